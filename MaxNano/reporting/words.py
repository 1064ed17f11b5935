"""Numbers and names in the words of a report, and the numbers of a run that several sections show."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from MaxNano.reporting.run_history import Run
from MaxNano.training.metrics import FIRST_TIMED_STEP

# What a stage is called in a report; a stage that is not here by its name.
STAGE_TITLES = {
    "pretrain": "pretraining",
    "sft": "fine-tuning",
    "rl": "reinforcement learning",
}

Config = Mapping[str, Any]


def _describe_rollouts(config: Config) -> str:
    answers, problems = config["rl_samples"], config["rl_problems"]
    return f"{config['rl_task']}, {answers} answers to each of {problems} problems per step"


def _describe_conversations(config: Config) -> str:
    return ", ".join(
        f"{task} x {amount}" + "".join(f" (at most {count})" for count in limit)
        for task, amount, *limit in config["chat_train_mixture"]
    )


def _describe_mixture(config: Config) -> str:
    return ", ".join(f"{share} x {source}" for source, share, *_ in config["dataset_mixture"])


# dataset_type -> the training data in words; other types by their name and path.
DATA: dict[str, Callable[[Config], str]] = {
    "rollouts": _describe_rollouts,
    "chat": _describe_conversations,
    "mixture": _describe_mixture,
}

Points = list[tuple[float, float | None]]


def stage_of(run: Run) -> str:
    """The title of a run's stage."""
    stage = run.config["stage"] or "pretrain"
    return STAGE_TITLES.get(stage, stage)


def describe_data(config: Config) -> str:
    """The training data of a run."""
    kind = config["dataset_type"]
    if kind in DATA:
        return DATA[kind](config)
    return f"{kind}, {config['dataset_name'] or config['dataset_path']}"


def status(run: Run) -> str:
    """How many steps a run has done."""
    if not run.steps:
        return "no training recorded"
    if run.steps_done < run.config["steps"]:
        return f"{run.steps_done:,} of {run.config['steps']:,} steps"
    return f"{run.steps_done:,} steps"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def large(number: float) -> str:
    """A large number with its unit prefix."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:,.3g} {name}"
    return f"{number:,.0f}"


def percent(share: float | None) -> str:
    """A share in percent, a dash for None."""
    return "–" if share is None else f"{100 * share:.1f} %"


def score(value: float | None) -> str:
    """A score with four digits, a dash for None."""
    return "–" if value is None else f"{value:z.4f}"


def or_dash(text: str) -> str:
    """A cell, a dash if it is empty."""
    return text or "–"


def points(rows: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> Points:
    """(step, number) of the rows that have a key; None if the number was not finite."""
    return [
        (row["step"], None if row[key] is None else factor * row[key]) for row in rows if key in row
    ]


def timed(run: Run) -> list[dict[str, Any]]:
    """The rows of the steps after the warm-up, or all rows if there are none."""
    return [row for row in run.steps if row["step"] >= FIRST_TIMED_STEP] or run.steps


def median_of(run: Run, key: str) -> float | None:
    """Median of a number over the timed steps, None if they do not have it."""
    values = [row[key] for row in timed(run) if row.get(key) is not None]
    return statistics.median(values) if values else None
