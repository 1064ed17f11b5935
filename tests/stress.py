"""Interrupts runs, damages checkpoints and fills up disks many times, and counts what is lost.

    python tests/stress.py FOLDER [--minutes 15] [--share 0.1] [--only pretraining/kill,damage]

Each trial is appended to FOLDER/trials.jsonl; the same command does those that are missing, then
prints the table of docs/preemption.md. A trial's run is a forked copy of this process, which has
imported everything: a kill takes a second or two. After each interruption the newest checkpoint
must be the one that was newest or a later one, its bytes must be right, and every row so far must
be that of a run that nothing interrupted. Full disks need root, because they are mounted.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import toy_rl  # noqa: E402, F401 (adds the task Ascii)

from MaxNano import evaluate, pyconfig, report, train, train_tokenizer  # noqa: E402
from MaxNano.distributed import runtime  # noqa: E402
from MaxNano.storage import checkpoints  # noqa: E402
from MaxNano.tokenization.bpe import train_bpe  # noqa: E402
from MaxNano.training.checkpointing import Checkpointer  # noqa: E402
from MaxNano.training.setup import set_up  # noqa: E402

COUNTS = {
    "pretraining/kill": 200,
    "pretraining/SIGTERM": 50,
    "sft/kill": 30,
    "rl/kill": 30,
    "damage": 200,
    "disk": 11,
}
STEPS = {"pretraining": 400, "sft": 160, "rl": 60}
SAVE_STEPS = {"pretraining": 40, "sft": 16, "rl": 6}  # between checkpoints
COMPARED = ("step", "event", "loss", "smoothed_loss", "bpb", "lowest_bpb", "reward", "grad_norm")
COMPARED += ("epoch", "file", "row_group", "pass@1", "pass@2")
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix strange and bright potions".split()
TIMEOUT_SECONDS = 120  # a start that takes longer hangs
EXIT_PREEMPTED = 75


class Trial(NamedTuple):
    """What one interruption, damage or full disk did; `outcome` is a column of the table."""

    kind: str
    detail: str  # when, or what
    outcome: str  # identical, refused, lost
    seconds: float
    problem: str = ""  # of a loss


class Stress:
    """The folder of all trials: text, tokenizer, compiled programs, reference runs, results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.runs = self.folder / "runs"
        self.results = self.folder / "trials.jsonl"
        self.damages: Connection | None = None  # to the process that restores damaged checkpoints
        self.trials = []
        if self.results.exists():
            lines = self.results.read_text().splitlines()
            self.trials = [Trial(**json.loads(line)) for line in lines]

    def prepare(self, stages: set[str]) -> None:
        """Write the data, and train the reference run of each stage."""
        write_data(self.folder)
        for stage in ["pretraining", *sorted(stages - {"pretraining"})]:
            done = self.runs / stage / "done"
            if not done.exists() or done.read_text() != str(STEPS[stage]):
                shutil.rmtree(self.runs / stage, ignore_errors=True)
                start = Start(self, stage, stage)
                assert start.wait() == 0, start.output()
                done.write_text(str(STEPS[stage]))

    def words(self, stage: str, run_name: str) -> list[str]:
        """The command line of a run."""
        words = {
            "num_decoder_layers": 1,
            "emb_dim": 32,
            "head_dim": 16,
            "num_query_heads": 2,
            "vocab_size": 300,
            "max_target_length": 32,
            "short_window_multiple": 16,
            "global_batch_tokens": 128,
            "steps": STEPS[stage],
            "muon_iterations": 1,
            "data_readers": 2,
            "packing_buffer_documents": 20,
            "dataset_path": self.folder / "text",
            "tokenizer_path": self.folder / "tokenizer",
            "jax_cache_dir": os.environ.get("MAXNANO_TEST_CACHE", self.folder / "cache"),
            "base_output_directory": self.runs,
            "num_cpu_devices": 1,
            "eval_interval": SAVE_STEPS[stage] + 4,
            "eval_tokens": 512,
            "sample_interval": 0,
            "checkpoint_interval_steps": SAVE_STEPS[stage],
            "warmup_steps": 2,
            "embedding_lr": 30,
            "run_name": run_name,
        }
        if stage != "pretraining":
            words |= {"stage": stage, "load_from": "pretraining"}
        if stage == "sft":
            chat = f"[[json:{self.folder}/chat.jsonl, 1]]"
            words |= {"chat_train_mixture": chat, "chat_validation_mixture": chat}
            words |= {"chat_interval": 0, "embedding_lr": 1, "load_optimizer": "false"}
        if stage == "rl":
            del words["global_batch_tokens"], words["eval_tokens"]
            words |= {"rl_task": "Ascii/train", "rl_eval_task": "Ascii/test"}
            words |= {"rl_problems": 2, "rl_samples": 2, "rl_row_tokens": 16, "max_new_tokens": 8}
            words |= {"rl_eval_problems": 2, "rl_eval_samples": 1, "embedding_lr": 0.3}
        return [str(pyconfig.BASE), *(f"{key}={value}" for key, value in words.items())]

    def add(self, trial: Trial) -> None:
        """Keep the result of a trial."""
        self.trials.append(trial)
        with self.results.open("a") as file:
            file.write(json.dumps(trial._asdict()) + "\n")


def write_data(folder: Path) -> None:
    """Text, conversations and a tokenizer, unless they are there."""
    if (folder / "tokenizer").exists():
        return
    (folder / "text").mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    for shard in range(3):
        texts = [
            " ".join(WORDS[(i * j + shard) % len(WORDS)] for j in range(3 + i % 60))
            for i in range(300)
        ]
        table = pa.table({"text": texts})
        pq.write_table(table, folder / "text" / f"shard_{shard}.parquet", row_group_size=50)
    with (folder / "chat.jsonl").open("w") as file:
        for i in range(60):
            question, answer = WORDS[i % 16], " ".join(WORDS[i % 7 : i % 7 + 5])
            turns = [{"role": "user", "content": question}]
            turns.append({"role": "assistant", "content": answer})
            file.write(json.dumps(turns) + "\n")
    train_bpe(texts, 300).save(folder / "tokenizer")


# ---- Starts -------------------------------------------------------------------------------------


class Start:
    """A forked process that runs a program with the command line of a run."""

    def __init__(
        self,
        stress: Stress,
        stage: str,
        run_name: str,
        *more: str,
        program: Callable[..., Any] = train.main,
        output: Path | None = None,
    ) -> None:
        self.began = time.monotonic()
        self.run = stress.runs / run_name
        self._log = output or stress.folder / "log.txt"
        words = [*stress.words(stage, run_name), *more]
        self.pid = os.fork()
        if self.pid == 0:
            self._become(program, words)

    def _become(self, program: Callable[..., Any], words: list[str]) -> None:
        status = 1
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with its parent
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            log = os.open(self._log, flags, 0o644)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            status = pyconfig.launch(program, words)
            sys.stdout.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> int | None:
        """The exit status, None if it still runs after some seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status = self.status()
            if status is not None:
                return status
            time.sleep(0.005)
        return None

    def end(self, number: int) -> int:
        """Send a signal and wait for the end."""
        os.kill(self.pid, number)
        status = self.wait()
        if status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
            raise Lost(f"did not end within {TIMEOUT_SECONDS} s of signal {number}")
        return status

    def output(self) -> str:
        return self._log.read_text(errors="replace")


class Lost(Exception):
    """A run lost something; the text says what."""


def rows_of(run: Path) -> list[dict[str, Any]]:
    """What must not depend on interruptions, of each row of metrics.jsonl."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    return [{key: row[key] for key in COMPARED if key in row} for row in rows]


def newest(run: Path) -> int:
    """Step of the newest finished checkpoint, 0 for none. Raises Lost if one is damaged."""
    folder = checkpoints.CheckpointFolder(run)
    steps = folder.steps()
    for step in steps:
        damage = checkpoints.find_damage(folder.path(step))
        if damage:
            raise Lost(f"the checkpoint of step {step} is damaged: {damage}")
    if list((run / "checkpoints").glob("*.damaged")):
        raise Lost("a checkpoint was called damaged")
    return max(steps, default=0)


def check_prefix(run: Path, reference: list[dict[str, Any]]) -> None:
    """Raise Lost unless the rows so far are those of the reference."""
    for row, expected in zip(rows_of(run), reference, strict=False):
        if row != expected:
            raise Lost(f"row {row} instead of {expected}")


# ---- Interruptions ------------------------------------------------------------------------------


def interrupt(stress: Stress, kind: str, trial: int) -> Trial:
    """Start the run of this kind, which earlier trials interrupted, and interrupt it.

    A run that reaches its end before that is compared as a whole, and another one begins.
    """
    stage, how = kind.split("/")
    number = signal.SIGKILL if how == "kill" else signal.SIGTERM
    draw = random.Random(f"{kind} {trial}")
    reference = rows_of(stress.runs / stage)
    first_row = float((stress.runs / f"{stage}.seconds").read_text())
    run_name = kind.replace("/", "-")
    run, began = stress.runs / run_name, time.monotonic()
    while True:
        before = newest(run)
        early = draw.random() < 0.25
        after = draw.uniform(0, first_row) if early else first_row + draw.uniform(0, 1.0)
        start = Start(stress, stage, run_name)
        status = start.wait(after)
        if status is not None:  # it reached its end
            if status:
                raise Lost(f"status {status}: {start.output()[-2000:]}")
            check_resumed(start.output(), before)
            if rows_of(run) != reference or newest(run) != STEPS[stage]:
                raise Lost("the finished run differs")
            shutil.rmtree(run)
            continue
        status = start.end(number)
        if status == 0:  # the run ended on its own just before the signal
            continue
        seconds = time.monotonic() - began
        output = start.output()
        check_resumed(output, before)
        step = newest(run)
        if step < before:
            raise Lost(f"step {before} was saved, now {step} is the newest")
        check_prefix(run, reference)
        if number == signal.SIGTERM:
            check_stopped(status, output, step)
        return Trial(kind, phase(run, output), "identical", seconds)


def check_resumed(output: str, before: int) -> None:
    """Raise Lost unless a start that got that far resumed from the newest checkpoint."""
    resumed = re.search(r"Resuming .* from step (\d+)", output)
    if resumed and int(resumed[1]) != before:
        raise Lost(f"resumed from step {resumed[1]} instead of {before}")
    if before and not resumed and re.search(r"^step ", output, re.MULTILINE):
        raise Lost(f"started from scratch though step {before} was saved")
    if "Traceback" in output:
        raise Lost(output[-2000:])


def check_stopped(status: int, output: str, newest_step: int) -> None:
    """Raise Lost unless a run that was asked to stop has saved its last step, if it had done any."""
    saved = re.search(r"Saved checkpoint at step (\d+)", output)
    is_saved = status == EXIT_PREEMPTED and saved and int(saved[1]) == newest_step
    is_at_start = status == -signal.SIGTERM and not re.search(r"^step ", output, re.MULTILINE)
    if not is_saved and not is_at_start:
        raise Lost(f"status {status}, newest checkpoint {newest_step}: {output[-1000:]}")


def phase(run: Path, output: str) -> str:
    """What a run was doing when it was interrupted, from what it left."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    unfinished = [
        n for n in names if not n.isdigit() or not (folder / n / "MANIFEST.json").exists()
    ]
    if unfinished:
        return "save"
    if not re.search(r"^step ", output, re.MULTILINE):
        return "start"
    last = re.findall(r"^(step|Validation) ", output, re.MULTILINE)
    return "evaluation" if last[-1] == "Validation" else "steps"


# ---- Damage -------------------------------------------------------------------------------------

DAMAGES = ("flip", "cut", "empty", "delete", "zeros")


def damage(stress: Stress, kind: str, trial: int) -> Trial:
    """Damage a file of the newest checkpoint of two, and restore, in a process that stays.

    Every file gets every kind of damage in turn; flips and cuts are at random positions.
    """
    if stress.damages is None:
        context = multiprocessing.get_context("fork")
        stress.damages, child = context.Pipe()
        context.Process(target=restore_damaged, args=(child, stress), daemon=True).start()
    began, run = time.monotonic(), stress.runs / "damaged"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(stress.runs / "pretraining", run)
    folder = run / "checkpoints" / str(newest(run))
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    name = names[(trial // len(DAMAGES)) % len(names)]
    how = DAMAGES[trial % len(DAMAGES)]
    is_changed = damage_file(folder / name, how, random.Random(f"damage {trial}"))
    detail = f"{how} {re.sub(r'[0-9a-f]{32}', '...', name)}"
    stress.damages.send(run)
    if not stress.damages.poll(TIMEOUT_SECONDS):
        raise Lost(f"{detail}: restoring takes more than {TIMEOUT_SECONDS} s")
    outcome = stress.damages.recv()
    if outcome not in ("identical", "refused"):
        raise Lost(f"{detail}: {outcome}")
    if is_changed and outcome == "identical" and name != checkpoints.MANIFEST:
        raise Lost(f"{detail}: not noticed")
    return Trial("damage", detail, outcome, time.monotonic() - began)


def restore_damaged(requests: Connection, stress: Stress) -> None:
    """Restore the runs that are asked for; replies whether what comes back is right.

    identical: the newest checkpoint, bit for bit. refused: the one before, bit for bit.
    """
    os.dup2(os.open(stress.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    config = pyconfig.initialize(stress.words("pretraining", "pretraining"))
    runtime.initialize(config)
    setup = set_up(config)

    def restore(run: Path, step: int | None = None) -> tuple[int, list[bytes], str]:
        with Checkpointer(config, run) as checkpointer:
            state, extra = checkpointer.restore(setup.abstract, step)
        leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
        return extra["run"]["step"], leaves, json.dumps(extra, sort_keys=True)

    good = stress.runs / "pretraining"
    first, last = checkpoints.CheckpointFolder(good).steps()[-2:]
    rights = {step: restore(good, step) for step in (first, last)}
    while True:
        run = requests.recv()
        try:
            found = restore(run)
            outcome = "identical" if found[0] == last else "refused"
            requests.send(outcome if found == rights[found[0]] else "other bytes came back")
        except Exception as error:  # noqa: BLE001 (whatever it is, it is the result)
            requests.send(f"{type(error).__name__}: {error}")


def damage_file(path: Path, how: str, draw: random.Random) -> bool:
    """Damage a file; False if its bytes stay the same (an empty file stays empty)."""
    before = path.read_bytes()
    if how == "delete":
        path.unlink()
        return True
    content = bytearray(before)
    if how == "flip" and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == "cut" and content:
        del content[draw.randrange(len(content)) :]
    elif how == "empty":
        content.clear()
    elif how == "zeros":
        content = bytearray(len(content))
    path.write_bytes(content)
    return content != before


# ---- Full disks ---------------------------------------------------------------------------------


class Disk:
    """A file system of a few megabytes, filled to the last byte until free()."""

    def __init__(self, folder: Path, size: str = "8m") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if folder.is_mount():  # left by a killed process
            self.close()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        subprocess.run(mount, check=True)

    def fill(self) -> None:
        try:
            with (self.folder / "ballast").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            return

    def free(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


train_tokenizer.REFERENCES = ()  # would be downloaded


class DiskCase(NamedTuple):
    """A kind of file whose disk is full at the start, or from some moment on."""

    folder: str  # of the disk, in the run's folder; "" for all of it, or an absolute path's name
    ends: bool  # whether the run ends, with one line, rather than going on without the file
    program: Callable[..., Any] = train.main
    words: tuple[str, ...] = ()
    fills_later: bool = False  # at the first row of metrics.jsonl
    frees_later: bool = False  # 2 s after the start


DISKS = {
    "tensorboard/": DiskCase("tensorboard", ends=False),
    "tensorboard/, room again": DiskCase("tensorboard", ends=False, frees_later=True),
    "metrics.jsonl": DiskCase("metrics", ends=False),
    "checkpoints/": DiskCase("checkpoints", ends=True),
    "checkpoints/, in the middle": DiskCase("checkpoints", ends=True, fills_later=True),
    "the run's folder": DiskCase("", ends=True),
    "compiled programs": DiskCase("cache", ends=False, words=("jax_cache_dir={disk}",)),
    "output": DiskCase("output", ends=False),
    "evals/ (evaluate.py)": DiskCase(
        "evals", ends=True, program=lambda config: evaluate.evaluate(config), words=("evals=bpb",)
    ),
    "tokenizer (train_tokenizer.py)": DiskCase(
        "tokenizer", ends=True, program=train_tokenizer.main, words=("tokenizer_path={disk}",)
    ),
    "report (report.py)": DiskCase("", ends=True, program=report.main),
}


def fill_disk(stress: Stress, kind: str, trial: int) -> Trial:
    """Run with a full disk under one kind of file, then again with room; compare the end."""
    name, case = list(DISKS.items())[trial % len(DISKS)]
    began, run = time.monotonic(), stress.runs / "full"
    shutil.rmtree(run, ignore_errors=True)
    disk = Disk(run / case.folder)
    try:
        if case.program is not train.main:
            for path in (stress.runs / "pretraining").iterdir():
                copy = shutil.copytree if path.is_dir() else shutil.copy
                if path.name != case.folder:
                    copy(path, run / path.name)
        if case.folder == "metrics":  # the other files have room
            (disk.folder / "metrics.jsonl").touch()
            (run / "metrics.jsonl").symlink_to(disk.folder / "metrics.jsonl")
        words = [word.format(disk=disk.folder) for word in case.words]
        output = Path("/dev/full") if case.folder == "output" else None
        if not case.fills_later:
            disk.fill()
        start = Start(stress, "pretraining", "full", *words, program=case.program, output=output)
        if case.fills_later:
            while not rows_of(run):
                time.sleep(0.01)
            disk.fill()
        if case.frees_later:
            time.sleep(2.0)
            disk.free()
        status = start.wait()
        first = start.output() if output is None else ""
        lines = [line for line in first.splitlines() if line.startswith("error:")]
        if status is None or "Traceback" in first or (status == 2) != (len(lines) == 1):
            raise Lost(f"{name}: status {status}: {first[-1500:]}")
        if case.ends != bool(status):
            raise Lost(f"{name}: status {status}, expected {case.ends}: {first[-1500:]}")
        disk.free()
        start = Start(stress, "pretraining", "full", *words, program=case.program)
        status = start.wait()
        if status or "Traceback" in start.output():
            raise Lost(f"{name}, with room: status {status}: {start.output()[-1500:]}")
        if rows_of(run) != rows_of(stress.runs / "pretraining"):
            shutil.copy(run / "metrics.jsonl", stress.runs / "lost.jsonl")
            raise Lost(f"{name}: other rows, in {stress.runs}/lost.jsonl")
    finally:
        disk.close()
    outcome = "refused" if case.ends else "identical"
    return Trial(kind, name, outcome, time.monotonic() - began)


# ---- Main ---------------------------------------------------------------------------------------

Repeat = Callable[[Stress, str, int], Trial]
KINDS: dict[str, Repeat] = {
    **{kind: interrupt for kind in COUNTS if "/" in kind},
    "damage": damage,
    "disk": fill_disk,
}


def time_first_rows(stress: Stress, stages: set[str]) -> None:
    """Measure how long a start takes until its first row; kept in the folder."""
    for stage in stages:
        path = stress.runs / f"{stage}.seconds"
        if path.exists():
            continue
        shutil.rmtree(stress.runs / "timed", ignore_errors=True)
        start = Start(stress, stage, "timed")
        while not rows_of(stress.runs / "timed"):
            time.sleep(0.005)
        path.write_text(str(time.monotonic() - start.began))
        start.wait()


def repeat(stress: Stress, counts: dict[str, int], minutes: float) -> None:
    """Do the missing trials of each kind, in turn, for at most some minutes."""
    end = time.monotonic() + 60 * minutes
    done = collections.Counter(trial.kind for trial in stress.trials)
    todo = [(kind, n) for kind, count in counts.items() for n in range(done[kind], count)]
    todo.sort(key=lambda item: (item[1] + 1) / counts[item[0]])  # a cut one has all kinds in part
    shown, began = 0.0, time.monotonic()
    for index, (kind, number) in enumerate(todo):
        if time.monotonic() > end:
            break
        started = time.monotonic()
        try:
            trial = KINDS[kind](stress, kind, number)
        except Lost as error:
            trial = Trial(kind, "", "lost", time.monotonic() - started, str(error))
            print(f"LOST: {kind} {number}: {error}", flush=True)
            keep = stress.folder / f"lost-{len(stress.trials)}"
            shutil.copytree(stress.runs, keep, ignore_dangling_symlinks=True)
            run = kind.replace("/", "-")
            shutil.rmtree(stress.runs / run, ignore_errors=True)
        stress.add(trial)
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            left = (shown - began) / (index + 1) * (len(todo) - index - 1)
            print(f"{index + 1}/{len(todo)} trials, {left / 60:.0f} minutes left", flush=True)


def table(trials: list[Trial]) -> list[str]:
    """The table of docs/preemption.md."""
    lines = ["| kind | trials | bit-identical | refused | lost | seconds each |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for kind in COUNTS:
        rows = [trial for trial in trials if trial.kind == kind]
        if rows:
            count = collections.Counter(trial.outcome for trial in rows)
            seconds = sum(trial.seconds for trial in rows) / len(rows)
            outcomes = " | ".join(str(count[name]) for name in ("identical", "refused", "lost"))
            lines.append(f"| {kind} | {len(rows)} | {outcomes} | {seconds:.1f} |")
    moments = collections.Counter(trial.detail for trial in trials if "/" in trial.kind)
    lines.append("")
    lines.append(f"Interrupted in: {', '.join(f'{k} {v}' for k, v in sorted(moments.items()))}")
    return lines


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder of the runs and results")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time")
    parser.add_argument("--share", type=float, default=1.0, help="of the number of trials")
    parser.add_argument("--only", default=",".join(COUNTS), help="kinds, or KIND=TRIALS")
    arguments = parser.parse_args(words)
    wanted = dict(word.partition("=")[::2] for word in arguments.only.split(","))
    if os.geteuid() and wanted.pop("disk", None) is not None:
        print("Full disks are left out: mounting them needs root")
    shares = {kind: math.ceil(COUNTS[kind] * arguments.share) for kind in wanted}
    counts = {kind: int(wanted[kind] or share) for kind, share in shares.items()}
    if counts.keys() == {"damage"}:  # it needs two checkpoints
        STEPS["pretraining"] = 2 * SAVE_STEPS["pretraining"]
    stages = {kind.split("/")[0] for kind in counts if "/" in kind} | {"pretraining"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unmounts disks
    stress = Stress(arguments.folder)
    stress.prepare(stages)
    time_first_rows(stress, {kind.split("/")[0] for kind in counts if "/" in kind})
    repeat(stress, counts, arguments.minutes)
    trials = [trial for trial in stress.trials if trial.kind in counts]
    print("\n".join(table(trials)))
    return int(any(trial.outcome == "lost" for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
