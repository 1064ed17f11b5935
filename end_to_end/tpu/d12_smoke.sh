#!/usr/bin/env bash
# Does everything work on this machine? A short training of twelve layers, which must be sound: every step done, the
# loss finite and falling, no update skipped, the last checkpoint whole.
#
#   bash end_to_end/tpu/d12_smoke.sh              minutes; status 0 if all is well
#   bash end_to_end/tpu/d12_smoke.sh --dry-run    what can be checked beforehand
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
