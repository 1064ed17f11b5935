"""A search under way: measures trials in processes, keeps their results, knows how much time is left."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from MaxNano import pyconfig
from MaxNano.config_schema import format_value
from MaxNano.tuning import candidates, children
from MaxNano.tuning.candidates import Facts, Overrides
from MaxNano.tuning.results import Journal
from MaxNano.tuning.search import FIRST_STEPS, TURNS, Outcome, Trial

# Relative differences from the defaults' first losses and gradient norms that rounding explains.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
NORM_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
LEAST_LIMIT_SECONDS = 120.0  # of a process
LIMIT_FACTOR = 5.0  # a candidate may take this times as long as the defaults took
FIRST_LIMIT_SECONDS = 1800.0  # of the defaults, which no earlier process has compiled

Run = Callable[[Mapping[str, Any], float], children.Report]


class Session:
    """Measures trials of one search, each once; `run` does a task, children.run if None."""

    def __init__(
        self,
        config: Mapping[str, Any],
        argv: Sequence[str],
        facts: Facts,
        journal: Journal,
        run: Run | None = None,
    ):
        self.config, self.facts, self.journal = config, facts, journal
        self.start: Overrides = {}  # what the others are compared with: the defaults, if they run
        self._argv, self._run = measured_words(config, argv, facts), run or children.run
        self._earlier_seconds = journal.wall_seconds
        self._began = time.monotonic()
        self._budget_seconds = 60 * config["tune_minutes"]

    # ---- Time

    def spent_seconds(self) -> float:
        """Time of the search, with that before it was interrupted."""
        return self._earlier_seconds + time.monotonic() - self._began

    def seconds_left(self, *, to_compare: bool = False) -> float:
        """Time before the comparison with the defaults has to begin, or to the end of it."""
        left = self._budget_seconds - self.spent_seconds()
        if to_compare:
            return left
        last = (2 * TURNS + 1) * min(self.journal.walls, default=0.0)
        return left - min(last, self._budget_seconds / 4)

    def say(self, line: str) -> None:
        """Print a line after the time that was spent."""
        spent, budget = self.spent_seconds() / 60, self._budget_seconds / 60
        print(f"[{spent:.1f} of {budget:g} min] {line}", flush=True)

    # ---- Kernels

    def check_kernels(self, choices: Sequence[Overrides]) -> list[dict[str, Any]]:
        """The result of kernels.check for each choice, {"failure": ...} if it could not be made."""
        pending = [i for i, choice in enumerate(choices) if not self.journal.get("kernel", choice)]
        limit = min(600.0, max(60.0, self._budget_seconds / 4))
        while pending:
            task = {"task": "kernels", "argv": self._argv, "choices": choices, "indices": pending}
            begin = time.monotonic()
            report = self._run(task, limit)
            results = {a["checked"]: a["result"] for a in report.answers if "checked" in a}
            started = [a["started"] for a in report.answers if "started" in a]
            if report.failure:
                ended_in = started[-1] if started else pending[0]
                results.setdefault(ended_in, {"failure": report.failure})
            wall = (time.monotonic() - begin) / max(1, len(results))
            for index, result in results.items():
                self.journal.add({**result, "wall": wall}, "kernel", choices[index])
                self.say(f"kernel {words_of(self.merge({}, choices[index]))}: {_verdict(result)}")
            if not results:
                raise ValueError("the check of kernels ended without a result; start it again")
            pending = [i for i in pending if i not in results]
        return [self.journal.get("kernel", choice) for choice in choices]

    # ---- Trials

    def merge(self, best: Overrides, choice: Overrides) -> Overrides:
        """Settings with a knob's choice, without what the config has anyway."""
        return candidates.changes(self.config, self.facts, {**best, **choice})

    def measure(self, trial: Trial) -> Outcome:
        """Measure a trial, or read its result. It fails if its losses are not the defaults'."""
        row = self.journal.get(*_key(trial))
        if row is None:
            row = self._measure_anew(trial)
        return Outcome(row.get("seconds"), row.get("failure", ""))

    def row(self, trial: Trial) -> dict[str, Any]:
        """All that is known of a trial that was measured."""
        return self.journal.get(*_key(trial)) or {}

    def tokens_per_second(self, seconds: float) -> float:
        """Throughput of a step that takes `seconds`."""
        rows = candidates.measured_rows(self.config, self.facts) * self.facts.data_parallel_size
        return rows * pyconfig.row_length(self.config) / seconds

    def trace(self, overrides: Overrides) -> str:
        """The most expensive operations with these settings, as a table."""
        task = self._task(Trial(overrides, 1)) | {"trace": True}
        report = self._run(task, self._limit_seconds()[0])
        return report.answer.get("operations", f"No trace: {report.failure}")

    def _task(self, trial: Trial) -> dict[str, Any]:
        return {
            "task": "steps",
            "argv": self._argv,
            "overrides": trial.overrides,
            "steps": trial.steps,
            "with_data": trial.with_data,
        }

    def _limit_seconds(self) -> tuple[float, bool]:
        """(time limit of a process, whether the budget is the reason for it)."""
        longest = max(self.journal.walls, default=math.inf)
        limit = min(FIRST_LIMIT_SECONDS, max(LEAST_LIMIT_SECONDS, LIMIT_FACTOR * longest))
        least = max([60.0, *(2 * wall for wall in self.journal.walls)])
        left = max(least, self._budget_seconds - self.spent_seconds())
        return min(limit, left), left < limit

    def _measure_anew(self, trial: Trial) -> dict[str, Any]:
        limit, is_short = self._limit_seconds()
        begin = time.monotonic()
        report = self._run(self._task(trial), limit)
        row = report.answer | {"wall": time.monotonic() - begin}
        failure = report.failure or ("" if "seconds" in row else "ended without a result")
        failure = failure or self._check_losses(trial, row)
        if failure:
            row = {name: value for name, value in row.items() if name != "seconds"}
            row["failure"] = failure
        self.say(self._describe(trial, row))
        if failure.startswith("timed out") and is_short:
            return row  # with more time it may do
        return self.journal.add(row, *_key(trial))

    def _check_losses(self, trial: Trial, row: Mapping[str, Any]) -> str:
        """How the first losses differ from those of the defaults, "" if they do not."""
        kind = f"losses {trial.with_data}"
        reference = self.journal.get(kind)
        if reference is None:
            self.journal.add({name: row[name] for name in ("loss", "grad_norm")}, kind)
            return ""
        return difference(reference, row, self.facts.dtype)

    def _describe(self, trial: Trial, row: Mapping[str, Any]) -> str:
        name = words_of(trial.overrides) + (" with data" if trial.with_data else "")
        if "failure" in row:
            return f"{name}: {row['failure']}"
        seconds = row["seconds"]
        rate = self.tokens_per_second(seconds)
        text = f"{name}: {1e3 * seconds:,.1f} ms per step, {rate:,.0f} tokens/s"
        first = self.row(Trial(self.start, FIRST_STEPS))
        if "seconds" in first and not trial.with_data:
            text += f", x{first['seconds'] / seconds:.3f}"
        return text + (f", {row['gib']:.1f} GiB" if row.get("gib") else "")


def _key(trial: Trial) -> tuple[Any, ...]:
    return ("trial", *trial)


def measured_words(config: Mapping[str, Any], argv: Sequence[str], facts: Facts) -> list[str]:
    """The command line of the measured steps: as many rows as measured_rows, and no warm-up of the
    learning rate, so that a wrong gradient shows in the next losses.
    """
    rows = candidates.measured_rows(config, facts) * facts.data_parallel_size
    words = [f"global_batch_tokens={rows * pyconfig.row_length(config)}", "steps=1000"]
    words += ["warmup_steps=0", "profile_steps=[]"]
    if facts.backend == "cpu":
        words.append(f"num_cpu_devices={facts.devices}")
    return [*argv, *words]


def difference(reference: Mapping[str, Any], measured: Mapping[str, Any], dtype: str) -> str:
    """How the losses and gradient norms of the first steps differ from the reference's by more than
    rounding, "" if they do not.
    """
    for name, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
        for step, (expected, value) in enumerate(zip(reference[name], measured[name], strict=True)):
            if not math.isclose(value, expected, rel_tol=tolerance[dtype]):
                return f"wrong: {name} at step {step} is {value:.6g} instead of {expected:.6g}"
    return ""


def words_of(overrides: Mapping[str, Any]) -> str:
    """Overrides as key=value words."""
    words = [f"{key}={format_value(value)}" for key, value in overrides.items()]
    return " ".join(words) or "the defaults"


def _verdict(result: Mapping[str, Any]) -> str:
    if result.get("failure") or result["problem"]:
        return f"struck off: {result.get('failure') or result['problem']}"
    time_text = f", {result['milliseconds']:.2f} ms" if result["milliseconds"] else ""
    return f"correct ({100 * result['error']:.0f} % of the tolerance){time_text}"
