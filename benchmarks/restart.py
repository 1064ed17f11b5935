"""Times a restart: from the command until the first resumed step is done, with compiled programs.

    .venv/bin/python benchmarks/restart.py configs/base.yml model=d4 dataset_path=PATH tokenizer_path=PATH

The arguments are those of train.py. A run in a new folder of base_output_directory is trained for a
few steps, killed, and started again several times; the folder is removed.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # reports a typo before JAX is imported

from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.console import print_table

RESTARTS = 3
SAVED_STEP = 2
WORDS = ("eval_interval=0", "sample_interval=0", "log_interval=1")


def start(words: list[str], folder: str) -> dict[str, float]:
    """Run train.py until it has done its second step; the seconds until each of its lines."""
    words = [*words, *WORDS, f"base_output_directory={folder}", "run_name=restart"]
    words += [f"checkpoint_interval_steps={SAVED_STEP}", "checkpoint_interval_minutes=0"]
    began, seconds = time.monotonic(), {}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "MaxNano/train.py"), *words], stdout=subprocess.PIPE, text=True
    )
    steps = 0
    for line in process.stdout:
        now = time.monotonic() - began
        if line.startswith("Resuming"):
            seconds["restored and compiled"] = now
        elif line.startswith("run "):
            seconds.setdefault("plan", now)
        elif line.startswith("step "):
            seconds.setdefault("first step", now)
            steps += 1
        saved = Path(folder, "restart", "checkpoints", str(SAVED_STEP), "MANIFEST.json")
        if "first step" in seconds and saved.exists():
            process.kill()
    if process.wait() > 0 or "first step" not in seconds:
        sys.exit(process.returncode or "error: steps is too small")  # train.py has said why
    return seconds


def main(config: FrozenConfigDict) -> int:
    """Measure and print."""
    runs = Path(config.base_output_directory).expanduser()
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".restart-", dir=runs) as folder:
        start(sys.argv[1:], folder)
        rows = [start(sys.argv[1:], folder) for _ in range(RESTARTS)]
    names = ("plan", "restored and compiled", "first step")
    medians = [f"{statistics.median(row[name] for row in rows):.1f}" for name in names]
    print_table(
        f"seconds since the command of {config.model}, median of {RESTARTS}", names, [medians]
    )
    return 0


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
