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
    if not _has_checkpoint(directory):
        hint = similar_runs(config, argv, "a checkpoint", _has_checkpoint)
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


def similar_runs(
    config: FrozenConfigDict, argv: Sequence[str], what: str, has: Callable[[epath.Path], bool]
) -> str:
    """The end of an error about run_name: "; did you mean NAME?", or the runs that have `what`, or
    where the run is whose config.yml is the first of argv.
    """
    folder = epath.Path(argv[0]).parent
    if Path(argv[0]).name == "config.yml" and has(folder):  # it names the folder of then
        folder = folder if "://" in argv[0] else folder.resolve()
        return (
            f"; {argv[0]} was moved: add base_output_directory={folder.parent}"
            f" run_name={folder.name}"
        )
    return _similar(config.run_name, run_directory(config).parent, what, has)


def require_start(config: FrozenConfigDict) -> None:
    """Raise ValueError if this run has no checkpoint and load_from names a run without one, or one
    with another tokenizer than a tokenizer_path that does not exist. A dry run needs neither.
    """
    directory = run_directory(config)
    is_resumed = config.enable_checkpointing and _has_checkpoint(directory)
    if config.load_from is None or config.dry_run or is_resumed:
        return
    start = pyconfig.start_directory(config.load_from, directory)
    if not _has_checkpoint(start):
        hint = _similar(start.name, start.parent, "a checkpoint", _has_checkpoint)
        raise ValueError(f"load_from={config.load_from}: {start} holds no checkpoint{hint}")
    saved, path = start / "config.yml", epath.Path(config.tokenizer_path).expanduser()
    if saved.exists() and not path.exists():
        known = pyconfig.saved_values(saved).get("tokenizer_path", config.tokenizer_path)
        if known != config.tokenizer_path:
            raise ValueError(
                f"tokenizer_path={config.tokenizer_path} does not exist; load_from={config.load_from} has "
                f"{known}: begin with {saved} instead of configs/base.yml"
            )


def _has_checkpoint(run: epath.Path) -> bool:
    return bool(names(run / "checkpoints"))


def _similar(name: str, folder: epath.Path, what: str, has: Callable[[epath.Path], bool]) -> str:
    runs = [run for run in names(folder) if has(folder / run)]
    known = f"; runs with {what}: {', '.join(runs)}" if runs else ""
    return suggest(name, runs) or known
