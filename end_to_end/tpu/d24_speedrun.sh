#!/usr/bin/env bash
# Trains a chat model of GPT-2 grade on a TPU v6e-8: text, tokenizer, training, evaluation, fine-tuning,
# chat tasks, reinforcement learning if RL=1, report, result.
#
#   bash end_to_end/tpu/d24_speedrun.sh                all stages
#   bash end_to_end/tpu/d24_speedrun.sh --dry-run      checks the machine and prints the plan
#   NUM_ITERATIONS=250 bash end_to_end/tpu/d24_speedrun.sh    a smoke run
#   RL=1 bash end_to_end/tpu/d24_speedrun.sh           adds reinforcement learning
#
# After any stop or preemption, the same command resumes. Ctrl-C and SIGTERM save and exit with
# status 75. end_to_end/tpu/launch.sh also rents the machine.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh

tpu_defaults
default MODEL d24_speedrun
default MIN_DISK_GB 60
default DOWNLOAD_SHARDS 170 # nanochat's number for this model
default STAGES "setup data tokenizer training evaluation sft chat rl report result"
training_knobs
parse_arguments "$@"

speedrun
