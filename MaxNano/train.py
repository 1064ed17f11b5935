"""Trains a model: the one program, the one loop, the one train step of every stage.

    python MaxNano/train.py configs/base.yml model=d24

The same command started again goes on where the run stopped. A batch is `inputs`, `targets` and `weights`, each
(rows, length); a target of -1 is ignored, a weight scales its token's loss. What a stage trains on is therefore
a matter of its data, and this file knows nothing about it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a script: MaxNano/ itself must not be where modules are looked for
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # a typo is told now, not when JAX has been imported

import contextlib
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.data import conversations
from MaxNano.data.loader import DevicePrefetch, Loader, make_loader, merge_states, put_global
from MaxNano.distributed import compile_cache, hardware, runtime, sharding
from MaxNano.distributed.preemption import EXIT_PREEMPTED, Preempted, Preemption
from MaxNano.evals import bpb, chat, core, samples
from MaxNano.evals.results import Results, evaluate_tasks
from MaxNano.inference import prefix_scoring
from MaxNano.reporting import run_history
from MaxNano.tokenization.tokenizer import Tokenizer, load_tokenizer
from MaxNano.training import rollouts
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.metrics import MetricLogger
from MaxNano.training.setup import (
    BatchPlan,
    RunSetup,
    check_memory,
    flops_per_token,
    print_plan,
    run_directory,
    set_up,
)
from MaxNano.training.state import (
    TrainState,
    initialize,
)
from MaxNano.training.step import build_programs, compile_train, score_step

LARGEST_MICRO_BATCH = 32  # rows a device takes at once where per_device_batch_size leaves it open
LARGEST_REPLICATED = 0.02  # share of the parameters' bytes that may lie whole on every device


# ---- The step -------------------------------------------------------------------------------------------------------


# ---- Set-up ---------------------------------------------------------------------------------------------------------


# ---- A start from another run ---------------------------------------------------------------------------------------


def load_start(setup: RunSetup, tokenizer_fingerprint: str) -> TrainState:
    """The newest checkpoint of config.load_from as step 0: its parameters and, with load_optimizer, optimizer state.

    Raises ValueError where there is none, or where it is of another model or tokenizer.
    """
    config, place = setup.config, start_directory(setup.config)
    with Checkpointer(
        config, place, tokenizer_fingerprint=tokenizer_fingerprint, writer=False
    ) as source:
        if config.load_optimizer:
            try:
                state, extra = source.restore(setup.abstract)
            except ValueError as error:
                raise ValueError(
                    f"{error}; load_optimizer=false would read its parameters only"
                ) from error
            params, opt_state = state.params, state.opt_state
        else:
            params, extra = source.restore_params_only(setup.abstract.params)
            in_place = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract.opt_state)
            opt_state = jax.jit(setup.optimizer.init, out_shardings=in_place)(params)
    check_windows(config, extra["run"]["config"])
    if jax.process_index() == 0:
        print(f"starting from step {extra['run']['step']} of {place}", flush=True)
    return TrainState(jax.device_put(np.int32(0), setup.abstract.step.sharding), params, opt_state)


def start_directory(config: FrozenConfigDict) -> epath.Path:
    """The folder of the run that load_from names. Raises ValueError where it is this run's own."""
    place = run_history.start_folder(config.load_from, run_directory(config))
    if place == run_directory(config):
        raise ValueError(
            f"load_from={config.load_from} is the folder of this run itself; choose another run_name"
        )
    return place


def check_windows(config: FrozenConfigDict, saved: Mapping[str, Any]) -> None:
    """Raise ValueError where a layer would see another window than it was trained with, as far as the context goes."""
    length, known = config.max_target_length, pyconfig.windows_of(saved)
    expected = tuple(length if w >= saved["max_target_length"] else min(w, length) for w in known)
    if pyconfig.windows_of(config) != expected:
        raise ValueError(
            f"the layers' windows are {pyconfig.windows_of(config)} tokens but {known} in {config.load_from}: set "
            f"window_pattern={saved['window_pattern']} short_window_fraction={min(expected) / length:g}"
        )


def with_start(config: FrozenConfigDict) -> FrozenConfigDict:
    """The config of a run that goes on, which was started from another run though nobody says so again."""
    saved = run_directory(config) / "config.yml"
    if config.load_from is not None or not config.enable_checkpointing or not saved.exists():
        return config
    was = pyconfig.saved_values(saved).get("load_from")
    return config if was is None else pyconfig.replace(config, "the run", load_from=was)


def check_start(config: FrozenConfigDict, saved: Mapping[str, Any]) -> None:
    """Raise ValueError where a run that goes on was started from another run than it is told now."""
    was = saved.get("load_from")
    if config.load_from not in (None, was):
        start = f"from {was}" if was else "from random parameters"
        raise ValueError(
            f"{run_directory(config)} was started {start}, not from {config.load_from}; choose another run_name"
        )


# ---- The loop -------------------------------------------------------------------------------------------------------


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps happens at `step`; an interval of 0 never comes."""
    return bool(interval) and step % interval == 0


def open_loader(
    config: FrozenConfigDict, plan: BatchPlan, tokenizer, split: str, state=None
) -> Loader:
    """This host's part of the batches of a split."""
    return make_loader(
        config,
        tokenizer,
        split,
        batch_rows=plan.rows,
        state=state,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
    )


def train(setup: RunSetup, preemption: Preemption) -> int:
    """Train from the run's last checkpoint, or from the start, to config.steps; returns the exit status."""
    config = setup.config
    directory = run_directory(config)
    tokenizer = load_tokenizer(config)
    core_tasks = core.load_bundle(config.core_bundle) if config.core_interval else []
    exams = make_exams(config, tokenizer) if config.chat_interval else []
    rows_sharding = sharding.batch_sharding(setup.mesh, config.logical_axis_rules)

    with contextlib.ExitStack() as cleanup:
        checkpointer = cleanup.enter_context(
            Checkpointer(config, directory, tokenizer_fingerprint=tokenizer.fingerprint())
        )

        # ---- State: from the last checkpoint, from that of another run, or new
        extra = {
            "data": None,
            "metrics": None,
            "evaluated_step": None,
            "core_step": None,
            "chat_step": None,
        }
        if config.enable_checkpointing and checkpointer.latest_step() is not None:
            state, extra = checkpointer.restore(setup.abstract)
            check_start(config, extra["run"]["config"])
        elif config.load_from is not None:
            state = load_start(setup, tokenizer.fingerprint())
        else:
            state = initialize(config, setup.numerics, setup.optimizer, setup.abstract)
        start = int(state.step)
        if config.enable_checkpointing:
            checkpointer.check_free_space(setup.abstract)
        setup, step = compile_train(setup)
        plan = setup.plan
        programs = build_programs(setup, step, tokenizer.token_bytes())

        # ---- Data, metrics
        if config.dataset_type == "rollouts":
            batches = rollouts.Rollouts(
                config,
                setup.mesh,
                tokenizer,
                lambda: state.params,
                rows_sharding,
                state=extra["data"],
                score_reference=reference_scorer(setup, tokenizer),
                on_step=preemption.check,
            )
        else:
            batches = DevicePrefetch(
                open_loader(config, plan, tokenizer, "train", extra["data"]),
                rows_sharding,
                config.prefetch_batches,
            )
        cleanup.callback(batches.close)
        held_out = None
        if jax.process_index() == 0:
            pyconfig.save(config, directory / "config.yml")
        logger = MetricLogger(
            config,
            directory,
            total_steps=config.steps,
            start_step=start,
            tokens_per_step=config.global_batch_tokens,
            flops_per_token=flops_per_token(config),
            peak_flops=hardware.peak_flops(list(setup.mesh.devices.flat)),
            is_main=jax.process_index() == 0,
            state=extra["metrics"],
        )
        cleanup.callback(logger.close)
        cleanup.callback(compile_cache.finish)
        if start:
            logger.message(f"going on from step {start} of {directory}")

        def save(step: int) -> None:
            extra = {
                "data": merge_states(runtime.gather_json(batches.state())),
                "metrics": logger.state(),
                "evaluated_step": evaluated_step,
                "core_step": core_step,
                "chat_step": chat_step,
            }
            checkpointer.save(step, state, extra)
            logger.flush()  # starts the clock anew: the next step's time does not have the saving in it

        # ---- Steps start ... config.steps, of which the last only evaluates and saves
        evaluated_step, core_step, chat_step = (
            extra.get(f"{what}_step") for what in ("evaluated", "core", "chat")
        )
        scorer = prefix_scoring.PrefixScorer(setup, tokenizer.bos_id)
        skipped_in_a_row = 0
        try:
            for step in itertools.count(start):
                last = step >= config.steps
                preemption.check(step)
                if step != evaluated_step:
                    if config.eval_interval and (last or due(step, config.eval_interval)):
                        logger.flush()  # so that no step's time has the evaluation in it
                        if config.dataset_type == "rollouts":
                            results = batches.evaluate()
                        else:
                            if held_out is None:
                                with preemption.at_once():
                                    held_out = read_held_out(setup, tokenizer)
                            results = bpb.evaluate_bpb(
                                lambda batch, params=state.params: programs.evaluate(
                                    params, put_global(batch, rows_sharding)
                                ),
                                preemption.checked(held_out),
                            )
                        logger.event(step, "validation", results)
                    if config.sample_interval and (
                        last or (step and due(step, config.sample_interval))
                    ):
                        texts = samples.sample(
                            partial(programs.greedy, state.params), tokenizer, config.sample_tokens
                        )
                        logger.event(step, "samples", texts)
                    evaluated_step = step
                if (
                    step != core_step
                    and config.core_interval
                    and (last or (step and due(step, config.core_interval)))
                ):
                    score, rows = evaluate_tasks(
                        config,
                        core_tasks,
                        tokenizer,
                        scorer,
                        state.params,
                        Results(directory, step, logger.state()["run_id"]),
                        say=logger.message,
                        progress=lambda done, total: preemption.check(),
                    )
                    centered = {label: values["centered"] for label, values in rows.items()}
                    logger.event(step, "core", {"core": score, **centered})
                    core_step = step
                if (
                    step != chat_step
                    and config.chat_interval
                    and (last or (step and due(step, config.chat_interval)))
                ):
                    found = chat.evaluate_exams(
                        config,
                        exams,
                        tokenizer,
                        scorer.bind(state.params),
                        partial(chat.make_engine, config, setup.mesh, state.params, tokenizer),
                        Results(directory, step, logger.state()["run_id"]),
                        dtype=setup.numerics.dtype,
                        say=logger.message,
                        on_step=preemption.check,
                    )
                    accuracies = {name: values["accuracy"] for name, values in found.items()}
                    logger.event(step, "chat", {**chat.summarize(found), **accuracies})
                    chat_step = step

                if (
                    config.enable_checkpointing
                    and step != start
                    and (last or checkpointer.should_save(step))
                ):
                    save(step)
                if last:
                    break

                with preemption.at_once():  # a shard may be long in coming
                    batches.fill()
                batch = next(batches)
                state, metrics = programs.train(state, batch)
                if step == start:
                    runtime.freeze_gc()

                # Metrics arrive one step late, so that the host never waits for the step that is under way.
                arrived = logger.step(step, metrics, batches.position())
                if arrived:
                    skipped_in_a_row = skipped_in_a_row + 1 if arrived["skipped"] else 0
                if skipped_in_a_row >= config.max_nonfinite_steps:
                    raise ValueError(
                        f"loss or gradient was not finite in {skipped_in_a_row} steps in a row, up to step {step - 1}; "
                        f"their updates were skipped. Lower the learning rates or look at the data, and start again "
                        f"from the checkpoints in {directory}"
                    )
        except Preempted:
            # Raised only between steps or between batches of an evaluation, where the state is whole.
            if config.enable_checkpointing:
                save(step)
                checkpointer.wait()
                logger.message(f"stopped at step {step}, saved; the same command goes on from here")
            return EXIT_PREEMPTED
        checkpointer.wait()
    return 0


def read_held_out(setup: RunSetup, tokenizer: Tokenizer) -> bpb.PackedRows:
    """The validation batches: config.eval_tokens, rounded down to whole batches, at least one."""
    config, plan = setup.config, setup.plan
    count = max(1, config.eval_tokens // config.global_batch_tokens)
    with open_loader(config, plan, tokenizer, "validation") as batches:
        return bpb.PackedRows(batches, count, config.vocab_size)


def make_exams(config: FrozenConfigDict, tokenizer: Tokenizer) -> list[chat.Exam]:
    """What chat_tasks ask at intervals."""
    limits = {
        "categorical": config.chat_interval_categorical,
        "generative": config.chat_interval_generative,
    }
    return [chat.make_exam(config, name, tokenizer, limits) for name in config.chat_tasks]


def reference_scorer(setup: RunSetup, tokenizer: Tokenizer) -> Callable[[dict], jax.Array] | None:
    """What rl_kl compares with: the losses of a batch by load_from's model; None where it is off."""
    config = setup.config
    if not config.rl_kl:
        return None
    if config.load_from is None:
        raise ValueError("rl_kl needs load_from, from whose model it measures; or set rl_kl=0")
    with Checkpointer(
        config,
        start_directory(config),
        tokenizer_fingerprint=tokenizer.fingerprint(),
        writer=False,
    ) as source:
        params, _ = source.restore_params_only(setup.abstract.params)
    rows = sharding.batch_sharding(setup.mesh, config.logical_axis_rules)
    return partial(jax.jit(partial(score_step, setup=setup), out_shardings=rows), params)


def with_horizon(config: FrozenConfigDict) -> FrozenConfigDict:
    """The config with the steps of chat_epochs, where a later stage says no steps itself."""
    if not pyconfig.horizon_is_open(config):
        return config
    if config.dataset_type == "rollouts":
        steps = rollouts.steps_of_passes(config)
    else:
        steps = conversations.steps_of_passes(config, load_tokenizer(config))
    return pyconfig.replace(config, "chat_epochs", steps=steps)


def main(config: FrozenConfigDict) -> int:
    """Check, show the plan, train."""
    runtime.initialize(config)
    config = with_horizon(with_start(config))
    setup = set_up(config)
    if jax.process_index() == 0:
        print_plan(setup)
    check_memory(setup)
    if config.dry_run:
        return 0
    with Preemption() as preemption, jax.set_mesh(setup.mesh):
        return train(setup, preemption)


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
