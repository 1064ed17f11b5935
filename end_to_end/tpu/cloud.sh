# shellcheck shell=bash
# What launch.sh and teardown.sh share: queued resources of Cloud TPU, through gcloud. Sourced after common.sh.
# Source: https://cloud.google.com/tpu/docs/queued-resources and, for states and their data,
# https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources

cloud_knobs() {
  knob TPU_NAME maxnano "name of the machine; several at once need several names, which may begin alike"
  knob PROJECT "" "Google Cloud project; empty: the one gcloud is set to"
  # Those with v6e for everybody, of https://cloud.google.com/tpu/docs/regions-zones as of August 2025.
  knob ZONES "us-central1-b us-east1-d us-east5-a us-east5-b europe-west4-a asia-northeast1-b southamerica-west1-a" \
    "zones to try, in this order"
  knob POLL_SECONDS 20 "pause between looks and between attempts"
  knob CALL_SECONDS 180 "seconds after which a gcloud call is ended and counts as failed, ssh included"
}

# within SECONDS COMMAND...: its status; 124 where it took longer: then it is ended, with all that it started. For
# coreutils' timeout, which macOS lacks. Waiting here, unlike waiting for a command in the foreground, ends with a signal.
call=
timer=
within() {
  local seconds=$1 status=0
  shift
  set -m # both get a process group of their own
  "$@" </dev/null 3>&- 4>&- &
  call=$!
  # A program of its own, which inherits no copy of our output: nobody who reads that is to wait for this.
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

# Ends a call that a signal to this script has left behind.
end_call() {
  local group
  for group in $call $timer; do
    kill -KILL -- "-$group" 2>/dev/null || true
  done
  call=
  timer=
}

# gcloud, never asking, in the project, and not without end.
cloud() {
  within "$CALL_SECONDS" gcloud "$@" --quiet ${PROJECT:+"--project=$PROJECT"}
}

tpus() {
  cloud compute tpus "$@"
}

require_gcloud() {
  command -v gcloud >/dev/null || fail "gcloud is not there: https://cloud.google.com/sdk/docs/install"
  case $TPU_NAME in
    *[!a-z0-9-]* | [!a-z]* | *- | "") fail "TPU_NAME is '$TPU_NAME', but must be of a-z, 0-9 and -, a letter first" ;;
  esac
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/maxnano.XXXXXX")
  trap 'end_call; rm -rf "$scratch"' EXIT
  # shellcheck disable=SC2034 # used where this is sourced
  read -ra places <<<"$ZONES"
}

# All lines of a text as one.
one_line() {
  tr -s '[:space:]' ' ' <<<"$1" | sed 's/^ //; s/ $//'
}

# Whether gcloud's error $1 says that this account cannot use the zone at all, or that there is no such zone. As for
# "Location us-east1-d is not found or access is unauthorized." and "Permission 'tpu.nodes.list' denied on ...".
is_closed() {
  grep -qE "PERMISSION_DENIED|INVALID_ARGUMENT|is not found or access is unauthorized|Permission '[^']*' denied" <<<"$1"
}

# find_state NAME ZONE: sets `state` to the queued resource's state, or NONE where there is no such thing, CLOSED where
# the zone is closed to this account, UNKNOWN where gcloud cannot tell; and `reason` to what gcloud says about it.
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

# delete_resource NAME ZONE: the queued resource and its machine. Fails, loudly, unless it has seen them gone.
delete_resource() {
  local refused=0 look
  for look in {1..30}; do
    find_state "$1" "$2"
    case $state in
      NONE) return 0 ;;
      CLOSED) break ;;
      DELETING | UNKNOWN) ;; # takes a while; or this computer has no network
      *)
        [ "$refused" -lt 5 ] || break
        say "deleting $1 in $2"
        # --force takes the machine along.
        if ! tpus queued-resources delete "$1" "--zone=$2" --force --async >/dev/null 2>"$scratch/error"; then
          refused=$((refused + 1))
          say "attempt $refused: $(one_line "$(<"$scratch/error")")"
        fi
        ;;
    esac
    [ "$look" = 1 ] || sleep "$POLL_SECONDS"
  done
  echo "!! $1 in $2 may STILL BE THERE AND COST MONEY. Delete it yourself:" >&2
  echo "!! gcloud compute tpus queued-resources delete $1 --zone=$2 --force${PROJECT:+ --project=$PROJECT}" >&2
  return 1
}
