#!/usr/bin/env bash
# From nothing to a GPT-2 grade model that talks, on the machine of a TPU v6e-8: documents, tokenizer, training,
# evaluation, fine-tuning, chat tasks, reinforcement learning where it is asked for, report, result.
#
#   bash end_to_end/tpu/d24_speedrun.sh                the whole of it
#   bash end_to_end/tpu/d24_speedrun.sh --dry-run      what can be checked beforehand, for nothing
#   NUM_ITERATIONS=250 bash end_to_end/tpu/d24_speedrun.sh    a smoke run
#   RL=1 bash end_to_end/tpu/d24_speedrun.sh           with reinforcement learning
#
# Stopped or preempted anywhere, the same command goes on where it was. Ctrl-C and SIGTERM save and end with status 75.
# To rent the machine as well: end_to_end/tpu/launch.sh.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh

tpu_defaults
default MODEL d24_speedrun
default MIN_DISK_GB 60
default DOWNLOAD_SHARDS 170 # as nanochat takes for this model
default STAGES "setup data tokenizer training evaluation sft chat rl report result"
training_knobs
parse_arguments "$@"

speedrun
