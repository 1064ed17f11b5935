#!/usr/bin/env bash
# Run by launch.sh on a new machine: where its Python is too old for MaxNano (Ubuntu 22.04 has 3.10), gets uv into
# ~/.local/bin, at the hash in constraints.txt; with uv, setup.sh fetches a Python of its own.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

for name in python3.11 python3.12 python3.13 uv ~/.local/bin/uv; do
  if command -v "$name" >/dev/null; then
    exit
  fi
done
echo "no Python 3.11, 3.12 or 3.13 here: getting uv"
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
awk 'index($0, "uv==") == 1 { on = 1 } on { print } !/\\$/ { on = 0 }' constraints.txt >"$pins"
python3 -m pip install --quiet --user --require-hashes --no-deps -r "$pins"
