"""The search: one knob after the other, by successive halving. It measures nothing itself.

Each knob has an equal share of the time that is left, so that a short search reaches all of them; what
a share cuts off is measured in the next cycle. Each rung of a knob measures the settings that are left
for twice as many steps as the rung before, and keeps the faster half. A winner replaces the best
settings so far only if it is faster when both are measured again, one after the other: a machine's
speed changes with time.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from MaxNano.tuning.candidates import Knob, Overrides

FIRST_STEPS = 3  # of the first rung
MARGIN = 0.01  # a smaller gain is noise
FAR = 0.1  # a setting that is slower by more than this is not measured again
CYCLES = 2  # over all knobs: the rows that fit depend on remat, and so on
TURNS = 3  # of the comparison with the defaults
FINAL_STEPS = 8


class Trial(NamedTuple):
    """A measurement. Trials that are equal have one result; `turn` makes another of them."""

    overrides: Overrides
    steps: int
    with_data: bool = False
    turn: str = ""


class Outcome(NamedTuple):
    """What a trial gave."""

    seconds: float | None  # per step; None: it failed
    failure: str = ""


Measure = Callable[[Trial], Outcome]
HasTime = Callable[[], bool]
SecondsLeft = Callable[[], float]


def search(
    start: Overrides,
    knobs: Sequence[Knob],
    measure: Measure,
    seconds_left: SecondsLeft,
    merge: Callable[[Overrides, Overrides], Overrides],
) -> Overrides:
    """The fastest settings that were found before the time was over.

    If no gain was confirmed by then, the result is the leader of the knob that was not finished:
    `compare` decides. merge: (settings, a choice of a knob) -> the settings with that choice.
    """
    best = start
    for cycle in range(CYCLES):
        before, is_cut = best, False
        for index, knob in enumerate(knobs):
            left = seconds_left()
            end = left - left / (len(knobs) - index)
            contenders = _contenders(best, knob, merge)
            if len(contenders) == 1 or left <= 0:
                continue
            winner, is_whole = halve(
                contenders, measure, lambda end=end: seconds_left() > end, with_data=knob.with_data
            )
            is_cut |= not is_whole
            if winner == best:
                continue
            if seconds_left() > 0:
                is_better = confirm(best, winner, knob, f"{knob.name} {cycle}", measure)
            else:
                is_better = best == start and not knob.with_data
            best = winner if is_better else best
        if (best == before and not is_cut) or seconds_left() <= 0:
            break
    return best


def _contenders(
    best: Overrides, knob: Knob, merge: Callable[[Overrides, Overrides], Overrides]
) -> list[Overrides]:
    """The best settings so far, then those with each choice of a knob, each once."""
    contenders = [best]
    for choice in knob.choices:
        merged = merge(best, choice)
        if merged not in contenders:
            contenders.append(merged)
    return contenders


def halve(
    contenders: Sequence[Overrides], measure: Measure, has_time: HasTime, *, with_data: bool = False
) -> tuple[Overrides, bool]:
    """(the fastest of the contenders, whether there was time to tell); the first is the best so far.

    If the time is over, the leader of the last rung. The first is the result if nothing else can be
    measured, or if it fails with the run's data, which the others then do too. It is not measured
    against a single rival: `confirm` does that.
    """
    alive, steps = list(contenders), FIRST_STEPS
    while len(alive) > 1:
        timed: list[tuple[float, Overrides]] = []
        for overrides in alive:
            if not has_time():
                return min(timed, default=(0.0, alive[0]), key=lambda pair: pair[0])[1], False
            outcome = measure(Trial(overrides, steps, with_data))
            if outcome.seconds is not None:
                timed.append((outcome.seconds, overrides))
            elif with_data and overrides == contenders[0]:
                return contenders[0], True
        if not timed:
            return contenders[0], True
        timed.sort(key=lambda pair: pair[0])
        fastest = timed[0][0]
        half = timed[: (len(timed) + 1) // 2]
        alive = [overrides for seconds, overrides in half if seconds <= (1 + FAR) * fastest]
        if len(alive) == 2 and contenders[0] in alive:
            alive.remove(contenders[0])
        steps *= 2
    return alive[0], True


def confirm(best: Overrides, winner: Overrides, knob: Knob, turn: str, measure: Measure) -> bool:
    """Whether the winner is faster by MARGIN if both are measured again."""
    before, now = (
        measure(Trial(overrides, 2 * FIRST_STEPS, knob.with_data, turn)).seconds
        for overrides in (best, winner)
    )
    return now is not None and (before is None or now < (1 - MARGIN) * before)


def compare(
    default: Overrides, best: Overrides, measure: Measure, has_time: HasTime
) -> tuple[list[float], list[float]]:
    """Seconds per step of the defaults and of the best settings, measured by turns.

    At least one turn, at most TURNS; one if they are the same. Turns in which one of them fails are
    left out.
    """
    pairs = []
    for turn in range(TURNS if best != default else 1):
        if turn and not has_time():
            break
        pair = [
            measure(final_trial(overrides, best, turn)).seconds
            for overrides in ((default, best) if best != default else (default,))
        ]
        if None not in pair:
            pairs.append((pair[0], pair[-1]))
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def final_trial(overrides: Overrides, best: Overrides, turn: int) -> Trial:
    """A turn of the comparison of the defaults with the best settings."""
    return Trial(overrides, FINAL_STEPS, turn=f"final {turn} of {sorted(best.items())}")


def is_faster(default: Sequence[float], best: Sequence[float]) -> bool:
    """Whether the best settings are faster than the defaults: in every turn, and by MARGIN in the
    median.
    """
    if not default or not all(b < a for a, b in zip(default, best, strict=True)):
        return False
    return statistics.median(best) < (1 - MARGIN) * statistics.median(default)
