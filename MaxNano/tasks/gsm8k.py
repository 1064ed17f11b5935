"""GSM8K: grade-school word problems, solved in words and with a calculator.

A solution in the data set marks arithmetic as <<expression=result>> and ends in a line
`#### number`. The arithmetic becomes tool calls with their outputs. Data: openai/gsm8k (MIT).
Source: nanochat/tasks/gsm8k.py@92d63d4.
"""

import re

from MaxNano.tasks.base import Conversation, HubTask, dialogue, same_final_number

_ARITHMETIC = re.compile(r"<<([^>]+)>>")


class Gsm8k(HubTask):
    """An answer is correct if its number after #### equals the solution's, digit for digit."""

    kind = "generative"
    repository = "openai/gsm8k"
    subset = "main"
    splits = ("train", "test")
    columns = ("question", "answer")

    def conversation(self, index: int) -> Conversation:
        row = self.rows[index]
        return dialogue(row["question"], answer_parts(row["answer"]))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return same_final_number(conversation, completion)


def answer_parts(solution: str) -> list[dict[str, str]]:
    """The parts of the assistant's message: text, tool calls and their outputs."""
    parts = []
    for index, piece in enumerate(_ARITHMETIC.split(solution)):
        if index % 2 == 0:
            parts.append({"type": "text", "text": piece})
            continue
        expression, equals, result = piece.rpartition("=")
        if not equals:
            expression, result = piece, ""
        parts.append({"type": "python", "text": expression})
        parts.append({"type": "python_output", "text": result})
    return parts
