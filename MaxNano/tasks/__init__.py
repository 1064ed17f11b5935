"""Chat tasks: data sets as conversations, most of them with a way to judge an answer.

    task = tasks.open_task(config, "GSM8K/test")
    conversation = task.conversation(0)
    task.evaluate(conversation, "... #### 18")

A task is written NAME/SPLIT, as MMLU/auxiliary_train; json:FILE, for conversations of your own; or
chat:OWNER/NAME/SUBSET/SPLIT, for any hub data set with a column `messages`. A new one is a class
and a row of TASKS.
"""

import difflib
import re
from collections.abc import Callable
from typing import Any

from MaxNano.tasks import arc, chat, custom_json, gsm8k, humaneval, mmlu, spelling
from MaxNano.tasks.base import Conversation, Task

__all__ = ["TASKS", "Conversation", "Task", "open_task"]

TASKS: dict[str, Callable[[Any, str], Task]] = {
    "ARC-Easy": arc.ArcEasy,
    "ARC-Challenge": arc.ArcChallenge,
    "MMLU": mmlu.Mmlu,
    "GSM8K": gsm8k.Gsm8k,
    "HumanEval": humaneval.HumanEval,
    "SmolTalk": chat.SmolTalk,
    "SpellingBee": spelling.SpellingBee,
    "SimpleSpelling": spelling.SimpleSpelling,
    "json": custom_json.CustomJson,
    "chat": chat.Chat,
}


def open_task(config: Any, name: str) -> Task:
    """The task of a name as config writes it; ValueError where there is none or its data are missing."""
    kind, _, argument = re.fullmatch(r"([^/:]*)([/:]?)(.*)", name, re.DOTALL).groups()
    if kind not in TASKS:
        names = {task.lower(): task for task in TASKS}
        near = difflib.get_close_matches(kind.lower(), names, n=1)
        hint = f"did you mean {names[near[0]]}?" if near else f"there are {', '.join(TASKS)}"
        raise ValueError(f"there is no task {name!r}; {hint}")
    return TASKS[kind](config, argument)
