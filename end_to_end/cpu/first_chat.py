"""Chats with messages from standard input, a line each, and prints each above its reply.

    .venv/bin/python end_to_end/cpu/first_chat.py configs/base.yml run_name=NAME <messages.txt

Commands of the terminal chat work too: /clear starts another conversation.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # sets the platform, before anything imports JAX

from ml_collections import FrozenConfigDict

from MaxNano import chat, pyconfig
from MaxNano.serving import terminal_chat
from MaxNano.training.run_config import config_of_run


def main(config: FrozenConfigDict, argv: Sequence[str]) -> int:
    """Answer each line of standard input."""
    config = config_of_run(config, argv)
    session = terminal_chat.ChatSession(config, chat.load(config))
    output = terminal_chat.TerminalOutput(sys.stdout, sys.stdout, is_styled=False)
    for line in sys.stdin:
        print(f"> {line.strip()}", flush=True)
        terminal_chat.handle_line(session, output, line)
    return 0


if __name__ == "__main__":
    sys.exit(pyconfig.launch(lambda config: main(config, sys.argv[1:])))
