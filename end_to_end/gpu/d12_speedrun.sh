#!/usr/bin/env bash
# Trains a small chat model of twelve layers on one NVIDIA GPU: text, tokenizer, training, evaluation,
# fine-tuning, chat tasks, reinforcement learning if RL=1, report, result.
#
#   bash end_to_end/gpu/d12_speedrun.sh                all stages
#   bash end_to_end/gpu/d12_speedrun.sh --dry-run      checks the machine and prints the plan
#   NUM_ITERATIONS=250 bash end_to_end/gpu/d12_speedrun.sh    a smoke run
#   RL=1 bash end_to_end/gpu/d12_speedrun.sh           adds reinforcement learning
#
# After any stop, the same command resumes. Ctrl-C and SIGTERM save and exit with status 75.
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
