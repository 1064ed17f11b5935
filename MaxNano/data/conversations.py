"""Conversations as training rows: a mixture of chat tasks in, encoded documents for the packer out.

A document is one conversation, `<|bos|>` first. A token that the assistant is not trained to say
stands in it as its complement, ~id: one int32 carries id and mask through workers, packer and saved
state, and the loader's to_batch makes targets of -1 of them. So does the padding of a row.

A conversation longer than a row is cut behind the last answer that fits whole; where not even the
first one does, at the end of the row. Without a token to be trained on it is left out. Both are
counted in the readers' positions. What is buffered thus always fits into an empty row, and no
conversation can block those behind it.
Source: nanochat/scripts/chat_sft.py@92d63d4, whose rows these are where every conversation fits.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from MaxNano import tasks
from MaxNano.data import packing

# Conversations from which `steps_of_passes` tells how many rows a pass fills.
_SAMPLE_CONVERSATIONS = 4096


class Position(NamedTuple):
    """Where a reader stands: what it has read, and what of it had to be cut or left out, in all passes."""

    epoch: int
    place: int  # of the next conversation in the order of the pass
    cut: int
    left_out: int


Reply = tuple[Position, list[packing.Document]]


# ---- Mixtures -----------------------------------------------------------------------------------


class Share(NamedTuple):
    """One task of a mixture."""

    task: str  # as tasks.open_task takes it
    amount: float
    first: int | None  # only so many of its conversations are used


def read_shares(rows: Sequence[Sequence[str]], key: str) -> list[Share]:
    """The rows of a mixture in config, [task, amount] or [task, amount, first]; ValueError names `key`."""
    shares = []
    for row in rows:
        try:
            task, amount, *first = row
            share = Share(task, float(amount), int(*first) if first else None)
            valid = 0 <= share.amount < math.inf and (share.first is None or share.first >= 0)
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise ValueError(
                f"{key} has a row [{', '.join(row)}]; write [task, amount] or [task, amount, "
                "at most this many conversations], with numbers of 0 or more"
            )
        shares.append(share)
    if not shares:
        raise ValueError(f"{key} is empty; write a row [task, amount] for each task")
    return shares


def conversations_of_a_pass(
    lengths: Sequence[int], amounts: Sequence[float], unit: str
) -> list[int]:
    """How many conversations of each task a pass has; lengths are the tasks' own.

    unit "epochs": the amount says how often each conversation comes. "weights": the amounts say in
    which proportion the tasks come, in a pass of as many conversations as they have together. An
    empty task has none, and then its weight goes to the others.
    """
    if unit == "epochs":
        return [round(amount * length) for length, amount in zip(lengths, amounts, strict=True)]
    weights = np.where(np.array(lengths) > 0, amounts, 0.0)
    if not weights.any():
        return [0] * len(lengths)
    used = sum(length for length, weight in zip(lengths, weights, strict=True) if weight)
    ends = np.rint(used * np.cumsum(weights) / weights.sum()).astype(int)
    return np.diff(ends, prepend=0).tolist()


class Mixture:
    """The conversations of several tasks in a shuffled order, pass after pass.

    Built as `Mixture(config, split)`; pickles without its data, which are opened again. `where`
    names it in messages; `content` tells mixtures apart.
    Raises ValueError where tasks or their data are missing or there is no conversation at all.
    Source: nanochat/tasks/common.py@92d63d4, TaskMixture, whose order that of the first pass is.
    """

    def __init__(self, config: Any, split: str):
        key = "chat_train_mixture" if split == "train" else "chat_validation_mixture"
        self._config = config
        self._shares = read_shares(config[key], key)
        self._tasks: list[tasks.Task] | None = None
        self._orders: dict[int, np.ndarray] = {}  # by epoch
        lengths = [len(task) for task in self._opened()]
        # Views onto the first ones of each task.
        self._lengths = [
            length if share.first is None else min(length, share.first)
            for length, share in zip(lengths, self._shares, strict=True)
        ]
        amounts = [share.amount for share in self._shares]
        unit = config.chat_mixture_unit
        self.counts = conversations_of_a_pass(self._lengths, amounts, unit)
        self._ends = np.cumsum(self.counts)
        self.where = f"{key} ({', '.join(share.task for share in self._shares)})"
        self.content = " + ".join(
            f"{count} of {share.task}"
            for count, share in zip(self.counts, self._shares, strict=True)
        )
        if not len(self):
            raise ValueError(f"{self.where} has no conversation; look at amounts and data")

    def __len__(self) -> int:
        """Conversations of a pass."""
        return int(self._ends[-1])

    def conversation(self, epoch: int, place: int) -> tasks.Conversation:
        """The conversation at 0 <= place < len(self) of a pass; epochs count from 1.

        A task goes on in one pass where it has stopped in the one before.
        """
        slot = int(self._order_of(epoch)[place])
        task = int(np.searchsorted(self._ends, slot, side="right"))
        nth = slot - (int(self._ends[task - 1]) if task else 0)
        index = ((epoch - 1) * self.counts[task] + nth) % self._lengths[task]
        return self._opened()[task].conversation(index)

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # Readers pass from one epoch to the next at different times: two are kept.
            self._orders = dict(list(self._orders.items())[-1:])
            slots = list(range(len(self)))
            random.Random(self._config.seed + epoch - 1).shuffle(slots)
            self._orders[epoch] = np.array(slots, np.int32)
        return self._orders[epoch]

    def _opened(self) -> list[tasks.Task]:
        if self._tasks is None:
            # Data are read once for a task that is named twice.
            opened: dict[str, tasks.Task] = {}
            for share in self._shares:
                if share.task not in opened:
                    opened[share.task] = tasks.open_task(self._config, share.task)
            self._tasks = [opened[share.task] for share in self._shares]
        return self._tasks

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tasks": None, "_orders": {}}


# ---- Encoding -----------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What became of a conversation."""

    document: packing.Document | None  # None: left out
    was_cut: bool
    problem: str  # why it was left out


class ConversationEncoding:
    """What makes documents of a mixture's conversations: a workers.Encoding.

    Reader r of R takes the conversations at places r, r + R, ... of each pass.
    Built as `ConversationEncoding(config, tokenizer, split)`; raises ValueError as Mixture does,
    and where there are fewer conversations than readers.
    """

    def __init__(self, config: Any, tokenizer: Any, split: str):
        self.mixture = Mixture(config, split)
        self.readers = config.data_readers
        self.row_tokens = config.max_target_length + 1
        self.padding = ~tokenizer.bos_id
        self._tokenizer = tokenizer
        self._list_documents = config.tokenize_batch_documents
        if len(self.mixture) < self.readers:
            raise ValueError(
                f"data_readers={self.readers} is too many for {self.mixture.where}, which has "
                f"{len(self.mixture)} conversations; set data_readers={len(self.mixture)} or less"
            )

    def lists(self, reader: int, position: Position) -> Iterator[Reply]:
        """Endless lists of one reader's documents, each with the position behind it.

        Raises ValueError when a whole pass has no conversation that can be trained on.
        """
        epoch, place, cut, left_out = position
        found = place != reader  # a pass that may be entered midway proves nothing
        reason = ""
        while True:
            while place < len(self.mixture):
                documents: list[packing.Document] = []
                for _ in range(self._list_documents):
                    if place >= len(self.mixture):
                        break
                    conversation = self.mixture.conversation(epoch, place)
                    place += self.readers
                    document, was_cut, problem = self.encode(conversation)
                    if document is None:
                        left_out, reason = left_out + 1, problem
                    else:
                        documents.append(document)
                        cut, found = cut + was_cut, True
                yield Position(epoch, place, cut, left_out), documents
            if not found:
                raise ValueError(
                    f"{self.mixture.where}: none of the conversations of reader {reader} of "
                    f"data_readers={self.readers} can be trained on ({reason})"
                )
            epoch, place, found = epoch + 1, reader, False

    def beginning(self, reader: int) -> Position:
        return Position(epoch=1, place=reader, cut=0, left_out=0)

    def position_to_json(self, position: Position) -> dict[str, Any]:
        return {"mixture": self.mixture.content, **position._asdict()}

    def position_from_json(self, saved: Mapping[str, Any]) -> Position:
        if saved.get("mixture") != self.mixture.content:
            raise ValueError(
                f"the saved data position lies in {saved.get('mixture', 'text')}, but the run has "
                f"{self.mixture.content}; go on with the same data"
            )
        return Position(*(saved[field] for field in Position._fields))

    def progress(self, positions: Sequence[Position]) -> dict[str, int]:
        furthest = max(positions)
        return {
            "epoch": furthest.epoch,
            "conversation": furthest.place,
            "conversations_cut": sum(position.cut for position in positions),
            "conversations_left_out": sum(position.left_out for position in positions),
        }

    def encode(self, conversation: tasks.Conversation) -> Encoded:
        """A conversation, cut to a row."""
        try:
            rendered = self._tokenizer.render_conversation(conversation)
        except ValueError as error:  # in data sets of others not every row is a conversation
            return Encoded(None, False, str(error))
        ids, mask = (np.array(part, np.int32) for part in rendered)
        kept = len(ids)
        if kept > self.row_tokens:
            answered = np.flatnonzero(
                ids[: self.row_tokens] == self._tokenizer.special.assistant_end
            )
            kept = int(answered[-1]) + 1 if answered.size else self.row_tokens
        if not mask[:kept].any():
            return Encoded(None, False, "no answer begins within max_target_length")
        tokens = np.where(mask == 1, ids, ~ids)[:kept]
        return Encoded(packing.Document(kept, tokens), kept < len(ids), "")


# ---- Horizon ------------------------------------------------------------------------------------


def steps_of_passes(config: Any, tokenizer: Any) -> int:
    """Optimizer steps in which `chat_epochs` passes over the training mixture are used up.

    Packs the first conversations of the mixture, which is shuffled, and takes the rest to be like
    them; exact for a mixture of no more than these but for the last rows.
    """
    encoding = ConversationEncoding(config, tokenizer, "train")
    size = len(encoding.mixture)
    sample = min(size, _SAMPLE_CONVERSATIONS)
    places = iter(range(sample))

    def next_documents() -> list[packing.Document]:
        document = encoding.encode(encoding.mixture.conversation(1, next(places))).document
        return [document] if document else []

    packer = packing.BestFitPacker(
        encoding.row_tokens, config.packing_buffer_documents, next_documents, (), encoding.padding
    )
    rows, row = 0.0, np.empty(encoding.row_tokens, np.int32)
    try:
        while True:
            packer.fill(row)
            rows += 1
    except StopIteration:
        rows += sum(document.length for document in packer.documents) / encoding.row_tokens
    batch_rows = config.global_batch_tokens // config.max_target_length
    return max(1, round(config.chat_epochs * rows * size / sample / batch_rows))
