"""The command `maxnano PROGRAM ...`: MaxNano/PROGRAM.py, with configs/base.yml as its default config.

    maxnano train model=d4                      as python MaxNano/train.py configs/base.yml model=d4
    maxnano train my_config.yml steps=100       a first argument that ends in .yml is the config
    python -m MaxNano train model=d4            where the command is not on the search path

Each program runs as by python -m. The programs are config_schema.PROGRAMS.
"""

import importlib.metadata
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as python MaxNano: see train.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from MaxNano import config_schema, console, end_on_interrupt, pyconfig

USAGE = "usage: maxnano PROGRAM [CONFIG.yml] [key=value ...]"


def help_text() -> str:
    """What the command can do."""
    width = max(map(len, config_schema.PROGRAMS))
    programs = (f"  {name:{width}}  {what}\n" for name, what in config_schema.PROGRAMS.items())
    return (
        f"{USAGE}\n\n{''.join(programs)}\n"
        f"CONFIG.yml is {config_schema.BASE} by default.\n"
        "maxnano PROGRAM --help lists the keys of a program, and --version prints the version.\n"
    )


def with_config(words: Sequence[str]) -> list[str]:
    """The arguments of a program, which begin with a config file."""
    first = words[0] if words else ""
    has_config = first.endswith((".yml", ".yaml")) and "=" not in first
    return list(words) if has_config else [str(config_schema.BASE), *words]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that the first word names; it ends with SystemExit if it has a status.

    Returns 0 after help or version, 2 for a word that is not a program.
    """
    console.keep_output()
    word, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    program = word.replace("-", "_")
    if word in ("-h", "--help", "help"):
        print(help_text(), end="")
    elif word == "--version":
        print(f"maxnano {importlib.metadata.version('maxnano')}")
    elif program not in config_schema.PROGRAMS:
        programs = list(config_schema.PROGRAMS)
        hint = config_schema.suggest(program, programs) or f"; there are: {', '.join(programs)}"
        print(f"error: no program {config_schema.shorten(word)}{hint}", file=sys.stderr)
        return 2
    else:
        pyconfig.COMMAND = f"maxnano {program}"
        sys.argv[1:] = with_config(words)
        end_on_interrupt()
        runpy.run_module(config_schema.module_of(program), run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
