#!/usr/bin/env bash
# Smoke test: trains twelve layers for a few minutes and checks the run. Every step is recorded once, the
# loss is finite and falls, no update is skipped and the last checkpoint is complete.
#
#   bash end_to_end/tpu/d12_smoke.sh              status 0 if all checks pass
#   bash end_to_end/tpu/d12_smoke.sh --dry-run    checks the machine only
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh

tpu_defaults
default NUM_ITERATIONS 100
default RUN_NAME d12_smoke
default STAGES "setup data tokenizer training result soundness"
training_knobs
parse_arguments "$@"

stage_soundness() {
  results smoke
}

speedrun
