"""Chat with a checkpoint in the terminal.

    python MaxNano/chat.py configs/base.yml model=d24 stage=sft
    python MaxNano/chat.py configs/base.yml model=d24 stage=sft prompt="Why is the sky blue?"

A base model continues the text. Without a terminal, each line of standard input is a message, and
only the replies are printed to standard output.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # as a script, MaxNano/ is first on sys.path instead of the repository
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # before the import of JAX

import os

from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.distributed import runtime
from MaxNano.serving.terminal_chat import (
    ChatSession,
    TerminalOutput,
    handle_line,
    run_interactive,
    show_reply,
)
from MaxNano.training.loading import load_engine


def main(config: FrozenConfigDict) -> None:
    """Load the run's checkpoint and chat."""
    is_terminal = sys.stdout.isatty()
    is_styled = is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    output = TerminalOutput(sys.stdout, sys.stdout if is_terminal else sys.stderr, is_styled)
    runtime.initialize(config)
    session = ChatSession(config, load_engine(config, slots=1, streams=True))
    if config.prompt is not None:
        session.ask(config.prompt)
        show_reply(session, output)
    elif sys.stdin.isatty():
        run_interactive(session, output, config.run_name)
    else:
        for line in sys.stdin:
            if not handle_line(session, output, line):
                return


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
