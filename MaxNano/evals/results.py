"""Results: the finished evaluations of a checkpoint, in a file in the run's folder."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
from etils import epath

from MaxNano import console, scaling
from MaxNano.distributed import runtime
from MaxNano.storage import files
from MaxNano.training.context import RunContext

_STEP = re.compile(r"step_(\d+)\.json")


class ResultTable(NamedTuple):
    """What evaluate.py prints of an evaluation."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Results:
    """The evaluations of one checkpoint that are done, by name.

    Each is kept with all that it depends on, files included, so that it counts only for the same.
    """

    def __init__(
        self,
        directory: epath.Path,
        step: int,
        run_id: str | None = None,
        *,
        is_training: bool = False,
    ):
        """directory: the run's folder. run_id: what the parameters are, from parameters_id; results
        of others in the same folder do not count. is_training: a file that cannot be written is a
        warning, as its numbers are also in metrics.jsonl.
        """
        self.path = directory / "evals" / f"step_{step:06}.json"
        self._step, self._run_id, self._is_training = step, run_id, is_training
        self._writes = jax.process_index() == 0
        evals = None
        if self._writes and self.path.exists():
            evals = _read(self.path)
            if evals is None:
                console.warn(f"{self.path} is damaged and is overwritten")
        self._evals = runtime.gather_json(evals)[0] or {}
        self._compares = is_training and self._writes  # until a difference was said

    def get(self, name: str, measured_on: Mapping[str, Any]) -> dict[str, Any] | None:
        """The values of an evaluation, if it is done and was measured on the same things."""
        entry = self._evals.get(name)
        expected = json.loads(json.dumps(self._with_run(measured_on)))
        return entry["values"] if entry and entry["of"] == expected else None

    def put(self, name: str, measured_on: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Keep an evaluation and write the file.

        In training, a warning says once if it was measured on other data, or in another way, than
        at the step before.
        """
        if self._compares:
            self._compare(name, measured_on)
        self._evals[name] = {"of": self._with_run(measured_on), "values": dict(values)}
        self.write(self.path, json.dumps({"evals": self._evals}, indent=1) + "\n")

    def write(self, path: epath.Path, text: str) -> None:
        """Write a file atomically, on process 0 only. Raises OSError unless `is_training`."""
        if not self._writes:
            return
        try:
            files.write_whole(path, text)
        except OSError as error:
            if not self._is_training:
                raise
            console.warn(f"{path} cannot be written ({console.type_and_text(error)})")

    def _compare(self, name: str, measured_on: Mapping[str, Any]) -> None:
        before, earlier = self._before
        now = json.loads(json.dumps(measured_on))
        known = earlier.get(name, {"of": now})["of"]
        changed = [key for key in now if known.get(key) != now[key]]
        if changed:
            self._compares = False
            console.warn(
                f"{name} is measured on other data or in another way now than in {before}: "
                f"{', '.join(changed)} changed; the scores of these steps cannot be compared"
            )

    @cached_property
    def _before(self) -> tuple[str, dict[str, Any]]:
        """(name, evaluations) of the file of the newest step before this one."""
        try:
            names = files.names(self.path.parent)
        except OSError:
            names = []
        steps = {int(match[1]): match[0] for match in map(_STEP.fullmatch, names) if match}
        newest = max((step for step in steps if step < self._step), default=None)
        if newest is None:
            return "", {}
        return steps[newest], _read(self.path.parent / steps[newest]) or {}

    def _with_run(self, measured_on: Mapping[str, Any]) -> dict[str, Any]:
        return {"run": self._run_id, **measured_on}


def _read(path: epath.Path) -> dict[str, Any] | None:
    """The evaluations of a file, None if it is damaged."""
    try:
        return json.loads(path.read_text())["evals"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measured_with(run: RunContext) -> dict[str, Any]:
    """What every number of a model depends on besides its parameters and the questions: tokenizer,
    dtypes and how far attention reaches.
    """
    numerics = run.setup.numerics
    return {
        "tokenizer": run.tokenizer.fingerprint(),
        "dtype": numerics.dtype,
        "embedding_dtype": numerics.embedding_dtype,
        **{key: run.config[key] for key in scaling.CONTEXT_KEYS},
    }
