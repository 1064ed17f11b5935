# shellcheck shell=bash
# Shared by the scripts of end_to_end/tpu, gpu and cpu: settings (knobs), stages, and the loop that
# restarts a preempted training. Sourced from the root of the repository, never run.

export PYTHONUNBUFFERED=1 # print lines at once, into a log file too

# ---- Messages

say() {
  printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*"
}

# Prints one line on stderr and exits with status 2, a mistake that the user can correct.
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

# default NAME VALUE: the default of a knob in this script. Call it before `knob NAME`.
default() {
  printf -v "default_$1" '%s' "$2"
}

# knob NAME DEFAULT HELP: declares a setting and reads the environment variable NAME.
knob() {
  local value=default_$1
  value=${!value-$2}
  knob_names="$knob_names $1"
  knob_lines="$knob_lines$(printf '  %-34s %s' "$1=$value" "$3")
"
  printf -v "$1" '%s' "${!1-$value}"
}

# Handles --help, --knobs and --dry-run, which sets `dry_run`.
dry_run=
parse_arguments() {
  local argument
  for argument in "$@"; do
    case $argument in
      -h | --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        printf '\nSettings, all of them environment variables, with their defaults:\n%s' "$knob_lines"
        exit 0
        ;;
      --knobs) # the names of all settings, for launch.sh
        echo "$knob_names"
        exit 0
        ;;
      --dry-run) dry_run=1 ;;
      *) fail "unknown argument $argument: see --help" ;;
    esac
  done
}

tpu_defaults() {
  default DEVICE tpu
  default CHIPS 8
  # Spot price of a v6e chip in us-central1 in US dollars, June 2026. It changes every month.
  default PRICE_PER_CHIP_HOUR 0.540137
}

# The settings of every script that trains.
training_knobs() {
  knob DEVICE auto "cpu, tpu or gpu: stop if JAX finds another device; auto: use what JAX finds"
  knob CHIPS "" "required number of chips; empty: any number"
  knob MODEL d12 "configs/models/<MODEL>.yml, or dN"
  knob NUM_ITERATIONS "" "optimizer steps; empty: the model's number"
  knob RUN_NAME "" "name of the run's folder; empty: derived from MODEL and NUM_ITERATIONS"
  knob DATASET_PATH "" "folder of parquet shards, the last one for validation; local or gs://; empty: download DATASET_NAME"
  knob DATASET_NAME karpathy/climbmix-400b-shuffle "dataset of the Hugging Face hub"
  knob DOWNLOAD_SHARDS 40 "number of its shards to train on"
  knob DOWNLOAD_PATH data "local folder for downloads"
  knob TOKENIZER_PATH data/tokenizer "folder of the tokenizer, which is trained if missing; local or gs://"
  knob OUTPUT runs "folder of all runs; local or gs://"
  knob EVALS bpb,core,samples "evaluations of the stage evaluation"
  knob CORE_BUNDLE "" "folder or archive of the CORE tasks; empty: download them"
  knob CHAT_DATA "" "folder or archive of the chat tasks; empty: download them"
  knob RL "" "1: run reinforcement learning in the stage rl"
  knob EXTRA "" "further key=value arguments, separated by spaces; later stages inherit them from the run"
  knob SFT_EXTRA "" "the same for fine-tuning and the chat tasks"
  knob RL_EXTRA "" "the same for reinforcement learning"
  knob PRICE_PER_CHIP_HOUR "" "US dollars; empty: print no price"
  knob MIN_DISK_GB 20 "free disk space that --dry-run requires"
  knob MAX_CRASHES 3 "how often to restart a training that crashed"
  knob RESTART_SECONDS 10 "pause before a restart, and between checks for the tokenizer of host 0"
  # SkyPilot numbers the hosts of a slice, GKE the hosts of each slice.
  knob HOST_INDEX "${SKYPILOT_NODE_RANK:-$((${MEGASCALE_SLICE_ID:-0} + ${TPU_WORKER_ID:-0}))}" \
    "index of this host; host 0 trains the tokenizer"
  knob STAGES "setup data tokenizer training result" "stages to run, in this order"
  knob MAXNANO_PYTHON .venv/bin/python "interpreter; the default is created by setup.sh if it is missing"
  knob SETUP "" "1: run setup.sh even if .venv exists"
}

# add_words WORDS: appends space-separated arguments to `config`.
add_words() {
  local words
  if [ -n "$1" ]; then
    read -ra words <<<"$1"
    config+=("${words[@]}")
  fi
}

# Sets `config`: the arguments for every program of MaxNano/.
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

# set_tuning NAME RUN EXTRA: sets `config` for stage NAME, which starts from the checkpoint of RUN.
# The config of RUN is the first argument: it sets the model, the tokenizer and the paths.
set_tuning() {
  local first=$OUTPUT/$2/config.yml
  case $OUTPUT in
    *://*) # configs are read from local files
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

# program NAME ARGUMENT...: runs a program of MaxNano/ with the config and further arguments.
program() {
  "$MAXNANO_PYTHON" "MaxNano/$1" "${config[@]}" "${@:2}"
}

# results COMMAND OPTION...: runs end_to_end/results.py.
results() {
  "$MAXNANO_PYTHON" end_to_end/results.py "$@" "${config[@]}"
}

# ---- Stages. A stage with complete output is skipped: the same command resumes after any stop.

run_stages() {
  local name number=0 names
  read -ra names <<<"$STAGES"
  for name in "${names[@]}"; do
    declare -f "stage_$name" >/dev/null || fail "STAGES has '$name', which is not a stage"
  done
  for name in "${names[@]}"; do
    number=$((number + 1))
    heading "$number/${#names[@]} $name"
    "stage_$name"
  done
  heading "done"
  if [[ " $STAGES " == *" result "* ]]; then
    say_how_to_chat
  fi
}

venv_is_missing() {
  # setup.sh writes the stamp last: an environment without it is incomplete.
  if [ "$MAXNANO_PYTHON" = .venv/bin/python ]; then
    [ ! -f .venv/maxnano-setup ] || [ ! -x "$MAXNANO_PYTHON" ]
  else
    command -v "$MAXNANO_PYTHON" >/dev/null || fail "MAXNANO_PYTHON=$MAXNANO_PYTHON does not exist"
    return 1
  fi
}

stage_setup() {
  if [ -n "$SETUP" ] || venv_is_missing; then
    MAXNANO_QUIET=1 DEVICE=$DEVICE bash setup.sh
  else
    echo "using $MAXNANO_PYTHON"
  fi
  if [ "$DEVICE" != cpu ]; then # every machine has a CPU
    check_devices
  fi
}

# Prints the devices that JAX finds. Fails if they differ from DEVICE and CHIPS: without this check a
# machine with a broken driver would train on its CPU.
check_devices() {
  "$MAXNANO_PYTHON" - "$DEVICE" "$CHIPS" <<'PY'
import sys
from MaxNano.distributed import runtime

wanted, chips = sys.argv[1:]
try:
    devices = runtime.find_devices()
except ValueError as error:
    sys.exit(f"error: {error}")
platform = devices[0].platform
if wanted not in ("auto", platform):
    sys.exit(f"JAX finds {len(devices)} {platform} and no {wanted}: does another process use the {wanted}, "
             f"or was .venv created for another device (DEVICE={wanted} bash setup.sh)?")
if chips and len(devices) != int(chips):
    sys.exit(f"JAX finds {len(devices)} {platform}, but CHIPS={chips}")
print(f"{len(devices)} x {devices[0].device_kind} ({platform})")
PY
}

stage_data() {
  local reason
  if [ -z "$DATASET_PATH" ]; then
    program data/download.py
  fi
  if ! reason=$(results text 2>&1); then
    fail "no text in DATASET_PATH=$DATASET_PATH: put at least two parquet shards with a text column there (${reason#*: })"
  fi
  echo "$reason"
}

# On a slice of several hosts this script runs on each host. Host 0 trains the tokenizer for all.
stage_tokenizer() {
  local deadline=$((SECONDS + 3600)) status=0 reason
  reason=$(results tokenizer 2>&1) || status=$?
  case $status in
    0)
      echo "$reason"
      return
      ;;
    2) fail "$(tail -n 1 <<<"$reason")" ;; # one that was trained on other text
  esac
  if [ "$HOST_INDEX" = 0 ]; then
    program train_tokenizer.py
    return
  fi
  say "waiting for the tokenizer of host 0"
  until results tokenizer 2>/dev/null; do
    [ "$SECONDS" -lt "$deadline" ] ||
      fail "timed out after 3600 s waiting for the tokenizer at TOKENIZER_PATH=$TOKENIZER_PATH, which host 0 trains: see its log, and use a path that all hosts share"
    sleep "$RESTART_SECONDS"
  done
}

stage_training() {
  local state
  state=$(results state)
  case $state in
    finished)
      results inputs # a run of another config or other data is refused
      echo "$OUTPUT/$RUN_NAME is finished"
      ;;
    new) train ;;
    *)
      say "resuming from step $state"
      train
      ;;
  esac
}

# Evaluates the run; finished evaluations are not repeated.
stage_evaluation() {
  if [ -z "$CORE_BUNDLE" ] && [[ ,$EVALS, == *,core,* ]]; then
    program data/download.py "download=[core]"
  fi
  program evaluate.py "evals=$EVALS"
}

# Fine-tunes on conversations, in the run RUN_NAME_sft.
stage_sft() {
  local base=$RUN_NAME
  local RUN_NAME=${base}_sft config=("${config[@]}") # dynamic scope: for the functions called here
  set_tuning sft "$base" "$SFT_EXTRA"
  if [ -z "$CHAT_DATA" ]; then
    program data/download.py "download=[chat]"
  fi
  stage_training
}

# Evaluates the fine-tuned model on the chat tasks.
stage_chat() {
  chat_tasks "${RUN_NAME}_sft"
}

# Evaluates the pretrained model on the chat tasks, for comparison.
stage_chat_before() {
  chat_tasks "$RUN_NAME"
}

# chat_tasks RUN: evaluates RUN on the chat tasks of SFT_EXTRA. Finished tasks are not repeated.
chat_tasks() {
  local base=$RUN_NAME
  local RUN_NAME=$1 config=("${config[@]}")
  set_tuning sft "$base" "$SFT_EXTRA"
  program evaluate.py evals=chat
}

# Reinforcement learning if RL=1, and its evaluation.
stage_rl() {
  if [ -z "$RL" ]; then
    echo "skipped: set RL=1 to run it"
    return
  fi
  local base=$RUN_NAME
  local RUN_NAME=${base}_rl config=("${config[@]}")
  set_tuning rl "${base}_sft" "$RL_EXTRA"
  stage_training
  program evaluate.py evals=chat
}

# Writes the report of the last run: see MaxNano/report.py.
stage_report() {
  local config=("${config[@]}" "run_name=$(last_run)")
  program report.py
}

# Prints the last run that started from RUN_NAME: _rl, _sft or itself.
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

# Prints the command that chats with the last run.
say_how_to_chat() {
  local folder=
  if [ "$OUTPUT" != runs ]; then
    printf -v folder ' base_output_directory=%q' "$OUTPUT"
  fi
  printf 'Chat with it:\n  %q MaxNano/chat.py configs/base.yml run_name=%s%s\n' \
    "$MAXNANO_PYTHON" "$(last_run)" "$folder"
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

# Starts train.py in the background, so that this script can forward signals. Not with `program`:
# its subshell would receive the signal instead.
start_training() {
  "$MAXNANO_PYTHON" MaxNano/train.py "${config[@]}" &
  trainer=$!
}

# Runs train.py once and sets `status`. A signal to this script is forwarded to train.py, which saves.
train_once() {
  start_training
  while true; do
    status=0
    wait "$trainer" || status=$?
    kill -0 "$trainer" 2>/dev/null || break # a signal ends `wait`, not the process
  done
  trainer=
}

# Trains to the last step. Status 75 means preempted and saved: restart, since the machine still runs.
# Crashes are counted. Status 2 is a mistake that only the user can correct.
train() {
  local crashes=0 status
  trap stop_training INT TERM
  while true; do
    train_once
    if [ -n "$stopping" ]; then
      say "stopped; the same command resumes here"
      exit 75
    fi
    case $status in
      0) break ;;
      2) exit 2 ;;
      75) say "preempted after saving; restarting in $RESTART_SECONDS s" ;;
      143) say "preempted before saving; restarting in $RESTART_SECONDS s" ;; # SIGTERM during start-up
      *)
        crashes=$((crashes + 1))
        if [ "$crashes" -gt "$MAX_CRASHES" ]; then
          say "train.py ended with status $status, crash $crashes: giving up"
          exit 1
        fi
        say "train.py ended with status $status; restarting in $RESTART_SECONDS s ($crashes of $MAX_CRASHES)"
        ;;
    esac
    sleep "$RESTART_SECONDS"
  done
  trap - INT TERM
}

# ---- Preflight

problems=0

# check NAME COMMAND...: runs a check and prints ok or FAIL with its output.
check() {
  local printed name=$1
  shift
  if printed=$("$@" 2>&1); then
    printf 'ok    %-10s %s\n' "$name" "$printed"
  else
    problems=$((problems + 1))
    printf 'FAIL  %-10s %s\n' "$name" "$(tail -n 1 <<<"$printed")"
  fi
}

# Prints the nearest existing parent folder of a path.
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
    *://*) folder=. ;; # text and compiled programs are stored locally
    *) folder=$(existing_folder "$OUTPUT") ;;
  esac
  free=$(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1000000) }')
  echo "$free GB free in $folder, $MIN_DISK_GB required"
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
if "://" in sys.argv[1]:  # only a write shows whether the bucket is writable
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".preflight").write_text("")
    (folder / ".preflight").unlink()
else:
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        sys.exit(f"{folder} is write-protected")
print(f"{sys.argv[1]} is writable")
PY
}

check_data() {
  if [ -n "$DATASET_PATH" ]; then
    results text
  else
    echo "$DATASET_NAME, $DOWNLOAD_SHARDS shards and one for validation, will be downloaded into $DOWNLOAD_PATH"
  fi
}

check_core() {
  if [ -n "$CORE_BUNDLE" ]; then
    results core
  else
    echo "the tasks will be downloaded into $DOWNLOAD_PATH"
  fi
}

check_chat() {
  if [ -z "$CHAT_DATA" ]; then
    echo "the tasks will be downloaded into $DOWNLOAD_PATH"
    return
  fi
  local config=("${config[@]}" stage=sft "chat_data=$CHAT_DATA")
  add_words "$SFT_EXTRA"
  results chat
}

check_tokenizer() {
  local status=0 reason
  reason=$(results tokenizer 2>&1) || status=$?
  case $status in
    1) echo "will be trained into $TOKENIZER_PATH" ;;
    *) echo "$reason" ;;
  esac
  [ "$status" -lt 2 ]
}

# Checks everything that can be checked for free: no training, no compilation, and no writes except a
# temporary file in the bucket.
preflight() {
  check disk check_disk
  if venv_is_missing; then
    problems=$((problems + 1))
    echo "FAIL  python     .venv is missing: run DEVICE=$DEVICE bash setup.sh"
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

# Runs a speedrun script after it has declared its settings.
speedrun() {
  set_config
  if [ -n "$dry_run" ]; then
    preflight
  else
    run_stages
  fi
}
