"""Chat data sets of the hub in the common `messages` format, SmolTalk among them.

Source: nanochat/tasks/smoltalk.py@92d63d4.
"""

from typing import Any

from MaxNano.tasks.base import Conversation, HubTask, Task, load_rows


class Chat(Task):
    """Any split of a hub data set whose column `messages` holds lists of {role, content}.

    What else a message has is left out. Rows are taken as they are: one that is no conversation
    of user and assistant by turns shows when it is rendered.
    """

    def __init__(self, config: Any, place: str):
        try:
            owner, name, subset, split = place.split("/")
        except ValueError:
            raise ValueError(
                f"chat:{place} must be chat:OWNER/NAME/SUBSET/SPLIT; many data sets have the one "
                "subset default"
            ) from None
        self.rows = load_rows(config, f"{owner}/{name}", subset, split, ("messages",))

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int) -> Conversation:
        return _conversation(self.rows[index])


class SmolTalk(HubTask):
    """Conversations of a general kind, synthetic, in a selection made for small models."""

    repository = "HuggingFaceTB/smol-smoltalk"
    subset = "default"
    splits = ("train", "test")
    columns = ("messages",)

    def conversation(self, index: int) -> Conversation:
        return _conversation(self.rows[index])


def _conversation(row: dict[str, Any]) -> Conversation:
    return {"messages": [{key: m[key] for key in ("role", "content")} for m in row["messages"]]}
