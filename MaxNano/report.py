"""Writes the report of a run: what ran, on what, how long and for how much, and what came of it.

    python MaxNano/report.py configs/base.yml run_name=NAME

It goes into the run's folder as `report.html`, one page that needs nothing from elsewhere, and as `report.md`. A run
that was started from another one (load_from) is told from the first of them on. What was not done or not recorded is
said in a line. Written again after anything, the report is whole; a process that dies leaves the one before.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a script: MaxNano/ itself must not be where modules are looked for
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # a typo is told now, not when JAX has been imported

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig, scaling
from MaxNano.distributed import hardware
from MaxNano.evals.core_tasks import center
from MaxNano.reporting import charts, run_history
from MaxNano.reporting.charts import Series
from MaxNano.reporting.document import (
    Block,
    Curves,
    Document,
    Folded,
    Heading,
    Missing,
    Note,
    Section,
    Speech,
    Table,
    Tiles,
    to_html,
    to_markdown,
)
from MaxNano.reporting.run_history import Run
from MaxNano.stage_configs import stage_config
from MaxNano.storage import files
from MaxNano.training.metrics import FIRST_TIMED_STEP

STAGES = {None: "pretraining", "sft": "fine-tuning", "rl": "reinforcement learning"}
RECORDS_READ = 200  # of each task's answers, to find one that is right and one that is wrong
ANSWERS_SHOWN = 12

# Accuracies of OpenAI's GPT-2, of 124 M and of 1.6 B parameters, on CORE's tasks, and that of guessing.
# Source: the result files of the CORE bundle (https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip).
GPT2 = {
    "hellaswag_zeroshot": (0.25, 0.308504, 0.502),
    "jeopardy": (0.0, 0.001889, 0.092),
    "bigbench_qa_wikidata": (0.0, 0.282663, 0.531),
    "arc_easy": (0.25, 0.412458, 0.595),
    "arc_challenge": (0.25, 0.221843, 0.299),
    "copa": (0.5, 0.6, 0.67),
    "commonsense_qa": (0.2, 0.224406, 0.227),
    "piqa": (0.5, 0.62296, 0.725),
    "openbook_qa": (0.25, 0.278, 0.346),
    "lambada_openai": (0.0, 0.322919, 0.523),
    "hellaswag": (0.25, 0.307907, 0.512),
    "winograd": (0.5, 0.578755, 0.714286),
    "winogrande": (0.5, 0.486188, 0.569),
    "bigbench_dyck_languages": (0.0, 0.155, 0.247),
    "agi_eval_lsat_ar": (0.2, 0.226087, 0.273913),
    "bigbench_cs_algorithms": (0.0, 0.419697, 0.417),
    "bigbench_operators": (0.0, 0.085714, 0.157143),
    "bigbench_repeat_copy_logic": (0.0, 0.03125, 0.09375),
    "squad": (0.0, 0.058278, 0.309),
    "coqa": (0.0, 0.133659, 0.28),
    "boolq": (0.62, 0.552294, 0.619),
    "bigbench_language_identification": (0.091, 0.2566, 0.25),
}


def gpt2_scores(label: str) -> tuple[float, float] | None:
    """Centered accuracies of the small and of the largest GPT-2 on a task, None where it is none of CORE's."""
    if label not in GPT2:
        return None
    guessing, small, largest = GPT2[label]
    return center(small, guessing), center(largest, guessing)


def gpt2_core() -> tuple[float, float]:
    """CORE of the small and of the largest GPT-2."""
    small, largest = zip(*map(gpt2_scores, GPT2), strict=True)
    return statistics.fmean(small), statistics.fmean(largest)


# ---- Words -----------------------------------------------------------------------------------------------------------


def stage_of(run: Run) -> str:
    """What a run is, in words."""
    stage = run.config["stage"]
    return STAGES.get(stage, str(stage))


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def large(number: float) -> str:
    """A large number with its unit."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:,.3g} {name}"
    return f"{number:,.0f}"


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %"


def known(text: Any) -> str:
    """A cell, empty ones as a dash."""
    return text or "–"


# ---- Numbers of a run ------------------------------------------------------------------------------------------------


def points(
    rows: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0
) -> list[tuple[float, float | None]]:
    """(step, number) of the rows that have a key; None where the number was not finite."""
    return [
        (row["step"], None if row[key] is None else factor * row[key]) for row in rows if key in row
    ]


def timed(run: Run) -> list[dict[str, Any]]:
    """The rows of steps that do not warm up any more, or all where there are too few."""
    return [row for row in run.steps if row["step"] >= FIRST_TIMED_STEP] or run.steps


def usual(run: Run, key: str) -> float | None:
    """The median of a number over the timed steps, None where they do not have it."""
    values = [row[key] for row in timed(run) if row.get(key) is not None]
    return statistics.median(values) if values else None


def goodput(run: Run) -> list[tuple[float, float]]:
    """(step, share of the time recorded so far that went into train steps)."""
    found, busy = [], 0.0
    for row in run.steps:
        busy += row["milliseconds"] / 1e3
        if row["elapsed_seconds"] > 0:
            found.append((row["step"], min(1.0, busy / row["elapsed_seconds"])))
    return found


def training_flops(run: Run) -> float:
    """FLOPs of the steps done."""
    flops = scaling.flops_per_token(scaling.shape_of(run.config), pyconfig.windows_of(run.config))
    return float(flops * run.steps_done * run.config["global_batch_tokens"])


def recorded_seconds(run: Run) -> float:
    """Time from the first step on that the run's rows tell of, evaluations and saving within."""
    return run.steps[-1]["elapsed_seconds"] if run.steps else 0.0


def evaluation_seconds(run: Run) -> float:
    """Time that evaluate.py took; what was evaluated while training is in recorded_seconds."""
    while_training = {(row["event"], row["step"]) for row in run.events}
    return sum(
        entry["values"].get("seconds", 0.0)
        for one in run.evaluations
        for kind in ("bpb", "core", "chat")
        if (kind, one.step) not in while_training
        for name, entry in one.of_kind(kind).items()
        if name
    )


class Price(NamedTuple):
    """What a run cost, computed: never what was billed."""

    chips: int
    hours: float
    chip_hour: float  # USD

    @property
    def dollars(self) -> float:
        """US dollars."""
        return self.chips * self.hours * self.chip_hour


def price_of(run: Run) -> Price | None:
    """The price of a run's recorded time by the chip table, None where that or the run's record lacks something."""
    devices = run.saved.get("devices")
    chip = hardware.CHIPS.get(devices["kind"]) if devices else None
    if chip is None or chip.spot_price is None:
        return None
    return Price(
        devices["count"], (recorded_seconds(run) + evaluation_seconds(run)) / 3600, chip.spot_price
    )


def last_bpb(run: Run) -> float | None:
    """Validation bits per byte of the newest model, None where they were never evaluated."""
    values = [row["bpb"] for row in run.events_of("validation") if row.get("bpb") is not None]
    newest = run.newest("bpb")
    entry = newest.of_kind("bpb").get("validation") if newest else None
    if entry and (not values or newest.step >= run.events_of("validation")[-1]["step"]):
        return entry["values"]["bpb"]
    return values[-1] if values else None


class Core(NamedTuple):
    """CORE of one model."""

    run: Run
    step: int
    rows: dict[str, dict[str, Any]]  # by task
    score: float | None  # None where tasks are still to be done
    limit: int  # questions of each task; 0: all


def core_of(run: Run) -> Core | None:
    """The newest CORE of a run."""
    newest = run.newest("core")
    if newest is None:
        return None
    entries = newest.of_kind("core")
    total = entries.pop("", None)
    if not entries:
        return None
    rows = {label: entry["values"] for label, entry in entries.items()}
    score = total["values"]["core"] if total else None
    mean = statistics.fmean(values["centered"] for values in rows.values())
    if score is not None and abs(score - mean) > 1e-9:
        score = None  # of an evaluation before the one that is under way
    return Core(
        run,
        newest.step,
        rows,
        score,
        max(entry["of"].get("max_per_task", 0) for entry in entries.values()),
    )


# ---- Head ------------------------------------------------------------------------------------------------------------


def head(runs: Sequence[Run], problem: str | None) -> Section:
    """The numbers that matter most."""
    tiles = []
    trained = [run for run in runs if run.steps]
    counts = scaling.parameter_counts(scaling.shape_of(runs[-1].config))
    tiles.append(
        ("parameters", large(counts.total), f"{runs[-1].config['num_decoder_layers']} layers")
    )
    if trained:
        tokens = sum(run.steps_done * run.config["global_batch_tokens"] for run in trained)
        tiles.append(("tokens", large(tokens), "all stages" if len(runs) > 1 else ""))
    base = runs[0]
    if (bpb := last_bpb(base)) is not None:
        tiles.append(("bits per byte", f"{bpb:z.4f}", f"validation, after {stage_of(base)}"))
    scores = [one for one in map(core_of, runs) if one and one.score is not None]
    if scores:
        sampled = f"{scores[-1].limit} questions a task; " if scores[-1].limit else ""
        tiles.append(
            ("CORE", f"{scores[-1].score:z.4f}", f"{sampled}GPT-2 XL {gpt2_core()[1]:z.4f}")
        )
    chat = [(run, value) for run in runs if (value := chat_score(run)) is not None]
    if chat:
        tiles.append(("ChatCORE", f"{chat[-1][1]:z.4f}", f"after {stage_of(chat[-1][0])}"))
    if trained:
        seconds = sum(recorded_seconds(run) + evaluation_seconds(run) for run in runs)
        tiles.append(
            ("time", duration(seconds), "recorded, all stages" if len(runs) > 1 else "recorded")
        )
    prices = [price_of(run) for run in trained]
    if prices and None not in prices:
        tiles.append(("price", f"${sum(price.dollars for price in prices):,.2f}", "computed"))
    blocks: list[Block] = [Tiles(tiles)]
    problems = [*([problem] if problem else []), *itertools.chain(*(run.problems for run in runs))]
    return Section("At a glance", [*blocks, *map(Missing, problems)])


def status(run: Run) -> str:
    """How far a run is."""
    if not run.steps:
        return "no training recorded"
    if run.steps_done < run.config["steps"]:
        return f"{run.steps_done:,} of {run.config['steps']:,} steps"
    return f"{run.steps_done:,} steps"


# ---- What ran --------------------------------------------------------------------------------------------------------


def devices_of(run: Run) -> str:
    """What a run was trained on; what only imported it is no matter."""
    if not run.steps:
        return ""
    devices = run.saved.get("devices")
    if not devices:
        return "not recorded"
    hosts = f" on {devices['processes']} hosts" if devices["processes"] > 1 else ""
    cores = f" ({devices['host_cores']} cores)" if devices["kind"] == "cpu" else ""
    return f"{devices['count']} x {devices['kind']}{hosts}{cores}"


def what_ran(runs: Sequence[Run]) -> Section:
    """Every stage in a column: model, data, horizon, hardware, versions."""
    facts: dict[str, Callable[[Run], str]] = {
        "run": lambda run: run.name,
        "started from": lambda run: run.config.get("load_from") or "no other run",
        "model": lambda run: (
            f"{run.config['model']}: {run.config['num_decoder_layers']} layers, "
            f"width {run.config['emb_dim']}, {run.config['num_query_heads']} heads"
        ),
        "parameters": lambda run: (
            f"{scaling.parameter_counts(scaling.shape_of(run.config)).total:,}"
        ),
        "vocabulary": lambda run: f"{run.config['vocab_size']:,} tokens",
        "context": lambda run: f"{run.config['max_target_length']:,} tokens",
        "data": lambda run: stage_config(run.config).describe_data(run.config),
        "batch": lambda run: f"{run.config['global_batch_tokens']:,} tokens",
        "done": status,
        "tokens": lambda run: (
            f"{run.steps_done * run.config['global_batch_tokens']:,}" if run.steps else ""
        ),
        "FLOPs": lambda run: f"{training_flops(run):.3g}" if run.steps else "",
        "updates skipped": lambda run: f"{run.steps[-1]['skipped_in_all']:,}" if run.steps else "",
        "hardware": devices_of,
        "software": lambda run: ", ".join(
            f"{name} {version}"
            for name, version in run.saved.get("versions", {}).items()
            if version and name != "commit"
        ),
        "commit": lambda run: (run.saved.get("versions", {}).get("commit") or "")[:12],
        "tokenizer": lambda run: run.saved.get("tokenizer", "")[:16],
        "newest checkpoint": lambda run: (
            f"step {run.saved['step']:,}" if "step" in run.saved else ""
        ),
    }
    rows = [[name, *(known(fact(run)) for run in runs)] for name, fact in facts.items()]
    blocks: list[Block] = [Table(["", *map(stage_of, runs)], rows, numeric=False)]
    blocks += [
        Missing(f"{run.name} has no checkpoint, so versions and hardware are not known.")
        for run in runs
        if not run.saved
    ]
    blocks += [
        Missing(f"{run.name} was saved by a version that did not record its hardware.")
        for run in runs
        if run.steps and run.saved and "devices" not in run.saved
    ]
    return Section("What ran", blocks)


# ---- Time and price --------------------------------------------------------------------------------------------------


def time_and_price(runs: Sequence[Run]) -> Section:
    """How long every stage took, and what that costs by the chip table."""
    title, trained = "Time and price", [run for run in runs if run.steps]
    if not trained:
        return Section(title, [Missing("No training is recorded: metrics.jsonl has no step.")])
    header = ["stage", "step", "tokens/s", "MFU", "goodput", "training", "evaluate.py", "together"]
    rows = [[*_speed_cells(run), *_time_cells([run])] for run in runs]
    if len(runs) > 1:
        rows.append(["all", "", "", "", "", *_time_cells(runs)])
    blocks: list[Block] = [
        Table([*header, "price, computed"], rows),
        Note(
            "Step, tokens/s and MFU are medians of the steps behind the warm-up. Training is the time that the rows of "
            "metrics.jsonl tell of, with the evaluations and checkpoints in it; goodput is the share of it that "
            "went into train steps. Not in it: start, compilation, and steps that a kill undid."
        ),
    ]
    prices = [(run, price) for run in runs if (price := price_of(run))]
    if prices:
        terms = "; ".join(
            f"{run.name} {price.chips} chips x {price.hours:.3f} h x ${price.chip_hour:.6g} a chip-hour"
            for run, price in prices
        )
        blocks.append(
            Note(
                f"Prices are computed, not billed, from the spot prices in MaxNano/distributed/hardware.py: {terms}."
            )
        )
    for run in trained:
        kind = run.saved.get("devices", {}).get("kind")
        if price_of(run) is None:
            why = f"the chip table has none for {kind}" if kind else "its hardware is not recorded"
            blocks.append(Missing(f"No price of {run.name}: {why}."))
    return Section(title, blocks)


def _speed_cells(run: Run) -> list[str]:
    step, rate, mfu = (usual(run, key) for key in ("milliseconds", "tokens_per_second", "mfu"))
    shares = goodput(run)
    return [
        stage_of(run),
        known(step and f"{step / 1e3:,.3g} s"),
        known(rate and f"{rate:,.0f}"),
        known(None if mfu is None else percent(mfu)),
        known(shares and percent(shares[-1][1])),
    ]


def _time_cells(runs: Sequence[Run]) -> list[str]:
    """Times of some runs together, and their price if it is known of each that trained."""
    trained = sum(map(recorded_seconds, runs))
    evaluated = sum(map(evaluation_seconds, runs))
    prices = [price_of(run) for run in runs if run.steps]
    dollars = "" if None in prices else f"${sum(price.dollars for price in prices):,.2f}"
    times = [duration(seconds) if seconds else "–" for seconds in (trained, evaluated)]
    return [*times, duration(trained + evaluated), known(prices and dollars)]


# ---- Curves ----------------------------------------------------------------------------------------------------------


def curves(run: Run) -> list[Block]:
    """The curves of one run, and a line for each that is missing."""
    if not run.steps:
        return [Missing(f"{run.name} has no curves: metrics.jsonl has no step.")]
    validations = run.events_of("validation")
    made: list[Block] = []

    def add(
        title: str, series: Sequence[Series], caption: str = "", from_zero: bool = False
    ) -> bool:
        series = [one for one in series if any(y is not None for _, y in one.points)]
        if series:
            made.append(Curves(title, series, caption, from_zero))
        return bool(series)

    missing = []
    is_rl = any("reward" in row for row in run.steps)
    if is_rl:
        reward = points(run.steps, "reward")
        add(
            "reward",
            [_noisy("a step's mean", reward), Series("median", charts.medians(reward))],
            from_zero=True,
        )
        asked = [name for name in validations[0] if name.startswith("pass@")] if validations else []
        shown = dict.fromkeys([*asked[:1], *asked[-1:]])
        task = run.config["rl_eval_task"]
        add(
            "pass@k",
            [Series(name, points(validations, name), "dots") for name in shown],
            task,
            from_zero=True,
        )
    add(
        "loss",
        [
            _noisy("each step", points(run.steps, "loss")),
            Series("smoothed", points(run.steps, "smoothed_loss")),
        ],
    )
    validation = points(validations, "bpb")
    training = points(run.steps, "bpb")
    if not is_rl:
        add(
            "bits per byte",
            [_noisy("training", training), Series("validation", validation, "dots")],
        )
        if not validation:
            missing.append(
                f"No validation of {run.name}: eval_interval={run.config['eval_interval']}."
            )
    peak = run.config["matrix_lr"] * (run.config["learning_rate_scale"] or 1)
    add(
        "learning rate",
        [Series("learning rate", points(run.steps, "lr_multiplier", peak))],
        "of Muon's matrices; other groups have their own base rates",
        from_zero=True,
    )
    rows = timed(run)
    mfu = points(rows, "mfu", 100)
    if not add(
        "MFU, %", [_noisy("each step", mfu), Series("median", charts.medians(mfu))], from_zero=True
    ):
        kind = run.saved.get("devices", {}).get("kind")
        unknown = kind is not None and kind not in hardware.CHIPS
        why = f"the chip table has no peak FLOP/s of {kind}" if unknown else "its rows have none"
        missing.append(f"No MFU of {run.name}: {why}; tokens/s are shown.")
        rate = points(rows, "tokens_per_second")
        add(
            "tokens/s",
            [_noisy("each step", rate), Series("median", charts.medians(rate))],
            from_zero=True,
        )
    share = [(step, 100 * value) for step, value in goodput(run)]
    add(
        "goodput, %",
        [Series("goodput", share)],
        "share of the time so far that went into train steps",
        from_zero=True,
    )
    evaluated = run.events_of("core")
    if len(evaluated) > 1:
        add("CORE while training", [Series("CORE", points(evaluated, "core"), "dots")])
    chats = run.events_of("chat")
    if len(chats) > 1:
        names = [name for name in chats[-1] if name.startswith("chatcore")]
        names = names or [name for name in chats[-1] if name not in ("step", "event")][:4]
        add(
            "chat tasks while training",
            [Series(name, points(chats, name), "dots") for name in names],
        )
    return [*made, *map(Missing, missing)]


def _noisy(name: str, of: Sequence[tuple[float, float | None]]) -> Series:
    return Series(name, of, "faint")


def curve_section(runs: Sequence[Run]) -> Section:
    """The curves of every stage."""
    blocks: list[Block] = []
    for run in runs:
        if len(runs) > 1:
            blocks.append(Heading(f"{stage_of(run)} ({run.name})"))
        blocks += curves(run)
    return Section("Curves", blocks)


# ---- CORE ------------------------------------------------------------------------------------------------------------


def core_section(runs: Sequence[Run]) -> Section:
    """CORE, task by task, beside GPT-2's."""
    found = [one for one in map(core_of, runs) if one]
    if not found:
        hint = "evaluate.py with evals=core computes it"
        return Section("CORE", [Missing(f"No CORE was evaluated: {hint}.")])
    blocks: list[Block] = []
    for one in found:
        if len(found) > 1:
            blocks.append(Heading(f"{stage_of(one.run)} ({one.run.name})"))
        rows = [_core_row(label, values) for label, values in one.rows.items()]
        small, largest = gpt2_core()
        if one.score is None:
            blocks.append(
                Missing(f"CORE of {one.run.name} is not finished: {len(rows)} tasks are done.")
            )
        else:
            bar = _core_bar("CORE", one.score, (small, largest))
            scores = [f"{score:z.4f}" for score in (one.score, small, largest)]
            rows.append(["CORE", bar, "", "", "", *scores])
        header = ["task", "", "shots", "questions", "accuracy", "centered", "GPT-2", "GPT-2 XL"]
        limited = (
            f" Only {one.limit} questions of each task were asked; GPT-2's numbers are of all."
            if one.limit
            else ""
        )
        blocks += [
            Table(header, rows),
            Note(
                f"After step {one.step:,}. Centered: 0 is guessing and 1 is knowing all; CORE is the mean. The bar is "
                "this model, the thin mark GPT-2 (124 M parameters), the thick one GPT-2 XL (1.6 B)."
                + limited
            ),
        ]
    return Section("CORE", blocks)


def _core_row(label: str, values: Mapping[str, Any]) -> list[Any]:
    theirs = gpt2_scores(label)
    bar = _core_bar(label, values["centered"], theirs or ())
    asked = [str(values["shots"]), f"{values['examples']:,}", percent(values["accuracy"])]
    numbers = [f"{score:z.4f}" for score in (values["centered"], *(theirs or ()))]
    return [label, bar, *asked, *numbers, *([] if theirs else ["–", "–"])]


def _core_bar(label: str, value: float, marks: Sequence[float]):
    return charts.bar(value, marks, low=-0.3, high=0.7, label=f"{label}: {value:z.4f}")


# ---- Chat tasks ------------------------------------------------------------------------------------------------------


def chat_entries(run: Run) -> dict[str, dict[str, Any]]:
    """Each chat task's newest entry of a run, by name."""
    newest = run.newest("chat")
    return {name: entry for name, entry in newest.of_kind("chat").items() if name} if newest else {}


def chat_score(run: Run) -> float | None:
    """ChatCORE of a run, None where one of its tasks was not asked."""
    newest = run.newest("chat")
    total = newest.of_kind("chat").get("") if newest else None
    if total:
        return total["values"].get("chatcore")
    rows = [row for row in run.events_of("chat") if newest and row["step"] == newest.step]
    return rows[-1].get("chatcore") if rows else None


def chat_section(runs: Sequence[Run]) -> Section:
    """The chat tasks of every stage beside each other, and pass@k before and after."""
    asked = [(run, entries) for run in runs if (entries := chat_entries(run))]
    blocks: list[Block] = []
    if asked:
        blocks += _chat_tables(asked)
    blocks += [
        Missing(f"No chat task was put to {run.name}: evaluate.py with evals=chat does it.")
        for run in runs
        if not chat_entries(run)
    ]
    for run in runs:
        blocks += _pass_table(run)
    stages = {run.config["stage"] for run in runs}
    if "sft" not in stages:
        blocks.append(Missing("No fine-tuning: no run of stage sft is in this chain."))
    if "rl" not in stages:
        blocks.append(Missing("No reinforcement learning: no run of stage rl is in this chain."))
    return Section("Chat tasks", blocks)


def _chat_tables(asked: Sequence[tuple[Run, Mapping[str, Any]]]) -> Iterator[Block]:
    """Accuracies, and how many of the answers in words ended by themselves, after each stage."""
    after = [f"after {stage_of(run)}" for run, _ in asked]
    change = ["change"] if len(asked) > 1 else []
    rows, stopped, differing = [], [], []
    for task in dict.fromkeys(itertools.chain(*(entries for _, entries in asked))):
        found = [entries.get(task) for _, entries in asked]
        values = [entry and entry["values"] for entry in found]
        some = next(filter(None, values))
        posed = {
            (entry["of"].get("content"), entry["values"]["problems"]) for entry in found if entry
        }
        differing += [task] if len(posed) > 1 else []
        cells = _before_and_after(values, "accuracy")
        rows.append([task, f"{some['problems']:,}", _guessing(some), *cells])
        if any(one and "stopped" in one for one in values):
            stopped.append([task, *_before_and_after(values, "stopped")])
    scores = [chat_score(run) for run, _ in asked]
    if any(score is not None for score in scores):
        cells = [known(None if score is None else f"{score:z.4f}") for score in scores]
        ends = [score for score in scores if score is not None]
        gain = f"{ends[-1] - ends[0]:+z.4f}" if len(ends) > 1 else "–"
        rows.append(["ChatCORE", "", "", *cells, *(gain for _ in change)])
    yield Table(["task", "problems", "guessing", *after, *change], rows)
    yield Note(
        "Accuracies; ChatCORE is the mean of its five tasks, 0 for guessing, 1 for knowing all."
    )
    if differing:
        yield Note(f"Not the same problems after every stage: {', '.join(differing)}.")
    if stopped:
        yield Table(["answers that the model ended itself", *after, *change], stopped)


def _before_and_after(values: Sequence[Mapping[str, Any] | None], key: str) -> list[str]:
    """A cell for each stage, and behind them, where there are several, the change in points."""
    shares = [one.get(key) if one else None for one in values]
    cells = [known(None if share is None else percent(share)) for share in shares]
    ends = [share for share in shares if share is not None]
    gain = f"{100 * (ends[-1] - ends[0]):+z.1f}" if len(ends) > 1 else "–"
    return [*cells, gain] if len(values) > 1 else cells


def _guessing(values: Mapping[str, Any]) -> str:
    """Accuracy of guessing, from an accuracy and what it is when centered."""
    if values["centered"] == 1:
        return "–"
    share = (values["accuracy"] - values["centered"]) / (1 - values["centered"])
    return percent(abs(share) if abs(share) < 1e-9 else share)


def _pass_table(run: Run) -> list[Block]:
    rows = [row for row in run.events_of("validation") if "pass@1" in row]
    if not rows:
        return []
    names = [name for name in rows[0] if name.startswith("pass@")]
    first, last = rows[0], rows[-1]
    cells = [
        [f"after step {row['step']:,}", *(percent(row[name]) for name in names)]
        for row in (first, last)
    ]
    title = f"{run.config['rl_eval_task']} before and after {stage_of(run)}"
    note = f"pass@k: problems of which one of the first k of {len(names)} answers, drawn at temperature 1, is right."
    return [Heading(title), Table(["", *names], cells), Note(note)]


# ---- Samples ---------------------------------------------------------------------------------------------------------


def sample_section(runs: Sequence[Run]) -> Section:
    """What the model says: the same prompts after every stage, and answers to problems."""
    blocks: list[Block] = []
    texts = {run.name: samples_of(run) for run in runs}
    prompts = list(dict.fromkeys(itertools.chain(*texts.values())))
    for prompt in prompts:
        turns = [
            (stage_of(run), texts[run.name][prompt]) for run in runs if prompt in texts[run.name]
        ]
        blocks.append(Speech(prompt, turns))
    if not prompts:
        blocks.append(
            Missing(
                "No samples were taken: sample_interval, or evaluate.py with evals=samples, does it."
            )
        )
    else:
        blocks.insert(0, Note("Likeliest continuations of the same beginnings."))
    answers = list(
        itertools.islice(
            itertools.chain(*(answers_of(run) for run in reversed(runs))), ANSWERS_SHOWN
        )
    )
    if answers:
        blocks += [Heading("Answers to chat tasks"), *answers]
    return Section("Samples", blocks)


def samples_of(run: Run) -> dict[str, str]:
    """{prompt: continuation} of the newest model that was asked."""
    rows = run.events_of("samples")
    newest = run.newest("samples")
    if newest and (not rows or newest.step >= rows[-1]["step"]):
        return newest.of_kind("samples")[""]["values"]
    return (
        {key: text for key, text in rows[-1].items() if isinstance(text, str) and key != "event"}
        if rows
        else {}
    )


def answers_of(run: Run) -> Iterator[Speech]:
    """For each chat task the first answer that is right and the first that is wrong."""
    newest = run.newest("chat")
    if newest is None or not newest.records.exists():
        return
    for path in sorted(newest.records.glob("*.jsonl")):
        found: dict[bool, Mapping[str, Any]] = {}
        with path.open() as lines:
            for line in itertools.islice(lines, RECORDS_READ):
                try:
                    record = json.loads(line)
                    found.setdefault(bool(record["right"]), record)
                except (ValueError, KeyError, TypeError):
                    break
        for is_right in (True, False):
            if is_right in found:
                yield _answer(run, path.stem, found[is_right])


def _answer(run: Run, task: str, record: Mapping[str, Any]) -> Speech:
    turns = [(message["role"], _content(message["content"])) for message in record["messages"]]
    completions = record.get("completions")
    if completions is None:
        said = record["said"]
    else:
        said = completions[0]["text"] if completions else ""
    verdict = "right" if record["right"] else "wrong"
    remark = f"{verdict}; expected: {_content(record['answer'])}"
    title = f"{task}, problem {record['problem']}, after {stage_of(run)}"
    return Speech(title, [*turns, ("assistant", said)], remark)


def _content(content: Any) -> str:
    """The text of a message, with what was said to tools and by them."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


# ---- Config ----------------------------------------------------------------------------------------------------------


def config_section(runs: Sequence[Run]) -> Section:
    """What differs from base.yml in every stage, with its origin; and behind it every key."""
    base = yaml.safe_load(pyconfig.BASE.read_text(encoding="utf-8"))
    blocks: list[Block] = []
    for run in runs:
        if len(runs) > 1:
            blocks.append(Heading(f"{stage_of(run)} ({run.name})"))
        changed = [
            [name, value, origin]
            for name, (value, origin) in run.lines.items()
            if origin != "base" and (name not in base or base[name] != run.config[name])
        ]
        blocks.append(Table(["key", "value", "from"], changed, numeric=False))
        width = max(map(len, run.lines), default=0) + 1
        lines = [
            f"{name + ':':<{width}} {value}  # {origin}"
            for name, (value, origin) in run.lines.items()
        ]
        blocks.append(Folded(f"All {len(lines)} keys of {run.name}", "\n".join(lines)))
    return Section("Config", blocks)


# ---- The whole -------------------------------------------------------------------------------------------------------


def make_report(runs: Sequence[Run], problem: str | None = None) -> Document:
    """The report of runs that were each started from the one before."""
    way = " → ".join(f"{stage_of(run)}, {status(run)}" for run in runs)
    return Document(
        title=f"MaxNano run {runs[-1].name}",
        subtitle=way,
        sections=[
            head(runs, problem),
            what_ran(runs),
            time_and_price(runs),
            curve_section(runs),
            core_section(runs),
            chat_section(runs),
            sample_section(runs),
            config_section(runs),
        ],
    )


def main(config: FrozenConfigDict) -> None:
    """Read the run, write its report."""
    folder = epath.Path(config.base_output_directory).expanduser() / config.run_name
    report = make_report(*run_history.read_chain(folder))
    for path, text in (
        (folder / "report.md", to_markdown(report)),
        (folder / "report.html", to_html(report)),
    ):
        files.write_whole(path, text)
        print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
