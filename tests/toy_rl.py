"""train.py with a toy task that can be learned by reward alone: `python tests/toy_rl.py
configs/base.yml ...`.
"""

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


tasks.TASKS |= {"Ascii": Ascii}

if __name__ == "__main__":
    from MaxNano import pyconfig, train

    sys.exit(pyconfig.launch(train.main))
