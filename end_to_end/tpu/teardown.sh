#!/usr/bin/env bash
# Deletes every TPU machine and request whose name begins with TPU_NAME, in all ZONES, and makes sure that none is left.
#
#   bash end_to_end/tpu/teardown.sh --dry-run    lists them
#   bash end_to_end/tpu/teardown.sh              lists them, asks, deletes
#   YES=1 bash end_to_end/tpu/teardown.sh        without asking
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh
# shellcheck source=end_to_end/tpu/cloud.sh
source end_to_end/tpu/cloud.sh

cloud_knobs
knob YES "" "1: do not ask"
knob POLL_SECONDS 20 "pause between attempts"
parse_arguments "$@"

# A line "kind name zone state" for each thing in all zones. Fails where a zone cannot be looked into.
list_all() {
  local each said
  for each in "${places[@]}"; do
    said=$(tpus queued-resources list "--zone=$each" '--format=value(name.basename(),state.state)') || return 1
    print_ours request "$each" <<<"$said"
    said=$(tpus tpu-vm list "--zone=$each" '--format=value(name.basename(),state)') || return 1
    print_ours machine "$each" <<<"$said"
  done
}

print_ours() {
  local name state
  while read -r name state; do
    if [[ -n $name && $name == "$TPU_NAME"* ]]; then
      echo "$1 $name $2 $state"
    fi
  done
}

list_or_fail() {
  found=$(list_all) || fail "gcloud could not list every one of ZONES ($ZONES): what is there is not known"
}

require_gcloud
read -ra places <<<"$ZONES"
list_or_fail
if [ -z "$found" ]; then
  echo "nothing of the name $TPU_NAME* in $ZONES"
  exit
fi
printf '%s\n' "$found"
if [ -n "$dry_run" ]; then
  exit
fi
if [ -z "$YES" ]; then
  read -r -p "Delete all of these? [y/N] " answer || fail "nobody to ask: set YES=1"
  [ "$answer" = y ] || fail "nothing was deleted"
fi

# Requests first, which take their machines along; then machines that have lost theirs.
while read -r kind name where _; do
  if [ "$kind" = request ]; then
    delete_resource "$name" "$where" </dev/null || true
  fi
done <<<"$found"
list_or_fail
while read -r kind name where _; do
  if [ "$kind" = machine ]; then
    say "deleting $name in $where"
    tpus tpu-vm delete "$name" "--zone=$where" </dev/null || true
  fi
done <<<"$found"

list_or_fail
if [ -n "$found" ]; then
  printf 'STILL THERE, AND COSTING MONEY:\n%s\n' "$found" >&2
  exit 1
fi
echo "all deleted; nothing of the name $TPU_NAME* is left in $ZONES"
