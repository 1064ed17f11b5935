"""Writes the report of a run: what ran, on what, how long and for how much, and with what result.

    .venv/bin/python MaxNano/report.py configs/base.yml run_name=NAME

It is written to the run's folder as `report.html`, one page that needs no other file, and as
`report.md`. The report of a run that was started from another one (load_from) begins with the first
of them. What was not done or not recorded is listed. Each file is replaced as a whole.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    if (
        not __package__
    ):  # run as a script: imports must start at the repository root, not in MaxNano/
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # report a typo before JAX is imported

from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.reporting import render, run_history
from MaxNano.reporting.report import make_report
from MaxNano.storage import files
from MaxNano.training.run_config import similar_runs


def main(config: FrozenConfigDict, argv: Sequence[str] = ("",)) -> None:
    """Read the run, write its report. argv: what `config` was read from."""
    folder = files.run_directory(config)
    if not run_history.has_run(folder):
        hint = similar_runs(config, argv, "a config", run_history.has_run)
        raise ValueError(run_history.NO_RUN.format(folder=folder) + hint)
    report = make_report(*run_history.read_chain(folder))
    for path, text in (
        (folder / "report.md", render.to_markdown(report)),
        (folder / "report.html", render.to_html(report)),
    ):
        files.write_whole(path, text)
        print(f"Wrote {path}")


if __name__ == "__main__":
    sys.exit(pyconfig.launch(lambda config: main(config, sys.argv[1:])))
