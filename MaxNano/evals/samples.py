"""Short greedy continuations of fixed prompts: a look at what the model knows, while it trains."""

from collections.abc import Callable, Sequence

import numpy as np

from MaxNano.tokenization.tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


def sample(
    next_tokens: Callable[[np.ndarray, np.ndarray], np.ndarray],
    tokenizer: Tokenizer,
    new_tokens: int,
    prompts: Sequence[str] = PROMPTS,
) -> dict[str, str]:
    """{prompt: greedy continuation of `new_tokens` tokens}.

    `next_tokens(tokens (P, length) int32, last (P,) int32) -> (P,)` gives the likeliest token after position
    `last` of each row. Every call has the same shape, so one program is compiled; what lies behind `last` cannot
    be seen from it. The key-value cache is the engine's business, not that of this small check.
    """
    ids = tokenizer.encode_batch(prompts, bos=True)
    lengths = np.array([len(row) for row in ids])
    tokens = np.full((len(ids), lengths.max() + new_tokens), tokenizer.bos_id, np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    everyone = np.arange(len(ids))
    for offset in range(new_tokens):
        last = lengths + offset - 1
        tokens[everyone, last + 1] = np.asarray(next_tokens(tokens, last.astype(np.int32)))
    return {
        prompt: tokenizer.decode(row[start : start + new_tokens].tolist())
        for prompt, row, start in zip(prompts, tokens, lengths, strict=True)
    }
