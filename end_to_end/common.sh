# shellcheck shell=bash
# What the scripts of end_to_end/tpu and end_to_end/gpu share: knobs, stages, and the loop that starts a preempted
# training again. Sourced from the root of the repository, never run.

export PYTHONUNBUFFERED=1 # lines are seen when they are printed, in a log file too

# ---- Words

say() {
  printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*"
}

# One line on stderr, and out: the user's to mend.
fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

heading() {
  printf '\n==== %s (%d:%02d)\n' "$*" $((SECONDS / 60)) $((SECONDS % 60))
}

# ---- Knobs: environment variables with a default

knob_names=
knob_lines=

# default NAME VALUE: what NAME is in this script where the environment does not give it; before the knob itself.
default() {
  printf -v "default_$1" '%s' "$2"
}

# knob NAME DEFAULT HELP: reads the environment variable NAME.
knob() {
  local value=default_$1
  value=${!value-$2}
  knob_names="$knob_names $1"
  knob_lines="$knob_lines$(printf '  %-34s %s' "$1=$value" "$3")
"
  printf -v "$1" '%s' "${!1-$value}"
}

# Answers --help and --knobs; sets `dry_run` where --dry-run is among the arguments.
dry_run=
parse_arguments() {
  local argument
  for argument in "$@"; do
    case $argument in
      -h | --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        printf '\nKnobs, all of them environment variables, with their defaults:\n%s' "$knob_lines"
        exit 0
        ;;
      --knobs) # their names, for launch.sh
        echo "$knob_names"
        exit 0
        ;;
      --dry-run) dry_run=1 ;;
      *) fail "$argument is no argument of this script: see --help" ;;
    esac
  done
}

tpu_defaults() {
  default DEVICE tpu
  default CHIPS 8
  # A v6e chip of a spot machine in us-central1, in US dollars, as of June 2026. It changes every month.
  default PRICE_PER_CHIP_HOUR 0.540137
}

# What every script that trains can be told.
training_knobs() {
  knob DEVICE auto "cpu, tpu or gpu: training elsewhere is refused; auto: what JAX finds"
  knob CHIPS "" "chips that must be there; empty: any number"
  knob MODEL d12 "configs/models/<MODEL>.yml, or dN"
  knob NUM_ITERATIONS "" "optimizer steps; empty: those of the model"
  knob RUN_NAME "" "the run's folder; empty: after MODEL and NUM_ITERATIONS"
  knob DATASET_PATH "" "folder of parquet shards, the last one held out; local or gs://; empty: DATASET_NAME is downloaded"
  knob DATASET_NAME karpathy/climbmix-400b-shuffle "data set of the Hugging Face hub"
  knob DOWNLOAD_SHARDS 40 "shards of it to train on"
  knob DOWNLOAD_PATH data "local folder below which downloads are kept"
  knob TOKENIZER_PATH data/tokenizer "folder of the tokenizer, trained where it is missing; local or gs://"
  knob OUTPUT runs "folder of all runs; local or gs://"
  knob EVALS bpb,core,samples "what the stage evaluation evaluates"
  knob CORE_BUNDLE "" "folder or archive of the CORE tasks; empty: it is downloaded"
  knob CHAT_DATA "" "folder or archive of the chat tasks; empty: they are downloaded"
  knob RL "" "1: reinforcement learning too, in the stage rl"
  knob EXTRA "" "further key=value words of configs/base.yml, separated by blanks; later stages have them from the run"
  knob SFT_EXTRA "" "the same for fine-tuning and the chat tasks"
  knob RL_EXTRA "" "the same for reinforcement learning"
  knob PRICE_PER_CHIP_HOUR "" "US dollars; empty: no price is printed"
  knob MIN_DISK_GB 20 "free disk that --dry-run wants"
  knob MAX_CRASHES 3 "times that a training which fell over is started again"
  knob RESTART_SECONDS 10 "pause before training is started again, or looked again for the tokenizer of host 0"
  # SkyPilot numbers the hosts of a slice, GKE those of each slice.
  knob HOST_INDEX "${SKYPILOT_NODE_RANK:-$((${MEGASCALE_SLICE_ID:-0} + ${TPU_WORKER_ID:-0}))}" \
    "which of a slice's hosts this is: 0 trains the tokenizer"
  knob STAGES "setup data tokenizer training result" "what to do, in this order"
  knob MAXNANO_PYTHON .venv/bin/python "interpreter; by default that of setup.sh, which is called where .venv is missing"
  knob SETUP "" "1: call setup.sh although .venv is there"
}

# add_words WORDS: adds to `config` what a knob has, separated by blanks.
add_words() {
  local words
  if [ -n "$1" ]; then
    read -ra words <<<"$1"
    config+=("${words[@]}")
  fi
}

# After the knobs: the words that every program of MaxNano/ is called with.
set_config() {
  RUN_NAME=${RUN_NAME:-$MODEL${NUM_ITERATIONS:+_${NUM_ITERATIONS}steps}}
  config=(
    configs/base.yml "model=$MODEL" "run_name=$RUN_NAME" "base_output_directory=$OUTPUT"
    "tokenizer_path=$TOKENIZER_PATH" "download_path=$DOWNLOAD_PATH"
    "core_bundle=${CORE_BUNDLE:-$DOWNLOAD_PATH/core/eval_bundle.zip}"
  )
  if [ -n "$DATASET_PATH" ]; then
    config+=("dataset_path=$DATASET_PATH")
  else
    config+=(dataset_type=hf "dataset_name=$DATASET_NAME" "download_shards=$DOWNLOAD_SHARDS")
  fi
  if [ -n "$NUM_ITERATIONS" ]; then
    config+=("steps=$NUM_ITERATIONS")
  fi
  add_words "$EXTRA"
  case $DEVICE in
    cpu) export JAX_PLATFORMS=cpu ;;
    auto | tpu | gpu) ;;
    *) fail "DEVICE is '$DEVICE', but must be auto, cpu, tpu or gpu" ;;
  esac
}

# set_tuning NAME RUN EXTRA: the words for the stage NAME behind pretraining, which starts from RUN. That run's own
# config comes first and brings the model, the tokenizer and where things lie.
set_tuning() {
  local first=$OUTPUT/$2/config.yml
  case $OUTPUT in
    *://*) # a config is read from a file of this machine
      first=$DOWNLOAD_PATH/configs/$2.yml
      mkdir -p "$DOWNLOAD_PATH/configs"
      results saved "--run=$2" >"$first"
      ;;
  esac
  config=(
    "$first" "stage=$1" "load_from=$2" "run_name=$RUN_NAME" "base_output_directory=$OUTPUT"
    "tokenizer_path=$TOKENIZER_PATH" "download_path=$DOWNLOAD_PATH"
  )
  if [ -n "$CHAT_DATA" ]; then
    config+=("chat_data=$CHAT_DATA")
  fi
  add_words "$3"
}

# program NAME ARGUMENT...: a program of MaxNano/ with the config, further words behind.
program() {
  "$MAXNANO_PYTHON" "MaxNano/$1" "${config[@]}" "${@:2}"
}

# results COMMAND OPTION...: see end_to_end/results.py.
results() {
  "$MAXNANO_PYTHON" end_to_end/results.py "$@" "${config[@]}"
}

# ---- Stages: each is skipped where its output is whole, so that the same command goes on after any stop

run_stages() {
  local name number=0 names
  read -ra names <<<"$STAGES"
  for name in "${names[@]}"; do
    declare -f "stage_$name" >/dev/null || fail "STAGES has '$name', which is no stage"
  done
  for name in "${names[@]}"; do
    number=$((number + 1))
    heading "$number/${#names[@]} $name"
    "stage_$name"
  done
  heading "done"
}

venv_is_missing() {
  # The stamp is written last: an environment without one is half made.
  if [ "$MAXNANO_PYTHON" = .venv/bin/python ]; then
    [ ! -f .venv/maxnano-setup ] || [ ! -x "$MAXNANO_PYTHON" ]
  else
    command -v "$MAXNANO_PYTHON" >/dev/null || fail "MAXNANO_PYTHON=$MAXNANO_PYTHON is not there"
    return 1
  fi
}

stage_setup() {
  if [ -n "$SETUP" ] || venv_is_missing; then
    MAXNANO_QUIET=1 DEVICE=$DEVICE bash setup.sh
  else
    echo "$MAXNANO_PYTHON is there"
  fi
  if [ "$DEVICE" != cpu ]; then # a CPU is there, and was asked for: nothing to see
    check_devices
  fi
}

# Says what JAX finds; fails where that is another kind or number than DEVICE and CHIPS want. Without this a machine
# whose driver is broken would train on its CPU.
check_devices() {
  "$MAXNANO_PYTHON" - "$DEVICE" "$CHIPS" <<'PY'
import sys
from MaxNano.distributed import runtime

wanted, chips = sys.argv[1:]
try:
    devices = runtime.find_devices()
except ValueError as error:
    sys.exit(f"error: {error}")
found = devices[0].platform
if wanted not in ("auto", found):
    sys.exit(f"JAX finds {len(devices)} {found} here and no {wanted}: is the {wanted} in use by another process, "
             f"or .venv made for another device (DEVICE={wanted} bash setup.sh)?")
if chips and len(devices) != int(chips):
    sys.exit(f"JAX finds {len(devices)} {found} and CHIPS={chips} are wanted")
print(f"{len(devices)} x {devices[0].device_kind} ({found})")
PY
}

stage_data() {
  local reason
  if [ -z "$DATASET_PATH" ]; then
    program data/download.py
  fi
  if ! reason=$(results text 2>&1); then
    fail "no text: put at least two parquet shards with a column of text into DATASET_PATH=$DATASET_PATH (${reason#*: })"
  fi
  echo "$reason"
}

# On a slice of several hosts this script runs on each of them, and one tokenizer is for all.
stage_tokenizer() {
  local deadline=$((SECONDS + 3600))
  if results tokenizer 2>/dev/null; then
    return
  elif [ "$HOST_INDEX" = 0 ]; then
    program train_tokenizer.py
    return
  fi
  say "waiting for the tokenizer that host 0 trains"
  until results tokenizer 2>/dev/null; do
    [ "$SECONDS" -lt "$deadline" ] ||
      fail "timed out after 3600 s waiting for the tokenizer at TOKENIZER_PATH=$TOKENIZER_PATH, which host 0 trains: see its log, and take a path that all hosts share"
    sleep "$RESTART_SECONDS"
  done
}

stage_training() {
  local state
  state=$(results state)
  case $state in
    finished) echo "$OUTPUT/$RUN_NAME is finished" ;;
    new) train ;;
    *)
      say "going on from step $state"
      train
      ;;
  esac
}

# What is evaluated already is not evaluated again.
stage_evaluation() {
  if [ -z "$CORE_BUNDLE" ] && [[ ,$EVALS, == *,core,* ]]; then
    program data/download.py "download=[core]"
  fi
  program evaluate.py "evals=$EVALS"
}

# Fine-tuning: conversations, in a run of its own.
stage_sft() {
  local base=$RUN_NAME
  local RUN_NAME=${base}_sft config=("${config[@]}") # for what is called from here
  set_tuning sft "$base" "$SFT_EXTRA"
  if [ -z "$CHAT_DATA" ]; then
    program data/download.py "download=[chat]"
  fi
  stage_training
}

# The chat tasks, of the fine-tuned model.
stage_chat() {
  chat_tasks "${RUN_NAME}_sft"
}

# The same of the model that it was made from, to compare with.
stage_chat_before() {
  chat_tasks "$RUN_NAME"
}

# chat_tasks RUN: puts to RUN the tasks of SFT_EXTRA. What is answered already is not asked again.
chat_tasks() {
  local base=$RUN_NAME
  local RUN_NAME=$1 config=("${config[@]}")
  set_tuning sft "$base" "$SFT_EXTRA"
  program evaluate.py evals=chat
}

# Reinforcement learning where it is asked for, and what came of it.
stage_rl() {
  if [ -z "$RL" ]; then
    echo "not asked for: RL=1 does it"
    return
  fi
  local base=$RUN_NAME
  local RUN_NAME=${base}_rl config=("${config[@]}")
  set_tuning rl "${base}_sft" "$RL_EXTRA"
  stage_training
  program evaluate.py evals=chat
}

# One page of everything: see MaxNano/report.py.
stage_report() {
  local config=("${config[@]}" "run_name=$(last_run)")
  program report.py
}

# The run that ends the line of RUN_NAME.
last_run() {
  local name=$RUN_NAME stage state base=("${config[@]}")
  for stage in sft rl; do
    local config=("${base[@]}" "run_name=${RUN_NAME}_$stage")
    state=$(results state)
    [ "$state" = new ] || name=${RUN_NAME}_$stage
  done
  echo "$name"
}

stage_result() {
  results summary "--chips=$CHIPS" "--price=$PRICE_PER_CHIP_HOUR"
}

# ---- Training

trainer=
stopping=

stop_training() {
  stopping=1
  if [ -n "$trainer" ]; then
    kill -TERM "$trainer" 2>/dev/null || true
  fi
}

# In the background, so that a signal to this script can be handed on. Not by `program`: its shell would get the signal.
start_training() {
  "$MAXNANO_PYTHON" MaxNano/train.py "${config[@]}" &
  trainer=$!
}

# Runs train.py to the end of one process and sets `status`. Asked to stop, this script asks train.py, which saves.
train_once() {
  start_training
  while true; do
    status=0
    wait "$trainer" || status=$?
    kill -0 "$trainer" 2>/dev/null || break # a signal ends the waiting, not the process
  done
  trainer=
}

# Trains to the last step: status 75 says saved and preempted, and the machine is still there, so on with it.
# Crashes count, and 2 is the user's to mend.
train() {
  local crashes=0 status
  trap stop_training INT TERM
  while true; do
    train_once
    if [ -n "$stopping" ]; then
      say "stopped; the same command goes on from here"
      exit 75
    fi
    case $status in
      0) break ;;
      2) exit 2 ;;
      75) say "preempted and saved; starting again in $RESTART_SECONDS s" ;;
      143) say "preempted before it could save; starting again in $RESTART_SECONDS s" ;; # by SIGTERM, as it started
      *)
        crashes=$((crashes + 1))
        if [ "$crashes" -gt "$MAX_CRASHES" ]; then
          say "train.py ended with status $status, crash $crashes: giving up"
          exit 1
        fi
        say "train.py ended with status $status; starting again in $RESTART_SECONDS s ($crashes of $MAX_CRASHES)"
        ;;
    esac
    sleep "$RESTART_SECONDS"
  done
  trap - INT TERM
}

# ---- Preflight

problems=0

# check NAME COMMAND...: its output, or that it failed and why.
check() {
  local said name=$1
  shift
  if said=$("$@" 2>&1); then
    printf 'ok    %-10s %s\n' "$name" "$said"
  else
    problems=$((problems + 1))
    printf 'FAIL  %-10s %s\n' "$name" "$(tail -n 1 <<<"$said")"
  fi
}

# The nearest folder of a path that exists.
existing_folder() {
  local folder=$1
  while [ ! -d "$folder" ]; do
    folder=$(dirname "$folder")
  done
  echo "$folder"
}

check_disk() {
  local folder free
  case $OUTPUT in
    *://*) folder=. ;; # runs lie elsewhere; text and compiled programs do not
    *) folder=$(existing_folder "$OUTPUT") ;;
  esac
  free=$(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1000000) }')
  echo "$free GB free in $folder, $MIN_DISK_GB wanted"
  [ "$free" -ge "$MIN_DISK_GB" ]
}

check_python() {
  "$MAXNANO_PYTHON" -c 'import platform, importlib.metadata as m; print("Python", platform.python_version(), "jax", m.version("jax"))'
}

check_output() {
  "$MAXNANO_PYTHON" - "$OUTPUT/$RUN_NAME" <<'PY'
import os, sys
from etils import epath

folder = epath.Path(sys.argv[1]).expanduser()
if "://" in sys.argv[1]:  # only writing tells whether a bucket may be written
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".preflight").write_text("")
    (folder / ".preflight").unlink()
else:
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        sys.exit(f"{folder} is write-protected")
print(f"{sys.argv[1]} can be written")
PY
}

check_data() {
  if [ -n "$DATASET_PATH" ]; then
    results text
  else
    echo "$DATASET_NAME, $DOWNLOAD_SHARDS shards and one for validation, is downloaded into $DOWNLOAD_PATH where it is missing"
  fi
}

check_core() {
  if [ -n "$CORE_BUNDLE" ]; then
    results core
  else
    echo "the tasks are downloaded into $DOWNLOAD_PATH where they are missing"
  fi
}

check_chat() {
  if [ -z "$CHAT_DATA" ]; then
    echo "the tasks are downloaded into $DOWNLOAD_PATH where they are missing"
    return
  fi
  local config=("${config[@]}" stage=sft "chat_data=$CHAT_DATA")
  add_words "$SFT_EXTRA"
  results chat
}

check_tokenizer() {
  results tokenizer 2>/dev/null || echo "will be trained into $TOKENIZER_PATH"
}

# What can be known before the first dollar: no training, no compiling, nothing written but a trial file in a bucket.
preflight() {
  check disk check_disk
  if venv_is_missing; then
    problems=$((problems + 1))
    echo "FAIL  python     .venv is not there: DEVICE=$DEVICE bash setup.sh makes it"
  else
    check python check_python
    check devices check_devices
    check data check_data
    check tokenizer check_tokenizer
    if [[ " $STAGES " == *" evaluation "* && ,$EVALS, == *,core,* ]]; then
      check core check_core
    fi
    if [[ " $STAGES " == *" sft "* ]]; then
      check chat check_chat
    fi
    check output check_output
    check run results state
    echo
    program train.py dry_run=true || problems=$((problems + 1))
  fi
  echo
  if [ "$problems" -gt 0 ]; then
    fail "$problems checks failed"
  fi
  echo "ready; nothing was trained"
}

# The whole of a speedrun: what a script does after its knobs.
speedrun() {
  set_config
  if [ -n "$dry_run" ]; then
    preflight
  else
    run_stages
  fi
}
