#!/usr/bin/env bash
# Makes .venv here and installs MaxNano into it, editable, with the versions of constraints.txt.
#
#   bash setup.sh                      with what this machine needs
#   DEVICE=tpu bash setup.sh           auto (the default), cpu, tpu or gpu
#   EXTRAS=track,serve bash setup.sh   and with further extras of pyproject.toml
#
# Where there is no Python 3.11, 3.12 or 3.13 with venv, uv makes the environment, and gets a Python if need be.
# Run again it does nothing, unless something has changed or more is asked for. Every file that is
# installed is checked against its hash in constraints.txt, by uv and by pip.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=.venv
STAMP=$VENV/maxnano-setup   # what was installed, written last
LOG=$VENV/maxnano-setup.log # what uv and pip say

fail() {
  echo "setup.sh: $*" >&2
  exit 1
}

# Whether $1 is an interpreter that will do. It has to run: a version manager's shim may not. No release candidate:
# Ubuntu 22.04 packages 3.11.0rc1, which many packages refuse.
is_right_python() {
  "$1" -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] <= (3, 13) or v[3] != "final")' >/dev/null 2>&1
}

# Prints the first interpreter on PATH that will do and can import the modules $1.
find_python() {
  local name path
  for name in python3.11 python3.12 python3.13 python3 python; do
    # All of that name: a shim may hide the real one.
    while IFS= read -r path; do
      if is_right_python "$path" && "$path" -c "import $1" >/dev/null 2>&1; then
        echo "$path"
        return
      fi
    done < <(type -aP "$name")
  done
  return 1
}

has_tpu() {
  local device
  if compgen -G '/dev/accel[0-9]*' >/dev/null || [ -n "${TPU_ACCELERATOR_TYPE:-}" ]; then
    return 0
  fi
  # Newer machines show the chips by vfio only: Google's PCI devices of TPU v3, v4, v5p, v5e, v6e
  # and 7x. Source: jax/_src/hardware_utils.py.
  for device in /sys/bus/pci/devices/*; do
    case "$(cat "$device/vendor" "$device/device" 2>/dev/null | tr '\n' ' ')" in
      "0x1ae0 0x0027 " | "0x1ae0 0x005e " | "0x1ae0 0x0062 " | "0x1ae0 0x0063 " | \
        "0x1ae0 0x006f " | "0x1ae0 0x0076 ") return 0 ;;
    esac
  done
  return 1
}

detect_device() {
  if has_tpu; then
    echo tpu
  elif nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo gpu
  else
    echo cpu
  fi
}

make_venv() {
  local python uv
  if python=$(find_python 'ensurepip, venv'); then
    "$python" -m venv --clear $VENV 2>/dev/null ||
      fail "$python cannot make an environment in $PWD/$VENV: is the disk full, or the folder write-protected?"
    return
  fi
  # uv can do without what Debian and Ubuntu package apart (python3-venv), and without any Python at all.
  if ! { rm -rf $VENV && mkdir -p $VENV/bin && : >$LOG; } 2>/dev/null; then
    fail "$PWD/$VENV cannot be made anew: is the folder write-protected?"
  fi
  uv=$(find_uv) || fail "no Python 3.11, 3.12 or 3.13 with venv here, and no uv to get one with ($(explain)); $(advice)"
  {
    python=$(find_python sysconfig) && "$uv" venv --allow-existing --python "$python" $VENV
  } >>$LOG 2>&1 || {
    echo "No Python 3.11, 3.12 or 3.13 here: uv gets one."
    "$uv" venv --allow-existing --managed-python --python cpython@3.12 $VENV >>$LOG 2>&1
  } || fail "no Python 3.11, 3.12 or 3.13 here, and uv could not download one (UV_PYTHON_INSTALL_MIRROR names a mirror); $(advice); see $LOG"
  pinned pip >$VENV/maxnano-tool.txt
  tell_uv_the_index
  "$uv" pip install --python $VENV/bin/python --no-deps --require-hashes -r $VENV/maxnano-tool.txt >>$LOG 2>&1 ||
    fail "$(explain); see $LOG"
}

# What to do where neither this machine nor uv has a Python.
advice() {
  local ID='' VERSION_ID=''
  # shellcheck source=/dev/null
  [ ! -r /etc/os-release ] || . /etc/os-release
  case $ID:$VERSION_ID in
    debian:12 | debian:13 | ubuntu:24.04) echo "run: sudo apt-get install python3 python3-venv" ;;
    ubuntu:2[02].04) echo "run: sudo add-apt-repository ppa:deadsnakes/ppa && sudo apt-get install python3.12 python3.12-venv" ;;
    fedora:* | rhel:* | rocky:* | almalinux:*) echo "run: sudo dnf install python3.12" ;;
    *) echo "install Python 3.12, or uv" ;;
  esac
}

# The lines of constraints.txt about package $1, for installing a tool at its hash.
pinned() {
  awk -v name="$1" 'index($0, name "==") == 1 { on = 1 } on { print } !/\\$/ { on = 0 }' constraints.txt
}

run_pip() {
  $VENV/bin/python -m pip --disable-pip-version-check --no-input "$@" >>$LOG 2>&1
}

install_tool() {
  pinned "$1" >$VENV/maxnano-tool.txt
  run_pip install --no-deps --require-hashes -r $VENV/maxnano-tool.txt
}

# Prints the uv to use, if it can be had.
find_uv() {
  if command -v uv || command -v ~/.local/bin/uv || command -v $VENV/bin/uv; then
    return
  fi
  fetch_uv >>$LOG 2>&1 && echo $VENV/bin/uv
}

# Gets the pinned uv: by the pip of any Python, which knows of mirrors and proxies, or else straight from the index.
fetch_uv() {
  local python
  pinned uv >$VENV/maxnano-tool.txt
  for python in $VENV/bin/python python3; do
    if "$python" -m pip --version; then
      "$python" -m pip --disable-pip-version-check --no-input download --no-deps --only-binary :all: --require-hashes \
        --dest $VENV -r $VENV/maxnano-tool.txt && unpack_uv
      return
    fi
  done
  download_uv && unpack_uv
}

# The wheel of uv for this machine, off the page that the index has about uv.
# Source: https://packaging.python.org/en/latest/specifications/simple-repository-api/
download_uv() {
  local index=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-https://pypi.org/simple}} version address digest
  version=$(sed -n 's/^uv==\([0-9.]*\).*/\1/p' constraints.txt)
  [ "$(uname -s)" = Linux ] || {
    echo "no pip"
    return 1
  }
  download "${index%/}/uv/" $VENV/uv.html || return
  address=$(tr '"' '\n' <$VENV/uv.html | grep -E "/uv-$version-[^/]*manylinux_2_17_$(uname -m)\.[^/]*\.whl(#|\$)" | head -n 1)
  case $address in
    '')
      echo "the package index has no uv $version for $(uname -m)"
      return 1
      ;;
    *://*) ;;
    /*) address=$(cut -d / -f 1-3 <<<"$index")$address ;;
    *) address=${index%/}/uv/$address ;;
  esac
  address=${address%%#*}
  download "$address" "$VENV/${address##*/}" || return
  digest=$(sha256sum "$VENV/${address##*/}" | cut -d ' ' -f 1)
  if [[ $(pinned uv) != *"--hash=sha256:$digest"* ]]; then
    rm -f "$VENV/${address##*/}"
    echo "uv is not the one that constraints.txt pins (its hash differs)"
    return 1
  fi
}

# download ADDRESS FILE
download() {
  if command -v curl; then
    curl -fsSL --connect-timeout 30 --retry 3 -o "$2" "$1"
  elif command -v wget; then
    wget -nv -T 30 -t 3 -O "$2" "$1"
  else
    echo "neither pip nor curl nor wget"
    return 1
  fi
}

# A wheel is a zip file. Leaves uv in .venv/bin.
unpack_uv() {
  local python
  (
    cd $VENV
    if command -v unzip; then
      unzip -qo uv-*.whl '*/scripts/uv'
    elif command -v bsdtar; then
      bsdtar -xf uv-*.whl
    else
      python=bin/python
      command -v $python || python=python3
      $python -m zipfile -e uv-*.whl . || {
        echo "neither python3 nor unzip"
        exit 1
      }
    fi
    mv uv-*.data/scripts/uv bin/uv && chmod +x bin/uv && rm -rf uv-*.data uv-*.dist-info uv-*.whl uv.html
  )
}

# uv does not read pip's settings: where pip was told of an index of its own, tell uv.
tell_uv_the_index() {
  local python index=${PIP_INDEX_URL:-}
  for python in $VENV/bin/python python3; do
    index=${index:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}
  done
  if [ -n "$index" ]; then
    export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
  fi
}

install_by_uv() {
  tell_uv_the_index
  "$1" pip install --python $VENV/bin/python --constraints constraints.txt \
    --build-constraints constraints.txt --editable ".[$2]" >>$LOG 2>&1
}

# pip checks hashes of all or of nothing, and a folder has none: first all that MaxNano depends on,
# then MaxNano alone. Only a new pip takes hashes from a file of constraints.
install_by_pip() {
  install_tool pip && install_tool setuptools || return
  $VENV/bin/python - "$1" >$VENV/maxnano-requirements.txt <<'PY' || return
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *(r for name in sys.argv[1].split(",") if name for r in extras[name]), sep="\n")
PY
  run_pip install --require-hashes --constraint constraints.txt -r $VENV/maxnano-requirements.txt &&
    run_pip install --no-deps --no-build-isolation --editable .
}

# One line that says why the installation failed.
explain() {
  local pattern reason
  while IFS='|' read -r pattern reason; do
    if grep -qiE "$pattern" $LOG; then
      echo "$reason"
      return
    fi
  done <<'REASONS'
no space left|the disk is full
hash mismatch|a package is not the one that constraints.txt pins (its hash differs)
do not match the hashes|a package is not the one that constraints.txt pins (its hash differs)
no matching distribution|the package index cannot be reached or lacks a package
connection|the package index cannot be reached
timed out|the package index cannot be reached
dns error|the package index cannot be reached
failed to fetch|the package index cannot be reached
REASONS
  tail -n 1 $LOG
}

# ---- What is wanted, and whether it is there

device=${DEVICE:-auto}
extras=${EXTRAS:-}
device_before=
if [ -f $STAMP ]; then
  read -r device_before extras_before <$STAMP
  extras=$extras,${extras_before#extras=}
  # DEVICE=cpu on a machine with a GPU stays so until another is asked for.
  device=${DEVICE:-$device_before}
fi
if [ "$device" = auto ]; then
  device=$(detect_device)
fi
case $device in
  cpu | tpu | gpu) ;;
  *) fail "DEVICE is '$device', but must be auto, cpu, tpu or gpu" ;;
esac
case ",${EXTRAS:-}," in
  *,tpu,* | *,gpu,*) fail "EXTRAS is '$EXTRAS', but tpu and gpu are asked for by DEVICE" ;;
esac
# The extra of the device that was there before goes with it.
extras=$(tr ',' '\n' <<<"$extras" | sed -E '/^(tpu|gpu|)$/d' | sort -u | paste -sd, -)
if [ "$device" != cpu ]; then
  extras=${extras:+$extras,}$device
fi
for extra in $(tr ',' ' ' <<<"$extras"); do
  grep -q "^$extra = \[" pyproject.toml || fail "EXTRAS names '$extra', which is no extra of pyproject.toml"
done

stamp="$device extras=$extras
$PWD
$(cat setup.sh pyproject.toml constraints.txt | cksum)"

say_next() {
  if [ -z "${MAXNANO_QUIET:-}" ]; then # set by the scripts that call this one
    cat <<'NEXT'
Next:
  bash end_to_end/cpu/quickstart.sh   trains a small model on real text, in about ten minutes
  bash tests/run.sh                   runs the tests
NEXT
  fi
}

if [ "$(cat $STAMP 2>/dev/null)" = "$stamp" ] && is_right_python $VENV/bin/python; then
  echo "$VENV is ready (for $device${extras:+, with $extras})."
  say_next
  exit
fi

# ---- Install

case $device in
  cpu) needed_mb=2000 ;;
  tpu) needed_mb=3000 ;;
  gpu) needed_mb=9000 ;;
esac
free_mb=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
if [ ! -x $VENV/bin/python ] && [ "$free_mb" -lt "$needed_mb" ]; then
  fail "the disk of $PWD has $free_mb MB free, and $needed_mb MB are needed"
fi

SECONDS=0
# An environment for another device would keep that device's packages: better a new one.
if [ "$device" != "${device_before:-$device}" ] || ! is_right_python $VENV/bin/python ||
  ! $VENV/bin/python -m pip --version >/dev/null 2>&1; then
  make_venv
fi
rm -f $STAMP
: >$LOG
echo "Installing into $PWD/$VENV for $device${extras:+, with $extras}; $LOG tells how far it is."
if uv=$(find_uv); then
  install_by_uv "$uv" "$extras" || install_by_pip "$extras" || fail "$(explain); see $LOG"
else
  install_by_pip "$extras" || fail "$(explain); see $LOG"
fi
versions=$($VENV/bin/python -c 'import platform, jax, MaxNano; print(f"Python {platform.python_version()}, jax {jax.__version__}")' 2>>$LOG) ||
  fail "what was installed does not import: $(tail -n 1 $LOG)"
echo "$stamp" >$STAMP
echo "$VENV is ready ($versions for $device${extras:+, with $extras}; $SECONDS s)."
say_next
