"""ARC: science questions of school examinations, an easy and a challenging set.

Data: allenai/ai2_arc (CC BY-SA 4.0). Source: nanochat/tasks/arc.py@92d63d4.
"""

from MaxNano.tasks.base import (
    Conversation,
    HubTask,
    MultipleChoice,
    dialogue,
    multiple_choice_prompt,
)


class _Arc(MultipleChoice, HubTask):
    repository = "allenai/ai2_arc"
    splits = ("train", "validation", "test")
    columns = ("question", "choices", "answerKey")

    def conversation(self, index: int) -> Conversation:
        row = self.rows[index]
        letters = row["choices"]["label"]  # some questions have digits for letters
        prompt = multiple_choice_prompt(row["question"], letters, row["choices"]["text"])
        return dialogue(prompt, row["answerKey"], letters=letters)


class ArcEasy(_Arc):
    """The questions that simple methods answer."""

    subset = "ARC-Easy"


class ArcChallenge(_Arc):
    """The questions that simple methods fail at."""

    subset = "ARC-Challenge"
