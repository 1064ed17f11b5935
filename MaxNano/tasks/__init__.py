"""Chat tasks: data sets as conversations, most of them with a way to grade an answer.

    task = tasks.open_task(config, "GSM8K/test")
    conversation = task.conversation(0)
    task.evaluate(conversation, "... #### 18")

A task's name in config is NAME/SPLIT, such as MMLU/auxiliary_train; json:FILE, for your own
conversations; or chat:OWNER/NAME/SUBSET/SPLIT, for a hub data set with a column `messages`.

To add a chat task, write its class in a file in this folder (gsm8k.py is a short example; base.py
has the base classes) and add a row to TASKS. Training mixtures, evaluation and RL then accept its
name.
"""

import difflib
import re
from collections.abc import Callable
from typing import Any

from MaxNano.tasks import arc, arithmetic, chat, custom_json, gsm8k, humaneval, mmlu, spelling
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
    "Sums": arithmetic.Sums,
    "json": custom_json.CustomJson,
    "chat": chat.Chat,
}


def open_task(config: Any, name: str) -> Task:
    """Open the task of a name in config. Raises ValueError if it is unknown or its data is missing."""
    kind, _, argument = re.fullmatch(r"([^/:]*)([/:]?)(.*)", name, re.DOTALL).groups()
    if kind not in TASKS:
        names = {task.lower(): task for task in TASKS}
        near = difflib.get_close_matches(kind.lower(), names, n=1)
        hint = f"did you mean {names[near[0]]}?" if near else f"tasks are {', '.join(TASKS)}"
        if name.endswith((".json", ".jsonl")):
            hint = f"write json:{name} for a file of conversations"
        raise ValueError(f"unknown task {name!r}; {hint}")
    return TASKS[kind](config, argument)
