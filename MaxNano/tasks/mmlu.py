"""MMLU: multiple-choice questions in 57 subjects, with four choices each.

Data: cais/mmlu (MIT). Source: nanochat/tasks/mmlu.py@92d63d4.
"""

from MaxNano.tasks.base import (
    Conversation,
    HubTask,
    MultipleChoice,
    dialogue,
    multiple_choice_prompt,
)


class Mmlu(MultipleChoice, HubTask):
    """auxiliary_train has about 100,000 questions of other benchmarks for training."""

    repository = "cais/mmlu"
    subset = "all"
    splits = ("auxiliary_train", "dev", "validation", "test")
    columns = ("question", "subject", "choices", "answer")
    letters = ("A", "B", "C", "D")

    def conversation(self, index: int) -> Conversation:
        row = self.rows[index]
        prompt = multiple_choice_prompt(row["question"], self.letters, row["choices"])
        answer = self.letters[row["answer"]]
        return dialogue(prompt, answer, letters=self.letters, subject=row["subject"])
