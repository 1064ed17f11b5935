"""Trains a model: one program and one loop for every stage.

    .venv/bin/python MaxNano/train.py configs/base.yml model=d24

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
from functools import partial
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.compile.profile import StepProfiler
from MaxNano.data.loader import merge_states
from MaxNano.distributed import compile_cache, hardware, runtime
from MaxNano.distributed.preemption import EXIT_PREEMPTED, Halted, Preempted, Preemption
from MaxNano.evals.base import EVALS, Eval, is_due, measured_steps, open_evals
from MaxNano.evals.results import Results
from MaxNano.tokenization.tokenizer import load_tokenizer
from MaxNano.training import checkpoint_identity
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.context import RunContext
from MaxNano.training.memory_plan import (
    compile_train,
    explain_out_of_memory,
    fit_memory,
    take_first_step,
)
from MaxNano.training.metric_files import has_all_rows
from MaxNano.training.metrics import MetricLogger
from MaxNano.training.run_config import require_start
from MaxNano.training.run_record import RunRecord, check_processes
from MaxNano.training.setup import RunSetup, check_memory, flops_per_token, print_plan, set_up
from MaxNano.training.stages import with_horizon
from MaxNano.training.start import start_state, with_start
from MaxNano.training.step import build_programs
from MaxNano.training.validation import warn_if_small, with_eval_tokens
from MaxNano.tuning.tuned_file import with_tuned


def main(config: FrozenConfigDict) -> int:
    """Set up, show the plan, train; returns the exit status."""
    runtime.initialize(config)
    config = with_tuned(config)
    check_processes(config)
    config = with_start(config)
    require_start(config)
    config = with_horizon(config)
    config = with_eval_tokens(config)
    setup = fit_memory(set_up(config))
    if jax.process_index() == 0:
        print_plan(setup)
    check_memory(setup)
    if config.dry_run:
        return 0
    with Preemption() as preemption, jax.set_mesh(setup.mesh):
        return train(setup, config, preemption)


def train(setup: RunSetup, config: FrozenConfigDict, preemption: Preemption) -> int:
    """Train from the run's latest checkpoint, or from the start, to config.steps.

    config: what the run records as its own; setup.config may also have values of the memory plan.
    Returns the exit status.
    """
    tokenizer = load_tokenizer(config)
    run = RunContext(setup, tokenizer, is_training=True, at_once=preemption.at_once)
    run.progress = lambda done=None, total=None: preemption.check()
    record = RunRecord(config, run.directory)
    if is_complete(run, record):
        return 0
    evaluations = open_evals(run)

    with contextlib.ExitStack() as cleanup:
        # ---- State, programs, data, metrics
        cleanup.enter_context(record)
        cleanup.enter_context(explain_out_of_memory(lambda: run.setup))
        checkpointer = cleanup.enter_context(
            Checkpointer(config, run.directory, tokenizer_fingerprint=tokenizer.fingerprint())
        )
        restart = partial(start_state, run, checkpointer, record)
        extra = restart()
        start, measured = int(run.state.step), measured_steps(extra)
        record.start(start)
        run.batches = setup.stage.open_batches(run, extra.get("data"))
        cleanup.callback(run.batches.close)
        warn_if_small(config)
        run.setup, compiled = compile_train(setup)
        run.programs = build_programs(run.setup, compiled, tokenizer.token_bytes())
        logger = make_logger(run, config, start, extra.get("metrics"))
        cleanup.callback(logger.close)
        cleanup.callback(compile_cache.finish)
        run.say = logger.message
        profiler = cleanup.enter_context(StepProfiler(run, compiled, logger))
        save = partial(save_checkpoint, run, checkpointer, record, logger, measured)

        # ---- Steps start ... config.steps; the last only evaluates and saves
        skipped_in_a_row = 0
        try:
            for step in itertools.count(start):
                last = step >= config.steps
                preemption.check(step)
                profiler.stop(step)
                evaluate_if_due(run, evaluations, measured, logger, step, record)
                is_new = config.enable_checkpointing and step != start
                if is_new and (last or checkpointer.should_save(step)):
                    save(step)
                if last:
                    break

                batch = next_batch(run, logger, preemption, step)
                profiler.start(step)
                if step == start:
                    metrics, recompiled = take_first_step(run, batch, restart)
                    if recompiled:
                        profiler = cleanup.enter_context(StepProfiler(run, recompiled, logger))
                    runtime.freeze_gc()
                else:
                    run.state, metrics = run.programs.train(run.state, batch)

                # Metrics are read one step later: the host never waits for the current step.
                arrived = logger.step(step, metrics, run.batches.position())
                if arrived:
                    skipped_in_a_row = skipped_in_a_row + 1 if arrived["skipped"] else 0
                check_finite(run, skipped_in_a_row, step - 1)
        except (Preempted, Halted) as stop:
            # Raised only between steps, or within an evaluation: the state is that of `step`.
            if config.enable_checkpointing and (step > start or isinstance(stop, Preempted)):
                save(step)
                checkpointer.wait()
                logger.message(f"Saved checkpoint at step {step}; the same command resumes the run")
            if isinstance(stop, Halted):
                raise stop.error from None
            record.preempt(step, EXIT_PREEMPTED)
            return EXIT_PREEMPTED
        checkpointer.wait()
        record.finish(step, logger.run_id, measured)
    return 0


def save_checkpoint(
    run: RunContext,
    checkpointer: Checkpointer,
    record: RunRecord,
    logger: MetricLogger,
    measured: Mapping[str, int | None],
    step: int,
) -> None:
    """Save the state after `step` steps, with all that resumes the run."""
    extra = {
        "data": merge_states(runtime.gather_json(run.batches.state())),
        "metrics": logger.state(),
        "measured_steps": measured,
        "inputs": record.inputs(),
    }
    checkpointer.save(step, run.state, extra)
    logger.flush()  # restarts the clock: the next step's time does not include saving


def next_batch(
    run: RunContext, logger: MetricLogger, preemption: Preemption, step: int
) -> dict[str, jax.Array]:
    """The batch of `step`. Raises Halted if it cannot be made, or Preempted while it waits for data.

    Of several processes, all raise Halted before the first batch that is missing in one of them.
    They cannot save if sampling rollouts fails, which they do together: the error itself is raised.
    """
    is_alone = jax.process_count() == 1
    try:
        with run.at_once(), logger.waiting():  # for data, maybe long
            run.batches.fill()
    except (ValueError, OSError, RuntimeError) as error:
        if is_alone:
            raise Halted(error) from None
        raise
    ready, error = run.batches.shortage() or (None, None)
    if ready is not None and step + ready >= run.config.steps:
        ready, error = None, None  # no later batch is needed
    if not is_alone:
        preemption.check_batches(step, ready, error)
    elif ready == 0:
        raise Halted(error)
    return next(run.batches)


def is_complete(run: RunContext, record: RunRecord) -> bool:
    """Whether the run has all of its steps and evaluations, which is then printed.

    Raises ValueError if it was trained with another config, tokenizer or data.
    """
    config, fingerprint = run.config, run.tokenizer.fingerprint()
    if not config.enable_checkpointing:
        return False
    with Checkpointer(
        config, run.directory, tokenizer_fingerprint=fingerprint, writer=False
    ) as reader:
        if (reader.latest_step() or 0) < max(1, config.steps):
            return False
        extra = reader.read_extra()
    step = extra["run"]["step"]
    if step < config.steps:  # a later checkpoint is damaged
        return False
    checkpoint_identity.check(extra["run"], config, fingerprint, run.directory)
    record.check(extra)
    measured = measured_steps(extra) | record.measured_at_end(extra)
    if any(row.interval(config) and measured.get(name) != step for name, row in EVALS.items()):
        return False
    if extra.get("metrics") and not has_all_rows(run.directory, extra["metrics"]):
        return False
    run.say(f"Run already complete ({step} of {config.steps} steps)")
    return True


def check_finite(run: RunContext, skipped_in_a_row: int, step: int) -> None:
    """Raise ValueError if max_nonfinite_steps updates in a row, up to `step`, were skipped."""
    if skipped_in_a_row >= run.config.max_nonfinite_steps:
        raise ValueError(
            f"loss or gradient was not finite in {skipped_in_a_row} steps in a row, up to step "
            f"{step}; their updates were skipped. Lower the learning rates or check the data, and "
            f"resume from the checkpoints in {run.directory}"
        )


def make_logger(
    run: RunContext, config: FrozenConfigDict, start: int, state: Mapping[str, Any] | None
) -> MetricLogger:
    """Save the config and open the run's metrics; state: from the logger of an earlier process."""
    is_main = jax.process_index() == 0
    if is_main:  # a change is allowed once, and later stages read this file
        saved = pyconfig.replace(config, "base", allow_config_change=False)
        pyconfig.save(saved, run.directory / "config.yml")
    logger = MetricLogger(
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
    if start:
        logger.message(f"Resuming {run.directory} from step {start}")
    return logger


def evaluate_if_due(
    run: RunContext,
    evaluations: Mapping[str, Eval],
    measured: dict[str, int | None],
    logger: MetricLogger,
    step: int,
    record: RunRecord,
) -> None:
    """Measure and log the evaluations that are due at `step` and were not yet measured there.

    Raises Halted if one fails in all processes.
    """
    for name, evaluation in evaluations.items():
        if measured.get(name) != step and is_due(evaluation, run.config, step):
            logger.flush()  # a step's time does not include evaluation
            run_id = record.parameters_id(logger.run_id)
            results = Results(run.directory, step, run_id, is_training=True)
            try:
                values = evaluation.measure(results)
            except (ValueError, OSError) as error:  # such as missing data; the parameters are saved
                if jax.process_count() > 1 and not isinstance(error, runtime.SharedError):
                    raise
                raise Halted(error) from None
            logger.event(step, evaluation.event, values)
            measured[name] = step


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
