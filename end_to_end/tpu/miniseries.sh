#!/usr/bin/env bash
# The same recipe at several depths, each trained for the same number of tokens per scaling parameter, and a table at
# the end. What is better at every depth is better; what is better at one may be luck.
#
#   bash end_to_end/tpu/miniseries.sh              all depths, one after the other
#   bash end_to_end/tpu/miniseries.sh --dry-run    what can be checked beforehand, for the deepest
#
# Stopped anywhere, the same command goes on where it was.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh

tpu_defaults
knob DEPTHS "10 12 14 16 18" "numbers of layers"
knob RATIO 12 "tokens per scaling parameter"
knob SERIES miniseries "folder of the series below OUTPUT; change it with what you try"
training_knobs
parse_arguments "$@"
OUTPUT=$OUTPUT/$SERIES
[ -z "$NUM_ITERATIONS" ] || fail "NUM_ITERATIONS would give each depth the same steps: set RATIO"

# Sets the config of one depth.
choose_depth() {
  MODEL=d$1
  RUN_NAME=d$1
  set_config
  config+=("target_param_data_ratio=$RATIO")
}

# shellcheck disable=SC2153 # DEPTHS is a knob
read -ra depths <<<"$DEPTHS"
if [ -n "$dry_run" ]; then
  choose_depth "${depths[${#depths[@]} - 1]}"
  preflight
  exit
fi

run_names=
for depth in "${depths[@]}"; do
  choose_depth "$depth"
  heading "depth $depth"
  run_stages
  run_names=${run_names:+$run_names,}$RUN_NAME
done

heading "$SERIES, $RATIO tokens per scaling parameter"
results table "--runs=$run_names" "--chips=$CHIPS" "--price=$PRICE_PER_CHIP_HOUR"
