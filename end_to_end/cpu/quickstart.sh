#!/usr/bin/env bash
# Trains a small language model on real text from a fresh clone, on a CPU, in about ten minutes.
#
#   bash end_to_end/cpu/quickstart.sh            speeches and encyclopedia articles (17 MB)
#   bash end_to_end/cpu/quickstart.sh FOLDER     your own .txt and .md files in FOLDER
#
# A stage with complete output is skipped: after any stop, the same command resumes.
set -euo pipefail
unset CDPATH
folder=
if [ $# -gt 0 ]; then
  folder=$(cd "$1" && pwd) || exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python

stage() {
  printf '\n==== %s (%d:%02d)\n' "$*" $((SECONDS / 60)) $((SECONDS % 60))
}

text=data/text
tokenizer=data/tokenizer_4096
run_name=d4_quickstart

stage "1/4 set-up"
MAXNANO_QUIET=1 bash setup.sh
if [ -n "$folder" ]; then
  # Other files are another text, tokenizer and run.
  id=$($python end_to_end/cpu/prepare_text.py --id "$text" "$folder")
  text=data/own_text_$id
  tokenizer=data/own_tokenizer_$id
  run_name=d4_own_text_$id
fi
config=(
  configs/base.yml model=d4_quickstart "run_name=$run_name" "dataset_path=$text" "tokenizer_path=$tokenizer"
)

stage "2/4 text"
$python end_to_end/cpu/prepare_text.py "$text" ${folder:+"$folder"}

stage "3/4 tokenizer"
status=0
problem=$($python end_to_end/results.py tokenizer "${config[@]}" 2>&1) || status=$?
case $status in
  0) ;;
  1) $python MaxNano/train_tokenizer.py "${config[@]}" ;; # there is none yet
  *)                                                      # one that was trained on other text
    echo "$problem" >&2
    exit "$status"
    ;;
esac

stage "4/4 training"
$python MaxNano/train.py "${config[@]}"

$python MaxNano/report.py configs/base.yml "run_name=$run_name"

stage "done"
$python - "runs/$run_name" "$text" "$tokenizer" "configs/base.yml model=d4_quickstart dataset_path=$text tokenizer_path=$tokenizer" <<'PY'
import json, sys
run, text, tokenizer, config = sys.argv[1:]
rows = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
bpb = [row["bpb"] for row in rows if row.get("event") == "validation"]
last = [row for row in rows if "event" not in row][-1]
print(f"""validation bits per byte: {bpb[0]:.4f} before training, {bpb[-1]:.4f} after {last["step"] + 1} steps

text         {text}
tokenizer    {tokenizer}
checkpoints  {run}/checkpoints
metrics      {run}/metrics.jsonl, and curves in {run}/tensorboard
report       {run}/report.html: curves, samples and how much they repeat themselves

Next:
  let it continue your text:
    .venv/bin/python MaxNano/chat.py configs/base.yml run_name={run.removeprefix("runs/")}
  train a model for twice as long:
    .venv/bin/python MaxNano/train.py {config} run_name={run.removeprefix("runs/")}_long steps={2 * (last["step"] + 1)}
  list the config keys:
    .venv/bin/python MaxNano/train.py --help
  show what a larger model needs, without training it:
    .venv/bin/python MaxNano/train.py configs/base.yml model=d12 dry_run=true""")
PY
