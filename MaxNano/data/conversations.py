"""Conversations for SFT: a mixture of chat tasks becomes encoded documents for the packer.

A document is one conversation and begins with `<|bos|>`. Tokens without loss, and the padding of a
row, are stored as their complement, ~id: one int32 carries both the id and the training mask
through workers, packer and checkpoints, and the loader's to_batch turns them into targets of -1.

A conversation longer than a row is cut after its last complete answer, or at the end of the row if
none is complete. It is skipped if no trained token is left. Positions count both cases. Every
buffered document therefore fits into an empty row.
Source: nanochat/scripts/chat_sft.py@92d63d4; the rows are the same if every conversation fits.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from MaxNano import tasks
from MaxNano.data import packing
from MaxNano.scaling import largest_divisor

# Conversations that steps_of_passes packs to estimate the rows of an epoch.
_SAMPLE_CONVERSATIONS = 4096


class ConversationPosition(NamedTuple):
    """A reader's position, and how many conversations it has cut or skipped in all epochs."""

    epoch: int
    index: int  # of the next conversation in the order of the epoch
    cut: int
    left_out: int


_SAVED_FIELDS = ("epoch", "place", "cut", "left_out")  # their names in checkpoints


# ---- Mixtures -----------------------------------------------------------------------------------


class Share(NamedTuple):
    """One task of a mixture."""

    task: str  # a name for tasks.open_task
    amount: float
    first: int | None  # use at most this many of its conversations; None: all


def read_shares(rows: Sequence[Sequence[str]], key: str) -> list[Share]:
    """Parse the rows [task, amount] or [task, amount, first] of the config key `key`.

    Raises ValueError, naming the key, if a row is malformed or there is none.
    """
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


def conversations_per_epoch(
    lengths: Sequence[int], amounts: Sequence[float], unit: str
) -> list[int]:
    """The number of conversations of each task in one epoch of a mixture.

    lengths: conversations that each task has. unit "epochs": the amount is the number of times that
    each conversation is used. "weights": the amounts are the tasks' proportions, and the epoch has
    as many conversations as the tasks together; an empty task's weight goes to the others.
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
    """The conversations of several tasks, shuffled in each epoch.

    Built as `Mixture(config, split)`; pickles without its data, which are opened again. `where`
    names it in messages; `content` identifies it in checkpoints.
    Raises ValueError if a task or its data is missing, or there is no conversation.
    Source: nanochat/tasks/common.py@92d63d4, TaskMixture; the order of the first epoch is the same.
    """

    def __init__(self, config: Any, split: str):
        key = "chat_train_mixture" if split == "train" else "chat_validation_mixture"
        self._config = config
        self._shares = read_shares(config[key], key)
        self._tasks: list[tasks.Task] | None = None
        self._orders: dict[int, np.ndarray] = {}  # by epoch
        lengths = [len(task) for task in self._opened()]
        self._lengths = [
            length if share.first is None else min(length, share.first)
            for length, share in zip(lengths, self._shares, strict=True)
        ]
        amounts = [share.amount for share in self._shares]
        unit = config.chat_mixture_unit
        self.counts = conversations_per_epoch(self._lengths, amounts, unit)
        self._ends = np.cumsum(self.counts)
        self.where = f"{key} ({', '.join(share.task for share in self._shares)})"
        self.content = " + ".join(
            f"{count} of {share.task}"
            for count, share in zip(self.counts, self._shares, strict=True)
        )
        if not len(self):
            raise ValueError(f"{self.where} has no conversation; check its amounts and data")

    def __len__(self) -> int:
        """The number of conversations per epoch."""
        return int(self._ends[-1])

    def conversation(self, epoch: int, index: int) -> tasks.Conversation:
        """The conversation at 0 <= index < len(self) of an epoch; epochs count from 1.

        If an epoch uses a part of a task, the next epoch continues after that part.
        """
        slot = int(self._order_of(epoch)[index])
        task = int(np.searchsorted(self._ends, slot, side="right"))
        nth = slot - (int(self._ends[task - 1]) if task else 0)
        task_index = ((epoch - 1) * self.counts[task] + nth) % self._lengths[task]
        return self._opened()[task].conversation(task_index)

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # Readers enter the next epoch at different times: keep two orders.
            self._orders = dict(list(self._orders.items())[-1:])
            slots = list(range(len(self)))
            random.Random(self._config.seed + epoch - 1).shuffle(slots)
            self._orders[epoch] = np.array(slots, np.int32)
        return self._orders[epoch]

    def _opened(self) -> list[tasks.Task]:
        if self._tasks is None:
            # A task that is named twice is opened once.
            opened: dict[str, tasks.Task] = {}
            for share in self._shares:
                if share.task not in opened:
                    opened[share.task] = tasks.open_task(self._config, share.task)
            self._tasks = [opened[share.task] for share in self._shares]
        return self._tasks

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tasks": None, "_orders": {}}


# ---- Encoding -----------------------------------------------------------------------------------


class EncodedConversation(NamedTuple):
    """A conversation as a document, or the reason why it was skipped."""

    document: packing.Document | None  # None: skipped
    was_cut: bool
    problem: str


class ConversationEncoding:
    """The workers.Encoding of a mixture's conversations.

    Reader r of R takes conversations r, r + R, ... of each epoch. Built as
    `ConversationEncoding(config, tokenizer, split)`. Of fewer conversations than data_readers, R is
    the largest divisor that leaves no reader without one. Raises ValueError as Mixture does.
    """

    def __init__(self, config: Any, tokenizer: Any, split: str):
        self.mixture = Mixture(config, split)
        self.readers = largest_divisor(config.data_readers, len(self.mixture))
        self.row_tokens = config.max_target_length + 1
        self.splits = False
        self.padding = ~tokenizer.bos_id
        self._tokenizer = tokenizer
        self._list_documents = config.tokenize_batch_documents

    def lists(
        self, reader: int, position: ConversationPosition
    ) -> Iterator[tuple[ConversationPosition, list[packing.Document]]]:
        """Endless lists of one reader's documents, each with the position after it.

        Raises ValueError if a whole epoch has no conversation that can be trained on.
        """
        epoch, index, cut, left_out = position
        has_documents = index != reader  # an epoch entered midway proves nothing
        reason = ""
        while True:
            while index < len(self.mixture):
                documents: list[packing.Document] = []
                end = min(index + self.readers * self._list_documents, len(self.mixture))
                while index < end:
                    encoded = self.encode(self.mixture.conversation(epoch, index))
                    index += self.readers
                    if encoded.document is None:
                        left_out, reason = left_out + 1, encoded.problem
                    else:
                        documents.append(encoded.document)
                        cut, has_documents = cut + encoded.was_cut, True
                yield ConversationPosition(epoch, index, cut, left_out), documents
            if not has_documents:
                raise ValueError(
                    f"{self.mixture.where}: none of the conversations of reader {reader} of "
                    f"data_readers={self.readers} can be trained on ({reason})"
                )
            epoch, index, has_documents = epoch + 1, reader, False

    def start_position(self, reader: int) -> ConversationPosition:
        return ConversationPosition(epoch=1, index=reader, cut=0, left_out=0)

    def position_to_json(self, position: ConversationPosition) -> dict[str, Any]:
        saved = dict(zip(_SAVED_FIELDS, position, strict=True))
        return {"mixture": self.mixture.content, **saved}

    def position_from_json(self, saved: Mapping[str, Any]) -> ConversationPosition:
        if saved.get("mixture") != self.mixture.content:
            raise ValueError(
                f"the saved data position is in {saved.get('mixture', 'text')}, but the run has "
                f"{self.mixture.content}; resume with the same data"
            )
        return ConversationPosition(*(saved[field] for field in _SAVED_FIELDS))

    def progress(self, positions: Sequence[ConversationPosition]) -> dict[str, int]:
        furthest = max(positions)
        return {
            "epoch": furthest.epoch,
            "conversation": furthest.index,
            "conversations_cut": sum(position.cut for position in positions),
            "conversations_left_out": sum(position.left_out for position in positions),
        }

    def encode(self, conversation: tasks.Conversation) -> EncodedConversation:
        """Encode a conversation and cut it to a row."""
        try:
            rendered = self._tokenizer.render_conversation(conversation)
        except ValueError as error:  # not every row of a public data set is a conversation
            return EncodedConversation(None, False, str(error))
        ids, mask = (np.array(part, np.int32) for part in rendered)
        kept = len(ids)
        if kept > self.row_tokens:
            answered = np.flatnonzero(
                ids[: self.row_tokens] == self._tokenizer.special.assistant_end
            )
            kept = int(answered[-1]) + 1 if answered.size else self.row_tokens
        if not mask[:kept].any():
            return EncodedConversation(None, False, "no answer begins within max_target_length")
        tokens = np.where(mask == 1, ids, ~ids)[:kept]
        return EncodedConversation(packing.Document(kept, tokens), kept < len(ids), "")


# ---- Horizon ------------------------------------------------------------------------------------


def steps_of_passes(config: Any, tokenizer: Any) -> int:
    """The number of optimizer steps for `chat_epochs` epochs of the training mixture.

    An estimate from packing the first _SAMPLE_CONVERSATIONS of the shuffled mixture. For a smaller
    mixture it is exact up to the last rows.
    """
    encoding = ConversationEncoding(config, tokenizer, "train")
    size = len(encoding.mixture)
    sample = min(size, _SAMPLE_CONVERSATIONS)
    indices = iter(range(sample))

    def next_documents() -> list[packing.Document]:
        document = encoding.encode(encoding.mixture.conversation(1, next(indices))).document
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
