"""Samples: greedy continuations of a few prompts, to watch what the model learns."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from ml_collections import FrozenConfigDict

from MaxNano.evals.results import Results, ResultTable
from MaxNano.tokenization.tokenizer import Tokenizer
from MaxNano.training.context import RunContext

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


class SamplesEval:
    """{prompt: its greedy continuation}; see base.Eval."""

    event = "samples"
    at_start = False

    def __init__(self, run: RunContext):
        self._run = run

    @staticmethod
    def interval(config: FrozenConfigDict) -> int:
        return config.sample_interval

    def measure(self, results: Results) -> dict[str, str]:
        run = self._run
        greedy = partial(run.programs.greedy, run.params)
        return sample(greedy, run.tokenizer, run.config.sample_tokens)

    def table(self, results: Results) -> ResultTable:
        texts = self.measure(results)
        results.put("samples", {}, texts)
        rows = [(prompt, repr(text)[1:-1]) for prompt, text in texts.items()]
        return ResultTable("samples", ("prompt", "greedy continuation"), rows)


def sample(
    next_tokens: Callable[[np.ndarray, np.ndarray], np.ndarray],
    tokenizer: Tokenizer,
    new_tokens: int,
    prompts: Sequence[str] = PROMPTS,
) -> dict[str, str]:
    """{prompt: greedy continuation of `new_tokens` tokens}.

    next_tokens: (tokens (P, length) int32, last (P,) int32) -> the most likely token after position
    `last` of each row, (P,). All calls have one shape, so that one program is compiled; the tokens
    after `last` are masked. There is no KV cache: these few short rows do not need one.
    """
    ids = tokenizer.encode_batch(prompts, bos=True)
    lengths = np.array([len(row) for row in ids])
    tokens = np.full((len(ids), lengths.max() + new_tokens), tokenizer.bos_id, np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    rows = np.arange(len(ids))
    for offset in range(new_tokens):
        last = lengths + offset - 1
        tokens[rows, last + 1] = np.asarray(next_tokens(tokens, last.astype(np.int32)))
    return {
        prompt: tokenizer.decode(row[length : length + new_tokens].tolist())
        for prompt, row, length in zip(prompts, tokens, lengths, strict=True)
    }
