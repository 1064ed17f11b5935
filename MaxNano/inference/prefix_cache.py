"""The prefix cache: a prompt that begins with earlier tokens is not prefilled from its start.

A prefix is a slot's part of the KV cache, copied to the store when a sample ends, and after its
prompt if the sample may grow beyond a window. A request whose prompt begins with the tokens of a
prefix gets a copy of it, and only the rest of its prompt is computed: extend.py.

A layer with a window keeps only what its newest token can see, and the next position overwrites the
oldest one. A prefix that is longer than a window is therefore used whole or not at all; a shorter
one also up to the first token that differs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from MaxNano.inference.programs import ModelRunner
from MaxNano.inference.slots import QueuedRequest, RunningSample, SlotTable
from MaxNano.tokenization.tokenizer import Tokenizer

SHORTEST = 64  # tokens; a shorter prefix saves nothing


class Prefix(NamedTuple):
    """Tokens whose keys and values are in the store."""

    tokens: np.ndarray
    shard: int
    entry: int  # within the shard


class Match(NamedTuple):
    """A prefix, and how many of its tokens a prompt shares."""

    prefix: Prefix
    length: int


class PrefixIndex:
    """Which prefixes are in the store: per shard at most `entries`, the last used ones."""

    def __init__(self, shards: int, entries: int, sizes: Sequence[int]):
        """sizes: positions that each layer keeps (Plan.sizes)."""
        self._shortest_window = min(sizes)
        self._free = [list(range(entries)) for _ in range(shards)]
        self._prefixes: list[Prefix] = []  # the last used is last

    def clear(self) -> None:
        """Forget every prefix, because the parameters changed or the store was lost."""
        for prefix in self._prefixes:
            self._free[prefix.shard].append(prefix.entry)
        self._prefixes.clear()

    def is_cut_free(self, length: int) -> bool:
        """Whether any part of a prefix of `length` tokens can be used: nothing was overwritten."""
        return length < self._shortest_window

    def find(self, prompt: Sequence[int]) -> Match | None:
        """The longest usable prefix of a prompt, if it saves at least half of the prefill."""
        ids = np.asarray(prompt[:-1])  # the last token is always computed
        best = None
        for prefix in self._prefixes:
            length = _shared(prefix.tokens, ids)
            is_usable = length == len(prefix.tokens) or self.is_cut_free(len(prefix.tokens))
            if is_usable and length > (best.length if best else 0):
                best = Match(prefix, length)
        return best if best and best.length >= max(SHORTEST, len(ids) / 2) else None

    def touch(self, prefix: Prefix) -> None:
        """Mark a prefix as used."""
        self._prefixes = [other for other in self._prefixes if other is not prefix] + [prefix]

    def add(self, tokens: Sequence[int], shard: int) -> int | None:
        """The entry for a new prefix; None if it is too short or already there.

        It replaces the prefixes that it continues, but not a prompt whose answer it ends with if
        its parts cannot be used: the next prompt may have other tokens for the same answer.
        """
        tokens = np.asarray(tokens, np.int32)
        if len(tokens) < SHORTEST:
            return None
        continued = []
        for prefix in self._prefixes:
            if prefix.shard == shard and _shared(prefix.tokens, tokens) == len(prefix.tokens):
                continued.append(prefix)
        for prefix in continued:
            if len(prefix.tokens) == len(tokens):
                self.touch(prefix)
                return None
        continued.sort(key=lambda prefix: len(prefix.tokens))
        for prefix in continued if self.is_cut_free(len(tokens)) else continued[:-1]:
            self._drop(prefix)
        if not self._free[shard]:
            self._drop(next(prefix for prefix in self._prefixes if prefix.shard == shard))
        entry = self._free[shard].pop()
        self._prefixes.append(Prefix(tokens, shard, entry))
        return entry

    def _drop(self, prefix: Prefix) -> None:
        self._prefixes = [other for other in self._prefixes if other is not prefix]
        self._free[prefix.shard].append(prefix.entry)


class PrefixCache:
    """Saves prefixes of samples, and admits requests that begin with them. Does nothing if the
    programs have no entries for prefixes.
    """

    def __init__(self, runner: ModelRunner):
        programs, shards = runner.programs, runner.programs.setup.data_parallel_size
        self.tokens_looked_up = 0  # in prompts of requests that the cache serves
        self.tokens_reused = 0
        self.index = PrefixIndex(shards, programs.prefix_entries // shards, programs.plan.sizes)
        self._runner = runner
        self._is_on = programs.prefix_entries > 0

    def compile(self) -> None:
        """Compile the programs, if there are entries."""
        if self._is_on:
            self._runner.save(-1, 0, 0)
            self._runner.extend(-1, 0, 0, (0, 0), 1)

    def admit(
        self, queued: QueuedRequest, table: SlotTable, tokenizer: Tokenizer | None
    ) -> RunningSample | None:
        """Start a request after a prefix of its prompt; None if there is none with a free slot."""
        match = self.index.find(queued.request.prompt) if self._serves(queued) else None
        if match is None or not table.free[match.prefix.shard]:
            return None
        (_, shard, entry), prompt = match.prefix, queued.request.prompt
        sample = table.place(queued, shard, tokenizer)
        self._runner.extend(shard, entry, sample.slot, prompt, match.length)
        self.index.touch(match.prefix)
        self.tokens_reused += match.length
        self.save_prompt(sample, table)
        return sample

    def save_prompt(self, sample: RunningSample, table: SlotTable) -> None:
        """Save a prompt that was just prefilled if the answer may overwrite its oldest positions."""
        if self._serves(sample.queued):
            prompt = sample.request.prompt
            self.tokens_looked_up += len(prompt)
            if not self.index.is_cut_free(len(prompt) + sample.queued.max_tokens):
                self._save(sample, prompt[:-1], table)

    def save(self, sample: RunningSample, ran: Sequence[int], table: SlotTable) -> None:
        """Save a sample that ends; ran: the tokens that the device generated in its last round."""
        if self._serves(sample.queued):
            tokens = (*sample.request.prompt, *sample.tokens, *ran)
            # The newest token may not be in the cache yet.
            stored = table.control.position[sample.slot] + len(ran)
            self._save(sample, tokens[:stored], table)

    def _serves(self, queued: QueuedRequest) -> bool:
        return self._is_on and queued.request.samples == 1 and not queued.request.prompt_logprobs

    def _save(self, sample: RunningSample, tokens: Sequence[int], table: SlotTable) -> None:
        shard = sample.slot // table.per_shard
        entry = self.index.add(tokens, shard)
        if entry is not None:
            self._runner.save(shard, entry, sample.slot)


def _shared(left, right):
    """Number of tokens at the beginning that two arrays share."""
    size = min(len(left), len(right))
    differs = np.flatnonzero(left[:size] != right[:size])
    return int(differs[0]) if len(differs) else size
