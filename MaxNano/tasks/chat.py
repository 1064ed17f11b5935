"""Chat data sets of the hub with a column of messages, such as SmolTalk.

Source: nanochat/tasks/smoltalk.py@92d63d4.
"""

from typing import Any

from MaxNano.tasks import shapes
from MaxNano.tasks.base import Conversation, HubTask, Task, load_rows


class Chat(Task):
    """A split of a hub data set with conversations in one of the shapes of shapes.py.

    Other fields of a message are dropped. A malformed conversation raises only when it is rendered.
    """

    def __init__(self, config: Any, path: str):
        try:
            owner, name, subset, split = path.split("/")
        except ValueError:
            raise ValueError(
                f"chat:{path} must be chat:OWNER/NAME/SUBSET/SPLIT; the subset of many data sets "
                "is default"
            ) from None
        self.rows = load_rows(config, f"{owner}/{name}", subset, split, (shapes.COLUMNS,))

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int) -> Conversation:
        return _conversation(self.rows[index])


class SmolTalk(HubTask):
    """General synthetic conversations, selected for small models."""

    repository = "HuggingFaceTB/smol-smoltalk"
    subset = "default"
    splits = ("train", "test")
    columns = ("messages",)

    def conversation(self, index: int) -> Conversation:
        return _conversation(self.rows[index])


def _conversation(row: dict[str, Any]) -> Conversation:
    return {"messages": shapes.messages_of(row)}
