# shellcheck shell=bash
# What launch.sh and teardown.sh share: queued resources of Cloud TPU, through gcloud. Sourced after common.sh.
# Source: https://cloud.google.com/tpu/docs/queued-resources

cloud_knobs() {
  knob TPU_NAME maxnano "name of the machine; several at once need several names, which may begin alike"
  knob PROJECT "" "Google Cloud project; empty: the one gcloud is set to"
  # Those with v6e for everybody, of https://cloud.google.com/tpu/docs/regions-zones as of August 2025.
  knob ZONES "us-central1-b us-east1-d us-east5-a us-east5-b europe-west4-a asia-northeast1-b southamerica-west1-a" \
    "zones to try, in this order"
}

# gcloud, never asking, in the project.
cloud() {
  gcloud "$@" --quiet ${PROJECT:+"--project=$PROJECT"}
}

tpus() {
  cloud compute tpus "$@"
}

require_gcloud() {
  command -v gcloud >/dev/null || fail "gcloud is not there: https://cloud.google.com/sdk/docs/install"
  case $TPU_NAME in
    *[!a-z0-9-]* | [!a-z]* | *- | "") fail "TPU_NAME is '$TPU_NAME', but must be of a-z, 0-9 and -, a letter first" ;;
  esac
}

# state_of NAME ZONE: the queued resource's state, NONE where there is no such thing, UNKNOWN where gcloud cannot tell.
state_of() {
  local said
  if said=$(tpus queued-resources describe "$1" "--zone=$2" '--format=value(state.state)' 2>&1); then
    tail -n 1 <<<"$said"
  elif grep -q NOT_FOUND <<<"$said"; then
    echo NONE
  else
    echo UNKNOWN
  fi
}

# delete_resource NAME ZONE: the queued resource and its machine. Fails, loudly, unless it has seen them gone.
delete_resource() {
  local attempt said
  for attempt in 1 2 3 4 5; do
    if [ "$(state_of "$1" "$2")" = NONE ]; then
      return 0
    fi
    say "deleting $1 in $2"
    # --force takes the machine along. One that is being deleted refuses: then look again.
    said=$(tpus queued-resources delete "$1" "--zone=$2" --force 2>&1) || say "attempt $attempt: $(tail -n 1 <<<"$said")"
    [ "$(state_of "$1" "$2")" = NONE ] || sleep "$POLL_SECONDS"
  done
  [ "$(state_of "$1" "$2")" = NONE ] && return 0
  echo "!! $1 in $2 may STILL BE THERE AND COST MONEY. Delete it yourself:" >&2
  echo "!! gcloud compute tpus queued-resources delete $1 --zone=$2 --force${PROJECT:+ --project=$PROJECT}" >&2
  return 1
}
