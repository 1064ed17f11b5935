"""train.py with two toy tasks that can be learned by reward alone: `python tests/toy_rl.py
configs/base.yml ...`.
"""

import random
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from MaxNano import tasks
from MaxNano.tasks.base import Task, dialogue


class Ascii(Task):
    """A question, to be answered with as many plain characters as possible: the reward is their
    share.
    """

    kind = "generative"

    def __init__(self, config, split):
        del config, split

    def __len__(self):
        return 10

    def conversation(self, index):
        return dialogue(f"{index}?", "abc")

    def evaluate(self, conversation, completion):
        return self.reward(conversation, completion) > 0.5

    def reward(self, conversation, completion):
        return sum(character.isascii() for character in completion) / max(1, len(completion))


class Sums(Task):
    """Two digits to be added by the calculator; right is that it said their sum.

    The split `guess` calls it with the right digits hardly more often than with any other ones:
    trained on that, a model knows the form, and where to look.
    """

    kind = "generative"

    def __init__(self, config, split):
        del config
        self.is_guess = split == "guess"

    def __len__(self):
        return 8000 if self.is_guess else 100

    def conversation(self, index):
        first, second = called = divmod(index % 100, 10)
        if self.is_guess:
            draw = random.Random(index)
            called = tuple(
                digit if draw.random() < 0.25 else draw.randrange(10) for digit in called
            )
        call, result = f"{called[0]}+{called[1]}", str(sum(called))
        parts = [{"type": "python", "text": call}, {"type": "python_output", "text": result}]
        return dialogue(f"{first}+{second}", parts)

    def evaluate(self, conversation, completion):
        first, second = map(int, conversation["messages"][0]["content"].split("+"))
        return f"<|output_start|>{first + second}<|output_end|>" in completion


tasks.TASKS |= {"Ascii": Ascii, "Sums": Sums}

if __name__ == "__main__":
    from MaxNano import pyconfig, train

    sys.exit(pyconfig.launch(train.main))
