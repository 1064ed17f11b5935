"""The parts of first_hour.sh: runs each within the time that is left and writes down what it found.

Every part is a process of its own with a time limit. It imports nothing but the standard library,
so that a missing package stops only the part that needs it.
"""

import argparse
import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 4096  # of the generated text's tokenizer
OFFLINE = ROOT / "end_to_end/offline"
STAND_INS = ("ml_collections", "filelock")  # folders of OFFLINE, for packages that are missing
PACKAGES = (*STAND_INS, "jax", "flax", "optax", "orbax", "tensorboardX", "tiktoken", "pytest")

Row = dict[str, Any]


class Part(NamedTuple):
    """One part: what it runs, how much time it needs at least and may take at most."""

    run: Callable[["Hour", float], Row]  # (hour, seconds) -> its result
    least_seconds: float
    most_seconds: float
    share: float = 1.0  # of the time that is left, at most, if that is least_seconds


class Failed(Exception):
    """A part has no result; the message says why."""


def is_installed(package: str) -> bool:
    """Whether this Python has a package."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


class Hour:
    """The folder of the results, the device, and the environment of all parts."""

    def __init__(self, output: Path, seconds: float):
        self.output = output
        self.ends = time.monotonic() + seconds
        self.device: Row = {}
        output.mkdir(parents=True, exist_ok=True)
        paths = [str(ROOT)]
        paths += [str(OFFLINE / name) for name in STAND_INS if not is_installed(name)]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    @property
    def on_cpu(self) -> bool:
        """Whether there is no accelerator, so that tiny models are measured."""
        return self.device.get("platform", "cpu") == "cpu"

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.ends - time.monotonic()

    def python(self, name: str, seconds: float, *words: str) -> str:
        """The output of a Python program, which is also in NAME.log. Raises Failed."""
        log = self.output / f"{name}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:  # also what the program has started, and after an interrupt
                _end_group(process)
        text = log.read_text(errors="replace")
        if status is None:
            raise Failed(f"timed out after {seconds:.0f} s, see {log}")
        if status:
            lines = [line for line in text.splitlines() if line.strip()]
            raise Failed(f"exit status {status}: {lines[-1] if lines else 'no output'}, see {log}")
        return text


def _end_group(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def last_json(text: str) -> Row:
    """The last line that is a JSON object. Raises Failed if there is none."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    raise Failed("printed no result")


def measure(hour: Hour, name: str, seconds: float, *words: str) -> Row:
    """The last result that a benchmark printed; with `failure` if it ended early. Raises Failed."""
    try:
        return last_json(hour.python(name, seconds, *words))
    except Failed as error:
        try:
            row = last_json((hour.output / f"{name}.log").read_text(errors="replace"))
        except Failed:
            raise error from None
        return {**row, "failure": str(error)}


# ---- Parts --------------------------------------------------------------------------------------

DEVICE = """
import importlib.metadata, json, platform, jax
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
device = jax.devices()[0]
product = jax.jit(lambda a: a @ a)(jax.numpy.ones((256, 256), "bfloat16"))
assert float(product[0, 0]) == 256
print(json.dumps(dict(
    kind=device.device_kind, platform=device.platform, count=jax.device_count(),
    memory_gib=round((device.memory_stats() or {}).get("bytes_limit", 0) / 2**30, 1) or None,
    python=platform.python_version(),
    versions={name: version(name) for name in ("jax", "jaxlib", "libtpu", "flax", "optax", "jax-cuda13-plugin")},
)))
"""


def find_device(hour: Hour, seconds: float) -> Row:
    """Devices and versions, after a matrix product."""
    hour.device = last_json(hour.python("device", seconds, "-c", DEVICE))
    missing = [name for name in PACKAGES if not is_installed(name)]
    return {**hour.device, "packages_missing": missing}


def test_device(hour: Hour, seconds: float) -> Row:
    """The tests that need the device. Their files are found by the marks, with no import."""
    if hour.on_cpu:
        raise Failed("no accelerator: nothing to test")
    if not is_installed("pytest"):
        raise Failed("pytest is not installed")
    marked = re.compile(r"pytest\.mark\.(gpu|tpu)\b")
    names = [
        str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if marked.search(p.read_text())
    ]
    words = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu or tpu", *names]
    if not is_installed("hypothesis") or not is_installed("pytest_timeout"):
        words[2:2] = ["-c", os.devnull, "--rootdir", str(ROOT), "--noconftest"]
    failure = None
    try:
        hour.python("tests", seconds, *words)
    except Failed as error:
        failure = str(error)
    return count_tests((hour.output / "tests.log").read_text(), failure)


def count_tests(log: str, failure: str | None) -> Row:
    """What `pytest -v` printed, also if it was ended early."""
    outcomes = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", log, re.MULTILINE)
    result: Row = {"passed": sum(outcome == "PASSED" for _, outcome in outcomes)}
    result["failed"] = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    if failure:
        result["failure"] = failure
    if not result["passed"] and not result["failed"]:
        raise Failed(failure or "no test ran")
    return result


def model_words(hour: Hour, large: bool) -> list[str]:
    """The config of the model whose step is measured: d12 or d24, on a CPU one of a few seconds."""
    if hour.on_cpu:
        shape = ["max_target_length=128", f"vocab_size={VOCABULARY}"]
        return [f"model=d{4 if large else 2}", *shape, "global_batch_tokens=1024"]
    return [f"model=d{24 if large else 12}", "global_batch_tokens=131072"]


def measure_step(hour: Hour, seconds: float, large: bool) -> Row:
    """Time of the train step; beside nanochat's where NANOCHAT is set."""
    name = "step_large" if large else "step_small"
    words = ["benchmarks/step_time.py", "configs/base.yml", *model_words(hour, large)]
    return measure(hour, name, seconds, *words)


PREPARE = """
import json, sys
from pathlib import Path
from MaxNano import pyconfig
from MaxNano.data import stream
from MaxNano.tokenization.bpe import NANOCHAT_PATTERN, BpeTokenizer
from MaxNano.tokenization.tokenizer import SPECIAL_TOKENS

folder, size = Path(sys.argv[1]), int(sys.argv[2])
config = pyconfig.initialize(["configs/base.yml", "dataset_type=synthetic"])
ranks = {bytes([byte]): byte for byte in range(256)}
for text in stream.iterate_texts(config, "train"):
    for word in text.split():
        if len(ranks) < size - len(SPECIAL_TOKENS):
            ranks.setdefault(b" " + word.encode(), len(ranks))
    if len(ranks) >= size - len(SPECIAL_TOKENS):
        break
BpeTokenizer(NANOCHAT_PATTERN, ranks).save(folder / "tokenizer")

bundle = folder / "core"
(bundle / "eval_data").mkdir(parents=True, exist_ok=True)
words = [word.decode() for word in list(ranks)[256:1256]]
listed, table = [], ["Eval Task,Random baseline"]
kinds = {"multiple_choice": 25, "schema": 50, "language_modeling": 0}
for number, (kind, baseline) in enumerate(kinds.items()):
    rows = []
    for i in range(200):
        pick = lambda k: "".join(words[(i * 37 + j * 101 + number) % len(words)] for j in range(k)).strip()
        if kind == "multiple_choice":
            rows.append({"query": pick(20), "choices": [pick(j + 2) for j in range(4)], "gold": i % 4})
        elif kind == "schema":
            rows.append({"context_options": [pick(12), pick(13)], "continuation": pick(4), "gold": i % 2})
        else:
            rows.append({"context": pick(20), "continuation": pick(1)})
    (bundle / f"eval_data/{kind}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    listed.append(f"- {{label: {kind}, icl_task_type: {kind}, num_fewshot: [3], dataset_uri: {kind}.jsonl}}")
    table.append(f"{kind},{baseline}")
(bundle / "core.yaml").write_text("icl_tasks:\\n" + "\\n".join(listed) + "\\n")
(bundle / "eval_meta_data.csv").write_text("\\n".join(table) + "\\n")
"""


def run_words(hour: Hour) -> list[str]:
    """The config of the run that is trained: generated text, a model of seconds per step at most."""
    model = ["model=d8", "global_batch_tokens=65536"]
    if hour.on_cpu:
        model = ["model=d2", "max_target_length=128", "global_batch_tokens=1024"]
    return [
        "configs/base.yml",
        *model,
        f"vocab_size={VOCABULARY}",
        "dataset_type=synthetic",
        f"tokenizer_path={hour.output / 'tokenizer'}",
        f"base_output_directory={hour.output}",
        "run_name=trained",
    ]


def train(hour: Hour, seconds: float) -> Row:
    """200 steps on generated text, or as many as fit; the loss must fall."""
    begin = time.monotonic()
    hour.python("prepare", seconds, "-c", PREPARE, str(hour.output), str(VOCABULARY))
    words = [
        "steps=200",
        "eval_interval=0",
        "sample_interval=0",
        "warmup_steps=10",
    ]
    if not is_installed("tensorboardX"):
        words.append("tensorboard=false")
    failure = None
    try:
        rest = seconds - (time.monotonic() - begin)
        hour.python("train", rest, "MaxNano/train.py", *run_words(hour), *words)
    except Failed as error:
        failure = str(error)
    path = hour.output / "trained/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [row for row in rows if "event" not in row]
    if len(steps) < 20:
        raise Failed(failure or f"only {len(steps)} steps")
    first, last = steps[0]["loss"], steps[-1]["smoothed_loss"]
    timed = sorted(row["milliseconds"] for row in steps[11:])
    keys = ("tokens_per_second", "tflops_per_second", "mfu", "skipped_in_all")
    result = {"steps": len(steps), "loss": [first, last], "milliseconds": timed[len(timed) // 2]}
    result |= {key: steps[-1][key] for key in keys if key in steps[-1]}
    if failure:
        result["failure"] = failure
    if not last < first:
        raise Failed(f"the loss did not fall: {json.dumps(result)}")
    return result


def decode(hour: Hour, seconds: float) -> Row:
    """Decoding by batch size."""
    words = model_words(hour, False)[:-1] + [
        "run_name=none",
        f"base_output_directory={hour.output}",
    ]
    return measure(hour, "decode", seconds, "benchmarks/decode.py", "configs/base.yml", *words)


def measure_core(hour: Hour, seconds: float) -> Row:
    """Questions per second on generated CORE tasks, with the run that was trained."""
    if not (hour.output / "trained/checkpoints").exists():
        raise Failed("needs the checkpoint of the part train")
    words = [*run_words(hour), f"core_bundle={hour.output / 'core'}"]
    words.append(f"core_max_per_task={8 if hour.on_cpu else 20}")
    return measure(hour, "core", seconds, "benchmarks/core.py", *words)


def tune(hour: Hour, seconds: float) -> Row:
    """The search for the fastest settings, in what is left: its row, or what it has measured."""
    minutes = max(1.0, (seconds - 60) / 60)
    words = [*model_words(hour, False), f"base_output_directory={hour.output}"]
    words.append(f"tune_minutes={minutes:.1f}")
    try:
        hour.python("tune", seconds, "MaxNano/tune.py", "configs/base.yml", *words)
    except Failed as error:
        lines = (hour.output / "tune.log").read_text(errors="replace").splitlines()
        measured = [line for line in lines if " ms per step" in line]
        if not measured:
            raise
        return {"failure": str(error), "measured": measured}
    newest = max((hour.output / "tune").glob("*.csv"), key=lambda path: path.stat().st_mtime)
    (row,) = csv.DictReader(newest.read_text().splitlines())
    return row


# The shares leave something for the parts that follow.
PARTS = {
    "device": Part(find_device, 10, 120),
    "tests": Part(test_device, 60, 600, share=0.4),
    "step_small": Part(
        lambda hour, seconds: measure_step(hour, seconds, False), 30, 300, share=0.3
    ),
    "train": Part(train, 60, 400, share=0.5),
    "step_large": Part(lambda hour, seconds: measure_step(hour, seconds, True), 60, 420, share=0.3),
    "decode": Part(decode, 60, 300, share=0.4),
    "core": Part(measure_core, 60, 300, share=0.5),
    "tune": Part(tune, 120, 3600),
}


# ---- Results ------------------------------------------------------------------------------------


def write_results(hour: Hour, results: Row) -> None:
    """results.jsonl: one row with everything so far; results.md: a line per part."""
    files = {
        "results.jsonl": json.dumps(results) + "\n",
        "results.md": "# First hour\n\n| part | seconds | result |\n|---|--:|---|\n"
        + "".join(
            f"| {name} | {part['seconds']:.0f} | {_in_words(part)} |\n"
            for name, part in results["parts"].items()
        ),
    }
    for name, text in files.items():
        new = hour.output / f"{name}.new"
        new.write_text(text)
        new.replace(hour.output / name)


def _in_words(part: Row) -> str:
    text = part.get("failure") or json.dumps(part.get("result"))
    return text.replace("|", "/").replace("\n", " ")


def run_parts(hour: Hour, names: list[str], parts: dict[str, Part]) -> Row:
    """Runs the parts within the budget; returns and writes their results."""
    results: Row = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "parts": {}}
    for name in names:
        part, begin, row = parts[name], time.monotonic(), {}
        if hour.left() < part.least_seconds:
            row["failure"] = (
                f"left out: {hour.left():.0f} s left, and it needs {part.least_seconds:.0f} s"
            )
        else:
            print(f"==== {name}: {hour.left() / 60:.1f} minutes left", flush=True)
            try:
                seconds = max(part.least_seconds, part.share * hour.left())
                row["result"] = part.run(hour, min(seconds, part.most_seconds))
            except Failed as error:
                row["failure"] = str(error)
            except Exception as error:  # noqa: BLE001 (the other parts need not fail)
                row["failure"] = f"{type(error).__name__}: {error}"
        row["seconds"] = time.monotonic() - begin
        results["parts"][name] = row
        write_results(hour, results)
        print(f"{name}: {_in_words(row)}", flush=True)
    print(f"Wrote {hour.output / 'results.jsonl'} and results.md", flush=True)
    return results


def main(argv: list[str]) -> int:
    """Runs the parts; a part that fails is in the results and changes no exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--output", type=Path, default=Path("runs/first_hour"))
    parser.add_argument("--parts", default=" ".join(PARTS))
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(argv)
    names = options.parts.split()
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"PARTS has '{unknown[0]}', which is not one of {', '.join(PARTS)}")
    if options.dry_run:
        print(
            "\n".join(
                f"{n}: {PARTS[n].least_seconds:.0f} to {PARTS[n].most_seconds:.0f} s" for n in names
            )
        )
        return 0
    hour = Hour((ROOT / options.output).resolve(), 60 * options.minutes)
    run_parts(hour, names, PARTS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
