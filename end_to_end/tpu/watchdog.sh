#!/usr/bin/env bash
# Dead man's switch: runs on the TPU machine as its startup script, because the computer that rented the machine
# may have lost power or network. The machine deletes itself
#   - when its time limit is over, whatever it does;
#   - when no job runs and launch.sh has not checked for WATCH_IDLE_SECONDS.
# Before that it asks the job to save, which then exits with status 75, and copies the log to the bucket. It never
# interrupts a running job before the time limit. launch.sh puts the variables WATCH_* above this text. Of several hosts
# the first one acts; the others would only later, if it does not: launch.sh checks the first one.
#
#   bash watchdog.sh         watches; one process per machine
#   bash watchdog.sh save    asks the job to save, waits for it, copies local results to the bucket
#   bash watchdog.sh keep    copies local results to the bucket and stops watching
#
# Root, who runs startup scripts, and the user who trains share WATCH_FOLDER: launch.sh touches `looked` with each
# check, `until` is the time limit in seconds since 1970, `job` the job's folder, `keep` stops watching (KEEP=1).
#
# Deleting the queued resource ends the costs; the machine's service account needs the role roles/tpu.admin for it.
# The fallback is to shut down: that stops the work, but Cloud TPU documents only the deletion of a queued resource
# as the end of its costs: https://cloud.google.com/tpu/docs/queued-resources
set -uo pipefail

WATCH_FOLDER=${WATCH_FOLDER:-/var/tmp/maxnano}
export HOME=${HOME:-/root} PATH=$PATH:/snap/bin # startup scripts have neither

say() {
  printf '[%s] watchdog: %s\n' "$(date +%H:%M:%S)" "$*"
}

# Sets `index`, the number of this host in its slice, and `late`, the seconds by which it acts later than the first one.
find_index() {
  local url=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
  index=0
  late=0
  if [ "${WATCH_HOSTS:-1}" != 1 ]; then
    index=$(curl -sf -H Metadata-Flavor:Google "$url" || echo unknown)
    [ "$index" = 0 ] || late=$((WATCH_SAVE_SECONDS + 3600))
  fi
}

# Succeeds if the job runs; sets `pid` and `folder`.
job_runs() {
  folder=$(cat "$WATCH_FOLDER/job" 2>/dev/null) && [ ! -f "$folder/status" ] &&
    pid=$(cat "$folder/pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null
}

# Copies local results to the bucket: the log, and the runs if OUTPUT is a local folder.
copy_out() {
  folder=$(cat "$WATCH_FOLDER/job" 2>/dev/null) || return 0
  timeout 300 gcloud storage cp "$folder/log" "$WATCH_STORE/logs/$(date +%Y%m%d-%H%M%S)-$index.log" --quiet
  [ ! -d "$folder/runs" ] || timeout 1200 gcloud storage rsync "$folder/runs" "$WATCH_STORE/runs" --recursive --quiet
}

# Sends SIGTERM to every process of the job, which saves, and SIGKILL after WATCH_SAVE_SECONDS.
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
      say "the job did not exit within $WATCH_SAVE_SECONDS s" >>"$folder/log"
      kill -KILL -- "-$pid" 2>/dev/null
    fi
  fi
  copy_out
}

# Deletes this machine. $1: the reason.
leave() {
  local attempt output
  say "$1: deleting this machine"
  save
  # launch.sh reads this file when the machine no longer exists.
  printf '%s %s\n' "$(cat "$folder/status" 2>/dev/null || echo none)" "$1" >"$WATCH_FOLDER/ended"
  timeout 60 gcloud storage cp "$WATCH_FOLDER/ended" "$WATCH_STORE/ended" --quiet
  for attempt in 1 2 3; do
    output=$(timeout 120 gcloud compute tpus queued-resources delete "$WATCH_NAME" "--zone=$WATCH_ZONE" --force --async \
      --quiet ${WATCH_PROJECT:+"--project=$WATCH_PROJECT"} 2>&1) && return
    say "attempt $attempt: $output"
    sleep "$WATCH_POLL_SECONDS"
  done
  say "shutting down instead"
  sudo -n poweroff
}

watch() {
  mkdir -p "$WATCH_FOLDER"
  exec 9>>"$WATCH_FOLDER/lock"
  flock -n 9 || exit 0 # another process watches already
  touch "$WATCH_FOLDER/looked"
  chmod 777 "$WATCH_FOLDER" 2>/dev/null # root and the user both write there
  chmod 666 "$WATCH_FOLDER"/* 2>/dev/null
  local limit=$(($(date +%s) + WATCH_SECONDS)) now looked
  while sleep "$WATCH_POLL_SECONDS"; do
    [ ! -f "$WATCH_FOLDER/keep" ] || exit 0
    now=$(date +%s)
    looked=$(stat -c %Y "$WATCH_FOLDER/looked")
    if [ $((now - late)) -ge "$(cat "$WATCH_FOLDER/until" 2>/dev/null || echo "$limit")" ]; then
      leave "the time limit is over"
      exit
    elif ! job_runs && [ $((now - looked - late)) -gt "$WATCH_IDLE_SECONDS" ]; then
      leave "no job runs, and launch.sh has not checked for $WATCH_IDLE_SECONDS s"
      exit
    fi
  done
}

find_index
case ${1:-} in
  save) save ;;
  keep)
    touch "$WATCH_FOLDER/keep"
    copy_out
    ;;
  *) watch ;;
esac
