"""The comparison of arms: runs that differ in some keys, each with several seeds, paired by seed."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from scipy.special import stdtrit

from MaxNano import config_schema
from MaxNano.data import fingerprint
from MaxNano.reporting.blocks import (
    Block,
    Curves,
    Heading,
    Missing,
    Note,
    Report,
    Section,
    Table,
)
from MaxNano.reporting.charts import Series
from MaxNano.reporting.evaluations import chat_score, core_score, validation_bpb
from MaxNano.reporting.report import recorded_seconds
from MaxNano.reporting.run_history import Run
from MaxNano.reporting.words import duration, median_of, points, score, status

CONFIDENCE = 0.95
CHART = "compare.svg"  # next to the table
# Keys in which runs of one arm may differ, besides the seed, and the sections of such keys.
UNCOMPARED = frozenset(("run_name", "base_output_directory", "seed", "jax_cache_dir", "dry_run"))
UNCOMPARED_SECTIONS = ("Checkpoints", "Logging and safety", "Several hosts")
# Keys that decide which tokens a step trains on.
BATCH_KEYS = frozenset(fingerprint.ROW_KEYS) - {"chat_validation_mixture"} | frozenset(
    "dataset_path dataset_name tokenizer_type tokenizer_path vocab_size max_target_length rl_task".split()
)


class Arm(NamedTuple):
    """Runs with one config and several seeds."""

    name: str
    runs: dict[int, Run]  # the finished ones, by seed


class Difference(NamedTuple):
    """Mean of paired differences, with its confidence interval; None if there is only one pair."""

    pairs: int
    mean: float
    low: float | None
    high: float | None


# What is compared -> its value for a finished run, None if the run does not have it.
METRICS: dict[str, Callable[[Run], float | None]] = {
    "bits per byte": validation_bpb,
    "CORE": core_score,
    "ChatCORE": chat_score,
    "pass@1": lambda run: last_value(run.events_of("validation"), "pass@1"),
    "training loss": lambda run: last_value(run.steps, "smoothed_loss"),
}


# ---- Statistics ---------------------------------------------------------------------------------


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """Mean of second - first over the seeds that both have, None if there is none.

    The interval is Student's t interval of the differences: it assumes that they are normal.
    """
    gaps = [second[seed] - first[seed] for seed in first if seed in second]
    if not gaps:
        return None
    mean, count = statistics.fmean(gaps), len(gaps)
    if count < 2:
        return Difference(count, mean, None, None)
    quantile = float(stdtrit(count - 1, (1 + confidence) / 2))
    half = quantile * statistics.stdev(gaps) / math.sqrt(count)
    return Difference(count, mean, mean - half, mean + half)


def last_value(rows: Sequence[Mapping[str, float]], key: str) -> float | None:
    """The number of the last row, None if it does not have one."""
    return rows[-1].get(key) if rows else None


def values_of(arm: Arm, metric: Callable[[Run], float | None]) -> dict[int, float]:
    """{seed: value} of the runs that have a metric."""
    values = {seed: metric(run) for seed, run in arm.runs.items()}
    return {seed: value for seed, value in values.items() if value is not None}


# ---- Arms ---------------------------------------------------------------------------------------


def config_keys() -> list[str]:
    """The keys of train.py, apart from the seed, that can change a run's numbers or its speed."""
    return [
        name
        for name, key in config_schema.base_keys().items()
        if "train" in key.programs
        and name not in UNCOMPARED
        and not key.section.startswith(UNCOMPARED_SECTIONS)
    ]


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The keys of config_keys whose values differ between runs."""
    return [
        key
        for key in config_keys()
        if any(value_text(run, key) != value_text(runs[0], key) for run in runs)
    ]


def value_text(run: Run, key: str) -> str:
    """A run's value as config.yml writes it, or as base.yml does for a key that it does not have."""
    if key in run.lines:
        return run.lines[key][0]
    return config_schema.format_value(_as_tuples(run.config.get(key)))


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def group_runs(runs: Sequence[Run]) -> list[Arm]:
    """The arms of runs: those with equal configs, apart from the seed, are one.

    An arm's name is what differs from the first run, or the names of its runs if that is long.
    Raises ValueError if an arm has two runs of one seed.
    """
    keys = differing_keys(runs)
    groups: dict[tuple[str, ...], dict[int, Run]] = {}
    for run in runs:
        group = groups.setdefault(tuple(value_text(run, key) for key in keys), {})
        if (seed := run.config["seed"]) in group:
            raise ValueError(
                f"{group[seed].name} and {run.name} have the same config and seed={seed}: name one"
            )
        group[seed] = run
    arms = []
    for values, group in groups.items():
        name = " ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
        arms.append(
            Arm(name if 0 < len(name) <= 60 else ", ".join(map(_name, group.values())), group)
        )
    return arms


def _name(run: Run) -> str:
    return run.name


# ---- The report ---------------------------------------------------------------------------------


def compare(name: str, arms: Sequence[Arm], problems: Sequence[str] = ()) -> Report:
    """The comparison as a report. problems: runs that are missing, one line each.

    Raises ValueError if no arm has a run.
    """
    runs = [run for arm in arms for run in arm.runs.values()]
    if not runs:
        raise ValueError(f"no run of {name} is finished")
    shown = {
        title: metric
        for title, metric in METRICS.items()
        if any(metric(run) is not None for run in runs)
    }
    blocks: list[Block] = []
    for title, metric in shown.items():
        blocks += [Heading(title), metric_table(arms, metric, with_speed=not blocks)]
    blocks.append(
        Note(
            f"Difference: mean of arm minus {arms[0].name}, of runs with the same seed, with its "
            f"{CONFIDENCE:.0%} confidence interval (Student's t, paired). Of bits per byte and losses, less "
            "is better. An interval that contains 0 may be noise; with several arms, some of their "
            "intervals miss by chance. tokens/s: median of the steps after the warm-up, time: with "
            "evaluations and checkpoints; both are means "
            "over the seeds."
        )
    )
    blocks += map(Missing, problems)
    sections = [Section("Results", blocks), Section("Curves", [_curves(arms)])]
    sections += [_run_section(arms, shown), _config_section(runs)]
    seeds = len({seed for arm in arms for seed in arm.runs})
    return Report(f"MaxNano comparison {name}", f"{len(arms)} arms, {seeds} seeds", sections)


def metric_table(
    arms: Sequence[Arm], metric: Callable[[Run], float | None], *, with_speed: bool = False
) -> Table:
    """A row per arm: mean and standard deviation over seeds, and the difference to the first arm."""
    header = ["arm", "seeds", "mean", "std", "difference", f"{CONFIDENCE:.0%} interval"]
    header += ["tokens/s", "time"] if with_speed else []
    first, rows = values_of(arms[0], metric), []
    for arm in arms:
        values = values_of(arm, metric)
        known = list(values.values())
        mean = statistics.fmean(known) if known else None
        deviation = statistics.stdev(known) if len(known) > 1 else None
        row = [arm.name, str(len(known)), score(mean), score(deviation)]
        row += _difference_cells(paired_difference(first, values) if arm is not arms[0] else None)
        rows.append(row + (_speed_cells(arm) if with_speed else []))
    return Table(header, rows)


def _difference_cells(gap: Difference | None) -> list[str]:
    if gap is None:
        return ["–", "–"]
    interval = "–" if gap.low is None else f"{gap.low:+.4f} to {gap.high:+.4f}"
    return [f"{gap.mean:+.4f}", interval]


def _speed_cells(arm: Arm) -> list[str]:
    speeds = values_of(arm, lambda run: median_of(run, "tokens_per_second")).values()
    times = [recorded_seconds(run) for run in arm.runs.values()]
    return [
        f"{statistics.fmean(speeds):,.0f}" if speeds else "–",
        duration(statistics.fmean(times)) if times else "–",
    ]


def _curves(arms: Sequence[Arm]) -> Curves:
    """The mean over seeds of validation bits per byte, or of the loss if that has few points."""
    series = [Series(arm.name, _mean_curve(arm, "bpb"), "dots") for arm in arms]
    if max(len(line.points) for line in series) >= 3:
        # The value before the first step would hide what differs later.
        series = [line._replace(points=[p for p in line.points if p[0]]) for line in series]
        return Curves("bits per byte, validation", series, "mean over seeds", image=CHART)
    series = [Series(arm.name, _mean_curve(arm, "smoothed_loss")) for arm in arms]
    return Curves("training loss, smoothed", series, "mean over seeds", image=CHART)


def _mean_curve(arm: Arm, key: str) -> list[tuple[float, float | None]]:
    """(step, mean over seeds) of the steps that all runs of an arm have."""
    curves = [
        dict(points(run.events_of("validation") if key == "bpb" else run.steps, key))
        for run in arm.runs.values()
    ]
    steps = set.intersection(*map(set, curves)) if curves else set()
    means = []
    for step in sorted(steps):
        values = [curve[step] for curve in curves]
        means.append((step, None if None in values else statistics.fmean(values)))
    return means


def _run_section(arms: Sequence[Arm], shown: Mapping[str, Callable]) -> Section:
    rows = [
        [
            run.name,
            arm.name,
            str(seed),
            status(run),
            *(score(metric(run)) for metric in shown.values()),
            duration(recorded_seconds(run)),
        ]
        for arm in arms
        for seed, run in sorted(arm.runs.items())
    ]
    return Section("Runs", [Table(["run", "arm", "seed", "done", *shown, "time"], rows)])


def _config_section(runs: Sequence[Run]) -> Section:
    """The keys in which runs differ, and whether they saw the same tokens."""
    keys = differing_keys(runs)
    blocks: list[Block] = []
    for key in keys:
        values = dict.fromkeys(value_text(run, key) for run in runs)
        blocks.append(Note(f"{key}: {', '.join(values)}"))
    data = [key for key in keys if key in BATCH_KEYS]
    if data:
        blocks.append(Missing(f"Not the same batches in all arms: {', '.join(data)} differ."))
    elif runs[0].config["stage"] == "rl":
        blocks.append(Note("Each run trained on its own model's answers to the same problems."))
    else:
        blocks.append(
            Note("In all arms, runs of one seed trained on the same batches in the same order.")
        )
    return Section("Differences", blocks)
