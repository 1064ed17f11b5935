#!/usr/bin/env bash
# Rents a TPU v6e-8 spot machine, trains on it, stores the results in a bucket and deletes the machine.
#
#   export BUCKET=gs://my-bucket DATASET_PATH=gs://my-bucket/text
#   bash end_to_end/tpu/launch.sh --dry-run    prints the plan and the price per hour
#   bash end_to_end/tpu/launch.sh
#   ACCELERATOR=v6e-16 bash end_to_end/tpu/launch.sh    a slice of several hosts: pretraining on all of them;
#                                              then the line above does the other stages on one host
#
# Needs only gcloud. end_to_end/cloud/ supports more clouds, and works while this computer is off.
#
# Runs and tokenizer are stored in the bucket, because a spot machine loses its disk. After a preemption the script
# requests another machine, and training resumes from the last checkpoint. However the script ends, the job saves and
# the machine is deleted and confirmed deleted, unless KEEP=1. Training continues while this computer sleeps; the same
# command finds the machine again. If this computer does not return, the machine deletes itself: see watchdog.sh, which
# also enforces MAX_HOURS. Settings of SCRIPT (see its --help) are passed on if the environment sets them.
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
knob BUCKET "" "gs:// address for runs and tokenizer, in the region of the zones; required"
knob DATASET_PATH "" "gs:// folder with at least two parquet shards of text; required"
knob OUTPUT "" "folder of all runs; empty: BUCKET/TPU_NAME/runs"
knob TOKENIZER_PATH "" "folder of the tokenizer; empty: BUCKET/TPU_NAME/tokenizer"
knob ALLOW_OTHER_REGION "" "1: accept a bucket in another region, which is slow and charged by the byte"
knob SCRIPT end_to_end/tpu/d24_speedrun.sh "script to run on the machine"
knob ACCELERATOR v6e-8 "TPU type; more than 8 chips are a slice of several hosts"
knob CHIPS 8 "number of its chips; of several hosts: by ACCELERATOR"
knob RUNTIME v2-alpha-tpuv6e "the machine's system image"
knob PRICE_PER_CHIP_HOUR "" "US dollars"
knob SERVICE_ACCOUNT "" "service account of the machine; empty: the Compute Engine default of the project"
knob INTERNAL_IP "" "1: no external address; ssh uses IAP, and the network needs Private Google Access and Cloud NAT"
knob NETWORK "" "VPC network of the machine; empty: default"
knob SUBNETWORK "" "its subnetwork, in the region of the zones"
knob ZONE_WAIT_SECONDS 900 "time to wait in the queue of a zone before trying the next zone"
knob MAX_HOURS 12 "time limit for waiting and training; then the job saves and the machine is deleted"
knob SAVE_SECONDS 300 "time for the job to save before the machine is deleted"
knob IDLE_SECONDS 1800 "time after which a machine without a job that launch.sh does not check deletes itself"
knob MAX_CRASHES 3 "how often to restart a script that crashed"
knob KEEP "" "1: keep the machine at the end (and pay for it)"
parse_arguments "$@"

zone=          # zone of the current queued resource
active_since=  # value of SECONDS when the machine became active
active_total=0 # seconds that machines were active
machines=0
left_out= # zones that never provide a machine, and why
hosts=1   # of the slice
worker=   # the host that `reach` goes to: empty for the first, or all

# ---- Zones and bucket

# Succeeds if a bucket at location $1 is near zone $2. Locations: https://cloud.google.com/storage/docs/locations
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

# Keeps the zones near the bucket: the machine writes a checkpoint there every few minutes.
choose_zones() {
  local location near=() each
  [ -n "$BUCKET" ] || fail "BUCKET is required, as gs://name: a spot machine loses its disk"
  BUCKET=gs://${BUCKET#gs://}
  BUCKET=${BUCKET%/}
  location=$(cloud storage buckets describe "gs://$(cut -d / -f 3 <<<"$BUCKET")" '--format=value(location)') ||
    fail "BUCKET=$BUCKET is not accessible: is the name right, and is gcloud logged in?"
  for each in "${candidates[@]}"; do
    if [ -n "$ALLOW_OTHER_REGION" ] || is_near "$location" "$each"; then
      near+=("$each")
    fi
  done
  [ ${#near[@]} -gt 0 ] ||
    fail "BUCKET=$BUCKET is in $location, but none of ZONES ($ZONES): use a bucket and zones in one region, or set ALLOW_OTHER_REGION=1"
  candidates=("${near[@]}")
  store=$BUCKET/$TPU_NAME
  say "bucket in $location; zones ${candidates[*]}"
}

# Sets `hosts`, and CHIPS of several: a host has 4 chips then, https://cloud.google.com/tpu/docs/v6e#configurations
check_accelerator() {
  local size=${ACCELERATOR##*-}
  case $size in
    "" | *[!0-9]*) fail "ACCELERATOR is '$ACCELERATOR', but must be a type and a number, such as v6e-8" ;;
  esac
  if [ "$size" -gt 8 ]; then
    case $ACCELERATOR in
      v5p-* | v4-*) size=$((size / 2)) ;; # these names count cores
    esac
    CHIPS=$size
    hosts=$(((size + 3) / 4))
  fi
}

# The machine reads its text from a bucket. Checked before it costs money.
check_text() {
  case $DATASET_PATH in
    gs://*) cloud storage ls "$DATASET_PATH" >/dev/null || fail "DATASET_PATH=$DATASET_PATH cannot be listed" ;;
    *) fail "DATASET_PATH is required, as gs://name/folder with at least two parquet shards with a text column" ;;
  esac
}

# ---- Request a machine

seconds_left() {
  awk -v hours="$MAX_HOURS" -v gone="$SECONDS" 'BEGIN { print int(hours * 3600 - gone) }'
}

check_time() {
  [ "$(seconds_left)" -gt 0 ] || fail "MAX_HOURS=$MAX_HOURS are over; the results so far are in $store"
}

# Prints the variables of watchdog.sh. Its time limit includes SAVE_SECONDS, so that this script acts first.
watch_words() {
  printf 'WATCH_NAME=%q WATCH_ZONE=%q WATCH_PROJECT=%q WATCH_STORE=%q ' "$TPU_NAME" "$zone" "$PROJECT" "$store"
  printf 'WATCH_SECONDS=%d WATCH_IDLE_SECONDS=%d WATCH_SAVE_SECONDS=%d WATCH_POLL_SECONDS=%s WATCH_HOSTS=%d' \
    $(($(seconds_left) + SAVE_SECONDS)) "$IDLE_SECONDS" "$SAVE_SECONDS" "$POLL_SECONDS" "$hosts"
}

# Requests a spot machine in `zone`; sets `reason` if the request is refused. The request expires and the machine
# deletes itself if this script no longer runs.
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

# Waits for the queued resource in `zone`. Fails if it is not active in time, and sets `reason`.
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
      PROVISIONING) ;; # about to become active: keep waiting
      *)
        if [ "$SECONDS" -ge "$deadline" ]; then
          say "$zone: no machine after $ZONE_WAIT_SECONDS s"
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

# Deletes the machine in `zone`. Exits if that fails, to never have two machines.
give_back() {
  stop_the_clock
  delete_resource "$TPU_NAME" "$zone" || exit 1
  zone=
}

# Prints when to repeat a request that failed with error $1: never (a quota of 0, a closed zone), soon (a quota that
# other machines use, an unknown error) or later (capacity, a rate limit, an internal error, no error).
# Error texts: "Quota limit 'TPUV6EPreemptiblePerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-east5-a.", of
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

# Fails because no zone provides a machine. $1: each zone and its error.
give_up() {
  local limits advice=''
  limits=$(grep -oE "Quota limit '[^']*'" <<<"$1" | cut -d "'" -f 2 | tr ',' '\n' | sort -u | paste -sd, - || true)
  if grep -qi quota <<<"$1"; then
    advice="; ask for more${limits:+ of $limits} (Cloud TPU API) at https://console.cloud.google.com/iam-admin/quotas${PROJECT:+?project=$PROJECT}, see https://cloud.google.com/tpu/docs/quota"
  fi
  fail "no zone accepts the request for $ACCELERATOR spot: ${1% | }$advice"
}

# Requests a machine in one zone after the other until one is active. Drops zones that never provide one.
acquire() {
  local each open waits why hopeless=0
  while true; do
    open=()
    waits=
    why=
    for each in "${candidates[@]}"; do
      check_time
      zone=$each
      say "requesting $ACCELERATOR spot in $zone"
      if ask && wait_until_active; then
        return
      fi
      case $(outlook "$reason") in
        never)
          say "$each is skipped from now on"
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
    candidates=(${open[@]+"${open[@]}"})
    hopeless=$((waits ? 0 : hopeless + 1))
    if [ ${#candidates[@]} = 0 ] || [ "$hopeless" -ge 10 ]; then
      give_up "$left_out$why"
    fi
    sleep "$POLL_SECONDS"
  done
}

# Takes over the machine of an earlier call of this script, if it exists. Skips zones that this account cannot use.
# Fails if gcloud fails for another reason, because a second machine might be created.
adopt() {
  local each open=() attempt
  for each in "${candidates[@]}"; do
    for attempt in 1 2 3; do
      find_state "$TPU_NAME" "$each"
      [ "$state" = UNKNOWN ] && [ "$attempt" -lt 3 ] || break
      sleep "$POLL_SECONDS"
    done
    case $state in
      UNKNOWN) fail "gcloud cannot say whether $TPU_NAME is in $each: $reason" ;;
      CLOSED)
        say "$each is skipped, because it is not accessible: $reason"
        left_out="$left_out$each: $reason | "
        ;;
      *) open+=("$each") ;;
    esac
    case $state in
      NONE | CLOSED) continue ;;
    esac
    zone=$each
    say "$TPU_NAME already exists in $zone"
    if wait_until_active; then
      return 0
    fi
    give_back
  done
  candidates=(${open[@]+"${open[@]}"})
  [ ${#candidates[@]} -gt 0 ] || give_up "$left_out"
  return 1
}

# ---- Run the script on the machine

# Never wait for a prompt or a dead connection. gcloud itself retries ten times.
ssh_options=(-oBatchMode=yes -oConnectTimeout=20 -oServerAliveInterval=15 -oServerAliveCountMax=4)

# reach ssh|scp ARGUMENT...: outside of alpha only queued-resources supports IAP.
reach() {
  local kind=tpu-vm how=$1
  shift
  [ -z "$INTERNAL_IP" ] || kind=queued-resources
  tpus "$kind" "$how" "$@" "--zone=$zone" ${worker:+"--worker=$worker"} ${INTERNAL_IP:+--tunnel-through-iap} "${ssh_options[@]/#/--$how-flag=}"
}

# remote COMMAND: runs a command in bash on the machine, in the home folder. gcloud's errors are in $scratch/error. Also
# tells the watchdog about this check and about the remaining time.
remote() {
  local prefix="mkdir -p $watch_folder; touch $watch_folder/looked"
  prefix="$prefix; echo \$((\$(date +%s) + $(seconds_left) + $SAVE_SECONDS)) >$watch_folder/until"
  reach ssh "$TPU_NAME" "--command=$prefix; $1" 2>"$scratch/error"
}

# Succeeds if the last error says that the machine no longer exists, as after a preemption that the queued resource
# does not show yet: `This TPU has terminal state "PREEMPTED", so it cannot be used or updated.`
is_lost() {
  grep -qE 'terminal state|NOT_FOUND' "$scratch/error"
}

# on_all COMMAND...: runs a function whose connections go to every host of the slice.
on_all() {
  local worker=
  [ "$hosts" = 1 ] || worker=all
  "$@"
}

# persist COMMAND...: repeats a command until the machine answers, which takes a while after its start.
persist() {
  local attempt
  for attempt in 1 2 3 4 5 6 7 8 9 10; do
    if "$@"; then
      return 0
    fi
    if is_lost; then
      return 1
    fi
    say "no answer yet (attempt $attempt): $(tail -n 1 "$scratch/error")"
    find_state "$TPU_NAME" "$zone"
    [ "$state" = ACTIVE ] || return 1
    sleep "$POLL_SECONDS"
  done
  return 1
}

# Checks the permissions of the machine's service account. Writes a line with the account, and a line per missing
# permission.
ask_rights() {
  remote "echo account \$(gcloud auth list --filter=status:ACTIVE '--format=value(account)' --quiet 2>/dev/null)
    output=\$(echo launch.sh was here | gcloud storage cp - $store/.writable --quiet 2>&1 &&
      gcloud storage rm $store/.writable --quiet 2>&1) || echo write \$output
    output=\$(gcloud storage ls $DATASET_PATH --quiet 2>&1) || echo read \$output
    output=\$(gcloud compute tpus queued-resources describe $TPU_NAME --zone=$zone ${PROJECT:+--project=$PROJECT} --quiet 2>&1) ||
      echo delete \$output" >"$scratch/rights"
}

check_rights() {
  local account member why target
  say "checking that the machine may write to $BUCKET"
  persist ask_rights || return 1
  account=$(sed -n 's/^account //p' "$scratch/rights")
  member="--member=serviceAccount:${account:-ACCOUNT}"
  if why=$(grep -m 1 -E '^(write|read) ' "$scratch/rights"); then
    target=$store
    [[ $why == write* ]] || target=$DATASET_PATH
    fail "the machine's service account ${account:-(none)} may not ${why%% *} $target (${why#* }): gcloud storage buckets add-iam-policy-binding gs://$(cut -d / -f 3 <<<"$target") $member --role=roles/storage.objectAdmin"
  fi
  if grep -q '^delete ' "$scratch/rights"; then
    say "warning: without this computer the machine can only shut down, not delete itself, because its service account does not have the role: gcloud projects add-iam-policy-binding ${PROJECT:-PROJECT} $member --role=roles/tpu.admin"
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

# Prints NAME=value for each setting of SCRIPT that the environment or this script sets.
knobs_to_hand_on() {
  local name
  OUTPUT=${OUTPUT:-$store/runs}
  TOKENIZER_PATH=${TOKENIZER_PATH:-$store/tokenizer}
  for name in $(bash "$SCRIPT" --knobs); do
    if [ -n "${!name+set}" ]; then
      printf '%s=%q ' "$name" "${!name}"
    elif [ "$name" = STAGES ] && [ "$hosts" != 1 ]; then # one host does the others at a lower price
      printf '%s=%q ' "$name" "setup data tokenizer training"
    fi
  done
}

# Starts SCRIPT on the machine in a new session, so that a broken connection does not end it. Does nothing if it runs
# already, as after a connection that broke during this call. When SCRIPT exits, its status is stored in a file. Also
# starts the watchdog, in case startup scripts are forbidden. One of several hosts is told its number by Google's
# metadata server, as JAX is.
start() {
  local job index=
  [ "$hosts" = 1 ] || index="HOST_INDEX=\$($ask_worker_number) && export HOST_INDEX &&"
  job="trap : TERM
$index env $(knobs_to_hand_on) bash $SCRIPT
echo \$? >status.new; mv status.new status"
  remote "cd MaxNano && mkdir -p $watch_folder && rm -f $watch_folder/keep && echo \"\$PWD\" >$watch_folder/job &&
    { env $(watch_words) setsid nohup bash end_to_end/tpu/watchdog.sh >>watchdog.log 2>&1 </dev/null & } &&
    { [ ! -f status ] && kill -0 \$(cat pid 2>/dev/null) 2>/dev/null || {
    rm -f status; touch log; (setsid nohup bash -c $(printf '%q' "$job") >>log 2>&1 </dev/null & echo \$! >pid); }; }"
}

# Fetches a first line, `running`, `gone`, `absent` or the exit status, and the size of the log; then the log from byte $1.
look() {
  remote "cd MaxNano 2>/dev/null && [ -f pid ] || { echo absent 0; exit; }
    state=\$(cat status 2>/dev/null || { kill -0 \$(cat pid) 2>/dev/null && echo running; } || echo gone)
    size=\$(wc -c <log); echo \$state \$size; tail -c +$(($1 + 1)) log | head -c \$((size - $1))" >"$scratch/look"
}

# Watches SCRIPT on the machine until it is done. Fails if the machine is lost. Without a network the machine continues,
# and so does this loop when the network is back.
work() {
  local seen=0 silent=0 crashes=0 status size blind=
  while true; do
    check_time
    find_state "$TPU_NAME" "$zone"
    case $state in
      ACTIVE) ;;
      UNKNOWN)
        [ -n "$blind" ] || say "gcloud cannot reach the machine, retrying: $reason"
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
        persist on_all upload && persist on_all start || return 1
        ;;
      0) return 0 ;;
      2) fail "$SCRIPT exited with status 2: correct the mistake above" ;;
      75 | 143 | gone) # asked to stop: usually the machine is being preempted
        sleep "$POLL_SECONDS"
        persist on_all start || return 1
        ;;
      *)
        crashes=$((crashes + 1))
        [ "$crashes" -le "$MAX_CRASHES" ] || fail "$SCRIPT ended with status $status, crash $crashes: giving up"
        say "$SCRIPT ended with status $status; restarting it ($crashes of $MAX_CRASHES)"
        persist on_all start || return 1
        ;;
    esac
  done
}

# Succeeds if the lost machine had deleted itself after its job, while this computer slept.
was_done() {
  local status why
  cloud storage cat "$store/ended" >"$scratch/ended" 2>/dev/null || return 1
  cloud storage rm "$store/ended" >/dev/null 2>&1 || true
  read -r status why <"$scratch/ended"
  say "the machine deleted itself: $why; status of the job: $status"
  [ "$status" = 0 ]
}

# ---- Clean up

# Asks the job to save, unless KEEP=1, and copies local results to the bucket.
save() {
  local CALL_SECONDS=$((SAVE_SECONDS + 1800))
  on_all remote "cd MaxNano && env $(watch_words) bash end_to_end/tpu/watchdog.sh $([ -n "$KEEP" ] && echo keep || echo save)" >/dev/null
}

price() {
  awk -v chips="$CHIPS" -v seconds="$1" -v price="${PRICE_PER_CHIP_HOUR:-0}" 'BEGIN {
    printf "%d chips x %.2f h x %s USD = %.2f USD", chips, seconds / 3600, price, chips * seconds / 3600 * price }'
}

# Deletes the machine, however the script ends.
clean_up() {
  local status=$?
  trap '' INT TERM # a second Ctrl-C must not leave a machine running
  exec >&3 2>&4 # a signal may arrive while a function's output goes into a file
  set +e
  end_call
  if [ -n "$zone" ]; then
    if [ -n "$active_since" ]; then
      say "copying the machine's local results to $store"
      persist save || say "the job could not be asked to save; $store has the results so far"
    fi
    if [ -n "$KEEP" ] && [ -n "$active_since" ]; then
      stop_the_clock
      say "KEEP=1: $TPU_NAME in $zone costs money until you run: TPU_NAME=$TPU_NAME ZONES=$zone bash end_to_end/tpu/teardown.sh"
    else
      stop_the_clock
      delete_resource "$TPU_NAME" "$zone" || status=1
    fi
  fi
  if [ "$machines" -gt 0 ]; then
    say "machines: $machines, $(price "$active_total"), from when they became active"
  fi
  rm -rf "$scratch"
  exit "$status"
}

# ---- Main

watch_folder=/var/tmp/maxnano # as in watchdog.sh
ask_worker_number='curl -sf -H Metadata-Flavor:Google http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number'
check_accelerator
require_gcloud
[ -f "$SCRIPT" ] || fail "SCRIPT=$SCRIPT does not exist"
choose_zones
check_text
if [ -n "$dry_run" ]; then
  say "would request $ACCELERATOR spot as $TPU_NAME, at most $MAX_HOURS h, $(price 3600) per hour"
  say "would run: env $(knobs_to_hand_on) bash $SCRIPT"
  exit
fi
exec 3>&1 4>&2
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
pack
cloud storage rm "$store/ended" >/dev/null 2>&1 || true # from an earlier machine
adopt || acquire
until work; do
  say "the machine is lost${reason:+: $reason}"
  give_back
  if was_done; then
    break
  fi
  say "requesting another machine"
  acquire
done
say "done; the results are in $store (copy them with: gcloud storage rsync $store/runs runs --recursive)"
