#!/usr/bin/env bash
# Sets up if needed and runs the tests in three processes. Arguments go to pytest:
#
#   bash tests/run.sh -k packing
#   PYTEST_WORKERS=0 bash tests/run.sh --pdb    in this process, as a debugger needs it
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MAXNANO_QUIET=1 EXTRAS=dev,docs,export,serve bash setup.sh
# Without bytecode each process compiles all tests again, which takes ten seconds in each.
unset PYTHONDONTWRITEBYTECODE
exec .venv/bin/python -m pytest -n "${PYTEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
