#!/usr/bin/env bash
# Rents a TPU v6e-8 spot machine, trains on it, brings the result home and gives the machine back.
#
#   export BUCKET=gs://my-bucket DATASET_PATH=gs://my-bucket/text
#   bash end_to_end/tpu/launch.sh --dry-run    what would be done, and its price an hour
#   bash end_to_end/tpu/launch.sh
#
# Runs and tokenizer lie in the bucket, for a spot machine's disk goes with it. Preempted, another machine is asked for
# and training goes on from the last checkpoint. However this script ends, the machine is deleted and seen to be gone,
# unless KEEP=1. Killed with -9, or its own machine gone, teardown.sh does that; the same command finds the machine
# again and goes on. Knobs of the script that is run (see its --help) are handed on where the environment sets them.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh
# shellcheck source=end_to_end/tpu/cloud.sh
source end_to_end/tpu/cloud.sh

tpu_defaults
default TPU_NAME maxnano-d24
cloud_knobs
knob BUCKET "" "gs:// address for runs and tokenizer, in the region of the zones; needed"
knob DATASET_PATH "" "gs:// folder with at least two parquet shards of text; needed"
knob OUTPUT "" "folder of all runs; empty: BUCKET/TPU_NAME/runs"
knob TOKENIZER_PATH "" "folder of the tokenizer; empty: BUCKET/TPU_NAME/tokenizer"
knob ALLOW_OTHER_REGION "" "1: a bucket far from the machine, slow and charged by the byte"
knob SCRIPT end_to_end/tpu/d24_speedrun.sh "what the machine runs"
knob ACCELERATOR v6e-8 "type of the TPU"
knob CHIPS 8 "chips of that type, for the price"
knob RUNTIME v2-alpha-tpuv6e "the machine's system image"
knob PRICE_PER_CHIP_HOUR "" "US dollars"
knob ZONE_WAIT_SECONDS 900 "how long to wait in the queue of a zone before the next one is tried"
knob POLL_SECONDS 20 "pause between looks at the machine"
knob MAX_HOURS 12 "waiting and training together; then all is given back, whatever has been reached"
knob MAX_CRASHES 3 "times that a script which fell over is started again"
knob KEEP "" "1: leave the machine running at the end (and pay for it)"
knob DOWNLOAD "" "local folder to copy the runs to at the end; empty: they stay in the bucket"
parse_arguments "$@"

zone=          # where we have, or may have, a queued resource
active_since=  # second of this script's clock at which the machine became ours
active_total=0 # seconds that machines were ours
machines=0
archive=

# ---- Place

# Whether a bucket at location $1 is near zone $2. Locations: https://cloud.google.com/storage/docs/locations
is_near() {
  local region=${2%-*}
  case $1 in
    US) [[ $region == us-* || $region == northamerica-* ]] ;;
    EU) [[ $region == europe-* ]] ;;
    ASIA) [[ $region == asia-* ]] ;;
    NAM4) [[ $region == us-central1 || $region == us-east1 ]] ;;
    EUR4) [[ $region == europe-north1 || $region == europe-west4 ]] ;;
    ASIA1) [[ $region == asia-northeast1 || $region == asia-northeast2 ]] ;;
    *) [ "$(tr '[:upper:]' '[:lower:]' <<<"$1")" = "$region" ] ;;
  esac
}

# Leaves in `places` those near the bucket. A checkpoint crosses this way every few minutes.
choose_zones() {
  local location near=() each
  [ -n "$BUCKET" ] || fail "BUCKET is needed, as gs://name: a spot machine's disk goes with the machine"
  BUCKET=gs://${BUCKET#gs://}
  BUCKET=${BUCKET%/}
  location=$(cloud storage buckets describe "gs://$(cut -d / -f 3 <<<"$BUCKET")" '--format=value(location)') ||
    fail "BUCKET=$BUCKET cannot be looked at: is the name right, and gcloud logged in?"
  for each in "${places[@]}"; do
    if [ -n "$ALLOW_OTHER_REGION" ] || is_near "$location" "$each"; then
      near+=("$each")
    fi
  done
  [ ${#near[@]} -gt 0 ] ||
    fail "BUCKET=$BUCKET is in $location and none of ZONES ($ZONES) is: take a bucket or zones of one region, or set ALLOW_OTHER_REGION=1"
  places=("${near[@]}")
  store=$BUCKET/$TPU_NAME
  say "bucket in $location; zones ${places[*]}"
}

# The machine has no text of its own, and a bucket is all that it shares with this one. Asked now, before it costs money.
check_text() {
  case $DATASET_PATH in
    gs://*) cloud storage ls "$DATASET_PATH" >/dev/null || fail "DATASET_PATH=$DATASET_PATH cannot be listed" ;;
    *) fail "DATASET_PATH is needed, as gs://name/folder with at least two parquet shards that have a column of text" ;;
  esac
}

# ---- Getting a machine

seconds_left() {
  awk -v hours="$MAX_HOURS" -v gone="$SECONDS" 'BEGIN { print int(hours * 3600 - gone) }'
}

check_time() {
  [ "$(seconds_left)" -gt 0 ] || fail "MAX_HOURS=$MAX_HOURS are over; what there is lies in $store"
}

# Waits for the queued resource in `zone`; fails where it does not come in time.
wait_until_active() {
  local state seen='' deadline=$((SECONDS + ZONE_WAIT_SECONDS))
  while true; do
    check_time
    state=$(state_of "$TPU_NAME" "$zone")
    if [ "$state" != "$seen" ]; then
      say "$zone: $state"
      seen=$state
    fi
    case $state in
      ACTIVE)
        active_since=$SECONDS
        machines=$((machines + 1))
        return 0
        ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | NONE) return 1 ;;
      PROVISIONING) ;; # about to come: too good to give up
      *)
        if [ "$SECONDS" -ge "$deadline" ]; then
          say "$zone: nothing in $ZONE_WAIT_SECONDS s"
          return 1
        fi
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# Asks for a spot machine in `zone`. The request expires by itself, should this script not be there to withdraw it.
ask() {
  local said
  if ! said=$(tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" "--zone=$zone" "--accelerator-type=$ACCELERATOR" \
    "--runtime-version=$RUNTIME" --spot --async "--valid-until-duration=$(seconds_left)s" 2>&1); then
    refusal=$(tail -n 1 <<<"$said")
    say "$zone refuses: $refusal"
    return 1
  fi
}

stop_the_clock() {
  if [ -n "$active_since" ]; then
    active_total=$((active_total + SECONDS - active_since))
    active_since=
  fi
}

# Deletes what we have in `zone`. What cannot be deleted ends the script: another machine beside it is out of the question.
give_back() {
  stop_the_clock
  delete_resource "$TPU_NAME" "$zone" || exit 1
  zone=
}

# Goes round the zones until one gives a machine.
acquire() {
  local each refused refusal=''
  while true; do
    refused=0
    for each in "${places[@]}"; do
      check_time
      zone=$each
      say "asking for $ACCELERATOR spot in $zone"
      if ! ask; then
        refused=$((refused + 1))
      elif wait_until_active; then
        return
      fi
      give_back
    done
    if [ "$refused" = ${#places[@]} ] && ! grep -qiE 'capacity|exhausted|unavailable' <<<"$refusal"; then
      fail "no zone accepts the request: $refusal"
    fi
    sleep "$POLL_SECONDS"
  done
}

# Takes over the machine that an earlier call of this script has left, if there is one.
adopt() {
  local each
  for each in "${places[@]}"; do
    case $(state_of "$TPU_NAME" "$each") in
      NONE) continue ;;
      UNKNOWN) fail "gcloud cannot say whether $TPU_NAME is in $each: $(tpus queued-resources describe "$TPU_NAME" "--zone=$each" 2>&1 | tail -n 1)" ;;
    esac
    zone=$each
    say "$TPU_NAME is already in $zone"
    if wait_until_active; then
      return 0
    fi
    give_back
  done
  return 1
}

# ---- Working on it

# remote COMMAND: in bash on the machine, from the home folder.
remote() {
  tpus tpu-vm ssh "$TPU_NAME" "--zone=$zone" "--command=$1"
}

# Tries until the machine answers, which takes a while after its start.
persist() {
  local attempt
  for attempt in 1 2 3 4 5 6 7 8 9 10; do
    if "$@"; then
      return 0
    fi
    [ "$(state_of "$TPU_NAME" "$zone")" = ACTIVE ] || return 1
    say "no answer yet ($attempt)"
    sleep "$POLL_SECONDS"
  done
  return 1
}

pack() {
  archive=$(mktemp "${TMPDIR:-/tmp}/maxnano.XXXXXX")
  COPYFILE_DISABLE=1 tar -czf "$archive" --exclude=__pycache__ \
    README.md LICENSE pyproject.toml constraints.txt setup.sh configs MaxNano end_to_end
}

upload() {
  tpus tpu-vm scp "$archive" "$TPU_NAME:maxnano.tar.gz" "--zone=$zone" >/dev/null &&
    remote "mkdir -p MaxNano && tar -xzf maxnano.tar.gz -C MaxNano"
}

# Prints NAME=value for each knob of the script that the environment, or this script, sets.
knobs_to_hand_on() {
  local name
  OUTPUT=${OUTPUT:-$store/runs}
  TOKENIZER_PATH=${TOKENIZER_PATH:-$store/tokenizer}
  for name in $(bash "$SCRIPT" --knobs); do
    if [ -n "${!name+set}" ]; then
      printf '%s=%q ' "$name" "${!name}"
    fi
  done
}

# Starts the script on the machine, in a session of its own: a broken connection does not end it. Does nothing where it
# runs already, as after a connection that broke in just this moment.
start() {
  local job
  job="bash end_to_end/tpu/prepare_machine.sh && env PATH=\$HOME/.local/bin:\$PATH $(knobs_to_hand_on) bash $SCRIPT
echo \$? >status.new; mv status.new status"
  remote "cd MaxNano && { [ ! -f status ] && kill -0 \$(cat pid 2>/dev/null) 2>/dev/null || {
    rm -f status; touch log; (setsid nohup bash -c $(printf '%q' "$job") >>log 2>&1 </dev/null & echo \$! >pid); }; }"
}

# First line: running, gone, absent or the exit status; size of the log. Then the log from byte $1 on.
look() {
  remote "cd MaxNano 2>/dev/null && [ -f pid ] || { echo absent 0; exit; }
    state=\$(cat status 2>/dev/null || { kill -0 \$(cat pid) 2>/dev/null && echo running; } || echo gone)
    size=\$(wc -c <log); echo \$state \$size; tail -c +$(($1 + 1)) log | head -c \$((size - $1))"
}

# Sees the script through on the machine. Fails where the machine is lost.
work() {
  local seen=0 silent=0 crashes=0 said state size
  while true; do
    check_time
    case $(state_of "$TPU_NAME" "$zone") in
      ACTIVE | UNKNOWN) ;;
      *) return 1 ;;
    esac
    if ! said=$(look "$seen"); then
      silent=$((silent + 1))
      [ "$silent" -lt 10 ] || return 1
      sleep "$POLL_SECONDS"
      continue
    fi
    silent=0
    read -r state size <<<"$said"
    if [ "$size" -gt "$seen" ]; then
      tail -n +2 <<<"$said"
      seen=$size
    fi
    case $state in
      running) sleep "$POLL_SECONDS" ;;
      absent)
        say "copying MaxNano to the machine"
        persist upload && persist start || return 1
        ;;
      0) return 0 ;;
      2) fail "$SCRIPT cannot run as it is told; see above" ;;
      75 | gone) # asked to stop, which on a spot machine is most often the beginning of its end
        sleep "$POLL_SECONDS"
        persist start || return 1
        ;;
      *)
        crashes=$((crashes + 1))
        [ "$crashes" -le "$MAX_CRASHES" ] || fail "$SCRIPT ended with status $state, crash $crashes: giving up"
        say "$SCRIPT ended with status $state; starting it again ($crashes of $MAX_CRASHES)"
        persist start || return 1
        ;;
    esac
  done
}

# What lies on the machine's disk alone: the log, and runs where OUTPUT is a local folder.
copy_out() {
  say "copying what is left on the machine to $store"
  remote "cd MaxNano && gcloud storage cp log $store/logs/$(date +%Y%m%d-%H%M%S).log --quiet &&
    { [ ! -d runs ] || gcloud storage rsync runs $store/runs --recursive --quiet; }" >/dev/null
}

# ---- The end

price() {
  awk -v chips="$CHIPS" -v seconds="$1" -v price="${PRICE_PER_CHIP_HOUR:-0}" 'BEGIN {
    printf "%d chips x %.2f h x %s USD = %.2f USD", chips, seconds / 3600, price, chips * seconds / 3600 * price }'
}

# However the script ends: nothing stays behind.
clean_up() {
  local status=$?
  trap '' INT TERM # an impatient second Ctrl-C must not leave a machine behind
  set +e
  rm -f "$archive"
  if [ -n "$zone" ]; then
    if [ -n "$active_since" ]; then
      persist copy_out || say "the log could not be copied out; checkpoints lie in the bucket since they were written"
    fi
    if [ -n "$KEEP" ] && [ -n "$active_since" ]; then
      stop_the_clock
      say "KEEP=1: $TPU_NAME goes on costing money in $zone, until: TPU_NAME=$TPU_NAME ZONES=$zone bash end_to_end/tpu/teardown.sh"
    else
      stop_the_clock
      delete_resource "$TPU_NAME" "$zone" || status=1
    fi
  fi
  if [ "$machines" -gt 0 ]; then
    say "machines: $machines, $(price "$active_total"), from the moment they were there"
  fi
  exit "$status"
}

# ---- All of it

require_gcloud
read -ra places <<<"$ZONES"
[ -f "$SCRIPT" ] || fail "SCRIPT=$SCRIPT is not there"
choose_zones
check_text
if [ -n "$dry_run" ]; then
  say "would ask for $ACCELERATOR spot as $TPU_NAME, at most $MAX_HOURS h, $(price 3600) an hour"
  say "would run there: env $(knobs_to_hand_on) bash $SCRIPT"
  exit
fi
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
pack
adopt || acquire
until work; do
  say "the machine is lost; asking for another"
  give_back
  acquire
done
say "done; everything is in $store"
if [ -n "$DOWNLOAD" ]; then
  mkdir -p "$DOWNLOAD"
  cloud storage rsync "$store/runs" "$DOWNLOAD" --recursive
fi
