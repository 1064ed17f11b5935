"""Trains arms x seeds with train.py and compares them; or compares runs that exist.

    .venv/bin/python MaxNano/compare.py configs/base.yml model=d4 --arm "" --arm "matrix_lr=0.03" --seeds 3
    .venv/bin/python MaxNano/compare.py configs/base.yml --runs d4_a,d4_b
    .venv/bin/python MaxNano/compare.py configs/base.yml --leaderboard runs

Each run is one train.py after another, or several at once with --devices. The same command skips
runs that are complete and resumes the one that was interrupted; a later --arm or more --seeds train
only what is missing. Table and chart go to comparisons/<run_name> in base_output_directory.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a script: see train.py
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    import MaxNano  # noqa: F401  # explains a missing package

import argparse
import hashlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree

from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import config_schema, pyconfig
from MaxNano.console import UNFOLDED_WIDTH, print_table
from MaxNano.reporting import charts, comparison, leaderboard, render
from MaxNano.reporting.blocks import Curves, Heading, Missing, Note, Report, Table
from MaxNano.reporting.run_history import Run, read_run
from MaxNano.storage import files
from MaxNano.training.config_changes import result_keys

EXIT_STOPPED = 75  # as train.py exits after SIGTERM: the same command resumes
TRAIN = Path(__file__).resolve().with_name("train.py")
POLL_SECONDS = 0.2


class Job(NamedTuple):
    """A run to train."""

    arm: str
    seed: int
    words: list[str]  # the arguments of train.py
    config: FrozenConfigDict

    @property
    def folder(self) -> epath.Path:
        """The run's folder."""
        return files.run_directory(self.config)


def make_parser() -> argparse.ArgumentParser:
    """The options, which stand anywhere between the key=value words."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        epilog="The key=value words are those of train.py, whose --help lists all of them.",
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="WORDS",
        help="key=value words of an arm; once per arm, the first one is what others are compared with",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="seeds per arm, from seed= on; default 3"
    )
    parser.add_argument(
        "--devices",
        metavar="A;B",
        help="train several runs at once, one on each of these groups of GPUs, or of CPU cores "
        "without a GPU, such as '0;1' or '0,1;2,3'",
    )
    parser.add_argument(
        "--runs", metavar="A,B,C", help="train nothing, compare these runs: names or folders"
    )
    parser.add_argument(
        "--leaderboard",
        metavar="FOLDER",
        help="train nothing, write results.md and results.csv of all finished runs in a folder",
    )
    parser.add_argument(
        "--price",
        type=float,
        metavar="USD",
        help="price per chip-hour of --leaderboard; default: that of the chip table",
    )
    return parser


# ---- Runs to train ------------------------------------------------------------------------------


def make_jobs(words: Sequence[str], options: argparse.Namespace) -> list[Job]:
    """The runs, seed by seed, with checked configs. Raises ValueError."""
    if len(options.arm) < 2:
        raise ValueError("nothing to compare: give --arm twice or more, --runs or --leaderboard")
    if options.seeds < 1:
        raise ValueError(f"--seeds={options.seeds} is out of range: >= 1")
    base = pyconfig.initialize(words)
    jobs = []
    for seed in range(base.seed, base.seed + options.seeds):
        for arm in options.arm:
            given = shlex.split(arm)
            for word in given:
                key = word.partition("=")[0]
                if key in ("seed", "run_name", "base_output_directory"):
                    raise ValueError(f"--arm {arm!r} sets {key}, which all arms share")
            name = run_name(base.run_name, arm, seed)
            full = [*words, *given, f"seed={seed}", f"run_name={name}"]
            jobs.append(Job(arm or "unchanged", seed, full, pyconfig.initialize(full)))
    names = [job.config.run_name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two arms are the same: {name}")
    return jobs


def run_name(name: str, arm: str, seed: int) -> str:
    """The name of a run: that of the comparison, the arm's words and the seed; at most 64 characters."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", arm).strip("-") or "unchanged"
    full = f"{name}_{words}_s{seed}"
    if len(full) <= 64:
        return full
    digest = hashlib.sha256(arm.encode()).hexdigest()[:8]
    return f"{name[:40]}_{digest}_s{seed}"


def finished_run(job: Job) -> Run | None:
    """The run of a job if it is complete, else None.

    Raises ValueError if it was trained with another config.
    """
    if not (job.folder / "config.yml").exists():
        return None
    run, config = read_run(job.folder), job.config
    saved = run.saved.get("step") == run.config["steps"] or not config.enable_checkpointing
    measured = run.events_of("validation")
    evaluated = not config.eval_interval or (
        measured and measured[-1]["step"] == run.config["steps"]
    )
    if not (run.is_finished and saved and evaluated):
        return None
    for key in sorted(result_keys()):
        # What follows from the data or from another run is not known here.
        if key in run.lines and not {"chat_epochs", pyconfig.RUN_ORIGIN} & {run.lines[key][1]}:
            now = config_schema.format_value(config[key])
            if now != run.lines[key][0]:
                raise ValueError(
                    f"{job.folder} was trained with {key}={run.lines[key][0]}, not {now}: choose "
                    "another run_name for the comparison"
                )
    return run


def train_all(jobs: Sequence[Job], slots: Sequence[str | None], logs: epath.Path) -> dict[str, int]:
    """Train the jobs, one at a time on each slot; {run name: exit status} of those that ended.

    After SIGTERM, Ctrl-C or a run that stops with EXIT_STOPPED, all running ones stop, and no other
    is started; their status is EXIT_STOPPED.
    """
    waiting, free = list(jobs), list(slots)
    running: dict[subprocess.Popen, tuple[Job, str | None]] = {}
    statuses: dict[str, int] = {}
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for process in running:
            process.terminate()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while running or (waiting and not stopping):
            while waiting and free and not stopping:
                job, slot = waiting.pop(0), free.pop(0)
                print(
                    f"==== run {len(jobs) - len(waiting)} of {len(jobs)}: {job.config.run_name}",
                    flush=True,
                )
                process = start(job, slot, logs)
                running[process] = job, slot
                if stopping:  # while it was started
                    process.terminate()
            time.sleep(POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                job, slot = running.pop(process)
                free.append(slot)
                # A signal ends a process that is not yet prepared for it.
                was_stopped = process.returncode == EXIT_STOPPED or (
                    stopping and process.returncode < 0
                )
                statuses[job.config.run_name] = EXIT_STOPPED if was_stopped else process.returncode
                if was_stopped and not stopping:
                    stop()
    finally:
        for process in running:
            process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return statuses


def start(job: Job, slot: str | None, logs: epath.Path) -> subprocess.Popen:
    """Start train.py, on the devices of a slot; then its output goes to a file in `logs`."""
    command = [sys.executable, str(TRAIN), *job.words]
    if slot is None:
        return subprocess.Popen(command)
    path = Path(logs) / f"{job.config.run_name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    environment, numbers = dict(os.environ), slot.split(",")
    if has_nvidia():
        environment["CUDA_VISIBLE_DEVICES"] = slot
    with path.open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if not has_nvidia():
        os.sched_setaffinity(process.pid, map(int, numbers))
    return process


def has_nvidia() -> bool:
    """Whether the system has an NVIDIA GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def parse_slots(text: str | None, logs: epath.Path) -> list[str | None]:
    """The groups of devices of --devices, [None] without it. Raises ValueError."""
    if text is None:
        return [None]
    slots = text.split(";")
    numbers = [number for slot in slots for number in slot.split(",")]
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(f"--devices={text} is not groups of different numbers, such as '0;1'")
    if pyconfig.has_accelerator() and not has_nvidia():
        raise ValueError("--devices is for NVIDIA GPUs and CPU cores; leave it out on a TPU")
    if not pyconfig.has_accelerator():
        missing = set(map(int, numbers)) - os.sched_getaffinity(0)
        if missing:
            raise ValueError(f"--devices={text}: there is no CPU core {min(missing)}")
    if files.is_remote(logs):
        raise ValueError("--devices writes logs: set a local base_output_directory")
    return slots


# ---- Output -------------------------------------------------------------------------------------


def write(report: Report, folder: epath.Path, name: str) -> None:
    """Write a report as <name>.html and <name>.md, with its chart beside it if it has one."""
    texts = {f"{name}.html": render.to_html(report), f"{name}.md": render.to_markdown(report)}
    for section in report.sections:
        for block in section.blocks:
            if isinstance(block, Curves) and block.image:
                title = f"{block.title}, {block.caption}"
                picture = charts.picture(block.series, title=title, from_zero=block.from_zero)
                texts[block.image] = ElementTree.tostring(picture, encoding="unicode")
    for file, text in texts.items():
        files.write_whole(folder / file, text)
        print(f"Wrote {folder / file}")


def write_comparison(
    config: FrozenConfigDict, arms: Sequence[comparison.Arm], problems: Sequence[str]
) -> None:
    """Print the results of arms, and write them with a row per run."""
    report = comparison.compare(config.run_name, arms, problems)
    title = ""
    for block in report.sections[0].blocks:
        if isinstance(block, Heading):
            title = block.text
        elif isinstance(block, Table):
            print_table(title, block.header, block.rows, plain_width=UNFOLDED_WIDTH)
        elif isinstance(block, Missing | Note):
            print(block.text)
    folder = comparison_folder(config)
    write(report, folder, "compare")
    runs = [run for arm in arms for run in arm.runs.values()]
    files.write_whole(folder / "runs.csv", leaderboard.to_csv(runs))
    print(f"Wrote {folder / 'runs.csv'}")


def comparison_folder(config: FrozenConfigDict) -> epath.Path:
    """Where a comparison is written."""
    return files.run_directory(config, "comparisons") / config.run_name


def write_leaderboard(folder: epath.Path, price: float | None = None) -> None:
    """Print and write the results of the finished runs in a folder; price: USD per chip-hour."""
    runs, problems = leaderboard.read_runs(folder)
    if not runs:
        raise ValueError(f"{folder} has no finished run")
    table = leaderboard.table(runs, price)
    print_table(f"results of {folder}", table.header, table.rows, plain_width=UNFOLDED_WIDTH)
    write(leaderboard.make_leaderboard(folder.name, runs, problems, price), folder, "results")
    files.write_whole(folder / "results.csv", leaderboard.to_csv(runs, price))
    print(f"Wrote {folder / 'results.csv'}")


# ---- Entry point --------------------------------------------------------------------------------


def main(config: FrozenConfigDict, words: Sequence[str], options: argparse.Namespace) -> int:
    """Train what is missing, compare; returns the exit status."""
    if options.leaderboard is not None:
        write_leaderboard(epath.Path(options.leaderboard).expanduser(), options.price)
        return 0
    if options.runs is not None:
        folder = files.run_directory(config)
        runs = [
            read_run(pyconfig.start_directory(name, folder)) for name in options.runs.split(",")
        ]
        unfinished = [run for run in runs if not run.is_finished]
        if unfinished:
            run = unfinished[0]
            steps = f"{run.steps_done:,} of {run.config['steps']:,} steps"
            raise ValueError(f"{run.name} is not finished: {steps}")
        write_comparison(config, comparison.group_runs(runs), [])
        return 0
    jobs = make_jobs(words, options)
    slots = parse_slots(options.devices, comparison_folder(config))
    missing = [job for job in jobs if finished_run(job) is None]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are complete", flush=True)
    if config.dry_run:
        for job in missing:
            print(f"to train: {job.config.run_name}")
        return 0
    statuses = train_all(missing, slots, comparison_folder(config))
    if EXIT_STOPPED in statuses.values():
        print("Stopped; the same command resumes the comparison", flush=True)
        return EXIT_STOPPED
    arms = {arm or "unchanged": comparison.Arm(arm or "unchanged", {}) for arm in options.arm}
    problems = []
    for job in jobs:
        run = finished_run(job)
        if run is not None:
            arms[job.arm].runs[job.seed] = run
        else:
            status = statuses.get(job.config.run_name)
            problems.append(
                f"{job.config.run_name} is not finished: train.py ended with status {status}"
            )
    write_comparison(config, list(arms.values()), problems)
    return next((status for status in statuses.values() if status), 0)


if __name__ == "__main__":
    parser = make_parser()
    options, words = parser.parse_known_args()
    sys.exit(
        pyconfig.launch(
            lambda config: main(config, words, options), words, options=parser.format_help()
        )
    )
