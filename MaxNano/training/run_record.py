"""What a run is made of: compared with its checkpoint and between its processes, and kept in its
history.
"""

from collections.abc import Mapping
from typing import Any, Self

import jax
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import config_schema, console
from MaxNano.config_schema import BASE
from MaxNano.data import fingerprint
from MaxNano.distributed import runtime
from MaxNano.storage import history
from MaxNano.storage.run_lock import Superseded
from MaxNano.tokenization.tokenizer import load_tokenizer
from MaxNano.training import checkpoint_identity, config_changes
from MaxNano.training.config_changes import HOST_KEYS, Change, ConfigChanged
from MaxNano.training.start import check_start


class RunRecord:
    """Compares a start of the run in `directory` with its checkpoint, and keeps its history.

    A context manager: its end is the end of the run, with the error if there is one. Only process
    0 writes, and a history that cannot be written is a warning. Raises ValueError if data are
    missing.
    """

    def __init__(self, config: FrozenConfigDict, directory: epath.Path) -> None:
        self._config, self._directory = config, directory
        self._contents = fingerprint.contents_of_run(config)
        self._changes: dict[str, Any] = {}  # allowed ones, since the checkpoint
        self._suffix = ""  # see config_changes.parameters_id
        self._source: dict[str, Any] | None = None  # the checkpoint of load_from, at the start
        self._end: dict[str, Any] | None = None
        self._is_started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type | None, exc: BaseException | None, _: object) -> None:
        if not self._is_started or isinstance(exc, Superseded):  # the history is another's now
            return
        if exc is not None:
            error = console.one_line(exc, 300)
            if not isinstance(exc, ValueError):
                error = console.type_and_text(exc)
            self._end = {"status": "failed", "error": error}
        self._append("end", self._end or {"status": "unknown"})

    def check(self, extra: Mapping[str, Any]) -> None:
        """Raise ConfigChanged if the run was trained otherwise until the checkpoint with `extra`,
        unless allow_config_change.
        """
        check_start(self._config, extra["run"]["config"])
        inputs = extra.get("inputs", {})
        step = extra["run"]["step"]
        try:
            self._changes = config_changes.check_resume(self._config, extra, self._contents)
        except ConfigChanged as error:
            self._append("refused", {"step": step, "error": str(error)})
            raise
        self._source = inputs.get("start")
        self._suffix = config_changes.changes_suffix(inputs.get("changes", ""), step, self._changes)

    def start_from(self, extra: Mapping[str, Any]) -> None:
        """Note the checkpoint of another run that initializes this one."""
        step = extra["run"]["step"]
        self._source = {"run": config_changes.parameters_id(extra), "step": step}

    def start(self, step: int) -> None:
        """Write that the run starts or resumes at a step, with which config, code and devices."""
        identity = checkpoint_identity.describe(self._config, "")
        base = config_schema.default_values(config_schema.base_keys(), BASE.name)
        facts = {
            "step": step,
            "steps": self._config.steps,
            "versions": identity["versions"],
            "devices": identity["devices"],
            # From base.yml at the first start, then from the start before.
            "changes": config_changes.changes(
                config_changes.saved_config(self._directory) or base, identity["config"]
            ),
        }
        if self._changes:
            facts["allowed"] = sorted(self._changes)
        if "data" in self._changes:
            facts["data"] = self._changes["data"]
        if self._source:
            facts["start"] = self._source
        self._append("start", facts)
        self._is_started = True

    def finish(self, step: int, run_id: str, measured: Mapping[str, int | None]) -> None:
        """Note that all steps are done, and at which step each evaluation was measured last."""
        run = self.parameters_id(run_id)
        self._end = {"status": "finished", "step": step, "run": run, "measured": dict(measured)}

    def preempt(self, step: int, exit_status: int) -> None:
        """Note that the run was stopped by a signal."""
        self._end = {"status": "preempted", "step": step, "exit_status": exit_status}

    def inputs(self) -> dict[str, Any]:
        """What the parameters depend on besides config, code and tokenizer, for a checkpoint."""
        return {"data": self._contents, "changes": self._suffix, "start": self._source}

    def parameters_id(self, run_id: str) -> str:
        """As config_changes.parameters_id, of the current parameters."""
        return run_id + self._suffix

    def measured_at_end(self, extra: Mapping[str, Any]) -> dict[str, int]:
        """The steps of evaluations after the checkpoint of the last step was saved, by name."""
        run = config_changes.parameters_id(extra)
        entries = history.read(self._directory) if jax.process_index() == 0 else []
        measured: dict[str, int] = {}
        for entry in entries:
            if entry.get("status") == "finished" and entry.get("run") == run:
                measured |= entry["measured"]
        return runtime.gather_json(measured)[0]

    def _append(self, event: str, facts: Mapping[str, Any]) -> None:
        if jax.process_index() == 0:
            history.append(self._directory, event, facts)


# ---- Several processes --------------------------------------------------------------------------


def check_processes(config: FrozenConfigDict) -> None:
    """Raise ValueError, in every process, if the processes of this run differ in config, code,
    packages, tokenizer or data, or if one of them cannot read these.

    Call it before anything that they compute together.
    """
    if jax.process_count() == 1:
        return
    identity = checkpoint_identity.describe(config, "")
    values = {name: value for name, value in identity["config"].items() if name not in HOST_KEYS}
    _compare("config", runtime.gather_json(values))
    versions = runtime.gather_json(identity["versions"])
    if len({each["source"] for each in versions}) == 1:  # a copy of the code may have no commit
        versions = [{**each, "commit": None} for each in versions]
    _compare("versions", versions)
    problem, contents = None, {}
    try:
        contents["tokenizer"] = {"tokenizer": load_tokenizer(config).fingerprint()}
        contents |= fingerprint.contents_of_run(config)
    except ValueError as error:
        problem = f"process {jax.process_index()}: {error}"
    if (problem := runtime.first_problem(problem)) is not None:
        raise ValueError(problem)
    if len(set(runtime.gather_json(fingerprint.summary(contents)))) == 1:
        return
    _compare_contents(runtime.gather_json(contents))


def _compare(what: str, values: list[Mapping[str, Any]]) -> None:
    """Raise ValueError if a process has other values than process 0."""
    first = values[0]
    for number, other in enumerate(values):
        found = {
            name: Change(first.get(name), other.get(name))
            for name in (*first, *other)
            if first.get(name) != other.get(name)
        }
        if found:
            raise ValueError(
                f"the processes of this run differ: process {number} has "
                f"{config_changes.describe(found)} in process 0; start the same command "
                + ("on each host" if what == "config" else "with the same code on each host")
            )


def _compare_contents(contents: list[Mapping[str, Mapping[str, str]]]) -> None:
    for number, other in enumerate(contents):
        for name, expected in contents[0].items():
            problem = fingerprint.difference(expected, other[name])
            if problem is not None:
                where = "" if name == "tokenizer" else f" in the {name} data"
                raise ValueError(
                    f"the processes of this run differ: in process {number}{where} {problem}, "
                    "compared with process 0; give each host the same files"
                )
