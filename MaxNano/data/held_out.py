"""How much data validate, and how much of them a validation reads."""

import math
from typing import Any

from MaxNano import pyconfig
from MaxNano.data import conversations, sources
from MaxNano.data.folder import DamagedData, Folder, NotArrived

# Of much text, and of much of other types. Source: eval_tokens of nanochat's base_train.py and
# chat_sft.py@92d63d4.
EVAL_TOKENS = 41_943_040
EVAL_TOKENS_OF = {"chat": 20_971_520}
SMALL_TOKENS = 10_000  # of less text a warning says that its bits per byte say little
MEASURED_CHARACTERS = 1_000_000  # the number of tokens of more text is an estimate
ENOUGH_CHARACTERS = 10 * EVAL_TOKENS  # for EVAL_TOKENS
MEASURED_CONVERSATIONS = 1_000
BATCH_DOCUMENTS = 128  # per tokenizer call
ORIGIN = "validation data"  # of an eval_tokens that follows from them


def with_eval_tokens(config: Any, tokenizer: Any) -> Any:
    """The config with eval_tokens: one pass of the validation data, most_tokens of more data."""
    if config.eval_tokens is not None:
        return config
    tokens = validation_tokens(config, tokenizer) or math.inf
    return pyconfig.replace(config, ORIGIN, eval_tokens=min(most_tokens(config), tokens))


def most_tokens(config: Any) -> int:
    """The eval_tokens of much data."""
    return EVAL_TOKENS_OF.get(config.dataset_type, EVAL_TOKENS)


def validation_tokens(config: Any, tokenizer: Any) -> int | None:
    """Tokens of one pass of the validation data, estimated from their beginning.

    Every process of a run finds the same number. None if it is not known: of data sets without
    files, of one that a download lists, of other tasks than json, and of files that cannot be read.
    """
    try:
        if config.dataset_type == "chat":
            return _tokens_of_conversations(config, tokenizer)
        source = sources.open_source(config, "validation")
        if not isinstance(source, sources.MixtureSource):
            return _tokens_of(source, tokenizer)
        # The first part that is at its end begins again.
        share = sum(source.weights)
        parts = zip(source.parts, source.weights, strict=True)
        passes = [(_tokens_of(part, tokenizer), weight) for part, weight in parts]
        return min((round(n * share / weight) for n, weight in passes if n), default=None)
    except (ValueError, OSError):
        return None  # reported where the text is needed


def _tokens_of_conversations(config: Any, tokenizer: Any) -> int | None:
    """As validation_tokens, of conversations in files."""
    names = [name for name, *_ in config.chat_validation_mixture]
    if not all(name.startswith("json:") for name in names):
        return None
    encoding = conversations.ConversationEncoding(config, tokenizer, "validation")
    size = len(encoding.mixture)
    count, tokens = min(size, MEASURED_CONVERSATIONS), 0
    for index in range(count):
        document = encoding.encode(encoding.mixture.conversation(1, index)).document
        tokens += document.length if document else 0
    return round(tokens * size / count)


def _tokens_of(source: Any, tokenizer: Any) -> int | None:
    """As validation_tokens, of one source."""
    if not isinstance(source, Folder):
        return None
    if any("done" in facts for facts in source.listed().values()):
        return None
    characters, files, tokens = 0, 0, 0.0
    while files < len(source.files) and characters < MEASURED_CHARACTERS:
        try:
            groups = source.open(files)
        except DamagedData:
            groups = ()
        files += 1
        if isinstance(groups, NotArrived):
            return None
        read, counted = 0, 0.0
        while read < len(groups) and characters < MEASURED_CHARACTERS:
            size, count = _measure(groups, read, tokenizer)
            characters, counted, read = characters + size, counted + count, read + 1
        tokens += counted * len(groups) / max(1, read)
    return round(tokens * len(source.files) / max(1, files))


def _measure(groups: Any, group: int, tokenizer: Any) -> tuple[int, float]:
    """(characters, tokens) of a row group up to where it is damaged.

    A large one is not read beyond ENOUGH_CHARACTERS, and encoded up to MEASURED_CHARACTERS.
    """
    characters = encoded = tokens = 0
    batch: list[str] = []
    try:
        for text in groups.documents(group):
            if not isinstance(text, str):
                continue
            characters += len(text)
            if encoded < MEASURED_CHARACTERS:
                batch.append(text)
                encoded += len(text)
            if len(batch) == BATCH_DOCUMENTS:
                tokens += sum(map(len, tokenizer.encode_batch(batch, bos=True)))
                batch = []
            if characters > ENOUGH_CHARACTERS:
                break
    except DamagedData:
        pass
    if batch:
        tokens += sum(map(len, tokenizer.encode_batch(batch, bos=True)))
    return characters, tokens * characters / max(1, encoded)


def describe(config: Any, tokenizer: Any) -> str | None:
    """The size of the validation data beside eval_tokens, for the start-up table; None if unknown."""
    tokens = validation_tokens(config, tokenizer)
    if tokens is None:
        return None
    batches = max(1, (config.eval_tokens or most_tokens(config)) // config.global_batch_tokens)
    read = batches * config.global_batch_tokens
    passes = f", {read / tokens:.3g} passes" if tokens else ""
    return f"about {tokens:,}; a validation reads {read:,}{passes}"


def small(config: Any, tokenizer: Any) -> str | None:
    """A warning about validation data of fewer than SMALL_TOKENS, with what to do; else None."""
    if config.origin["eval_tokens"] == ORIGIN and config.eval_tokens >= SMALL_TOKENS:
        return None  # it is one pass at most, and need not be counted again
    tokens = validation_tokens(config, tokenizer)
    if not tokens or tokens >= SMALL_TOKENS:  # 0: reading them is an error
        return None
    if config.dataset_type == "chat":
        names = [name for name, *_ in config.chat_validation_mixture]
        remedy = "add conversations to them"
    else:
        names = sources.open_source(config, "validation").files
        remedy = (
            "add text to them, or name a larger file after the validation split, such as"
            " validation.txt"
        )
    return (
        f"only about {tokens:,} tokens validate ({', '.join(names[:2])}{', ...' * (len(names) > 2)}),"
        f" and bits per byte of so little text say little: {remedy}"
    )
