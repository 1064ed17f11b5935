"""What a training run left behind in its folder: config, metrics, checkpoints' facts, evaluations; and its forerunners.

Nothing here changes a folder, starts JAX or reads a parameter, so a run can be looked at while it goes on.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from MaxNano import pyconfig
from MaxNano.storage import files


class Evaluation(NamedTuple):
    """What evaluations found of the checkpoint of one step."""

    step: int
    entries: dict[str, dict[str, Any]]  # name -> {"of": what it is of, "values": what was found}
    records: epath.Path  # folder with the answers to each task, if there are any

    def of_kind(self, kind: str) -> dict[str, dict[str, Any]]:
        """The entries of one kind by what stands behind it: `chat MMLU/test` under "MMLU/test", `chat` under ""."""
        return {
            name[len(kind) + 1 :]: entry
            for name, entry in self.entries.items()
            if name == kind or name.startswith(f"{kind} ")
        }


class Run(NamedTuple):
    """One run. What its folder lacks is empty."""

    folder: epath.Path
    config: dict[str, Any]
    lines: dict[
        str, tuple[str, str]
    ]  # key -> its value as config.yml writes it, and where that came from
    steps: list[dict[str, Any]]  # rows of metrics.jsonl of train steps
    events: list[dict[str, Any]]  # rows of evaluations and samples
    saved: dict[str, Any]  # of the newest checkpoint: step, versions, devices, tokenizer
    evaluations: list[Evaluation]  # by step
    problems: list[str]  # what could not be read, a line each

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    @property
    def steps_done(self) -> int:
        """Optimizer steps of which there is a row."""
        return self.steps[-1]["step"] + 1 if self.steps else 0

    def events_of(self, name: str) -> list[dict[str, Any]]:
        """The rows of one kind of event: validation, samples, core or chat."""
        return [row for row in self.events if row["event"] == name]

    def newest(self, kind: str) -> Evaluation | None:
        """The evaluation of the latest step that has something of a kind."""
        return next((one for one in reversed(self.evaluations) if one.of_kind(kind)), None)


def start_folder(load_from: str, folder: epath.Path) -> epath.Path:
    """The folder of the run that the run in `folder` is started from: a path, or the name of one beside it."""
    return epath.Path(load_from).expanduser() if "/" in load_from else folder.parent / load_from


def read_chain(folder: epath.Path) -> tuple[list[Run], str | None]:
    """The run in a folder behind all those that load_from leads to, the first one first; and why one is missing.

    Raises ValueError where `folder` itself holds no run.
    """
    runs = [read_run(folder)]
    while (start := runs[0].config.get("load_from")) is not None:
        place = start_folder(start, runs[0].folder)
        if any(str(place) == str(run.folder) for run in runs):
            return (
                runs,
                f"{runs[0].name} was started from {start}, which itself was started from it",
            )
        try:
            runs.insert(0, read_run(place))
        except ValueError as error:
            return (
                runs,
                f"{runs[0].name} was started from {start}, of which nothing is known: {error}",
            )
    return runs, None


def read_run(folder: epath.Path) -> Run:
    """What is in a run's folder. Raises ValueError, in one line, where that is no run."""
    if not (folder / "config.yml").exists():
        raise ValueError(
            f"{folder} holds no run: give run_name and base_output_directory of one that was started"
        )
    values = pyconfig.saved_values(folder / "config.yml")
    base = pyconfig.saved_values(pyconfig.BASE)
    text = (folder / "config.yml").read_text()
    problems: list[str] = []
    rows, torn = _rows(folder / "metrics.jsonl")
    if torn:
        problems.append(f"metrics.jsonl of {folder.name} is damaged from line {len(rows) + 1} on")
    extra = _newest_extra(folder / "checkpoints")
    saved = extra.get("run", {})
    # Metrics that nobody wrote with the checkpoint: it was imported.
    run_id = (extra.get("metrics") or {}).get("run_id")
    return Run(
        folder=folder,
        config=base | values,  # a run of an older version knows nothing of newer keys
        lines=dict(_config_lines(text)),
        steps=[row for row in rows if "event" not in row],
        events=[row for row in rows if "event" in row],
        saved=saved,
        evaluations=_evaluations(folder / "evals", problems, {"run": run_id} if extra else {}),
        problems=problems,
    )


def _config_lines(text: str) -> Iterator[tuple[str, tuple[str, str]]]:
    for line in text.splitlines():
        if not line.startswith("#") and ":" in line:
            written, _, origin = line.rpartition("  # ")
            name, _, value = written.partition(":")
            yield name, (value.strip(), origin)


def _rows(path: epath.Path) -> tuple[list[dict[str, Any]], bool]:
    """The rows of metrics.jsonl, and whether one in its middle is none; its last may still be being written."""
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


def _newest_extra(root: epath.Path) -> dict[str, Any]:
    """The JSON of the newest finished checkpoint; none of its hashes is checked."""
    steps = sorted(
        (
            int(n)
            for n in files.names(root)
            if n.isdigit() and (root / n / "MANIFEST.json").exists()
        ),
        reverse=True,
    )
    for step in steps:
        try:
            extra = json.loads((root / str(step) / "extra" / "metadata").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(extra, dict):
            return extra
    return {}


def _evaluations(
    folder: epath.Path, problems: list[str], of: Mapping[str, Any]
) -> list[Evaluation]:
    """What evals/step_*.json hold that is of this run, by step."""
    found = []
    for path in sorted(folder.glob("step_*.json")) if folder.exists() else []:
        try:
            entries = json.loads(path.read_text())["evals"]
            own = {
                name: entry
                for name, entry in entries.items()
                if isinstance(entry["values"], dict) and entry["of"].items() >= of.items()
            }
            found.append(Evaluation(int(path.stem.removeprefix("step_")), own, folder / path.stem))
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f"{path.name} of {folder.parent.name} is damaged")
    return sorted(found, key=lambda one: one.step)
