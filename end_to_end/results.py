"""What a run has to show for itself, for the scripts of end_to_end/: is it whole, what came of it, is it sound.

    python end_to_end/results.py COMMAND [--OPTION=VALUE ...] configs/base.yml [key=value ...]

    text                          a document of each split can be read
    core                          the CORE tasks are there
    chat                          the conversations and chat tasks are there
    tokenizer                     the tokenizer is there and whole
    state                         prints new, finished, or the step that the run will go on from
    saved --run=RUN               prints the config that RUN has kept
    summary [--chips= --price=]   loss, bits per byte, speed and price of the run
    smoke                         the run is finished, its loss fell and no update was skipped
    resumed --before=FILE [--like=RUN]
                                  the run went on from where it was when FILE was a copy of its
                                  metrics.jsonl, and has the losses of RUN, which nothing interrupted
    table --runs=A,B,... [--chips= --price=]
                                  a row for each run, also as <base_output_directory>/table.csv

Status 0: yes; 1: no, with one line that says why; 2: the question is wrong. Never imports JAX.
"""

import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml  # noqa: E402
from etils import epath  # noqa: E402
from ml_collections import FrozenConfigDict  # noqa: E402

from MaxNano import pyconfig, scaling  # noqa: E402
from MaxNano.storage import files  # noqa: E402

# The scripts ask often: what is slow to import is imported by the command that needs it.

FIRST_TIMED_STEP = 11  # earlier ones compile and warm up, as MaxNano/training/metrics.py has it


class No(Exception):
    """The answer is no; the message says why."""


# ---- Reading ------------------------------------------------------------------------------------


def folder_of(config: FrozenConfigDict, run_name: str | None = None) -> epath.Path:
    """Where a run, or this run, keeps its files."""
    return epath.Path(config.base_output_directory).expanduser() / (run_name or config.run_name)


def rows_of(folder: epath.Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise No(f"{path} is not there")
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of train steps; at least one."""
    steps = [row for row in rows if "event" not in row]
    if not steps:
        raise No("metrics.jsonl has no train step")
    return steps


def bpb_of(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Bits per byte of every validation."""
    return [row["bpb"] for row in rows if row.get("event") == "validation"]


def last_checkpoint(folder: epath.Path) -> int | None:
    """The step of the last whole checkpoint."""
    root = folder / "checkpoints"
    whole = [
        int(name)
        for name in files.names(root)
        if name.isdigit() and (root / name / "MANIFEST.json").exists()
    ]
    return max(whole, default=None)


def steps_in_all(config: FrozenConfigDict) -> float:
    """Of the whole run. In later stages its data decide, so that only the run itself knows: it has kept it."""
    if not pyconfig.horizon_is_open(config):
        return config.steps
    path = folder_of(config) / "config.yml"
    return yaml.safe_load(path.read_text())["steps"] if path.exists() else math.inf


def evaluated_core(folder: epath.Path, step: int) -> float | None:
    """CORE after `step`, None where evaluate.py has not computed it."""
    path = folder / f"evals/step_{step:06}.json"
    found = json.loads(path.read_text())["evals"].get("core") if path.exists() else None
    return found["values"]["core"] if found else None


def usual(steps: Sequence[dict[str, Any]], key: str) -> float | None:
    """The median of a number over the steps that are not warming up, None where it is not given."""
    values = [row[key] for row in steps[FIRST_TIMED_STEP:] or steps if key in row]
    return statistics.median(values) if values else None


def price_of(seconds: float, options: dict[str, str]) -> float | None:
    """US dollars of `seconds` on all chips, None where no price is given."""
    price, chips = options.get("price"), options.get("chips")
    return seconds / 3600 * float(chips) * float(price) if price and chips else None


# ---- Commands -----------------------------------------------------------------------------------


def text(config: FrozenConfigDict, options: dict[str, str]) -> None:
    from MaxNano.data import sources, stream

    where = sources.open_source(config, "train").where
    for split in ("train", "validation"):
        if next(stream.iterate_texts(config, split), None) is None:
            raise No(f"{where} has no document for {split}")
    print(f"{where}: documents for training and for validation are there")


def core_tasks(config: FrozenConfigDict, options: dict[str, str]) -> None:
    from MaxNano.evals import core

    print(f"{config.core_bundle}: {len(core.load_bundle(config.core_bundle))} tasks are there")


def chat_tasks(config: FrozenConfigDict, options: dict[str, str]) -> None:
    from MaxNano import tasks
    from MaxNano.data import conversations

    found = [conversations.Mixture(config, split) for split in ("train", "validation")]
    asked = [tasks.open_task(config, name) for name in config.chat_tasks]
    print(
        f"{len(found[0]):,} conversations to train on, {len(found[1]):,} for validation, {len(asked)} chat tasks"
    )


def has_tokenizer(config: FrozenConfigDict, options: dict[str, str]) -> None:
    from MaxNano.tokenization.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(config)
    except ValueError as error:
        raise No(str(error)) from None
    if tokenizer.vocab_size != config.vocab_size:
        raise No(
            f"{config.tokenizer_path} has {tokenizer.vocab_size} tokens, not {config.vocab_size}"
        )
    print(f"{config.tokenizer_path} is there")


def state(config: FrozenConfigDict, options: dict[str, str]) -> None:
    step = last_checkpoint(folder_of(config))
    print("new" if step is None else "finished" if step >= steps_in_all(config) else step)


def saved(config: FrozenConfigDict, options: dict[str, str]) -> None:
    print((folder_of(config, options["run"]) / "config.yml").read_text(), end="")


def summary(config: FrozenConfigDict, options: dict[str, str]) -> None:
    rows = rows_of(folder_of(config))
    steps, bpb = steps_of(rows), bpb_of(rows)
    last = steps[-1]
    mfu, seconds = usual(steps, "mfu"), last["elapsed_seconds"]
    lines = {
        "steps": f"{last['step'] + 1:,} of {config.steps:,}, {last['skipped_in_all']} updates skipped",
        "tokens": f"{(last['step'] + 1) * config.global_batch_tokens:,}",
        "loss": f"{steps[0]['loss']:.4f} at first, {last['smoothed_loss']:.4f} at last (smoothed)",
        "bits per byte": f"{bpb[0]:.4f} at first, {bpb[-1]:.4f} at last"
        if bpb
        else "not evaluated",
        "speed": f"{usual(steps, 'tokens_per_second'):,.0f} tokens/s (median)"
        + (f", MFU {100 * mfu:.1f} %" if mfu else ""),
        "time": f"{last['training_seconds'] / 60:.1f} minutes of training steps, {seconds / 60:.1f} in all",
    }
    evaluated = evaluated_core(folder_of(config), config.steps)
    if evaluated is not None:
        lines["CORE"] = f"{evaluated:.4f}"
    dollars = price_of(seconds, options)
    if dollars is not None:
        lines["price"] = (
            f"{options['chips']} chips x {seconds / 3600:.2f} h x {options['price']} USD = {dollars:.2f} USD"
        )
    lines["files"] = str(folder_of(config))
    for name, value in lines.items():
        print(f"{name:<14} {value}")


def smoke(config: FrozenConfigDict, options: dict[str, str]) -> None:
    rows = check_whole(config)
    steps = steps_of(rows)
    if not steps[-1]["smoothed_loss"] < steps[0]["loss"]:
        raise No(
            f"the loss did not fall: {steps[0]['loss']:.4f}, then {steps[-1]['smoothed_loss']:.4f}"
        )
    if steps[-1]["skipped_in_all"]:
        raise No(
            f"{steps[-1]['skipped_in_all']} updates were skipped: loss or gradient was not finite"
        )
    bpb = bpb_of(rows)
    if len(bpb) > 1 and not bpb[-1] < bpb[0]:
        raise No(f"validation bits per byte did not fall: {bpb[0]:.4f}, then {bpb[-1]:.4f}")
    print(
        f"sound: {len(steps)} steps, loss {steps[0]['loss']:.4f} -> {steps[-1]['smoothed_loss']:.4f}"
    )


def resumed(config: FrozenConfigDict, options: dict[str, str]) -> None:
    before = Path(options["before"]).read_text().splitlines()
    after = (folder_of(config) / "metrics.jsonl").read_text().splitlines()
    stopped = steps_of([json.loads(line) for line in before])[-1]["step"] + 1
    if not 0 < stopped < config.steps:
        raise No(f"it was stopped after {stopped} of {config.steps} steps, which tests nothing")
    # Rows hold the time they were written, so equal ones were not written again.
    if after[: len(before)] != before:
        raise No(
            f"it did not go on from step {stopped}: the rows from before the stop have changed"
        )
    steps = steps_of(check_whole(config))
    if "like" in options:
        whole = steps_of(rows_of(folder_of(config, options["like"])))
        for ours, theirs in zip(steps, whole, strict=True):
            if ours["loss"] != theirs["loss"]:
                raise No(
                    f"step {ours['step']} has loss {ours['loss']!r}, and {theirs['loss']!r} "
                    f"in {options['like']}, which nothing interrupted"
                )
    print(
        f"went on: stopped after {stopped} of {config.steps} steps, final loss {steps[-1]['loss']:.6f}"
        + (f", every loss that of {options['like']} to the last bit" if "like" in options else "")
    )


def check_whole(config: FrozenConfigDict) -> list[dict[str, Any]]:
    """The rows of a run that did each of its steps once, ended, and kept its state."""
    folder = folder_of(config)
    rows = rows_of(folder)
    steps = steps_of(rows)
    if [row["step"] for row in steps] != list(range(config.steps)):
        raise No(
            f"{folder} has {len(steps)} rows of steps, which are not each of {config.steps} once"
        )
    # A loss that is not finite is written as null.
    if not all(isinstance(row["loss"], float) and math.isfinite(row["loss"]) for row in steps):
        raise No(f"{folder} has a loss that is not finite")
    if last_checkpoint(folder) != config.steps:
        raise No(f"{folder} has no whole checkpoint of step {config.steps}")
    return rows


def table(config: FrozenConfigDict, options: dict[str, str]) -> None:
    header = [
        "run",
        "layers",
        "parameters",
        "scaling",
        "tokens",
        "FLOPs",
        "bpb",
        "loss",
        "MFU",
        "minutes",
        "USD",
    ]
    cells = [table_row(config, run, options) for run in options["runs"].split(",")]
    shown = [
        header,
        *(
            [f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row]
            for row in cells
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *cells])
    path = epath.Path(config.base_output_directory).expanduser() / "table.csv"
    files.write_whole(path, out.getvalue())
    print(f"also in {path}")


def table_row(config: FrozenConfigDict, run: str, options: dict[str, str]) -> list[Any]:
    folder = folder_of(config, run)
    rows = rows_of(folder)
    steps, bpb = steps_of(rows), bpb_of(rows)
    own = pyconfig.initialize([str(folder / "config.yml")])
    counts = scaling.parameter_counts(scaling.shape_of(own))
    tokens = own.steps * own.global_batch_tokens
    flops = scaling.flops_per_token(scaling.shape_of(own), pyconfig.windows_of(own))
    seconds = steps[-1]["elapsed_seconds"]
    mfu, dollars = usual(steps, "mfu"), price_of(seconds, options)
    return [
        run,
        own.num_decoder_layers,
        float(counts.total),
        float(counts.scaling),
        float(tokens),
        float(flops * tokens),
        bpb[-1] if bpb else "",
        steps[-1]["smoothed_loss"],
        "" if mfu is None else mfu,
        seconds / 60,
        "" if dollars is None else dollars,
    ]


COMMANDS: dict[str, Callable[[FrozenConfigDict, dict[str, str]], None]] = {
    "text": text,
    "core": core_tasks,
    "chat": chat_tasks,
    "tokenizer": has_tokenizer,
    "state": state,
    "saved": saved,
    "summary": summary,
    "smoke": smoke,
    "resumed": resumed,
    "table": table,
}


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        print(__doc__)
        return 2
    options = dict(word[2:].split("=", 1) for word in argv[1:] if word.startswith("--"))
    try:
        config = pyconfig.initialize([word for word in argv[1:] if not word.startswith("--")])
        COMMANDS[argv[0]](config, options)
    except No as error:
        print(f"no: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
