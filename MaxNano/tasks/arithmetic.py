"""Arithmetic with the calculator: one-digit sums, which a model of a few million parameters learns."""

import random
import re
from typing import Any

from MaxNano.tasks.base import Conversation, Task, check_split, dialogue

_GUESSED = 8000  # conversations of the split `guess`
_OUTPUT = re.compile(r"<\|output_start\|>(.*?)<\|output_end\|>")
_HELD_OUT = 5  # every fifth sum, in a fixed random order, is for the split `test`


class Sums(Task):
    """Two digits to be added by the calculator; an answer is correct if it has one call, with their sum.

    The splits `train` (80 sums) and `test` (the other 20) have no sum in common. `guess` has the
    form of `train`, but calls the calculator with the digits of the question only by chance more
    often than with others: a model that is fine-tuned on it knows how to call, and RL has the rest
    to teach. A model that always says 9 is right in a tenth of all sums.
    """

    kind = "generative"
    baseline = 0.1

    def __init__(self, config: Any, split: str):
        del config
        check_split(split, ("train", "test", "guess"), type(self).__name__)
        sums = [divmod(number, 10) for number in range(100)]
        random.Random(42).shuffle(sums)
        is_test = split == "test"
        self._sums = [each for n, each in enumerate(sums) if (n % _HELD_OUT == 0) == is_test]
        self._is_guess = split == "guess"

    def __len__(self) -> int:
        return _GUESSED if self._is_guess else len(self._sums)

    def conversation(self, index: int) -> Conversation:
        asked = called = self._sums[index % len(self._sums)]
        if self._is_guess:
            draw = random.Random(index)
            called = tuple(d if draw.random() < 0.25 else draw.randrange(10) for d in asked)
        parts = [
            {"type": "python", "text": f"{called[0]}+{called[1]}"},
            {"type": "python_output", "text": str(sum(called))},
        ]
        return dialogue(f"{asked[0]}+{asked[1]}", parts)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        first, second = map(int, conversation["messages"][0]["content"].split("+"))
        return _OUTPUT.findall(completion) == [str(first + second)]
