# shellcheck shell=bash
# Shared by launch.sh and teardown.sh: Cloud TPU queued resources, through gcloud. Sourced after common.sh.
# Source: https://cloud.google.com/tpu/docs/queued-resources and, for states and their data,
# https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources

cloud_knobs() {
  knob TPU_NAME maxnano "name of the machine; machines that exist at the same time need different names"
  knob PROJECT "" "Google Cloud project; empty: gcloud's current project"
  # The public zones with v6e: https://cloud.google.com/tpu/docs/regions-zones, August 2025.
  knob ZONES "us-central1-b us-east1-d us-east5-a us-east5-b europe-west4-a asia-northeast1-b southamerica-west1-a" \
    "zones to try, in this order"
  knob POLL_SECONDS 20 "pause between checks and between attempts"
  knob CALL_SECONDS 180 "time limit of a gcloud call, ssh included"
}

# within SECONDS COMMAND...: runs a command with a time limit. Returns its status, or 124 after a timeout,
# which kills it and its child processes. macOS does not have coreutils' timeout. A signal interrupts
# `wait`, but not a command in the foreground.
call=
timer=
within() {
  local seconds=$1 status=0
  shift
  set -m # a new process group for each of the two
  "$@" </dev/null 3>&- 4>&- &
  call=$!
  # The timer inherits no output: otherwise a reader of this script's output would wait for it.
  bash -c 'sleep "$1" && kill -TERM -- "-$2" && sleep 5 && kill -KILL -- "-$2"' timer "$seconds" "$call" \
    </dev/null >/dev/null 2>&1 3>&- 4>&- &
  timer=$!
  set +m
  wait "$call" 2>/dev/null || status=$?
  { kill -KILL -- "-$timer" && wait "$timer"; } 2>/dev/null || true
  call=
  timer=
  case $status in
    137 | 143) return 124 ;;
    *) return "$status" ;;
  esac
}

# Kills a call that a signal to this script has interrupted.
end_call() {
  local group
  for group in $call $timer; do
    kill -KILL -- "-$group" 2>/dev/null || true
  done
  call=
  timer=
}

# cloud ARGUMENT...: gcloud in PROJECT, without prompts, with a time limit.
cloud() {
  within "$CALL_SECONDS" gcloud "$@" --quiet ${PROJECT:+"--project=$PROJECT"}
}

tpus() {
  cloud compute tpus "$@"
}

require_gcloud() {
  command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
  case $TPU_NAME in
    *[!a-z0-9-]* | [!a-z]* | *- | "") fail "TPU_NAME is '$TPU_NAME', but must consist of a-z, 0-9 and -, and begin with a letter" ;;
  esac
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/maxnano.XXXXXX")
  trap 'end_call; rm -rf "$scratch"' EXIT
  # shellcheck disable=SC2034 # used where this is sourced
  read -ra candidates <<<"$ZONES"
}

# Prints a text as one line.
one_line() {
  tr -s '[:space:]' ' ' <<<"$1" | sed 's/^ //; s/ $//'
}

# Succeeds if gcloud's error $1 says that this account cannot use the zone or that the zone does not exist, as in
# "Location us-east1-d is not found or access is unauthorized." and "Permission 'tpu.nodes.list' denied on ...".
is_closed() {
  grep -qE "PERMISSION_DENIED|INVALID_ARGUMENT|is not found or access is unauthorized|Permission '[^']*' denied" <<<"$1"
}

# find_state NAME ZONE: sets `state` to the state of the queued resource, NONE if it does not exist, CLOSED if this
# account cannot use the zone, UNKNOWN if gcloud fails; and `reason` to gcloud's explanation.
find_state() {
  state=UNKNOWN
  reason=
  if tpus queued-resources describe "$1" "--zone=$2" \
    '--format=value[separator="|"](state.state,state.stateInitiator,state.failedData.error.message)' \
    >"$scratch/state" 2>"$scratch/error"; then
    state=$(head -n 1 "$scratch/state" | cut -d '|' -f 1)
    reason=$(one_line "$(cut -s -d '|' -f 3- "$scratch/state")")
    if [ -z "$reason" ] && [[ $state == SUSPEND* ]]; then
      reason="by the $(head -n 1 "$scratch/state" | cut -d '|' -f 2)"
    fi
  else
    reason=$(one_line "$(<"$scratch/error")")
    if is_closed "$reason"; then
      state=CLOSED
    elif [[ $reason == *NOT_FOUND* ]]; then
      state=NONE
    fi
  fi
}

# delete_resource NAME ZONE: deletes the queued resource and its machine. Fails unless gcloud confirms the deletion.
delete_resource() {
  local refused=0 attempt
  for attempt in {1..30}; do
    find_state "$1" "$2"
    case $state in
      NONE) return 0 ;;
      CLOSED) break ;;
      DELETING | UNKNOWN) ;; # in progress, or this computer has no network
      *)
        [ "$refused" -lt 5 ] || break
        say "deleting $1 in $2"
        # --force also deletes the machine.
        if ! tpus queued-resources delete "$1" "--zone=$2" --force --async >/dev/null 2>"$scratch/error"; then
          refused=$((refused + 1))
          say "attempt $refused: $(one_line "$(<"$scratch/error")")"
        fi
        ;;
    esac
    [ "$attempt" = 1 ] || sleep "$POLL_SECONDS"
  done
  echo "!! $1 in $2 may STILL EXIST AND COST MONEY. Delete it by hand:" >&2
  echo "!! gcloud compute tpus queued-resources delete $1 --zone=$2 --force${PROJECT:+ --project=$PROJECT}" >&2
  return 1
}
