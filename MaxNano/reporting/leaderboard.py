"""The leaderboard of a folder of runs: a row per finished run, as Markdown and as CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from MaxNano import scaling
from MaxNano.reporting.blocks import Missing, Note, Report, Section, Table
from MaxNano.reporting.evaluations import chat_score, core_score, validation_bpb
from MaxNano.reporting.report import (
    describe_devices,
    evaluation_seconds,
    price_of,
    recorded_seconds,
    tokens_done,
    training_flops,
)
from MaxNano.reporting.run_history import Run, read_run
from MaxNano.reporting.words import duration, large, median_of, or_dash, score, stage_of
from MaxNano.storage import files

Column = tuple[Callable[[Run], Any], Callable[[Any], str] | None]


def _seconds(run: Run) -> float:
    return recorded_seconds(run) + evaluation_seconds(run)


def _parameters(run: Run) -> scaling.Counts:
    return scaling.parameter_counts(scaling.shape_of(run.config))


def _dollars(chip_hour: float | None) -> Callable[[Run], float | None]:
    def dollars(run: Run) -> float | None:
        price = price_of(run, chip_hour)
        return price.dollars if price else None

    return dollars


def columns(chip_hour: float | None = None) -> dict[str, Column]:
    """Column of the CSV -> (its value for a run, None if unknown; the value as text of the table, or
    None if it is in the CSV only). chip_hour: as in report.price_of.
    """
    return {
        "run": (lambda run: run.name, str),
        "stage": (stage_of, str),
        "model": (lambda run: run.config["model"], str),
        "layers": (lambda run: run.config["num_decoder_layers"], None),
        "parameters": (lambda run: _parameters(run).total, large),
        "scaling": (lambda run: _parameters(run).scaling, None),
        "tokens": (tokens_done, large),
        "flops": (training_flops, None),
        "loss": (lambda run: run.steps[-1].get("smoothed_loss"), None),
        "bpb": (validation_bpb, score),
        "core": (core_score, score),
        "chatcore": (chat_score, score),
        "mfu": (lambda run: median_of(run, "mfu"), None),
        "seconds": (_seconds, duration),
        "usd": (_dollars(chip_hour), lambda value: f"{value:,.2f}"),
        "hardware": (describe_devices, str),
        "commit": (lambda run: run.saved.get("versions", {}).get("commit"), lambda text: text[:12]),
    }


def read_runs(folder: epath.Path) -> tuple[list[Run], list[str]]:
    """(the finished runs in a folder, one line for each run that is not finished or unreadable).

    The runs are in the order of CORE, best first, then of bits per byte.
    """
    runs, problems = [], []
    for name in files.names(folder):
        if not (folder / name / "config.yml").exists():
            continue
        try:
            run = read_run(folder / name)
        except ValueError as error:
            problems.append(str(error))
            continue
        if run.is_finished:
            runs.append(run)
        else:
            problems.append(
                f"{name} is not finished: {run.steps_done:,} of {run.config['steps']:,} steps"
            )

    def order(run: Run) -> tuple[float, float]:
        core, bpb = core_score(run), validation_bpb(run)
        return (float("inf") if core is None else -core, float("inf") if bpb is None else bpb)

    return sorted(runs, key=order), problems


def to_csv(runs: Sequence[Run], chip_hour: float | None = None) -> str:
    """A line per run with the unrounded values; what is unknown is empty."""
    text, shown = io.StringIO(), columns(chip_hour)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(shown)
    for run in runs:
        values = (value(run) for value, _ in shown.values())
        writer.writerow("" if value is None else value for value in values)
    return text.getvalue()


def table(runs: Sequence[Run], chip_hour: float | None = None) -> Table:
    """A row per run."""
    shown = {name: column for name, column in columns(chip_hour).items() if column[1]}
    rows = []
    for run in runs:
        values = [(value(run), text) for value, text in shown.values()]
        rows.append([or_dash("" if value is None else text(value)) for value, text in values])
    return Table([*shown], rows, numeric=False)


def make_leaderboard(
    name: str, runs: Sequence[Run], problems: Sequence[str], chip_hour: float | None = None
) -> Report:
    """The leaderboard as a report."""
    priced = "the prices of the chip table" if chip_hour is None else f"{chip_hour:g} USD/h"
    note = f"Time is the recorded time with evaluations; prices are computed from {priced}."
    blocks = [table(runs, chip_hour), Note(note), *map(Missing, problems)]
    return Report(f"Results of {name}", f"{len(runs)} finished runs", [Section("Runs", blocks)])
