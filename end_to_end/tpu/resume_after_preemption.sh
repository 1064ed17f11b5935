#!/usr/bin/env bash
# Tests that a preempted run resumes exactly. Starts a training, sends it SIGTERM in the middle as the
# preemption of a spot machine does, restarts it, and checks: exit status 75 within GRACE_SECONDS; the rows
# written before the stop are unchanged; every step is recorded once; the final loss and the last
# checkpoint exist; every loss equals that of an uninterrupted run bit for bit.
#
#   bash end_to_end/tpu/resume_after_preemption.sh    status 0 if all checks pass
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh

tpu_defaults
default NUM_ITERATIONS 60
default RUN_NAME d12_preempted # must be new
knob STOP_AT_STEP 20 "step after which to send SIGTERM"
knob GRACE_SECONDS 30 "time that a preempted spot machine has to save"
knob UNBROKEN d12_unbroken "uninterrupted run to compare with, trained if it is not finished; empty: no comparison"
default STAGES "setup data tokenizer stop resume compare"
training_knobs
parse_arguments "$@"

metrics=
before=

stage_stop() {
  local state status asked
  metrics=$OUTPUT/$RUN_NAME/metrics.jsonl
  case $OUTPUT in
    *://*) fail "OUTPUT=$OUTPUT must be a local folder: this script watches metrics.jsonl" ;;
  esac
  state=$(results state)
  [ "$state" = new ] || fail "$OUTPUT/$RUN_NAME already exists: remove it, or choose another RUN_NAME"
  start_training
  trap stop_training INT TERM EXIT
  until grep -q "^{\"step\": $STOP_AT_STEP," "$metrics" 2>/dev/null; do
    kill -0 "$trainer" 2>/dev/null || fail "training ended before step $STOP_AT_STEP"
    sleep 0.05
  done
  asked=$SECONDS
  stop_training
  status=0
  wait "$trainer" || status=$?
  trap - INT TERM EXIT
  trainer=''
  stopping=''
  [ "$status" = 75 ] || fail "train.py ended with status $status instead of 75 (preempted)"
  say "stopped with status 75, $((SECONDS - asked)) s after SIGTERM"
  [ $((SECONDS - asked)) -le "$GRACE_SECONDS" ] || fail "longer than GRACE_SECONDS=$GRACE_SECONDS"
  before=$OUTPUT/$RUN_NAME/metrics_before.jsonl
  cp "$metrics" "$before"
}

stage_resume() {
  train
  results resumed "--before=$before"
}

stage_compare() {
  if [ -z "$UNBROKEN" ]; then
    echo "skipped: UNBROKEN is empty"
    return
  fi
  ( # a subshell, so that the run's name changes only here
    config+=("run_name=$UNBROKEN")
    if [ "$(results state)" != finished ]; then
      train
    else
      results inputs
    fi
  )
  results resumed "--before=$before" "--like=$UNBROKEN"
}

[ -z "$dry_run" ] || fail "--dry-run: use that of d12_smoke.sh"
set_config
run_stages
