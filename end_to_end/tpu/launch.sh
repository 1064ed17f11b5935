#!/usr/bin/env bash
# Rents a TPU v6e-8 spot machine, trains on it, brings the result home and gives the machine back.
#
#   export BUCKET=gs://my-bucket DATASET_PATH=gs://my-bucket/text
#   bash end_to_end/tpu/launch.sh --dry-run    what would be done, and its price an hour
#   bash end_to_end/tpu/launch.sh
#
# The road without further software; end_to_end/cloud/ has more clouds, more hosts and no need for this computer to stay.
#
# Runs and tokenizer lie in the bucket, for a spot machine's disk is lost with it. After a preemption another machine is
# asked for and training resumes from the last checkpoint. However this script ends, the job saves, and the machine is
# deleted and seen to be gone, unless KEEP=1. Where this computer sleeps, training continues; started again, the same
# command finds the machine. Where it does not come back, the machine deletes itself: see watchdog.sh, which also keeps
# to MAX_HOURS. Knobs of the script that is run (see its --help) are handed on where the environment sets them.
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
knob ACCELERATOR v6e-8 "type of the TPU, of one host"
knob CHIPS 8 "chips of that type, for the price"
knob RUNTIME v2-alpha-tpuv6e "the machine's system image"
knob PRICE_PER_CHIP_HOUR "" "US dollars"
knob SERVICE_ACCOUNT "" "account that the machine acts as; empty: the project's default for Compute Engine"
knob INTERNAL_IP "" "1: no external address; ssh goes through IAP, and the network needs Private Google Access and Cloud NAT"
knob NETWORK "" "VPC network of the machine; empty: default"
knob SUBNETWORK "" "its subnetwork, in the region of the zones"
knob ZONE_WAIT_SECONDS 900 "how long to wait in the queue of a zone before the next one is tried"
knob MAX_HOURS 12 "waiting and training together; then the job saves and all is given back, whatever has been reached"
knob SAVE_SECONDS 300 "how long the job may take to save before the machine is given back"
knob IDLE_SECONDS 1800 "after which a machine that runs no job and that nobody looks at deletes itself"
knob MAX_CRASHES 3 "times that a script which fell over is started again"
knob KEEP "" "1: leave the machine running at the end (and pay for it)"
parse_arguments "$@"

zone=          # where we have, or may have, a queued resource
active_since=  # second of this script's clock at which the machine became ours
active_total=0 # seconds that machines were ours
machines=0
left_out= # zones that will never give a machine, and why

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

# Slices of more than 8 chips have several hosts, of any type: https://cloud.google.com/tpu/docs/v6e#configurations
check_accelerator() {
  local size=${ACCELERATOR##*-}
  case $size in
    "" | *[!0-9]*) fail "ACCELERATOR is '$ACCELERATOR', but must be a type and a number, such as v6e-8" ;;
  esac
  [ "$size" -le 8 ] ||
    fail "ACCELERATOR=$ACCELERATOR has several hosts, and this script sets up one: end_to_end/cloud/v6e-16.yaml runs on each host of a slice, see end_to_end/cloud/README.md"
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

# Variables of watchdog.sh, as words. Its time is ours and what it takes to save, so that we are first if we are here.
watch_words() {
  printf 'WATCH_NAME=%q WATCH_ZONE=%q WATCH_PROJECT=%q WATCH_STORE=%q ' "$TPU_NAME" "$zone" "$PROJECT" "$store"
  printf 'WATCH_SECONDS=%d WATCH_IDLE_SECONDS=%d WATCH_SAVE_SECONDS=%d WATCH_POLL_SECONDS=%s' \
    $(($(seconds_left) + SAVE_SECONDS)) "$IDLE_SECONDS" "$SAVE_SECONDS" "$POLL_SECONDS"
}

# Asks for a spot machine in `zone`; sets `reason` where that is refused. The request expires by itself, and the machine
# deletes itself, should this script not be there any more.
ask() {
  local flags=("--zone=$zone" "--node-id=$TPU_NAME" "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" --spot
    --async "--valid-until-duration=$(seconds_left)s" "--metadata-from-file=startup-script=$scratch/startup.sh"
    "--scopes=https://www.googleapis.com/auth/cloud-platform")
  [ -z "$SERVICE_ACCOUNT" ] || flags+=("--service-account=$SERVICE_ACCOUNT")
  [ -z "$INTERNAL_IP" ] || flags+=(--internal-ips)
  [ -z "$NETWORK" ] || flags+=("--network=$NETWORK")
  [ -z "$SUBNETWORK" ] || flags+=("--subnetwork=$SUBNETWORK")
  { echo "#!/usr/bin/env bash" && echo "export $(watch_words)" && cat end_to_end/tpu/watchdog.sh; } >"$scratch/startup.sh"
  if tpus queued-resources create "$TPU_NAME" "${flags[@]}" >"$scratch/error" 2>&1; then
    reason=
  else
    reason=$(one_line "$(<"$scratch/error")")
    say "$zone refuses: $reason"
    return 1
  fi
}

# Waits for the queued resource in `zone`; fails where it does not come in time, with the `reason` if there is one.
wait_until_active() {
  local seen='' deadline=$((SECONDS + ZONE_WAIT_SECONDS))
  while true; do
    check_time
    find_state "$TPU_NAME" "$zone"
    if [ "$state" != "$seen" ]; then
      say "$zone: $state${reason:+: $reason}"
      seen=$state
    fi
    case $state in
      ACTIVE)
        active_since=$SECONDS
        machines=$((machines + 1))
        return 0
        ;;
      FAILED | SUSPENDED | DELETING | NONE | CLOSED) return 1 ;;
      PROVISIONING) ;; # about to come: too good to give up
      *)
        if [ "$SECONDS" -ge "$deadline" ]; then
          say "$zone: nothing in $ZONE_WAIT_SECONDS s"
          reason=
          return 1
        fi
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
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

# What a request that failed with $1 is worth in this zone: never (a quota of 0, a closed zone), soon (a quota that other
# machines use up, what is not known) or later (capacity, a rate, the service's own trouble; no reason at all).
# Texts: "Quota limit 'TPUV6EPreemptiblePerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-east5-a.", of
# several limits "Limit: 0,0 in region us-central1,zone us-central1-a.", https://cloud.google.com/tpu/docs/quota and
# https://cloud.google.com/docs/quotas/troubleshoot; "There is no more capacity in the zone ...".
outlook() {
  if grep -qE 'Limit: ([0-9]+,)*0(,[0-9]+)* ' <<<"$1" || is_closed "$1"; then
    echo never
  elif [ -z "$1" ] || grep -qi 'per minute' <<<"$1"; then
    echo later
  elif ! grep -qi quota <<<"$1" && grep -qiE 'capacity|exhausted|unavailable|enough resources|internal' <<<"$1"; then
    echo later
  else
    echo soon
  fi
}

# No zone will give a machine, so that waiting is in vain. $1: each zone and why.
give_up() {
  local limits advice=''
  limits=$(grep -oE "Quota limit '[^']*'" <<<"$1" | cut -d "'" -f 2 | tr ',' '\n' | sort -u | paste -sd, - || true)
  if grep -qi quota <<<"$1"; then
    advice="; ask for more${limits:+ of $limits} (Cloud TPU API) at https://console.cloud.google.com/iam-admin/quotas${PROJECT:+?project=$PROJECT}, see https://cloud.google.com/tpu/docs/quota"
  fi
  fail "no zone accepts the request for $ACCELERATOR spot: ${1% | }$advice"
}

# Goes round the zones until one gives a machine. A zone that never will is left out from then on.
acquire() {
  local each open waits why hopeless=0
  while true; do
    open=()
    waits=
    why=
    for each in "${places[@]}"; do
      check_time
      zone=$each
      say "asking for $ACCELERATOR spot in $zone"
      if ask && wait_until_active; then
        return
      fi
      case $(outlook "$reason") in
        never)
          say "$each is left out from here on"
          left_out="$left_out$each: $reason | "
          ;;
        soon)
          open+=("$each")
          why="$why$each: $reason | "
          ;;
        later)
          open+=("$each")
          waits=1
          ;;
      esac
      give_back
    done
    places=(${open[@]+"${open[@]}"})
    hopeless=$((waits ? 0 : hopeless + 1))
    if [ ${#places[@]} = 0 ] || [ "$hopeless" -ge 10 ]; then
      give_up "$left_out$why"
    fi
    sleep "$POLL_SECONDS"
  done
}

# Takes over the machine that an earlier call of this script has left, if there is one. Zones that are closed to this
# account are left out; where gcloud cannot tell for another reason, a second machine might come about beside the first.
adopt() {
  local each open=() attempt
  for each in "${places[@]}"; do
    for attempt in 1 2 3; do
      find_state "$TPU_NAME" "$each"
      [ "$state" = UNKNOWN ] && [ "$attempt" -lt 3 ] || break
      sleep "$POLL_SECONDS"
    done
    case $state in
      UNKNOWN) fail "gcloud cannot say whether $TPU_NAME is in $each: $reason" ;;
      CLOSED)
        say "$each is left out, for it cannot be looked into: $reason"
        left_out="$left_out$each: $reason | "
        ;;
      *) open+=("$each") ;;
    esac
    case $state in
      NONE | CLOSED) continue ;;
    esac
    zone=$each
    say "$TPU_NAME is already in $zone"
    if wait_until_active; then
      return 0
    fi
    give_back
  done
  places=(${open[@]+"${open[@]}"})
  [ ${#places[@]} -gt 0 ] || give_up "$left_out"
  return 1
}

# ---- Working on it

# Neither a prompt nor a connection that has died may be waited for. gcloud tries ten times by itself.
ssh_options=(-oBatchMode=yes -oConnectTimeout=20 -oServerAliveInterval=15 -oServerAliveCountMax=4)

# reach ssh|scp ARGUMENT...: only queued-resources knows IAP outside of alpha.
reach() {
  local kind=tpu-vm how=$1
  shift
  [ -z "$INTERNAL_IP" ] || kind=queued-resources
  tpus "$kind" "$how" "$@" "--zone=$zone" ${INTERNAL_IP:+--tunnel-through-iap} "${ssh_options[@]/#/--$how-flag=}"
}

# remote COMMAND: in bash on the machine, from the home folder. What gcloud says is in $scratch/error. The watchdog is told
# that somebody looks, and how long our hours still last.
remote() {
  local told="mkdir -p $watch_folder; touch $watch_folder/looked"
  told="$told; echo \$((\$(date +%s) + $(seconds_left) + $SAVE_SECONDS)) >$watch_folder/until"
  reach ssh "$TPU_NAME" "--command=$told; $1" 2>"$scratch/error"
}

# Whether gcloud has just said that there is no such machine any more, as after a preemption that its request does not
# show yet: `This TPU has terminal state "PREEMPTED", so it cannot be used or updated.`
is_lost() {
  grep -qE 'terminal state|NOT_FOUND' "$scratch/error"
}

# Tries until the machine answers, which takes a while after its start.
persist() {
  local attempt
  for attempt in 1 2 3 4 5 6 7 8 9 10; do
    if "$@"; then
      return 0
    fi
    if is_lost; then
      return 1
    fi
    say "no answer yet ($attempt): $(tail -n 1 "$scratch/error")"
    find_state "$TPU_NAME" "$zone"
    [ "$state" = ACTIVE ] || return 1
    sleep "$POLL_SECONDS"
  done
  return 1
}

# What the machine may do, for its service account counts here and not the user's: a line for its account, and one for
# each right that it lacks.
ask_rights() {
  remote "echo account \$(gcloud auth list --filter=status:ACTIVE '--format=value(account)' --quiet 2>/dev/null)
    said=\$(echo launch.sh was here | gcloud storage cp - $store/.writable --quiet 2>&1 &&
      gcloud storage rm $store/.writable --quiet 2>&1) || echo write \$said
    said=\$(gcloud storage ls $DATASET_PATH --quiet 2>&1) || echo read \$said
    said=\$(gcloud compute tpus queued-resources describe $TPU_NAME --zone=$zone ${PROJECT:+--project=$PROJECT} --quiet 2>&1) ||
      echo delete \$said" >"$scratch/rights"
}

check_rights() {
  local account member why place
  say "asking the machine whether it may write to $BUCKET"
  persist ask_rights || return 1
  account=$(sed -n 's/^account //p' "$scratch/rights")
  member="--member=serviceAccount:${account:-ACCOUNT}"
  if why=$(grep -m 1 -E '^(write|read) ' "$scratch/rights"); then
    place=$store
    [[ $why == write* ]] || place=$DATASET_PATH
    fail "the machine's service account ${account:-(it has none)} may not ${why%% *} $place (${why#* }): gcloud storage buckets add-iam-policy-binding gs://$(cut -d / -f 3 <<<"$place") $member --role=roles/storage.objectAdmin"
  fi
  if grep -q '^delete ' "$scratch/rights"; then
    say "warning: without this computer the machine could not delete itself, only shut down, for its service account lacks the role: gcloud projects add-iam-policy-binding ${PROJECT:-PROJECT} $member --role=roles/tpu.admin"
  fi
}

pack() {
  COPYFILE_DISABLE=1 tar -czf "$scratch/maxnano.tar.gz" --exclude=__pycache__ \
    README.md LICENSE pyproject.toml constraints.txt setup.sh configs MaxNano end_to_end
}

upload() {
  reach scp "$scratch/maxnano.tar.gz" "$TPU_NAME:maxnano.tar.gz" >/dev/null 2>"$scratch/error" &&
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
# runs already, as after a connection that broke in just this moment. Asked to stop, the script ends and its status is
# kept. The watchdog is there already, unless startup scripts are forbidden.
start() {
  local job
  job="trap : TERM
env $(knobs_to_hand_on) bash $SCRIPT
echo \$? >status.new; mv status.new status"
  remote "cd MaxNano && mkdir -p $watch_folder && rm -f $watch_folder/keep && echo \"\$PWD\" >$watch_folder/job &&
    { env $(watch_words) setsid nohup bash end_to_end/tpu/watchdog.sh >>watchdog.log 2>&1 </dev/null & } &&
    { [ ! -f status ] && kill -0 \$(cat pid 2>/dev/null) 2>/dev/null || {
    rm -f status; touch log; (setsid nohup bash -c $(printf '%q' "$job") >>log 2>&1 </dev/null & echo \$! >pid); }; }"
}

# First line: running, gone, absent or the exit status; size of the log. Then the log from byte $1 on.
look() {
  remote "cd MaxNano 2>/dev/null && [ -f pid ] || { echo absent 0; exit; }
    state=\$(cat status 2>/dev/null || { kill -0 \$(cat pid) 2>/dev/null && echo running; } || echo gone)
    size=\$(wc -c <log); echo \$state \$size; tail -c +$(($1 + 1)) log | head -c \$((size - $1))" >"$scratch/look"
}

# Sees the script through on the machine. Fails where the machine is lost. Where this computer has no network, neither
# state nor machine can be seen: the machine works on, and so does this loop when the network is back.
work() {
  local seen=0 silent=0 crashes=0 status size blind=
  while true; do
    check_time
    find_state "$TPU_NAME" "$zone"
    case $state in
      ACTIVE) ;;
      UNKNOWN)
        [ -n "$blind" ] || say "gcloud cannot see the machine, trying again: $reason"
        blind=1
        sleep "$POLL_SECONDS"
        continue
        ;;
      *) return 1 ;;
    esac
    blind=
    if ! look "$seen"; then
      if is_lost; then
        return 1
      fi
      silent=$((silent + 1))
      say "the machine does not answer ($silent of 10): $(tail -n 1 "$scratch/error")"
      [ "$silent" -lt 10 ] || return 1
      sleep "$POLL_SECONDS"
      continue
    fi
    silent=0
    read -r status size <"$scratch/look" || continue
    if [ "$size" -gt "$seen" ]; then
      tail -n +2 "$scratch/look"
      seen=$size
    fi
    case $status in
      running) sleep "$POLL_SECONDS" ;;
      absent)
        check_rights || return 1
        say "copying MaxNano to the machine"
        persist upload && persist start || return 1
        ;;
      0) return 0 ;;
      2) fail "$SCRIPT cannot run as it is told; see above" ;;
      75 | 143 | gone) # asked to stop, which on a spot machine is most often the beginning of its end
        sleep "$POLL_SECONDS"
        persist start || return 1
        ;;
      *)
        crashes=$((crashes + 1))
        [ "$crashes" -le "$MAX_CRASHES" ] || fail "$SCRIPT ended with status $status, crash $crashes: giving up"
        say "$SCRIPT ended with status $status; starting it again ($crashes of $MAX_CRASHES)"
        persist start || return 1
        ;;
    esac
  done
}

# After the machine is lost: whether it had deleted itself with its job done, while this computer slept.
was_done() {
  local status why
  cloud storage cat "$store/ended" >"$scratch/ended" 2>/dev/null || return 1
  cloud storage rm "$store/ended" >/dev/null 2>&1 || true
  read -r status why <"$scratch/ended"
  say "the machine has deleted itself: $why; status of the job: $status"
  [ "$status" = 0 ]
}

# ---- The end

# Asks the job to save, unless the machine is kept, and copies to the bucket what lies on the machine's disk alone.
save() {
  local CALL_SECONDS=$((SAVE_SECONDS + 1800))
  remote "cd MaxNano && env $(watch_words) bash end_to_end/tpu/watchdog.sh $([ -n "$KEEP" ] && echo keep || echo save)" >/dev/null
}

price() {
  awk -v chips="$CHIPS" -v seconds="$1" -v price="${PRICE_PER_CHIP_HOUR:-0}" 'BEGIN {
    printf "%d chips x %.2f h x %s USD = %.2f USD", chips, seconds / 3600, price, chips * seconds / 3600 * price }'
}

# However the script ends: nothing stays behind.
clean_up() {
  local status=$?
  trap '' INT TERM # an impatient second Ctrl-C must not leave a machine behind
  exec >&3 2>&4 # a signal may have come where a function's output goes into a file
  set +e
  end_call
  if [ -n "$zone" ]; then
    if [ -n "$active_since" ]; then
      say "copying what is left on the machine to $store"
      persist save || say "the job could not be asked to save; what the bucket has lies in $store"
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
  rm -rf "$scratch"
  exit "$status"
}

# ---- All of it

watch_folder=/var/tmp/maxnano # as in watchdog.sh
check_accelerator
require_gcloud
[ -f "$SCRIPT" ] || fail "SCRIPT=$SCRIPT is not there"
choose_zones
check_text
if [ -n "$dry_run" ]; then
  say "would ask for $ACCELERATOR spot as $TPU_NAME, at most $MAX_HOURS h, $(price 3600) an hour"
  say "would run there: env $(knobs_to_hand_on) bash $SCRIPT"
  exit
fi
exec 3>&1 4>&2
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
pack
cloud storage rm "$store/ended" >/dev/null 2>&1 || true # of an earlier machine
adopt || acquire
until work; do
  say "the machine is lost${reason:+: $reason}"
  give_back
  if was_done; then
    break
  fi
  say "asking for another"
  acquire
done
say "done; everything is in $store (a copy: gcloud storage rsync $store/runs runs --recursive)"
