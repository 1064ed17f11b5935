"""How a report shows evaluations: VIEWS has one row per evaluation, in the order of the report.

An evaluation without a row is shown as a table of its numbers. A new view is a row of VIEWS.
"""

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from MaxNano.reporting import charts, gpt2
from MaxNano.reporting.blocks import Block, Heading, Missing, Note, Section, Speech, Table, Tile
from MaxNano.reporting.run_history import Run
from MaxNano.reporting.words import percent, score, stage_of

RECORDS_READ = 200  # answers per task in which a right and a wrong one are looked for
ANSWERS_SHOWN = 12
SIZES = (1, 2, 3)  # of the n-grams that are counted in samples
DISTINCT_NOTE = (
    "Distinct n-grams: different sequences of n words as a share of all in the continuations. "
    "Text that repeats itself has few."
)

Runs = Sequence[Run]


class View(NamedTuple):
    """The part of a report about one evaluation."""

    tile: Callable[[Runs], Tile | None] = lambda runs: None
    section: Callable[[Runs], Section] | None = None


def tiles(runs: Runs) -> list[Tile]:
    """The tiles of all evaluations."""
    return [tile for view in VIEWS.values() if (tile := view.tile(runs)) is not None]


def sections(runs: Runs) -> list[Section]:
    """The sections of all evaluations, those without a view included."""
    kinds = {
        name.partition(" ")[0] for run in runs for step in run.evaluations for name in step.entries
    }
    made = [view.section(runs) for view in VIEWS.values() if view.section is not None]
    return made + [_plain_section(kind, runs) for kind in sorted(kinds - VIEWS.keys())]


def _plain_section(kind: str, runs: Runs) -> Section:
    """The newest numbers of an evaluation without a view: a row per part, a column per run."""
    values: dict[str, dict[str, Any]] = {}
    for run in runs:
        for part, entry in run.newest_entries(kind).items():
            for name, value in entry["values"].items():
                values.setdefault(f"{part} {name}".strip(), {})[run.name] = value
    rows = []
    for name, by_run in values.items():
        cells = (by_run.get(run.name, "–") for run in runs)
        rows.append(
            [name, *(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells)]
        )
    return Section(kind, [Table(["", *(f"after {stage_of(run)}" for run in runs)], rows)])


# ---- Bits per byte ------------------------------------------------------------------------------


def validation_bpb(run: Run) -> float | None:
    """Validation bits per byte of a run's newest model that was evaluated, None if there is none."""
    rows = [row for row in run.events_of("validation") if row.get("bpb") is not None]
    newest = run.newest("bpb")
    entry = newest.of_kind("bpb").get("validation") if newest else None
    if entry and (not rows or newest.step >= rows[-1]["step"]):
        return entry["values"]["bpb"]
    return rows[-1]["bpb"] if rows else None


def _bpb_tile(runs: Runs) -> Tile | None:
    """Validation bits per byte of the newest model of the first run."""
    value = validation_bpb(runs[0])
    if value is None:
        return None
    return Tile("bits per byte", score(value), f"validation, after {stage_of(runs[0])}")


# ---- CORE ---------------------------------------------------------------------------------------


class Core(NamedTuple):
    """CORE of one model."""

    run: Run
    step: int
    rows: dict[str, dict[str, Any]]  # values by task
    score: float | None  # None if tasks remain
    limit: int  # questions per task; 0: all


def core_of(run: Run) -> Core | None:
    """The newest CORE of a run."""
    entries = run.newest_entries("core")
    total = entries.pop("", None)
    if not entries:
        return None
    rows = {task: entry["values"] for task, entry in entries.items()}
    mean = statistics.fmean(values["centered"] for values in rows.values())
    value = total["values"]["core"] if total else None
    if value is not None and abs(value - mean) > 1e-9:
        value = None  # of an earlier evaluation, while another one is running
    limit = max(entry["of"].get("max_per_task", 0) for entry in entries.values())
    return Core(run, run.newest("core").step, rows, value, limit)


def core_score(run: Run) -> float | None:
    """The newest CORE of a run, None if it was not evaluated or is not finished."""
    core = core_of(run)
    return core.score if core else None


def _core_tile(runs: Runs) -> Tile | None:
    scored = [core for core in map(core_of, runs) if core and core.score is not None]
    if not scored:
        return None
    sampled = f"{scored[-1].limit} questions per task; " if scored[-1].limit else ""
    return Tile("CORE", score(scored[-1].score), f"{sampled}GPT-2 XL {score(gpt2.core()[1])}")


def _core_section(runs: Runs) -> Section:
    """CORE by task, next to GPT-2's."""
    evaluated = [core for core in map(core_of, runs) if core]
    if not evaluated:
        hint = "evaluate.py with evals=core computes it"
        return Section("CORE", [Missing(f"No CORE was evaluated: {hint}.")])
    blocks: list[Block] = []
    for core in evaluated:
        if len(evaluated) > 1:
            blocks.append(Heading(f"{stage_of(core.run)} ({core.run.name})"))
        blocks += _core_blocks(core)
    return Section("CORE", blocks)


def _core_blocks(core: Core) -> Iterator[Block]:
    rows = [_core_row(task, values) for task, values in core.rows.items()]
    small, largest = gpt2.core()
    if core.score is None:
        yield Missing(f"CORE of {core.run.name} is not finished: {len(rows)} tasks are done.")
    else:
        bar = _core_bar("CORE", core.score, (small, largest))
        rows.append(["CORE", bar, "", "", "", *map(score, (core.score, small, largest))])
    header = ["task", "", "shots", "questions", "accuracy", "centered", "GPT-2", "GPT-2 XL"]
    yield Table(header, rows)
    note = (
        f"After step {core.step:,}. Centered: 0 is guessing and 1 is perfect; CORE is the mean. The "
        "bar is this model, the thin mark GPT-2 (124 M parameters), the thick one GPT-2 XL (1.6 B)."
    )
    if core.limit:
        note += f" Only {core.limit} questions per task were asked; GPT-2's scores are of all."
    yield Note(note)


def _core_row(task: str, values: Mapping[str, Any]) -> list[Any]:
    theirs = gpt2.scores_of(task)
    bar = _core_bar(task, values["centered"], theirs or ())
    counts = [str(values["shots"]), f"{values['examples']:,}", percent(values["accuracy"])]
    return [task, bar, *counts, *map(score, (values["centered"], *(theirs or (None, None))))]


def _core_bar(label: str, value: float, marks: Sequence[float]) -> Any:
    return charts.bar(value, marks, low=-0.3, high=0.7, label=f"{label}: {score(value)}")


# ---- Chat tasks ---------------------------------------------------------------------------------


def chat_score(run: Run) -> float | None:
    """ChatCORE of a run, None if one of its tasks was not evaluated."""
    newest = run.newest("chat")
    total = newest.of_kind("chat").get("") if newest else None
    if total:
        return total["values"].get("chatcore")
    rows = [row for row in run.events_of("chat") if newest and row["step"] == newest.step]
    return rows[-1].get("chatcore") if rows else None


def _chat_tile(runs: Runs) -> Tile | None:
    scored = [(run, value) for run in runs if (value := chat_score(run)) is not None]
    if not scored:
        return None
    run, value = scored[-1]
    return Tile("ChatCORE", score(value), f"after {stage_of(run)}")


def _chat_section(runs: Runs) -> Section:
    """The chat tasks after each stage, and pass@k of rollouts."""
    tasks = {run.name: run.newest_entries("chat") for run in runs}
    for entries in tasks.values():
        entries.pop("", None)
    evaluated = [(run, tasks[run.name]) for run in runs if tasks[run.name]]
    blocks: list[Block] = list(_chat_tables(evaluated)) if evaluated else []
    blocks += [
        Missing(f"No chat task of {run.name} was evaluated: evaluate.py with evals=chat does it.")
        for run in runs
        if not tasks[run.name]
    ]
    for run in runs:
        blocks += _pass_table(run)
    return Section("Chat tasks", blocks)


def _chat_tables(evaluated: Sequence[tuple[Run, Mapping[str, Any]]]) -> Iterator[Block]:
    """Accuracies, and the share of generated answers that the model ended itself, per stage."""
    after = [f"after {stage_of(run)}" for run, _ in evaluated]
    change = ["change"] if len(evaluated) > 1 else []
    rows, stopped, differing = [], [], []
    for task in dict.fromkeys(itertools.chain(*(entries for _, entries in evaluated))):
        entries = [by_task.get(task) for _, by_task in evaluated]
        values = [entry and entry["values"] for entry in entries]
        some = next(filter(None, values))
        problems = {
            (entry["of"].get("content"), entry["values"]["problems"]) for entry in entries if entry
        }
        differing += [task] if len(problems) > 1 else []
        cells = _before_and_after(values, "accuracy")
        rows.append([task, f"{some['problems']:,}", _guessing(some), *cells])
        if any(by_key and "stopped" in by_key for by_key in values):
            stopped.append([task, *_before_and_after(values, "stopped")])
    scores = [chat_score(run) for run, _ in evaluated]
    if any(value is not None for value in scores):
        known = [value for value in scores if value is not None]
        gain = f"{known[-1] - known[0]:+z.4f}" if len(known) > 1 else "–"
        rows.append(["ChatCORE", "", "", *map(score, scores), *(gain for _ in change)])
    yield Table(["task", "problems", "guessing", *after, *change], rows)
    yield Note("Accuracies; ChatCORE is the mean of its five tasks, 0 for guessing, 1 for perfect.")
    if differing:
        yield Note(f"Not the same problems after each stage: {', '.join(differing)}.")
    if stopped:
        yield Table(["answers that the model ended itself", *after, *change], stopped)


def _before_and_after(values: Sequence[Mapping[str, Any] | None], key: str) -> list[str]:
    """A cell per stage and, if there are several, the change in percentage points."""
    shares = [by_key.get(key) if by_key else None for by_key in values]
    known = [share for share in shares if share is not None]
    gain = f"{100 * (known[-1] - known[0]):+z.1f}" if len(known) > 1 else "–"
    return [*map(percent, shares), *([gain] if len(values) > 1 else [])]


def _guessing(values: Mapping[str, Any]) -> str:
    """Accuracy of guessing, from an accuracy and its centered value."""
    if values["centered"] == 1:
        return "–"
    share = (values["accuracy"] - values["centered"]) / (1 - values["centered"])
    return percent(abs(share) if abs(share) < 1e-9 else share)


def _pass_table(run: Run) -> list[Block]:
    rows = [row for row in run.events_of("validation") if "pass@1" in row]
    if not rows:
        return []
    names = [name for name in rows[0] if name.startswith("pass@")]
    cells = [
        [f"after step {row['step']:,}", *(percent(row[name]) for name in names)]
        for row in (rows[0], rows[-1])
    ]
    return [
        Heading(f"{run.config['rl_eval_task']} before and after {stage_of(run)}"),
        Table(["", *names], cells),
        Note(
            "pass@k: share of problems for which one of the first k of "
            f"{len(names)} answers, sampled at temperature 1, is right."
        ),
    ]


# ---- Samples ------------------------------------------------------------------------------------


def _sample_section(runs: Runs) -> Section:
    """Continuations of the same prompts after each stage, and answers to problems."""
    texts = {run.name: samples_of(run) for run in runs}
    blocks: list[Block] = []
    for prompt in dict.fromkeys(itertools.chain(*texts.values())):
        answered = [run for run in runs if prompt in texts[run.name]]
        turns = [(stage_of(run), texts[run.name][prompt]) for run in answered]
        blocks.append(Speech(prompt, turns))
    if blocks:
        blocks.insert(0, Note("Greedy continuations of the same prompts."))
        rows = [
            [stage_of(run), *(percent(distinct_ngrams(texts[run.name].values(), n)) for n in SIZES)]
            for run in runs
            if texts[run.name]
        ]
        blocks.append(Table(["distinct n-grams", *(f"n = {n}" for n in SIZES)], rows))
        blocks.append(Note(DISTINCT_NOTE))
    else:
        hint = "sample_interval, or evaluate.py with evals=samples, does it"
        blocks.append(Missing(f"No samples were taken: {hint}."))
    answers = itertools.chain(*(answers_of(run) for run in reversed(runs)))
    if shown := list(itertools.islice(answers, ANSWERS_SHOWN)):
        blocks += [Heading("Answers to chat tasks"), *shown]
    return Section("Samples", blocks)


def distinct_ngrams(texts: Iterable[str], n: int) -> float | None:
    """distinct-n: different n-grams of words as a share of all in the texts, None if there are none.

    Source: https://arxiv.org/abs/1510.03055 (Li et al., A diversity-promoting objective function).
    """
    ngrams = [
        tuple(words[start : start + n])
        for words in map(str.split, texts)
        for start in range(len(words) - n + 1)
    ]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def samples_of(run: Run) -> dict[str, str]:
    """{prompt: continuation} of the newest model that has any."""
    rows = run.events_of("samples")
    newest = run.newest("samples")
    if newest and (not rows or newest.step >= rows[-1]["step"]):
        return newest.of_kind("samples")[""]["values"]
    texts = rows[-1].items() if rows else ()
    return {key: text for key, text in texts if isinstance(text, str) and key != "event"}


def answers_of(run: Run) -> Iterator[Speech]:
    """The first right and the first wrong answer to each chat task."""
    newest = run.newest("chat")
    if newest is None or not newest.records.exists():
        return
    for path in sorted(newest.records.glob("*.jsonl")):
        first: dict[bool, Mapping[str, Any]] = {}
        with path.open() as lines:
            for line in itertools.islice(lines, RECORDS_READ):
                try:
                    record = json.loads(line)
                    first.setdefault(bool(record["right"]), record)
                except (ValueError, KeyError, TypeError):
                    break
        for is_right in (True, False):
            if is_right in first:
                yield _answer(run, path.stem, first[is_right])


def _answer(run: Run, task: str, record: Mapping[str, Any]) -> Speech:
    turns = [(message["role"], _content(message["content"])) for message in record["messages"]]
    completions = record.get("completions")
    if completions is None:
        text = record["said"]
    else:
        text = completions[0]["text"] if completions else ""
    verdict = "right" if record["right"] else "wrong"
    return Speech(
        f"{task}, problem {record['problem']}, after {stage_of(run)}",
        [*turns, ("assistant", text)],
        f"{verdict}; expected: {_content(record['answer'])}",
    )


def _content(content: Any) -> str:
    """The text of a message, calls of tools and their output included."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


VIEWS: dict[str, View] = {
    "bpb": View(_bpb_tile),
    "core": View(_core_tile, _core_section),
    "chat": View(_chat_tile, _chat_section),
    "samples": View(section=_sample_section),
}
