"""Trains a model: one program and one loop for every stage.

    python MaxNano/train.py configs/base.yml model=d24

The same command resumes a run that was interrupted. What a stage trains on is a row of
training/stages.py; what is measured at intervals is a row of evals/base.py.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a script: MaxNano/ itself must not be on the module search path
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # reports a typo before JAX is imported

import contextlib
import itertools
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.data.loader import merge_states
from MaxNano.distributed import compile_cache, hardware, runtime
from MaxNano.distributed.preemption import EXIT_PREEMPTED, Preempted, Preemption
from MaxNano.evals.base import Eval, is_due, measured_steps, open_evals
from MaxNano.evals.results import Results
from MaxNano.storage.files import run_directory
from MaxNano.tokenization.tokenizer import load_tokenizer
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.context import RunContext
from MaxNano.training.metrics import MetricLogger
from MaxNano.training.setup import RunSetup, check_memory, flops_per_token, print_plan, set_up
from MaxNano.training.stages import with_horizon
from MaxNano.training.start import check_start, load_start, with_start
from MaxNano.training.state import initialize
from MaxNano.training.step import build_programs, compile_train


def main(config: FrozenConfigDict) -> int:
    """Set up, show the plan, train; returns the exit status."""
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


def train(setup: RunSetup, preemption: Preemption) -> int:
    """Train from the run's latest checkpoint, or from the start, to config.steps.

    Returns the exit status.
    """
    config, directory = setup.config, run_directory(setup.config)
    tokenizer = load_tokenizer(config)
    run = RunContext(setup, tokenizer, is_training=True, at_once=preemption.at_once)
    run.progress = lambda done=None, total=None: preemption.check()
    evaluations = open_evals(run)

    with contextlib.ExitStack() as cleanup:
        # ---- State, programs, data, metrics
        checkpointer = cleanup.enter_context(
            Checkpointer(config, directory, tokenizer_fingerprint=tokenizer.fingerprint())
        )
        extra = start_state(run, checkpointer)
        start, measured = int(run.state.step), measured_steps(extra)
        run.setup, compiled = compile_train(setup)
        run.programs = build_programs(run.setup, compiled, tokenizer.token_bytes())
        run.batches = setup.stage.open_batches(run, extra.get("data"))
        cleanup.callback(run.batches.close)
        logger = make_logger(run, start, extra.get("metrics"))
        cleanup.callback(logger.close)
        cleanup.callback(compile_cache.finish)
        run.say = logger.message
        if start:
            logger.message(f"Resuming {directory} from step {start}")

        def save(step: int) -> None:
            extra = {
                "data": merge_states(runtime.gather_json(run.batches.state())),
                "metrics": logger.state(),
                "measured_steps": measured,
            }
            checkpointer.save(step, run.state, extra)
            logger.flush()  # restarts the clock: the next step's time does not include saving

        # ---- Steps start ... config.steps; the last only evaluates and saves
        skipped_in_a_row = 0
        try:
            for step in itertools.count(start):
                last = step >= config.steps
                preemption.check(step)
                evaluate_if_due(run, evaluations, measured, logger, step)
                is_new = config.enable_checkpointing and step != start
                if is_new and (last or checkpointer.should_save(step)):
                    save(step)
                if last:
                    break

                with preemption.at_once():  # waiting for data may take long
                    run.batches.fill()
                batch = next(run.batches)
                run.state, metrics = run.programs.train(run.state, batch)
                if step == start:
                    runtime.freeze_gc()

                # Metrics are read one step later: the host never waits for the current step.
                arrived = logger.step(step, metrics, run.batches.position())
                if arrived:
                    skipped_in_a_row = skipped_in_a_row + 1 if arrived["skipped"] else 0
                if skipped_in_a_row >= config.max_nonfinite_steps:
                    raise ValueError(
                        f"loss or gradient was not finite in {skipped_in_a_row} steps in a row, "
                        f"up to step {step - 1}; their updates were skipped. Lower the learning "
                        f"rates or check the data, and resume from the checkpoints in {directory}"
                    )
        except Preempted:
            # Raised only between steps, or within an evaluation: the state is that of `step`.
            if config.enable_checkpointing:
                save(step)
                checkpointer.wait()
                logger.message(f"Saved checkpoint at step {step}; the same command resumes the run")
            return EXIT_PREEMPTED
        checkpointer.wait()
    return 0


def start_state(run: RunContext, checkpointer: Checkpointer) -> dict[str, Any]:
    """Set run.state: from the run's latest checkpoint, from another run's, or initialized.

    Returns what was saved with the run's checkpoint, {} at the start of a run.
    """
    config, setup, extra = run.config, run.setup, {}
    if config.enable_checkpointing and checkpointer.latest_step() is not None:
        run.state, extra = checkpointer.restore(setup.abstract)
        check_start(config, extra["run"]["config"])
    elif config.load_from is not None:
        run.state = load_start(setup, run.tokenizer.fingerprint())
    else:
        run.state = initialize(config, setup.numerics, setup.optimizer, setup.abstract)
    if config.enable_checkpointing:
        checkpointer.check_free_space(setup.abstract)
    return extra


def make_logger(run: RunContext, start: int, state: Mapping[str, Any] | None) -> MetricLogger:
    """Save the config and open the run's metrics; state: from the logger of an earlier process."""
    config, is_main = run.config, jax.process_index() == 0
    if is_main:
        pyconfig.save(config, run.directory / "config.yml")
    return MetricLogger(
        config,
        run.directory,
        total_steps=config.steps,
        start_step=start,
        tokens_per_step=config.global_batch_tokens,
        flops_per_token=flops_per_token(config),
        peak_flops=hardware.peak_flops(list(run.setup.mesh.devices.flat)),
        is_main=is_main,
        state=state,
    )


def evaluate_if_due(
    run: RunContext,
    evaluations: Mapping[str, Eval],
    measured: dict[str, int | None],
    logger: MetricLogger,
    step: int,
) -> None:
    """Measure and log the evaluations that are due at `step` and were not yet measured there."""
    for name, evaluation in evaluations.items():
        if measured.get(name) != step and is_due(evaluation, run.config, step):
            logger.flush()  # a step's time does not include evaluation
            results = Results(run.directory, step, logger.state()["run_id"], is_training=True)
            logger.event(step, evaluation.event, evaluation.measure(results))
            measured[name] = step


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
