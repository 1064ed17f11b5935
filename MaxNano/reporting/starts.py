"""The report's section on a run's history: every start, with what changed and how it ended."""

from collections.abc import Mapping, Sequence
from typing import Any

from MaxNano.config_schema import shorten
from MaxNano.reporting.blocks import Block, Heading, Note, Section, Table
from MaxNano.reporting.run_history import Run
from MaxNano.reporting.words import or_dash, stage_of

HEADER = ("time", "from step", "end", "commit", "devices", "changes")


def section(runs: Sequence[Run]) -> Section:
    """A table per run."""
    blocks: list[Block] = []
    for run in runs:
        if len(runs) > 1:
            blocks.append(Heading(f"{stage_of(run)} ({run.name})"))
        if run.history:
            blocks.append(Table(HEADER, _rows(run.history), numeric=False))
        elif run.steps:
            blocks.append(
                Note(f"{run.name} was trained by a version that did not record its starts.")
            )
    return Section("History", blocks)


def _rows(history: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row per start or refusal; an end belongs to the start before it."""
    rows = []
    for entry in history:
        if entry["event"] == "end":
            if rows:
                rows[-1][2] = _end(entry)
            continue
        is_start = entry["event"] == "start"
        versions, devices = entry.get("versions", {}), entry.get("devices")
        rows.append(
            [
                entry["time"],
                f"{entry['step']:,}",
                "not recorded: killed, or running" if is_start else f"refused: {entry['error']}",
                or_dash((versions.get("commit") or "")[:12]),
                f"{devices['count']} x {devices['kind']}" if devices else "–",
                or_dash(_changes(entry) if rows else ""),  # the first: from base.yml, see Config
            ]
        )
    return rows


def _end(entry: Mapping[str, Any]) -> str:
    at = f" at step {entry['step']:,}" if "step" in entry else ""
    reason = f": {entry['error']}" if "error" in entry else ""
    return f"{entry['status']}{at}{reason}"


def _changes(entry: Mapping[str, Any]) -> str:
    words = [
        f"{name}: {shorten(before)} → {shorten(now)}"
        for name, (before, now) in entry.get("changes", {}).items()
    ]
    return ", ".join([*words, *([entry["data"]] if "data" in entry else [])])
