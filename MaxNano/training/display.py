"""The lines of a run on stdout: the step line, with a progress bar on a terminal, and events."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

# Steps before this one do not count in training_seconds: they compile and warm up. The number is
# nanochat's, so that the totals can be compared.
# Source: nanochat/scripts/base_train.py@92d63d4.
FIRST_TIMED_STEP = 11
SHOWN_WAIT = 0.1  # the line shows a wait for the batch above this share of the step


class Display:
    """Prints lines; on a terminal the latest step stays below them with a progress bar."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self._total_steps = total_steps
        self._console = Console(highlight=False)
        self._progress = None
        if self._console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=16, table_column=Column(min_width=16)),
                TextColumn("{task.description}", markup=False, table_column=Column()),  # may wrap
                console=self._console,
                auto_refresh=False,  # redrawn per line: a thread would take time from a core
            )
            self._task = self._progress.add_task("", total=total_steps, completed=start_step)
            self._progress.start()

    def show_step(self, row: Mapping[str, Any], position: Mapping[str, int]) -> None:
        """Print the line of a step, or update it on a terminal."""
        line = step_line(row, position, self._total_steps)
        if self._progress:
            with contextlib.suppress(OSError):
                self._progress.update(
                    self._task, completed=row["step"] + 1, description=line, refresh=True
                )
        else:
            self.print([line])

    def print(self, lines: Iterable[str]) -> None:
        """Print lines. If stdout is a full disk or a closed pipe, lines are lost and training
        continues.
        """
        with contextlib.suppress(OSError):
            for line in lines:
                if self._progress:
                    self._console.print(Text(line))
                else:
                    print(line, flush=True)

    def close(self) -> None:
        """Restore the terminal."""
        with contextlib.suppress(OSError):
            if self._progress:
                self._progress.stop()


def step_line(row: Mapping[str, Any], position: Mapping[str, int], total_steps: int) -> str:
    """A row of metrics.jsonl as a line; steps count from 0, as there."""
    parts = [f"step {row['step']:>{len(str(total_steps))}}/{total_steps}"]
    if row.get("loss") is not None:
        parts.append(f"loss {row['loss']:.4f}")
    if row["smoothed_loss"] is not None:
        parts.append(f"smoothed {row['smoothed_loss']:.4f}")
    if "bpb" in row:
        parts.append(f"bpb {row['bpb']:.4f}")
    if "reward" in row:
        parts.append(f"reward {row['reward']:.3f}")
    if "lr_multiplier" in row:
        parts.append(f"lr x{row['lr_multiplier']:.2f}")
    digits = 0 if row["milliseconds"] >= 10 else 3
    parts.append(f"{row['milliseconds']:,.{digits}f} ms")
    if row.get("batch_wait_milliseconds", 0.0) > SHOWN_WAIT * row["milliseconds"]:
        parts.append(f"waiting {row['batch_wait_milliseconds']:,.0f} ms")
    parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
    if "mfu" in row:
        parts.append(f"MFU {100 * row['mfu']:.1f}%")
    elif "tflops_per_second" in row:
        parts.append(f"{row['tflops_per_second']:.3g} TFLOP/s")
    if row["skipped_in_all"]:
        parts.append(f"skipped {row['skipped_in_all']}")
    # A share of 0 is not shown: nothing is discarded.
    shown = {key: value for key, value in position.items() if value or not key.endswith("_share")}
    shown.pop("reward", None)  # is above
    if shown:
        parts.append(" ".join(_amount(key, value) for key, value in shown.items()))
    times = duration(row["elapsed_seconds"])
    if row["seconds_left"] is not None:
        times += f", {duration(row['seconds_left'])} left"
    return " | ".join([*parts, times])


def event_lines(step: int, name: str, values: Mapping[str, float | str]) -> list[str]:
    """The numbers of an event on one line, then each of its texts on a line."""
    numbers = [
        f"{_words(key)} {value:.6g}" for key, value in values.items() if not isinstance(value, str)
    ]
    title = name[:1].upper() + name[1:]
    lines = [f"{title} at step {step}: {', '.join(numbers)}".rstrip(": ")]
    for key, value in values.items():
        if isinstance(value, str):
            lines.append("  " + f"{key} ->{value}".replace("\n", "\\n"))
    return lines


def _amount(key: str, value: float) -> str:
    if key.endswith("_share"):
        return f"{_words(key.removesuffix('_share'))} {100 * value:.1f}%"
    return f"{_words(key)} {value if isinstance(value, int) else f'{value:.4g}'}"


def _words(key: str) -> str:
    return key.replace("_", " ")


def duration(seconds: float) -> str:
    """Such as 5m07s or 1h02m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
