"""ARC: science questions from school tests, an easy and a challenging set.

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
        letters = row["choices"]["label"]  # some questions use digits instead of letters
        prompt = multiple_choice_prompt(row["question"], letters, row["choices"]["text"])
        return dialogue(prompt, row["answerKey"], letters=letters)


class ArcEasy(_Arc):
    """Questions that simple methods answer correctly."""

    subset = "ARC-Easy"


class ArcChallenge(_Arc):
    """Questions that simple methods get wrong."""

    subset = "ARC-Challenge"
