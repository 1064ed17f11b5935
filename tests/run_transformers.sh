#!/usr/bin/env bash
# Runs the tests of the export inside transformers, on the oldest and the newest version that
# huggingface.TESTED names, each in an environment of its own with torch for the CPU. The
# environments are kept in ~/.cache/maxnano/transformers. Arguments go to pytest.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$PWD/.venv/bin/python
cache=${XDG_CACHE_HOME:-$HOME/.cache}/maxnano/transformers
read -r torch oldest newest < <(PYTHONPATH=. "$python" -c 'from MaxNano.interop.huggingface import \
TESTED, TESTED_TORCH; print(TESTED_TORCH, TESTED[0], TESTED[-1])')

# Creates the environment $1 with what follows, arguments of pip install, or skips the tests if that
# cannot be installed. The file `complete` is written last.
create() {
  local folder=$cache/$1
  shift
  [ -e "$folder/complete" ] && return
  echo "Installing $* in $folder"
  rm -rf "$folder"
  "$python" -m venv "$folder"
  if ! "$folder/bin/pip" install --quiet --retries 1 --timeout 30 "$@"; then
    echo "Skipped the tests in transformers: could not install $*" >&2
    exit 0
  fi
  touch "$folder/complete"
}

# torch is large and installed once; the versions of transformers see it through a .pth file.
build=$([ "$(uname)" = Darwin ] || echo +cpu)
create "torch-$torch" "torch==$torch$build" numpy \
  --extra-index-url https://download.pytorch.org/whl/cpu
packages=$("$cache/torch-$torch/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for version in "$oldest" "$newest"; do
  create "$version" "transformers==$version"
  folder=$("$cache/$version/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$packages" >"$folder/torch.pth"
done

TRANSFORMERS_PYTHON=$cache/$oldest/bin/python:$cache/$newest/bin/python \
  exec "$python" -m pytest tests/test_huggingface.py -k "transformers or engine" "$@"
