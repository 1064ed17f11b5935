#!/usr/bin/env bash
# Runs on the TPU machine itself, as its startup script: the dead man's rule. Whoever rented the machine may be gone, a
# laptop without power or network. The machine deletes itself
#   - when its hours are over, whatever it does;
#   - when nothing runs on it and launch.sh has not looked for WATCH_IDLE_SECONDS.
# Before that it asks the job to save, which then ends with status 75, and copies the log to the bucket. A job that runs
# is left alone, however long nobody looks. Needs no other file: launch.sh puts the variables WATCH_* above this text.
#
#   bash watchdog.sh         watches, once per machine
#   bash watchdog.sh save    asks the job to save, waits for it, copies to the bucket what it does not have
#   bash watchdog.sh keep    copies to the bucket what it does not have, and ends the rule
#
# WATCH_FOLDER is shared by root, who runs startup scripts, and the user who trains: `looked` is touched with each look,
# `until` holds the second since 1970 at which the hours are over, `job` the job's folder, `keep` ends the rule (KEEP=1).
#
# What ends the bill: deleting the queued resource, which the machine's service account may do with the role
# roles/tpu.admin. Shutting down is the fallback: it stops the work, but Cloud TPU documents no end of the bill for a
# queued resource other than its deletion: https://cloud.google.com/tpu/docs/queued-resources
set -uo pipefail

WATCH_FOLDER=${WATCH_FOLDER:-/var/tmp/maxnano}
export HOME=${HOME:-/root} PATH=$PATH:/snap/bin # a startup script has neither

say() {
  printf '[%s] watchdog: %s\n' "$(date +%H:%M:%S)" "$*"
}

# Sets `pid` and whether the job runs.
job_runs() {
  folder=$(cat "$WATCH_FOLDER/job" 2>/dev/null) && [ ! -f "$folder/status" ] &&
    pid=$(cat "$folder/pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null
}

# What lies on the machine's disk alone: the log, and runs where OUTPUT is a local folder.
copy_out() {
  folder=$(cat "$WATCH_FOLDER/job" 2>/dev/null) || return 0
  timeout 300 gcloud storage cp "$folder/log" "$WATCH_STORE/logs/$(date +%Y%m%d-%H%M%S).log" --quiet
  [ ! -d "$folder/runs" ] || timeout 1200 gcloud storage rsync "$folder/runs" "$WATCH_STORE/runs" --recursive --quiet
}

# SIGTERM to every process of the job, so that it saves; then SIGKILL to what is left.
save() {
  local waited=0
  if job_runs; then
    say "asking the job to save" >>"$folder/log"
    kill -TERM -- "-$pid" 2>/dev/null
    while job_runs && [ "$waited" -lt "$WATCH_SAVE_SECONDS" ]; do
      sleep 1
      waited=$((waited + 1))
    done
    if job_runs; then
      say "the job has not ended within $WATCH_SAVE_SECONDS s" >>"$folder/log"
      kill -KILL -- "-$pid" 2>/dev/null
    fi
  fi
  copy_out
}

# Ends the machine, because of $1.
leave() {
  local attempt said
  say "$1: this machine deletes itself"
  save
  # launch.sh reads this where the machine is gone before it could look again.
  printf '%s %s\n' "$(cat "$folder/status" 2>/dev/null || echo none)" "$1" >"$WATCH_FOLDER/ended"
  timeout 60 gcloud storage cp "$WATCH_FOLDER/ended" "$WATCH_STORE/ended" --quiet
  for attempt in 1 2 3; do
    said=$(timeout 120 gcloud compute tpus queued-resources delete "$WATCH_NAME" "--zone=$WATCH_ZONE" --force --async \
      --quiet ${WATCH_PROJECT:+"--project=$WATCH_PROJECT"} 2>&1) && return
    say "attempt $attempt: $said"
    sleep "$WATCH_POLL_SECONDS"
  done
  say "shutting down instead"
  sudo -n poweroff
}

watch() {
  mkdir -p "$WATCH_FOLDER"
  exec 9>>"$WATCH_FOLDER/lock"
  flock -n 9 || exit 0 # it watches already
  touch "$WATCH_FOLDER/looked"
  chmod 777 "$WATCH_FOLDER" 2>/dev/null # root and the user both write there, whoever came first
  chmod 666 "$WATCH_FOLDER"/* 2>/dev/null
  local limit=$(($(date +%s) + WATCH_SECONDS)) now looked
  while sleep "$WATCH_POLL_SECONDS"; do
    [ ! -f "$WATCH_FOLDER/keep" ] || exit 0
    now=$(date +%s)
    looked=$(stat -c %Y "$WATCH_FOLDER/looked")
    if [ "$now" -ge "$(cat "$WATCH_FOLDER/until" 2>/dev/null || echo "$limit")" ]; then
      leave "its hours are over"
      exit
    elif ! job_runs && [ $((now - looked)) -gt "$WATCH_IDLE_SECONDS" ]; then
      leave "nothing runs here, and nobody has looked for $WATCH_IDLE_SECONDS s"
      exit
    fi
  done
}

case ${1:-} in
  save) save ;;
  keep)
    touch "$WATCH_FOLDER/keep"
    copy_out
    ;;
  *) watch ;;
esac
