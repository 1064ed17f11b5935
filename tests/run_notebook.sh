#!/usr/bin/env bash
# Runs the notebook with a tiny model on the CPU, by nbclient in an environment of its own, which is kept in
# ~/.cache/maxnano/notebook. Arguments go to pytest.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(nbclient==0.11.0 ipykernel==7.4.0)
python=${MAXNANO_PYTHON:-$PWD/.venv/bin/python}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/maxnano/notebook

# The file `complete` is written last and says what is installed.
wanted="$python ${packages[*]}"
if [ "$(cat "$cache/complete" 2>/dev/null)" != "$wanted" ]; then
  echo "Installing ${packages[*]} in $cache"
  rm -rf "$cache"
  if ! { "$python" -m venv "$cache" && "$cache/bin/python" -m pip install --quiet "${packages[@]}"; }; then
    echo "Skipped the notebook: could not install ${packages[*]}" >&2
    exit 0
  fi
  echo "$wanted" >"$cache/complete"
fi

NOTEBOOK_PYTHON=$cache/bin/python exec "$python" -m pytest tests/test_notebook.py "$@"
