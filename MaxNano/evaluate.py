"""Evaluates a checkpoint of a run: bits per byte, CORE, chat tasks, samples.

    python MaxNano/evaluate.py configs/base.yml model=d4 run_name=NAME evals=bpb,core,samples core_bundle=PATH
    python MaxNano/evaluate.py configs/base.yml model=d4 stage=sft evals=chat chat_data=PATH

What the run was trained with counts, save for what the command line says. Results go to `evals/step_<step>.json` and,
for CORE, `.csv` in the run's folder, after every task: started again, it goes on with the task that was under way, and
what is there for the same questions, tokenizer and numbers is not computed again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a script: MaxNano/ itself must not be where modules are looked for
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # a typo is told now, not when JAX has been imported

import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from MaxNano import pyconfig, train
from MaxNano.console import print_table
from MaxNano.data.loader import put_global
from MaxNano.distributed import runtime, sharding
from MaxNano.evals import bpb, chat, core, samples
from MaxNano.evals.results import Results, evaluate_tasks, run_id
from MaxNano.inference import prefix_scoring
from MaxNano.tokenization.tokenizer import Tokenizer, load_tokenizer
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.setup import RunSetup, run_directory, set_up
from MaxNano.training.step import build_programs, jit_evaluate

EVALS = ("bpb", "core", "chat", "samples")


# ---- Bits per byte --------------------------------------------------------------------------------------------------


def evaluate_bpb(setup: RunSetup, tokenizer: Tokenizer, params: Any, results: Results) -> None:
    """Bits per byte on the beginning of both splits, eval_tokens of each, the same rows for any number of devices."""
    config, plan = setup.config, setup.plan
    count = max(1, config.eval_tokens // config.global_batch_tokens)
    rows = sharding.batch_sharding(setup.mesh, config.logical_axis_rules)
    evaluate = jit_evaluate(setup)
    token_bytes = jax.device_put(
        tokenizer.token_bytes(), NamedSharding(setup.mesh, PartitionSpec())
    )
    table = []
    for split in ("train", "validation"):
        tokens = count * config.global_batch_tokens
        of = {
            "data": _data_of(config, split),
            "rows": [
                count,
                config.global_batch_tokens,
                config.max_target_length,
                config.data_readers,
            ],
            "tokenizer": tokenizer.fingerprint(),
            "dtype": setup.numerics.dtype,
        }
        values = results.get(f"bpb {split}", of)
        if values is None:
            started = time.monotonic()
            with (
                train.open_loader(config, plan, tokenizer, split) as batches,
                _progress() as shown,
            ):
                batches = shown.track(
                    islice(batches, count), total=count, description=f"bits per byte, {split}"
                )
                values = bpb.evaluate_bpb(
                    lambda batch: evaluate(params, put_global(batch, rows), token_bytes), batches
                )
            values |= {"tokens": tokens, "seconds": time.monotonic() - started}
            results.put(f"bpb {split}", of, values)
        table.append(
            (split, f"{values['tokens']:,}", f"{values['bpb']:.6f}", f"{values['seconds']:.1f}")
        )
    _show("bits per byte", ("split", "tokens", "bpb", "seconds"), table)


def _data_of(config: FrozenConfigDict, split: str) -> list[Any]:
    """What decides the documents of a split."""
    if config.dataset_type == "chat":
        mixture = config.chat_train_mixture if split == "train" else config.chat_validation_mixture
        return [config.dataset_type, config.chat_data, config.chat_mixture_unit, *mixture]
    return [
        config.dataset_type,
        config.dataset_path,
        config.dataset_name,
        list(config.dataset_splits),
    ]


# ---- CORE -----------------------------------------------------------------------------------------------------------


def evaluate_core(setup: RunSetup, tokenizer: Tokenizer, params: Any, results: Results) -> None:
    """CORE, task by task, in a table."""
    config = setup.config
    tasks = core.load_bundle(config.core_bundle)
    scorer = prefix_scoring.PrefixScorer(setup, tokenizer.bos_id)
    with _progress() as shown:
        bar = shown.add_task("CORE", total=None)
        score, rows = evaluate_tasks(
            config,
            tasks,
            tokenizer,
            scorer,
            params,
            results,
            say=_say,
            progress=lambda done, total: shown.update(bar, completed=done, total=total),
        )
    lines = [
        (
            label,
            v["shots"],
            v["examples"],
            f"{v['accuracy']:.6f}",
            f"{v['centered']:.6f}",
            f"{v['seconds']:.1f}",
        )
        for label, v in rows.items()
    ]
    seconds = sum(values["seconds"] for values in rows.values())
    header = ("task", "shots", "questions", "accuracy", "centered", "seconds")
    _show("CORE", header, [*lines, ("CORE", "", "", "", f"{score:.6f}", f"{seconds:.1f}")])


# ---- Chat tasks -----------------------------------------------------------------------------------------------------


def evaluate_chat(setup: RunSetup, tokenizer: Tokenizer, params: Any, results: Results) -> None:
    """The chat tasks, task by task, in a table."""
    config = setup.config
    limits = dict.fromkeys(("categorical", "generative"), config.chat_max_per_task)
    exams = [chat.make_exam(config, name, tokenizer, limits) for name in config.chat_tasks]
    with _progress() as shown:
        bar = shown.add_task("chat tasks", total=None)
        found = chat.evaluate_exams(
            config,
            exams,
            tokenizer,
            prefix_scoring.PrefixScorer(setup, tokenizer.bos_id).bind(params),
            lambda: chat.make_engine(config, setup.mesh, params, tokenizer),
            results,
            dtype=setup.numerics.dtype,
            say=_say,
            on_step=lambda: shown.advance(bar),
        )
    scores = chat.summarize(found)
    results.put("chat", {}, scores)
    lines = [
        (
            name,
            v["problems"],
            f"{v['accuracy']:.6f}",
            f"{v['centered']:.6f}",
            f"{v['stopped']:.2f}" if "stopped" in v else "",
            f"{v['seconds']:.1f}",
        )
        for name, v in found.items()
    ]
    lines += [(name, "", "", f"{score:.6f}", "", "") for name, score in scores.items()]
    _show("chat tasks", ("task", "problems", "accuracy", "centered", "stopped", "seconds"), lines)


# ---- Samples --------------------------------------------------------------------------------------------------------


def evaluate_samples(setup: RunSetup, tokenizer: Tokenizer, params: Any, results: Results) -> None:
    """Greedy continuations of a few prompts."""
    programs = build_programs(setup, None, tokenizer.token_bytes())
    texts = samples.sample(partial(programs.greedy, params), tokenizer, setup.config.sample_tokens)
    results.put("samples", {}, texts)
    _show(
        "samples",
        ("prompt", "greedy continuation"),
        [(key, repr(text)[1:-1]) for key, text in texts.items()],
    )


# ---- Command --------------------------------------------------------------------------------------------------------


def chosen(config: FrozenConfigDict) -> list[str]:
    """The evaluations that `evals` names. Raises ValueError for any other."""
    names = [name.strip() for name in config.evals.split(",")]
    for name in names:
        if name not in EVALS:
            raise ValueError(f"evals={config.evals} names {name!r}: choose among {','.join(EVALS)}")
    return names


def config_of_run(config: FrozenConfigDict, argv: Sequence[str]) -> FrozenConfigDict:
    """The config with which the run was trained, if it is there, with the command line's values in it."""
    saved = run_directory(config) / "config.yml"
    if Path(argv[0]).name == saved.name or not saved.exists():
        return config
    words = [word for word in argv[1:] if not word.startswith("model=")]
    names = ("base_output_directory", "run_name")  # the folder may have been moved
    return pyconfig.initialize([str(saved), *(f"{name}={config[name]}" for name in names), *words])


def evaluate(config: FrozenConfigDict) -> None:
    """Load the checkpoint, evaluate, print and write."""
    names = chosen(config)
    directory = run_directory(config)
    if not (directory / "checkpoints").exists():
        raise ValueError(
            f"{directory} holds no checkpoint: give run_name and base_output_directory of a trained run"
        )
    if "core" in names:
        core.load_bundle(config.core_bundle)  # what is wrong with it is told now
    runtime.initialize(config)
    setup = set_up(config)
    tokenizer = load_tokenizer(config)
    with jax.set_mesh(setup.mesh):
        with Checkpointer(
            config, directory, tokenizer_fingerprint=tokenizer.fingerprint(), writer=False
        ) as checkpointer:
            params, extra = checkpointer.restore_params_only(setup.abstract.params, config.step)
        step = extra["run"]["step"]
        results = Results(directory, step, run_id(extra))
        _say(
            f"{directory}, step {step}, on {setup.mesh.size} x {setup.mesh.devices.flat[0].device_kind}"
        )
        for name in EVALS:
            if name not in names:
                continue
            if name == "bpb":
                evaluate_bpb(setup, tokenizer, params, results)
            elif name == "core":
                evaluate_core(setup, tokenizer, params, results)
            elif name == "chat":
                evaluate_chat(setup, tokenizer, params, results)
            else:
                evaluate_samples(setup, tokenizer, params, results)
    _say(f"written to {results.path}")


def main(config: FrozenConfigDict, argv: Sequence[str]) -> int:
    """Evaluate; Ctrl-C leaves what is finished."""
    try:
        evaluate(config_of_run(config, argv))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _progress() -> Progress:
    """A bar with the time left, on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns, transient=True, disable=not sys.stdout.isatty() or jax.process_index() != 0
    )


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _show(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    if jax.process_index() == 0:
        print()
        print_table(title, header, rows)


if __name__ == "__main__":
    sys.exit(pyconfig.launch(lambda config: main(config, sys.argv[1:])))
