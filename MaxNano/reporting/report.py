"""The report of a run and of those that it started from: facts from their folders as plain data."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import yaml

from MaxNano import pyconfig, scaling
from MaxNano.distributed import hardware
from MaxNano.reporting import charts, evaluations, starts
from MaxNano.reporting.blocks import (
    Block,
    Curves,
    Folded,
    Heading,
    Missing,
    Note,
    Report,
    Section,
    Table,
    Tile,
    Tiles,
)
from MaxNano.reporting.charts import Series
from MaxNano.reporting.run_history import Run
from MaxNano.reporting.words import (
    Points,
    duration,
    large,
    median_of,
    or_dash,
    percent,
    points,
    stage_of,
    status,
    timed,
)
from MaxNano.stage_configs import STAGE_CONFIGS, stage_config

CURVES_PER_EVENT = 4  # series in the chart of an evaluation that training repeated


def make_report(runs: Sequence[Run], problem: str | None = None) -> Report:
    """The report of runs that were each started from the one before.

    problem: why the first of them is not the start, if it is not.
    """
    return Report(
        title=f"MaxNano run {runs[-1].name}",
        subtitle=" → ".join(f"{stage_of(run)}, {status(run)}" for run in runs),
        sections=[
            _overview(runs, problem),
            _what_ran(runs),
            _time_and_price(runs),
            _curve_section(runs),
            *evaluations.sections(runs),
            starts.section(runs),
            _config_section(runs),
        ],
    )


def _overview(runs: Sequence[Run], problem: str | None) -> Section:
    """The numbers that matter most."""
    trained = [run for run in runs if run.steps]
    several = "all stages" if len(runs) > 1 else ""
    last = runs[-1].config
    counts = scaling.parameter_counts(scaling.shape_of(last))
    tiles = [Tile("parameters", large(counts.total), f"{last['num_decoder_layers']} layers")]
    if trained:
        tiles.append(Tile("tokens", large(sum(map(tokens_done, trained))), several))
    tiles += evaluations.tiles(runs)
    if trained:
        seconds = sum(recorded_seconds(run) + evaluation_seconds(run) for run in runs)
        note = ", ".join(filter(None, ["recorded", several]))
        tiles.append(Tile("time", duration(seconds), note))
    prices = [price_of(run) for run in trained]
    if prices and None not in prices:
        dollars = sum(price.dollars for price in prices)
        tiles.append(Tile("price", f"${dollars:,.2f}", "computed"))
    problems = [*([problem] if problem else []), *itertools.chain(*(run.problems for run in runs))]
    return Section("At a glance", [Tiles(tiles), *map(Missing, problems)])


# ---- What ran -----------------------------------------------------------------------------------


def describe_devices(run: Run) -> str:
    """The devices on which a run was trained, "" if it was not."""
    if not run.steps:  # the devices on which it was imported do not matter
        return ""
    devices = run.saved.get("devices")
    if not devices:
        return "not recorded"
    hosts = f" on {devices['processes']} hosts" if devices["processes"] > 1 else ""
    cores = f" ({devices['host_cores']} cores)" if devices["kind"] == "cpu" else ""
    return f"{devices['count']} x {devices['kind']}{hosts}{cores}"


def _describe_model(run: Run) -> str:
    config = run.config
    return (
        f"{config['model']}: {config['num_decoder_layers']} layers, width {config['emb_dim']}, "
        f"{config['num_query_heads']} heads"
    )


def _describe_software(run: Run) -> str:
    versions = run.saved.get("versions", {}).items()
    hidden = ("commit", "source")
    return ", ".join(f"{name} {text}" for name, text in versions if text and name not in hidden)


def _describe_left_out(run: Run) -> str:
    """What of the data was read and not trained on, as counted until the last step."""
    last = run.steps[-1] if run.steps else {}
    parts = (
        [f"{percent(last['discarded_share'])} of the tokens"] if "discarded_share" in last else []
    )
    for name in ("rows_without_text", "damaged_parts", "conversations_left_out"):
        if last.get(name):
            parts.append(f"{last[name]:,} {name.replace('_', ' ')}")
    return ", ".join(parts)


# Row of the table -> its cell for a run. Empty: not known.
FACTS: dict[str, Callable[[Run], str]] = {
    "run": lambda run: run.name,
    "started from": lambda run: run.config.get("load_from") or "no other run",
    "model": _describe_model,
    "parameters": lambda run: f"{scaling.parameter_counts(scaling.shape_of(run.config)).total:,}",
    "vocabulary": lambda run: f"{run.config['vocab_size']:,} tokens",
    "context": lambda run: f"{run.config['max_target_length']:,} tokens",
    "data": lambda run: stage_config(run.config).describe_data(run.config),
    "data left out": _describe_left_out,
    "batch": lambda run: f"{run.config['global_batch_tokens']:,} tokens",
    "done": status,
    "tokens": lambda run: f"{tokens_done(run):,}" if run.steps else "",
    "FLOPs": lambda run: f"{training_flops(run):.3g}" if run.steps else "",
    "updates skipped": lambda run: f"{run.steps[-1]['skipped_in_all']:,}" if run.steps else "",
    "hardware": describe_devices,
    "software": _describe_software,
    "commit": lambda run: (run.saved.get("versions", {}).get("commit") or "")[:12],
    "tokenizer": lambda run: run.saved.get("tokenizer", "")[:16],
    "newest checkpoint": lambda run: f"step {run.saved['step']:,}" if "step" in run.saved else "",
}


def _what_ran(runs: Sequence[Run]) -> Section:
    """A column per stage: model, data, horizon, hardware, versions."""
    rows = [[name, *(or_dash(fact(run)) for run in runs)] for name, fact in FACTS.items()]
    blocks: list[Block] = [Table(["", *map(stage_of, runs)], rows, numeric=False)]
    for run in runs:
        if not run.saved:
            blocks.append(
                Missing(f"{run.name} has no checkpoint, so versions and hardware are unknown.")
            )
        elif run.steps and "devices" not in run.saved:
            blocks.append(
                Missing(f"{run.name} was saved by a version that did not record its hardware.")
            )
    stages = {stage_config(run.config).name for run in runs}
    blocks += [
        Missing(f"No {stage.title}: no run of stage {stage.name} is in this chain.")
        for stage in STAGE_CONFIGS.values()
        if stage.name not in stages
    ]
    return Section("What ran", blocks)


def tokens_done(run: Run) -> int:
    """Tokens of the steps done."""
    return run.steps_done * run.config["global_batch_tokens"]


def training_flops(run: Run) -> float:
    """FLOPs of the steps done."""
    flops = scaling.flops_per_token(scaling.shape_of(run.config), pyconfig.windows_of(run.config))
    return float(flops * tokens_done(run))


# ---- Time and price -----------------------------------------------------------------------------


class Price(NamedTuple):
    """What a run cost, computed and not billed."""

    chips: int
    hours: float
    chip_hour: float  # US dollars

    @property
    def dollars(self) -> float:
        """US dollars."""
        return self.chips * self.hours * self.chip_hour


def price_of(run: Run, chip_hour: float | None = None) -> Price | None:
    """The price of a run's recorded time, None if its devices or their price are unknown.

    chip_hour: USD; None is the price of the chip table.
    """
    devices = run.saved.get("devices")
    if devices and chip_hour is None and (chip := hardware.CHIPS.get(devices["kind"])):
        chip_hour = chip.price
    if not devices or chip_hour is None:
        return None
    hours = (recorded_seconds(run) + evaluation_seconds(run)) / 3600
    return Price(devices["count"], hours, chip_hour)


def recorded_seconds(run: Run) -> float:
    """Time since the first step in the run's rows, with evaluations and checkpoints."""
    return run.steps[-1]["elapsed_seconds"] if run.steps else 0.0


def evaluation_seconds(run: Run) -> float:
    """Time of evaluate.py; evaluations while training are in recorded_seconds."""
    while_training = {(row["event"], row["step"]) for row in run.events}
    return sum(
        entry["values"].get("seconds", 0.0)
        for evaluation in run.evaluations
        for name, entry in evaluation.entries.items()
        if " " in name and (name.partition(" ")[0], evaluation.step) not in while_training
    )


def _goodput(run: Run) -> Points:
    """(step, share of the recorded time until then that was spent in train steps)."""
    shares, busy = [], 0.0
    for row in run.steps:
        busy += row["milliseconds"] / 1e3
        if row["elapsed_seconds"] > 0:
            shares.append((row["step"], min(1.0, busy / row["elapsed_seconds"])))
    return shares


def _time_and_price(runs: Sequence[Run]) -> Section:
    """Time of each stage, and its price by the chip table."""
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
            "Step, tokens/s and MFU are medians of the steps after the warm-up. Training is the "
            "time recorded in metrics.jsonl, evaluations and checkpoints included; goodput is the "
            "share of it spent in train steps. Not included: start, compilation, and steps that "
            f"a kill undid. MFU is model FLOPs ({scaling.FLOP_COUNT}; nothing for what is computed "
            "again) over the chip table's dense bfloat16 peak."
        ),
    ]
    prices = [(run, price) for run in runs if (price := price_of(run))]
    if prices:
        terms = "; ".join(
            f"{run.name} {price.chips} chips x {price.hours:.3f} h x ${price.chip_hour:.6g} per chip-hour"
            for run, price in prices
        )
        source = "the prices in MaxNano/distributed/hardware.py"
        blocks.append(Note(f"Prices are computed, not billed, from {source}: {terms}."))
    for run in trained:
        kind = run.saved.get("devices", {}).get("kind")
        if price_of(run) is None:
            why = f"the chip table has none for {kind}" if kind else "its hardware is not recorded"
            blocks.append(Missing(f"No price of {run.name}: {why}."))
    return Section(title, blocks)


def _speed_cells(run: Run) -> list[str]:
    step, rate, mfu = (median_of(run, key) for key in ("milliseconds", "tokens_per_second", "mfu"))
    shares = _goodput(run)
    return [
        stage_of(run),
        f"{step / 1e3:,.3g} s" if step else "–",
        f"{rate:,.0f}" if rate else "–",
        percent(mfu),
        percent(shares[-1][1] if shares else None),
    ]


def _time_cells(runs: Sequence[Run]) -> list[str]:
    """Times of runs together, and their price if it is known for each that trained."""
    trained = sum(map(recorded_seconds, runs))
    evaluated = sum(map(evaluation_seconds, runs))
    prices = [price_of(run) for run in runs if run.steps]
    known = prices and None not in prices
    dollars = f"${sum(price.dollars for price in prices):,.2f}" if known else "–"
    times = [duration(seconds) if seconds else "–" for seconds in (trained, evaluated)]
    return [*times, duration(trained + evaluated), dollars]


# ---- Curves -------------------------------------------------------------------------------------


def _curve_section(runs: Sequence[Run]) -> Section:
    """The curves of each stage."""
    blocks: list[Block] = []
    for run in runs:
        if len(runs) > 1:
            blocks.append(Heading(f"{stage_of(run)} ({run.name})"))
        if run.steps:
            blocks += [*_curves(run), *_missing_curves(run)]
        else:
            blocks.append(Missing(f"{run.name} has no curves: metrics.jsonl has no step."))
    return Section("Curves", blocks)


def _curves(run: Run) -> Iterator[Curves]:
    """The curves for which a run has numbers."""
    for title, series, caption, from_zero in (*_step_curves(run), *_event_curves(run)):
        known = [one for one in series if any(y is not None for _, y in one.points)]
        if known:
            yield Curves(title, known, caption, from_zero)


Candidate = tuple[str, Sequence[Series], str, bool]  # the fields of Curves


def _step_curves(run: Run) -> Iterator[Candidate]:
    steps, validations, rows = run.steps, run.events_of("validation"), timed(run)
    reward = points(steps, "reward")
    yield "reward", _with_median("mean of a step", reward), "", True
    passes = [name for name in validations[0] if name.startswith("pass@")] if validations else []
    ends = dict.fromkeys([*passes[:1], *passes[-1:]])
    series = [Series(name, points(validations, name), "dots") for name in ends]
    yield "pass@k", series, run.config.get("rl_eval_task") or "", True
    smoothed = Series("smoothed", points(steps, "smoothed_loss"))
    yield "loss", [Series("each step", points(steps, "loss"), "faint"), smoothed], "", False
    training = Series("training", points(steps, "bpb"), "faint")
    validation = Series("validation", points(validations, "bpb"), "dots")
    yield "bits per byte", [training, validation], "", False
    peak = run.config["matrix_lr"] * (run.config["learning_rate_scale"] or 1)
    rate = Series("learning rate", points(steps, "lr_multiplier", peak))
    yield "learning rate", [rate], "of Muon's matrices; other groups have other base rates", True
    mfu = points(rows, "mfu", 100)
    yield "MFU, %", _with_median("each step", mfu), "", True
    if not mfu:
        speed = points(rows, "tokens_per_second")
        yield "tokens/s", _with_median("each step", speed), "", True
    goodput = Series("goodput", [(step, 100 * share) for step, share in _goodput(run)])
    yield "goodput, %", [goodput], "share of the time so far spent in train steps", True


def _event_curves(run: Run) -> Iterator[Candidate]:
    """The metrics of evaluations that training repeated: its scores, or the first few."""
    names = dict.fromkeys(row["event"] for row in run.events)
    for event in names:
        rows = run.events_of(event)
        if event == "validation" or len(rows) < 2:
            continue
        keys = [
            key for key, value in rows[-1].items() if key != "step" and not isinstance(value, str)
        ]
        keys = [key for key in keys if key.startswith(event)] or keys
        series = [Series(key, points(rows, key), "dots") for key in keys[:CURVES_PER_EVENT]]
        yield f"{event} while training", series, "", False


def _with_median(name: str, values: Points) -> list[Series]:
    return [Series(name, values, "faint"), Series("median", charts.medians(values))]


def _missing_curves(run: Run) -> Iterator[Missing]:
    if not run.events_of("validation"):
        yield Missing(f"No validation of {run.name}: eval_interval={run.config['eval_interval']}.")
    if not points(timed(run), "mfu"):
        kind = run.saved.get("devices", {}).get("kind")
        unknown = kind is not None and kind not in hardware.CHIPS
        why = f"the chip table has no peak FLOP/s of {kind}" if unknown else "its rows have none"
        yield Missing(f"No MFU of {run.name}: {why}; tokens/s are shown.")


# ---- Config -------------------------------------------------------------------------------------


def _config_section(runs: Sequence[Run]) -> Section:
    """What differs from base.yml in each stage, with its origin, and every key on demand."""
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
