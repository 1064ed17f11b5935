"""Numbers and names in the words of a report, and the numbers of a run that several sections show."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from MaxNano.reporting.run_history import Run
from MaxNano.stage_configs import STAGE_CONFIGS, stage_config
from MaxNano.training.display import FIRST_TIMED_STEP

Points = list[tuple[float, float | None]]


def stage_of(run: Run) -> str:
    """The title of a run's stage; its name if this version does not have the stage."""
    name = run.config["stage"]
    return stage_config(run.config).title if name in {None, *STAGE_CONFIGS} else name


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
