#!/usr/bin/env bash
# Does a preempted run go on as if nothing had been? Starts a training, sends it SIGTERM in the middle as a spot machine
# that is taken back does, starts it again, and holds it to this: status 75 within GRACE_SECONDS; afterwards the rows
# from before the stop unchanged, every step done once, the final loss and the last checkpoint there, and every loss
# that of the same training without interruption, to the last bit.
#
#   bash end_to_end/tpu/resume_after_preemption.sh    status 0 if all of it holds
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh

tpu_defaults
default NUM_ITERATIONS 60
default RUN_NAME d12_preempted # must be new
knob STOP_AT_STEP 20 "SIGTERM comes when this step is done"
knob GRACE_SECONDS 30 "what a spot machine leaves"
knob UNBROKEN d12_unbroken "the run to compare with, trained where it is not finished; empty: none"
default STAGES "setup data tokenizer stop resume compare"
training_knobs
parse_arguments "$@"

metrics=
before=

stage_stop() {
  local state status asked
  metrics=$OUTPUT/$RUN_NAME/metrics.jsonl
  case $OUTPUT in
    *://*) fail "OUTPUT=$OUTPUT must be a local folder here: steps are watched as they are written" ;;
  esac
  state=$(results state)
  [ "$state" = new ] || fail "$OUTPUT/$RUN_NAME is there already: remove it, or choose another RUN_NAME"
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
  [ "$status" = 75 ] || fail "train.py ended with status $status and not with 75, preempted"
  say "stopped with status 75, $((SECONDS - asked)) s after SIGTERM"
  [ $((SECONDS - asked)) -le "$GRACE_SECONDS" ] || fail "that is more than GRACE_SECONDS=$GRACE_SECONDS"
  before=$OUTPUT/$RUN_NAME/metrics_before.jsonl
  cp "$metrics" "$before"
}

stage_resume() {
  train
  results resumed "--before=$before"
}

stage_compare() {
  if [ -z "$UNBROKEN" ]; then
    echo "not asked for"
    return
  fi
  ( # with another run's name
    config+=("run_name=$UNBROKEN")
    if [ "$(results state)" != finished ]; then
      train
    fi
  )
  results resumed "--before=$before" "--like=$UNBROKEN"
}

[ -z "$dry_run" ] || fail "--dry-run: take that of d12_smoke.sh"
set_config
run_stages
