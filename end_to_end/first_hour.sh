#!/usr/bin/env bash
# The first hour on any accelerator (TPU, GPU or CPU): checks the kernels, measures, trains, tunes,
# and leaves a table behind. Needs no network if MAXNANO_PYTHON names a Python that has JAX.
#
#   bash end_to_end/first_hour.sh
#   MINUTES=8 MAXNANO_PYTHON=python3 bash end_to_end/first_hour.sh
#
# Parts, the most important first: device, tests (those that need a GPU or TPU), step time of d12,
# training of 200 steps, step time of d24, decoding, CORE, tuning. Each writes its result to
# OUTPUT/results.jsonl and results.md at once; a part that fails, or whose packages are missing, does
# not stop the others.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh

knob MINUTES 60 "time budget; what does not fit is left out"
knob OUTPUT runs/first_hour "folder of the results"
knob PARTS "device tests step_small train step_large decode core tune" "parts to run, in this order"
knob MAXNANO_PYTHON .venv/bin/python "interpreter; the default is created by setup.sh if it is missing"
knob NANOCHAT "" "a checkout of karpathy/nanochat, whose step and decoding are measured beside; needs NANOCHAT_PYTHON"
knob DEVICE auto "cpu, tpu or gpu: for setup.sh"
parse_arguments "$@"

if venv_is_missing; then
  [ -n "$dry_run" ] || MAXNANO_QUIET=1 DEVICE=$DEVICE bash setup.sh
fi
export NANOCHAT
exec "$MAXNANO_PYTHON" end_to_end/first_hour.py --minutes="$MINUTES" --output="$OUTPUT" --parts="$PARTS" \
  ${dry_run:+--dry-run}
