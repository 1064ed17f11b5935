"""Reads a run's folder: config, metrics, facts of checkpoints, evaluations; and the runs before it.

Reading changes nothing, starts no JAX and loads no parameters, so it works while the run trains.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from MaxNano import pyconfig
from MaxNano.data.fingerprint import summary
from MaxNano.storage import files, history
from MaxNano.storage.checkpoints import newest_extra
from MaxNano.training.config_changes import parameters_id

NO_RUN = "no run in {folder}: give run_name and base_output_directory of a run that was started"


class Evaluation(NamedTuple):
    """The evaluations of the checkpoint of one step."""

    step: int
    # "KIND PART", such as "chat MMLU/test", or "KIND" -> {"of": what was evaluated, "values": ...}
    entries: dict[str, dict[str, Any]]
    records: epath.Path  # folder with the answers to each task; may be missing

    def of_kind(self, kind: str) -> dict[str, dict[str, Any]]:
        """The entries of one kind by their part: "MMLU/test", or "" for the whole."""
        return {
            name[len(kind) + 1 :]: entry
            for name, entry in self.entries.items()
            if name == kind or name.startswith(f"{kind} ")
        }


class Run(NamedTuple):
    """One run. What its folder does not have is empty."""

    folder: epath.Path
    config: dict[str, Any]
    lines: dict[str, tuple[str, str]]  # key -> (its value in config.yml, where it came from)
    steps: list[dict[str, Any]]  # rows of metrics.jsonl of train steps
    events: list[dict[str, Any]]  # rows of evaluations and samples
    saved: dict[str, Any]  # of the newest checkpoint: step, versions, devices, tokenizer
    evaluations: list[Evaluation]  # by step
    problems: list[str]  # one line per file that could not be read
    history: list[
        dict[str, Any]
    ]  # starts, ends and refusals, oldest first; see training/run_record

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    @property
    def steps_done(self) -> int:
        """Optimizer steps until the last row."""
        return self.steps[-1]["step"] + 1 if self.steps else 0

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return 0 < self.config["steps"] <= self.steps_done

    def events_of(self, name: str) -> list[dict[str, Any]]:
        """The rows of one kind of event, such as validation."""
        return [row for row in self.events if row["event"] == name]

    def newest(self, kind: str) -> Evaluation | None:
        """The evaluation of the latest step that has entries of a kind."""
        return next((step for step in reversed(self.evaluations) if step.of_kind(kind)), None)

    def newest_entries(self, kind: str) -> dict[str, dict[str, Any]]:
        """The entries of newest(kind) by their part; {} if there are none."""
        newest = self.newest(kind)
        return newest.of_kind(kind) if newest else {}


def read_chain(folder: epath.Path) -> tuple[list[Run], str | None]:
    """(the runs to which load_from leads, first one first, and the run in `folder`; a problem).

    The problem is why the chain breaks off, None if it does not.
    Raises ValueError if `folder` has no run.
    """
    runs = [read_run(folder)]
    while (start := runs[0].config.get("load_from")) is not None:
        previous = pyconfig.start_directory(start, runs[0].folder)
        begin = f"{runs[0].name} was started from {start}, "
        if any(str(previous) == str(run.folder) for run in runs):
            return runs, begin + "which itself was started from it"
        try:
            runs.insert(0, read_run(previous))
        except ValueError as error:
            return runs, begin + f"which cannot be read: {error}"
    return runs, None


def has_run(folder: epath.Path) -> bool:
    """Whether a run was started in a folder."""
    return (folder / "config.yml").exists()


def read_run(folder: epath.Path) -> Run:
    """Read a run's folder. Raises ValueError, in one line, if it has no run."""
    if not has_run(folder):
        raise ValueError(NO_RUN.format(folder=folder))
    values = pyconfig.saved_values(folder / "config.yml")
    base = pyconfig.saved_values(pyconfig.BASE)
    text = (folder / "config.yml").read_text()
    problems: list[str] = []
    rows, is_damaged = _rows(folder / "metrics.jsonl")
    if is_damaged:
        problems.append(f"metrics.jsonl of {folder.name} is damaged from line {len(rows) + 1} on")
    extra = newest_extra(folder)
    # A checkpoint without metrics was imported.
    run_id = parameters_id(extra)
    return Run(
        folder=folder,
        config=base | values,  # a run of an older version does not have newer keys
        lines=pyconfig.saved_lines(text),
        steps=[row for row in rows if "event" not in row],
        events=[row for row in rows if "event" in row],
        saved=extra.get("run", {}),
        evaluations=_evaluations(folder / "evals", problems, run_id if extra else None, extra),
        problems=problems,
        history=history.read(folder),
    )


def _rows(path: epath.Path) -> tuple[list[dict[str, Any]], bool]:
    """(rows of metrics.jsonl, whether one before the last is damaged); the last may be half
    written.
    """
    if not path.exists():
        return [], False
    rows = []
    lines = path.read_text().splitlines()
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return rows, len(rows) + 1 < len(lines)
        rows.append(row)
    return rows, False


def _evaluations(
    folder: epath.Path, problems: list[str], run_id: str | None, extra: Mapping[str, Any]
) -> list[Evaluation]:
    """The entries of evals/step_*.json that are of this run and, as bits per byte, of its text, by
    step.
    """
    wanted = {} if run_id is None else {"run": run_id}
    trained_on = extra.get("inputs", {}).get("data") or {}
    text = {f"bpb {split}": summary(contents) for split, contents in trained_on.items()}
    evaluations = []
    for name in files.names(folder):
        if not (name.startswith("step_") and name.endswith(".json")):
            continue
        path = folder / name
        try:
            entries = {
                name: entry
                for name, entry in json.loads(path.read_text())["evals"].items()
                if isinstance(entry["values"], dict)
                and entry["of"].items() >= wanted.items()
                and text.get(name) in (None, entry["of"].get("data", text.get(name)))
            }
            step = int(path.stem.removeprefix("step_"))
            evaluations.append(Evaluation(step, entries, folder / path.stem))
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f"{path.name} of {folder.parent.name} is damaged")
    return sorted(evaluations, key=lambda evaluation: evaluation.step)
