#!/usr/bin/env bash
# Deletes every TPU machine and request whose name begins with TPU_NAME, in all ZONES, and verifies it.
# Status 1 if something remains, or if a zone cannot be listed.
#
#   bash end_to_end/tpu/teardown.sh --dry-run    lists them
#   bash end_to_end/tpu/teardown.sh              lists them, asks, deletes them
#   YES=1 bash end_to_end/tpu/teardown.sh        deletes them without asking
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

# Sets `resources` to a line "kind name zone state" per request and machine, and `unseen` to the zones that cannot be
# listed. Reports each such zone once.
unseen=
list_all() {
  local each before=$unseen
  unseen=
  : >"$scratch/resources"
  for each in "${candidates[@]}"; do
    if ! { list_zone request queued-resources state.state && list_zone machine tpu-vm state; } 2>"$scratch/error"; then
      unseen="$unseen $each"
      [[ " $before " == *" $each "* ]] || echo "$each cannot be listed: $(one_line "$(<"$scratch/error")")" >&2
    fi
  done
  resources=$(<"$scratch/resources")
}

# list_zone KIND COMMAND FIELD: appends the resources of one kind in the zone `each`.
list_zone() {
  tpus "$2" list "--zone=$each" "--format=value(name.basename(),$3)" >"$scratch/list" || return 1
  local name state
  while read -r name state; do
    if [[ -n $name && $name == "$TPU_NAME"* ]]; then
      echo "$1 $name $each $state" >>"$scratch/resources"
    fi
  done <"$scratch/list"
}

# Exits with status 1 if a zone cannot be listed.
finish() {
  if [ -n "$unseen" ]; then
    echo "UNKNOWN: these zones cannot be listed:$unseen" >&2
    exit 1
  fi
  exit 0
}

require_gcloud
list_all
if [ -z "$resources" ]; then
  echo "no resource named $TPU_NAME* in $ZONES${unseen:+, except in zones that cannot be listed}"
  finish
fi
printf '%s\n' "$resources"
if [ -n "$dry_run" ]; then
  finish
fi
if [ -z "$YES" ]; then
  read -r -p "Delete all of these? [y/N] " answer || fail "no terminal to ask on: set YES=1"
  [ "$answer" = y ] || fail "nothing was deleted"
fi

# Delete requests together with their machines first, then machines without a request.
while read -r kind name where _; do
  if [ "$kind" = request ]; then
    delete_resource "$name" "$where" </dev/null || true
  fi
done <<<"$resources"
list_all
while read -r kind name where _; do
  if [ "$kind" = machine ]; then
    say "deleting $name in $where"
    tpus tpu-vm delete "$name" "--zone=$where" </dev/null || true
  fi
done <<<"$resources"

list_all
if [ -n "$resources" ]; then
  printf 'STILL EXIST AND COST MONEY:\n%s\n' "$resources" >&2
  exit 1
fi
echo "all deleted; no resource named $TPU_NAME* remains in $ZONES${unseen:+, except in zones that cannot be listed}"
finish
