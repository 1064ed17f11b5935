#!/usr/bin/env bash
# Creates the virtual environment .venv and installs MaxNano in editable mode, with pinned versions.
#
#   bash setup.sh                      detects the device
#   DEVICE=tpu bash setup.sh           auto (the default), cpu, tpu or gpu
#   EXTRAS=track,serve bash setup.sh   also installs these extras of pyproject.toml
#
# If the machine has no Python 3.11, 3.12 or 3.13 with venv, uv creates the environment and
# downloads a Python if needed. A second run does nothing unless the device, the extras or the
# pinned versions have changed. uv and pip check the hash of every file against constraints.txt.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=.venv
STAMP=$VENV/maxnano-setup   # describes the installation; written last
LOG=$VENV/maxnano-setup.log # output of uv and pip

fail() {
  echo "setup.sh: $*" >&2
  exit 1
}

# Succeeds if $1 is a supported interpreter. It must run: the shim of a version manager may not.
# Release candidates do not count: Ubuntu 22.04 packages 3.11.0rc1, which many packages refuse.
is_right_python() {
  "$1" -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] <= (3, 13) or v[3] != "final")' >/dev/null 2>&1
}

# Prints the first supported interpreter on PATH that can import the modules $1. From Python 3.12 on
# JAX is newer: preferred for an accelerator, whose compiler came with it.
find_python() {
  local name path names="python3.11 python3.12 python3.13"
  [ "$device" = cpu ] || names="python3.13 python3.12 python3.11"
  for name in $names python3 python; do
    # All interpreters of that name: a shim may hide the real one.
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
  # Newer machines expose the chips through vfio only. These are the PCI devices of TPU v3, v4,
  # v5p, v5e, v6e and 7x. Source: jax/_src/hardware_utils.py.
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

# Prints the extra for the NVIDIA GPUs of this machine: gpu12, with CUDA 12, for a driver below 580
# or a card before Turing (compute capability 7.5), which CUDA 13 does not take.
# Source: https://docs.nvidia.com/cuda/cuda-toolkit-release-notes
gpu_extra() {
  if nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null |
    awk -F '[., ]+' '$1 + 0 > 0 && ($1 < 580 || $(NF - 1) * 10 + $NF < 75) { old = 1 } END { exit !old }'; then
    echo gpu12
  else
    echo gpu
  fi
}

make_venv() {
  local python uv
  if python=$(find_python 'ensurepip, venv'); then
    "$python" -m venv --clear $VENV 2>/dev/null ||
      fail "$python cannot create an environment in $PWD/$VENV: is the disk full, or the folder write-protected?"
    return
  fi
  # uv needs neither python3-venv, a separate package on Debian and Ubuntu, nor a Python.
  if ! { rm -rf $VENV && mkdir -p $VENV/bin && : >$LOG; } 2>/dev/null; then
    fail "cannot recreate $PWD/$VENV: is the folder write-protected?"
  fi
  uv=$(find_uv) || fail "no Python 3.11, 3.12 or 3.13 with venv on this machine, and could not download uv ($(explain)); $(advice)"
  {
    python=$(find_python sysconfig) && "$uv" venv --allow-existing --python "$python" $VENV
  } >>$LOG 2>&1 || {
    echo "No Python 3.11, 3.12 or 3.13 on this machine: uv downloads one."
    "$uv" venv --allow-existing --managed-python --python cpython@3.12 $VENV >>$LOG 2>&1
  } || fail "no Python 3.11, 3.12 or 3.13 on this machine, and uv could not download one (UV_PYTHON_INSTALL_MIRROR names a mirror); $(advice); see $LOG"
  pinned pip >$VENV/maxnano-tool.txt
  tell_uv_the_index
  "$uv" pip install --python $VENV/bin/python --no-deps --require-hashes -r $VENV/maxnano-tool.txt >>$LOG 2>&1 ||
    fail "$(explain); see $LOG"
}

# Prints how to install a Python on this system.
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

# Prints the lines of constraints.txt about package $1: its version and its hashes.
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

# Prints the path of uv, which is downloaded if it is missing.
find_uv() {
  if command -v uv || command -v ~/.local/bin/uv || command -v $VENV/bin/uv; then
    return
  fi
  fetch_uv >>$LOG 2>&1 && echo $VENV/bin/uv
}

# Downloads the pinned uv with the pip of any Python, which knows mirrors and proxies, or else
# directly from the package index.
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

# Downloads the wheel of uv for this machine, using the index's page about uv.
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
    echo "the hash of uv differs from constraints.txt"
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
    echo "found neither pip nor curl nor wget"
    return 1
  fi
}

# Unpacks uv into .venv/bin. A wheel is a zip file.
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
        echo "found neither python3 nor unzip"
        exit 1
      }
    fi
    mv uv-*.data/scripts/uv bin/uv && chmod +x bin/uv && rm -rf uv-*.data uv-*.dist-info uv-*.whl uv.html
  )
}

# uv does not read pip's settings: pass it the package index that pip is configured with.
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

# pip checks the hashes of all requirements or of none, and a folder has no hash: install the
# dependencies first, then MaxNano. Only a recent pip reads hashes from a constraints file.
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

# Prints one line: why the installation failed.
explain() {
  local pattern reason
  while IFS='|' read -r pattern reason; do
    if grep -qiE "$pattern" $LOG; then
      echo "$reason"
      return
    fi
  done <<'REASONS'
no space left|the disk is full
hash mismatch|the hash of a package differs from constraints.txt
do not match the hashes|the hash of a package differs from constraints.txt
no matching distribution|the package index cannot be reached or does not have a package
connection|the package index cannot be reached
timed out|the package index cannot be reached
dns error|the package index cannot be reached
failed to fetch|the package index cannot be reached
REASONS
  tail -n 1 $LOG
}

# ---- Which device and extras, and are they installed already?

device=${DEVICE:-auto}
extras=${EXTRAS:-}
device_before=
extras_before_accelerator=
if [ -f $STAMP ]; then
  read -r device_before extras_before <$STAMP
  extras=$extras,${extras_before#extras=}
  extras_before_accelerator=${extras_before##*[,=]}
  # DEVICE=cpu on a machine with a GPU stays in effect until DEVICE names another device.
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
  *,tpu,* | *,gpu,* | *,gpu12,*) fail "EXTRAS is '$EXTRAS', but DEVICE selects tpu and gpu" ;;
esac
# Drop the extra of the previous device.
extras=$(tr ',' '\n' <<<"$extras" | sed -E '/^(tpu|gpu|gpu12|)$/d' | sort -u | paste -sd, -)
case $device in
  tpu) extras=${extras:+$extras,}tpu ;;
  gpu) extras=${extras:+$extras,}$(gpu_extra) ;;
esac
for extra in $(tr ',' ' ' <<<"$extras"); do
  grep -q "^$extra = \[" pyproject.toml || fail "EXTRAS names '$extra', which is not an extra in pyproject.toml"
done

stamp="$device extras=$extras
$PWD
$(cat setup.sh pyproject.toml constraints.txt | cksum)"

say_next() {
  if [ -z "${MAXNANO_QUIET:-}" ]; then # scripts that call this one set it
    cat <<'NEXT'
Next:
  bash end_to_end/cpu/quickstart.sh   trains a small model and chats with it, in about eight minutes
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
  fail "the disk of $PWD has $free_mb MB free, but the installation needs $needed_mb MB"
fi

SECONDS=0
# An environment for another device or CUDA would keep its packages: create a new one. The last extra
# is that of the accelerator.
if [ "$device" != "${device_before:-$device}" ] ||
  { [ "$device" = gpu ] && [ "${extras##*,}" != "${extras_before_accelerator:-${extras##*,}}" ]; } || ! is_right_python $VENV/bin/python ||
  ! $VENV/bin/python -m pip --version >/dev/null 2>&1; then
  make_venv
fi
rm -f $STAMP
: >$LOG
echo "Installing into $PWD/$VENV for $device${extras:+, with $extras}; progress is in $LOG."
if uv=$(find_uv); then
  install_by_uv "$uv" "$extras" || install_by_pip "$extras" || fail "$(explain); see $LOG"
else
  install_by_pip "$extras" || fail "$(explain); see $LOG"
fi
versions=$($VENV/bin/python -c 'import platform, jax, MaxNano; print(f"Python {platform.python_version()}, jax {jax.__version__}")' 2>>$LOG) ||
  fail "the installed packages cannot be imported: $(tail -n 1 $LOG)"
echo "$stamp" >$STAMP
echo "$VENV is ready ($versions for $device${extras:+, with $extras}; $SECONDS s)."
say_next
