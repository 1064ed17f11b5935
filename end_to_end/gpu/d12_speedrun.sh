#!/usr/bin/env bash
# From documents to a small language model of twelve layers on one NVIDIA GPU: tokenizer, training, validation, result.
#
#   bash end_to_end/gpu/d12_speedrun.sh                the whole of it
#   bash end_to_end/gpu/d12_speedrun.sh --dry-run      what can be checked beforehand
#   NUM_ITERATIONS=250 bash end_to_end/gpu/d12_speedrun.sh    a smoke run
#
# Stopped anywhere, the same command goes on where it was. Ctrl-C and SIGTERM save and end with status 75.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh

default DEVICE gpu
training_knobs
parse_arguments "$@"

speedrun
