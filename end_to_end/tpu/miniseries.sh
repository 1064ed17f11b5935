#!/usr/bin/env bash
# Trains one recipe at several depths, with the same number of tokens per scaling parameter, and prints a
# table. A change that helps at every depth is real; a gain at one depth may be noise.
#
#   bash end_to_end/tpu/miniseries.sh              all depths, one after the other
#   bash end_to_end/tpu/miniseries.sh --dry-run    checks the machine and prints the deepest model's plan
#
# After any stop, the same command resumes.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh

tpu_defaults
knob DEPTHS "10 12 14 16 18" "numbers of layers"
knob RATIO 12 "tokens per scaling parameter"
knob SERIES miniseries "folder of the series in OUTPUT; use a new one for each experiment"
training_knobs
parse_arguments "$@"
OUTPUT=$OUTPUT/$SERIES
[ -z "$NUM_ITERATIONS" ] || fail "NUM_ITERATIONS would train each depth for the same number of steps: set RATIO instead"

# Sets the config for depth $1.
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

for depth in "${depths[@]}"; do
  choose_depth "$depth"
  heading "depth $depth"
  run_stages
done

heading "$SERIES, $RATIO tokens per scaling parameter"
"$MAXNANO_PYTHON" MaxNano/compare.py configs/base.yml --leaderboard "$OUTPUT" ${PRICE_PER_CHIP_HOUR:+"--price=$PRICE_PER_CHIP_HOUR"}
