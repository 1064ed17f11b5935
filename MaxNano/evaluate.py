"""Evaluates a checkpoint of a run: bits per byte, CORE, chat tasks, samples.

    .venv/bin/python MaxNano/evaluate.py configs/base.yml model=d4 run_name=NAME evals=bpb,core,samples core_bundle=PATH
    .venv/bin/python MaxNano/evaluate.py configs/base.yml model=d4 stage=sft evals=chat chat_data=PATH

Config values are those of the run, unless the command line sets them. Results go to
`evals/step_<step>.json` in the run's folder after every task. The same command resumes an
interrupted evaluation; tasks with a result for the same parameters, questions, tokenizer and keys
are skipped.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a script: MaxNano/ itself must not be on the module search path
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # reports a typo before JAX is imported

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax
from etils import epath
from ml_collections import FrozenConfigDict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from MaxNano import pyconfig
from MaxNano.console import print_table
from MaxNano.distributed import runtime
from MaxNano.evals.base import EVALS
from MaxNano.evals.results import Results
from MaxNano.storage import files
from MaxNano.storage.files import run_directory
from MaxNano.tokenization.tokenizer import load_tokenizer
from MaxNano.training.checkpointing import Checkpointer
from MaxNano.training.config_changes import parameters_id
from MaxNano.training.context import RunContext, say
from MaxNano.training.run_config import config_of_run
from MaxNano.training.setup import set_up
from MaxNano.training.state import TrainState
from MaxNano.training.step import build_programs
from MaxNano.training.validation import with_eval_tokens


def chosen_evals(config: FrozenConfigDict) -> list[str]:
    """The names in `evals`, in the order of EVALS. Raises ValueError for an unknown one."""
    names = [name.strip() for name in config.evals.split(",")]
    for name in names:
        if name not in EVALS:
            raise ValueError(f"evals={config.evals} names {name!r}: choose among {','.join(EVALS)}")
    return [name for name in EVALS if name in names]


def evaluate(config: FrozenConfigDict) -> None:
    """Restore the checkpoint, run the evaluations, print and write their results."""
    names = chosen_evals(config)
    directory = run_directory(config)
    runtime.initialize(config)
    check_output(directory)
    run = RunContext(set_up(config), load_tokenizer(config))
    evaluations = {name: EVALS[name](run) for name in names}
    mesh, fingerprint = run.setup.mesh, run.tokenizer.fingerprint()
    with jax.set_mesh(mesh):
        with Checkpointer(
            config, directory, tokenizer_fingerprint=fingerprint, writer=False
        ) as checkpointer:
            params, extra = checkpointer.restore_params_only(run.setup.abstract.params, config.step)
        step = extra["run"]["step"]
        run.state = TrainState(step=step, params=params, opt_state=None)
        run.programs = build_programs(run.setup, None, run.tokenizer.token_bytes())
        results = Results(directory, step, parameters_id(extra))
        say(
            f"Evaluating step {step} of {directory} on {mesh.size} x {mesh.devices.flat[0].device_kind}"
        )
        for name, evaluation in evaluations.items():
            with progress_bar(name) as run.progress:
                table = evaluation.table(results)
            if jax.process_index() == 0:
                print()
                print_table(*table)
    say(f"Wrote results to {results.path}")


def check_output(directory: epath.Path) -> None:
    """Raise ValueError in all processes if the first one cannot write results to the run's folder."""
    problem = None
    if jax.process_index() == 0:
        try:
            files.check_writable(directory / "evals", "make the run's folder writable")
        except ValueError as error:
            problem = str(error)
    problem = runtime.first_problem(problem)
    if problem is not None:
        raise ValueError(problem)


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Callable[..., None]]:
    """A bar with the time left, on a terminal; yields progress(done, total) that moves it.

    Without arguments it moves by one.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    is_shown = sys.stdout.isatty() and jax.process_index() == 0
    with Progress(*columns, transient=True, disable=not is_shown) as bars:
        bar = bars.add_task(name, total=None)

        def progress(done: int | None = None, total: int | None = None) -> None:
            if done is None:
                bars.advance(bar)
            else:
                bars.update(bar, completed=done, total=total)

        yield progress


def main(config: FrozenConfigDict, argv: Sequence[str]) -> int:
    """Evaluate; Ctrl-C keeps what is done."""
    try:
        evaluate(with_eval_tokens(config_of_run(config, argv)))
    except KeyboardInterrupt:
        print("Interrupted; the same command resumes the evaluation", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(pyconfig.launch(lambda config: main(config, sys.argv[1:])))
