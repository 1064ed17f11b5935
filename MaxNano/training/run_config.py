"""A run that exists: `run_name=NAME` is enough to evaluate it, to chat with it, to convert it.

Imports no JAX: an unknown run is reported at once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import config_schema, pyconfig
from MaxNano.config_schema import suggest
from MaxNano.storage.files import names, run_directory

# Which of several processes this is: known to the machine that runs it, not to the run.
PROCESS_KEYS = ("coordinator_address", "num_processes", "process_id")


def config_of_run(config: FrozenConfigDict, argv: Sequence[str]) -> FrozenConfigDict:
    """The config that the run was trained with, if it was saved, overridden by the command line.

    config: what `argv` says; run_name and base_output_directory name the run. Raises ValueError if
    the run has no checkpoint, or if argv names another model.
    """
    directory = run_directory(config)
    if not names(directory / "checkpoints"):
        hint = similar_runs(config, "a checkpoint", lambda run: bool(names(run / "checkpoints")))
        raise ValueError(
            f"{directory} holds no checkpoint: give run_name and base_output_directory of a trained"
            f" run{hint}"
        )
    saved = directory / "config.yml"
    if Path(argv[0]).name == saved.name or not saved.exists():
        return config
    model = pyconfig.saved_values(saved).get("model")
    if config.origin["model"] == pyconfig.COMMAND_LINE and config.model != model:
        raise ValueError(
            f"{directory} was trained with model={model}: leave out model={config.model}"
        )
    words = [word for word in argv[1:] if not word.startswith("model=")]
    moved = ("base_output_directory", "run_name")  # the folder may have been moved
    # Settings for the devices that trained may not run on those of now.
    defaults = config_schema.default_values(config_schema.base_keys(), config_schema.BASE.name)
    tuned = [
        f"{name}={config_schema.format_value(defaults[name])}"
        for name, (_, origin) in pyconfig.saved_lines(config_schema.read_text(saved)).items()
        if origin.startswith(pyconfig.TUNED_ORIGIN) and name in defaults
    ]
    return pyconfig.initialize(
        [
            str(saved),
            *tuned,
            *(f"{name}=null" for name in PROCESS_KEYS),
            *(f"{name}={config[name]}" for name in moved),
            *words,
        ]
    )


def similar_runs(config: FrozenConfigDict, what: str, has: Callable[[epath.Path], bool]) -> str:
    """The end of an error about run_name: "; did you mean NAME?", or the runs that have `what`."""
    folder = run_directory(config).parent
    runs = [run for run in names(folder) if has(folder / run)]
    known = f"; runs with {what}: {', '.join(runs)}" if runs else ""
    return suggest(config.run_name, runs) or known
