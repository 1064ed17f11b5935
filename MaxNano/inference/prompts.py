"""Prompts whose continuations share a prefix, and the protocol of what scores them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Prompt(NamedTuple):
    """A question in tokens: a prefix, and branches that continue it, each with another
    continuation.

    A branch begins with the last token that all branches share, if there is one: from it the next
    token is predicted. The tokens from `starts` on are scored; a start is at least 1. Equal answers
    share a branch.
    """

    prefix: np.ndarray  # (n,) int32, may be empty
    branches: tuple[np.ndarray, ...]
    starts: tuple[int, ...]  # of each branch
    answers: tuple[int, ...]  # the branch of each of the question's answers


class Scorer(Protocol):
    """Scores how likely the tokens of prompts are."""

    def __call__(
        self, prompts: Sequence[Prompt], *, greedy: bool
    ) -> Iterable[tuple[int, list[np.ndarray]]]:
        """(index of a prompt, one array over the scored tokens of each of its branches), in any
        order.

        The arrays are losses in nats, float32; if `greedy`, whether each token is the likeliest,
        bool.
        """
        ...
