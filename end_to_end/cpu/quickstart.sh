#!/usr/bin/env bash
# Trains a small language model from a fresh clone, on a CPU, in about eight minutes, and chats with it.
#
#   bash end_to_end/cpu/quickstart.sh            stories, encyclopedia articles, conversations (18 MB)
#   bash end_to_end/cpu/quickstart.sh FOLDER     your own .txt and .md files in FOLDER; a model that continues text
#
# A stage with complete output is skipped: after any stop, the same command resumes.
set -euo pipefail
unset CDPATH
folder=
if [ $# -gt 0 ]; then
  if [ ! -d "$1" ]; then
    echo "error: $1 is not a folder; name one with your .txt and .md files" >&2
    exit 2
  fi
  folder=$(cd "$1" && pwd)
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=end_to_end/cpu/fine_tuning.sh
source end_to_end/cpu/fine_tuning.sh
python=.venv/bin/python

stages=$([ -n "$folder" ] && echo 5 || echo 7)
number=0
stage() {
  number=$((number + 1))
  printf '\n==== %s (%d:%02d)\n' "$number/$stages $*" $((SECONDS / 60)) $((SECONDS % 60))
}

text=data/text
chat=data/chat
tokenizer=data/tokenizer_4096
run_name=d4_quickstart

stage "set-up"
MAXNANO_QUIET=1 bash setup.sh
if [ -n "$folder" ]; then
  # Other files are another text, tokenizer and run.
  id=$($python end_to_end/cpu/prepare_text.py --id "$text" "$folder")
  text=data/own_text_$id
  tokenizer=data/own_tokenizer_$id
  run_name=d4_own_text_$id
fi
config=(
  configs/base.yml model=d4_quickstart "dataset_path=$text" "tokenizer_path=$tokenizer"
)

stage "text"
$python end_to_end/cpu/prepare_text.py "$text" ${folder:+"$folder"}
if [ -z "$folder" ]; then
  $python end_to_end/cpu/prepare_chat.py "$chat"
fi

stage "tokenizer"
status=0
problem=$($python end_to_end/results.py tokenizer "${config[@]}" "run_name=$run_name" 2>&1) || status=$?
case $status in
  0) ;;
  1) $python MaxNano/train_tokenizer.py "${config[@]}" "run_name=$run_name" ;; # there is none yet
  *)                                                                           # one that was trained on other text
    echo "$problem" >&2
    exit "$status"
    ;;
esac

stage "training: the model learns to continue text"
$python MaxNano/train.py "${config[@]}" "run_name=$run_name"

last=$run_name
if [ -z "$folder" ]; then
  last=${run_name}_sft
  read -ra words <<<"$(sft_words "$chat")"
  stage "fine-tuning: the model learns to answer in turns"
  $python MaxNano/train.py "${config[@]}" stage=sft "load_from=$run_name" "run_name=$last" "${words[@]}"

  stage "a first chat"
  $python end_to_end/cpu/first_chat.py configs/base.yml "run_name=$last" <<'MESSAGES'
Hello!
What can you do?
Tell me a story about a fox.
Thank you!
3+4
MESSAGES
fi

stage "report"
$python MaxNano/report.py configs/base.yml "run_name=$last"

printf '\n==== done (%d:%02d)\n' $((SECONDS / 60)) $((SECONDS % 60))
$python - "runs/$run_name" "runs/$last" "$text" "$tokenizer" "${config[*]}" <<'PY'
import json, sys
run, last_run, text, tokenizer, config = sys.argv[1:]
rows = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
bpb = [row["bpb"] for row in rows if row.get("event") == "validation"]
last = [row for row in rows if "event" not in row][-1]
name = run.removeprefix("runs/")
verb = "chat with it" if last_run != run else "let it continue your text"
print(f"""validation bits per byte: {bpb[0]:.4f} before training, {bpb[-1]:.4f} after {last["step"] + 1} steps

text         {text}
tokenizer    {tokenizer}
checkpoints  {last_run}/checkpoints
metrics      {last_run}/metrics.jsonl, and curves in {last_run}/tensorboard
report       {last_run}/report.html

Next:
  {verb}:
    .venv/bin/python MaxNano/chat.py configs/base.yml run_name={last_run.removeprefix("runs/")}
  the same in a browser:
    EXTRAS=serve bash setup.sh
    .venv/bin/python MaxNano/serve.py configs/base.yml run_name={last_run.removeprefix("runs/")}
  train a model for twice as long:
    .venv/bin/python MaxNano/train.py {config} run_name={name}_long steps={2 * (last["step"] + 1)}
  list the config keys:
    .venv/bin/python MaxNano/train.py --help
  show what a larger model needs, without training it:
    .venv/bin/python MaxNano/train.py configs/base.yml model=d12 dry_run=true""")
PY
