"""HumanEval: write a Python function from its signature and docstring.

Data: openai/openai_humaneval (MIT). Source: nanochat/tasks/humaneval.py@92d63d4.
"""

import re

from MaxNano.tasks.base import Conversation, HubTask, dialogue
from MaxNano.tools import sandbox

# Source: nanochat/execution.py@92d63d4.
LIMITS = sandbox.SandboxLimits(seconds=5.0, memory_mb=256)

_FENCED = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


class HumanEval(HubTask):
    """An answer is correct if its program passes the problem's tests in the sandbox.

    evaluate raises sandbox.SandboxError on a machine without a working sandbox.
    """

    kind = "generative"
    repository = "openai/openai_humaneval"
    subset = "openai_humaneval"
    splits = ("test",)
    columns = ("prompt", "canonical_solution", "entry_point", "test")

    def conversation(self, index: int) -> Conversation:
        row = self.rows[index]
        solution = f"{row['prompt']}\n{row['canonical_solution']}"
        return dialogue(row["prompt"], solution, entry_point=row["entry_point"], test=row["test"])

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        prompt = conversation["messages"][0]["content"]
        return sandbox.check_program(
            program(prompt, completion),
            f"{prompt}\n\n{conversation['test']}",  # tests may call functions of the prompt
            conversation["entry_point"],
            limits=LIMITS,
        ).passed


def program(prompt: str, completion: str) -> str:
    """The program to test: the prompt's leading imports, then the answer's code."""
    return f"{leading_imports(prompt)}\n\n{code_of(completion)}"


def leading_imports(code: str) -> str:
    """The import lines before any other code, comments excepted."""
    imports = []
    for line in map(str.strip, code.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


def code_of(completion: str) -> str:
    """The first fenced block of an answer, or the whole answer."""
    fenced = _FENCED.search(completion)
    return (fenced[1] if fenced else completion).strip()
