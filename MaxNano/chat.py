"""Chat with a checkpoint in the terminal.

    .venv/bin/python MaxNano/chat.py configs/base.yml run_name=NAME
    .venv/bin/python MaxNano/chat.py configs/base.yml run_name=NAME prompt="Why is the sky blue?"

Config values are those of the run, unless the command line sets them. A base model continues the
text. At a terminal the prompt appears at once, and a thread loads and compiles the model meanwhile.
Without a terminal, each line of standard input is a message, and only the replies are printed to
standard output.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # as a script, MaxNano/ is first on sys.path instead of the repository
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # sets the platform, before anything imports JAX

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.serving import terminal_chat
from MaxNano.training.run_config import config_of_run

if TYPE_CHECKING:
    from MaxNano.inference.engine import Engine


def load(config: FrozenConfigDict) -> "Engine":
    """The engine of the run's checkpoint. JAX is imported here: that takes as long as loading."""
    from MaxNano.distributed import runtime
    from MaxNano.training.loading import load_engine

    runtime.initialize(config)
    return load_engine(config, slots=1, streams=True)


def main(config: FrozenConfigDict, argv: Sequence[str]) -> int:
    """Load the run's checkpoint and chat."""
    config = config_of_run(config, argv)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if config.prompt is None and is_terminal:
        from MaxNano.serving.terminal import run_interactive

        return run_interactive(config, load)
    return terminal_chat.run_plain(config, load(config))


if __name__ == "__main__":
    sys.exit(pyconfig.launch(lambda config: main(config, sys.argv[1:])))
