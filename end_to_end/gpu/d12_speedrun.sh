#!/usr/bin/env bash
# From documents to a small model of twelve layers that talks, on one NVIDIA GPU: tokenizer, training, evaluation,
# fine-tuning, chat tasks, reinforcement learning where it is asked for, report, result.
#
#   bash end_to_end/gpu/d12_speedrun.sh                the whole of it
#   bash end_to_end/gpu/d12_speedrun.sh --dry-run      what can be checked beforehand
#   NUM_ITERATIONS=250 bash end_to_end/gpu/d12_speedrun.sh    a smoke run
#   RL=1 bash end_to_end/gpu/d12_speedrun.sh           with reinforcement learning
#
# Stopped anywhere, the same command goes on where it was. Ctrl-C and SIGTERM save and end with status 75.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh

default DEVICE gpu
default STAGES "setup data tokenizer training evaluation sft chat rl report result"
training_knobs
parse_arguments "$@"

speedrun
