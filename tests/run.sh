#!/usr/bin/env bash
# Sets up if needed and runs the tests; arguments go to pytest: bash tests/run.sh -k packing
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MAXNANO_QUIET=1 EXTRAS=dev,export,serve bash setup.sh
exec .venv/bin/python -m pytest "$@"
