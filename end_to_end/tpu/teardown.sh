#!/usr/bin/env bash
# Deletes every TPU machine and request whose name begins with TPU_NAME, in all ZONES, and makes sure that none is left.
# Status 1 where something is left, or a zone could not be looked into.
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
parse_arguments "$@"

# Sets `found` to a line "kind name zone state" for each thing in all zones, and `unseen` to the zones that could not be
# looked into, which are said the first time.
unseen=
list_all() {
  local each before=$unseen
  unseen=
  : >"$scratch/found"
  for each in "${places[@]}"; do
    if ! { list_zone request queued-resources state.state && list_zone machine tpu-vm state; } 2>"$scratch/error"; then
      unseen="$unseen $each"
      [[ " $before " == *" $each "* ]] || echo "$each cannot be looked into: $(one_line "$(<"$scratch/error")")" >&2
    fi
  done
  found=$(<"$scratch/found")
}

# list_zone KIND COMMAND FIELD: adds what there is of a kind in the zone `each`.
list_zone() {
  tpus "$2" list "--zone=$each" "--format=value(name.basename(),$3)" >"$scratch/list" || return 1
  local name state
  while read -r name state; do
    if [[ -n $name && $name == "$TPU_NAME"* ]]; then
      echo "$1 $name $each $state" >>"$scratch/found"
    fi
  done <"$scratch/list"
}

# Exits, with status 1 where a zone could not be looked into.
finish() {
  if [ -n "$unseen" ]; then
    echo "NOT KNOWN, for these zones cannot be looked into:$unseen" >&2
    exit 1
  fi
  exit 0
}

require_gcloud
list_all
if [ -z "$found" ]; then
  echo "nothing of the name $TPU_NAME* in $ZONES${unseen:+, except for what cannot be seen}"
  finish
fi
printf '%s\n' "$found"
if [ -n "$dry_run" ]; then
  finish
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
list_all
while read -r kind name where _; do
  if [ "$kind" = machine ]; then
    say "deleting $name in $where"
    tpus tpu-vm delete "$name" "--zone=$where" </dev/null || true
  fi
done <<<"$found"

list_all
if [ -n "$found" ]; then
  printf 'STILL THERE, AND COSTING MONEY:\n%s\n' "$found" >&2
  exit 1
fi
echo "all deleted; nothing of the name $TPU_NAME* is left in $ZONES${unseen:+, except for what cannot be seen}"
finish
