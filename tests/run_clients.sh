#!/usr/bin/env bash
# Runs tests/test_clients.py: the server with real clients, for Python and Node, in environments of
# their own, which are kept in ~/.cache/maxnano/clients. Arguments go to pytest.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(openai==3.57.0 langchain-openai==1.7.4 litellm==1.110.2 'lm_eval[api]==0.4.13')
node_packages=(openai@6.49.0)
python=$PWD/.venv/bin/python
cache=${CLIENTS:-${XDG_CACHE_HOME:-$HOME/.cache}/maxnano/clients}

# The file `complete` is written last and says what is installed.
wanted="${packages[*]} ${node_packages[*]}"
if [ "$(cat "$cache/complete" 2>/dev/null)" != "$wanted" ]; then
  echo "Installing $wanted in $cache"
  rm -rf "$cache"
  "$python" -m venv "$cache/python"
  "$cache/python/bin/pip" install --quiet "${packages[@]}"
  if command -v npm >/dev/null; then
    npm install --silent --prefix "$cache/node" "${node_packages[@]}"
  fi
  echo "$wanted" >"$cache/complete"
fi

CLIENTS=$cache exec "$python" -m pytest tests/test_clients.py "$@"
