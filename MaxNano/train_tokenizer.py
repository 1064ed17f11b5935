"""Trains a byte-level BPE tokenizer on the training documents.

    .venv/bin/python MaxNano/train_tokenizer.py configs/base.yml [key=value ...]

Reads the data set, saves the tokenizer to tokenizer_path (atomically) and prints the bytes per
token on several kinds of text.
Source: nanochat/scripts/tok_train.py and tok_eval.py@92d63d4.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:
        # Not MaxNano/, which hides libraries.
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    import MaxNano  # noqa: F401  # explains a missing package

import itertools
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tiktoken
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.data import fingerprint, sources, stream
from MaxNano.storage import files
from MaxNano.tokenization.bpe import FILE_NAME, BpeTokenizer, cut_long_space, train_bpe
from MaxNano.tokenization.tokenizer import Tokenizer, load_tokenizer, valid_unicode

PROGRESS_SECONDS = 5.0  # between progress lines
REFERENCES = ("gpt2", "cl100k_base")  # tiktoken's encodings to compare with
REFERENCE_SECONDS = 15.0  # timeout for their download; tiktoken has none
TABLE_DOCUMENTS = 1024  # documents of each split in the table

SAMPLES = {
    "news": """\
The harbour council voted on Tuesday night, by 14 to 9, to reopen the old ferry line between the two
shores of the bay, eleven years after the last boat was sold. Tickets are to cost $3.40; a crossing
takes 18 minutes, against 50 by road at rush hour. "We've waited long enough," said Marta Okonkwo,
who runs a bakery at the northern landing. "It isn't about nostalgia. It's about getting to work."
Opponents, among them the councillor for finance, called the estimate of $27.5 million "hopeful" and
asked for an independent review before the first contracts are signed in March 2027.
""",
    "korean": """\
지난주 토요일 아침, 우리는 기차를 타고 바닷가의 작은 마을로 떠났습니다. 창밖으로는 안개가 낀 논과 낮은 산이
천천히 지나갔고, 할머니는 보온병에서 따뜻한 보리차를 따라 주셨습니다. 역에 내리니 시장이 막 열리는 참이었습니다.
상인들은 오징어와 미역을 가지런히 늘어놓고 "오늘 새벽에 잡은 거예요!" 하고 외쳤습니다. 점심으로 칼국수를 먹고
등대까지 걸어갔는데, 바람이 너무 세서 모자를 두 번이나 놓쳤습니다. 그래도 참 좋은 하루였습니다.
""",
    "code": '''\
def merge_intervals(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join the intervals that overlap; the result is sorted."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


if __name__ == "__main__":
    assert merge_intervals([(5, 8), (1, 3), (2, 4)]) == [(1, 4), (5, 8)]
    for i, (a, b) in enumerate(merge_intervals([(0, 10), (3, 4)])):
        print(f"{i:>3}: {a}..{b}")
''',
    "latex": r"""\begin{theorem}[Cauchy--Schwarz]\label{thm:cs}
  Let $V$ be a real inner product space and $u, v \in V$. Then
  \begin{equation}
    \lvert \langle u, v \rangle \rvert^2 \le \langle u, u \rangle \, \langle v, v \rangle .
  \end{equation}
\end{theorem}
\begin{proof}
  For $v \ne 0$ put $t = \frac{\langle u, v \rangle}{\lVert v \rVert^2}$. Expanding
  $0 \le \lVert u - t v \rVert^2 = \lVert u \rVert^2 - 2 t \langle u, v \rangle + t^2 \lVert v \rVert^2$
  gives the claim; equality holds if and only if $u = t v$, cf.~\cite{lang1993}, \S 4.2.
\end{proof}
""",
    "science": """\
Photosystem II splits water at a cluster of four manganese ions and one calcium ion. Each of four
successive photons (λ ≈ 680 nm, about 1.8 eV) removes one electron, and the cluster passes through
the states S0 to S4 before O₂ is released; the protons that stay behind in the thylakoid lumen lower
its pH to roughly 5, and the resulting gradient drives ATP synthase at some 100 revolutions per
second. In bright light a part of the absorbed energy is given off as heat within the
light-harvesting antennae, which protects the D1 protein; damaged D1 is replaced every 30 min or so.
""",
}


# ---- Reading ------------------------------------------------------------------------------------


def capped(texts: Iterable[str], characters: int, document_characters: int) -> Iterator[str]:
    """The first `document_characters` of each text, until they are more than `characters`."""
    total = 0
    for text in texts:
        text = text[:document_characters]
        total += len(text)
        yield text
        if total > characters:
            return


def with_progress(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The texts, with a progress line every PROGRESS_SECONDS and at the end."""
    start = shown = time.monotonic()
    documents = seen = 0

    def show() -> None:
        rate = seen / max(time.monotonic() - start, 1e-9)
        print(
            f"Read {documents:,} documents, {seen / 1e6:,.1f} M of at most"
            f" {characters / 1e6:,.1f} M characters, {rate / 1e6:.1f} M characters/s",
            flush=True,
        )

    for text in texts:
        yield text
        documents, seen = documents + 1, seen + len(text)
        if time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            show()
    show()


def train(config: FrozenConfigDict) -> tuple[BpeTokenizer, dict[str, Any]]:
    """(the tokenizer trained on the config's training documents, its inputs); saves nothing."""
    characters = config.tokenizer_train_characters
    source = _Opened(sources.open_source(config, "train"))
    texts = source.texts(config.skip_corrupt_data)
    texts = capped(texts, characters, config.tokenizer_train_document_characters)
    first = next((text for text in texts if text), None)
    if first is None:
        raise ValueError(f"no text to train on in {source.where}: its documents are empty")
    texts = with_progress(itertools.chain([first], texts), characters)
    trained = train_bpe(texts, config.vocab_size, config.tokenizer_threads)
    read, is_all = source.contents(config)
    return trained, {**_keys_of(config), "files": read, "all_files": is_all}


# ---- What a tokenizer was trained on ------------------------------------------------------------

INPUTS = "trained_on.json"  # in the tokenizer's folder
KEYS = (
    "vocab_size",
    "dataset_type",
    "text_column",
    "tokenizer_train_characters",
    "tokenizer_train_document_characters",
)


class _Opened:
    """A source that knows how many of its files were opened."""

    def __init__(self, source: Any) -> None:
        self._source, self._count = source, 0
        self.files, self.where = source.files, source.where

    def open(self, file: int) -> Any:
        self._count = max(self._count, file + 1)
        return self._source.open(file)

    def texts(self, skip_damaged: bool) -> Iterator[str]:
        """Every document once."""
        is_mixture = isinstance(self._source, sources.MixtureSource)
        return stream.texts_of(self._source if is_mixture else self, skip_damaged)

    def contents(self, config: FrozenConfigDict) -> tuple[dict[str, str], bool]:
        """(fingerprints of the opened files, whether these are all): shards after the characters
        to train on do not matter. A mixture counts as opened.
        """
        contents = fingerprint.contents_of_source(config, self._source)
        opened = dict(list(contents.items())[: self._count or None])
        return opened, len(opened) == len(contents)


def _keys_of(config: FrozenConfigDict) -> dict[str, Any]:
    return {"keys": {key: config[key] for key in KEYS}}


def check_inputs(config: FrozenConfigDict) -> None:
    """Raise ValueError if the tokenizer in tokenizer_path was trained on other text, or with other
    values, than this config has. A tokenizer that does not say so passes.
    """
    path = epath.Path(config.tokenizer_path).expanduser() / INPUTS
    if config.tokenizer_type != "bpe" or not path.exists():
        return
    saved = json.loads(path.read_text())
    problems = [
        f"{key}={config[key]} instead of {value}"
        for key, value in saved["keys"].items()
        if config[key] != value
    ]
    if not problems:
        source = sources.open_source(config, "train")
        contents = fingerprint.contents_of_source(config, source)
        count = None if saved["all_files"] else len(saved["files"])
        problem = fingerprint.difference(saved["files"], dict(list(contents.items())[:count]))
        problems += [problem] if problem else []
    if problems:
        raise ValueError(
            f"the tokenizer in {config.tokenizer_path} was trained on other text or with other "
            f"values: {', '.join(problems)}; set another tokenizer_path, or remove it"
        )


# ---- Compression --------------------------------------------------------------------------------


def reference_encodings(names: Sequence[str], seconds: float) -> dict[str, tiktoken.Encoding]:
    """The named tiktoken encodings that are available within some seconds.

    tiktoken downloads them once into TIKTOKEN_CACHE_DIR, without a timeout.
    """
    encodings: dict[str, tiktoken.Encoding] = {}

    def get() -> None:
        for name in names:
            try:
                encodings[name] = tiktoken.get_encoding(name)
            except Exception:  # of any type: the table omits this column
                continue

    thread = threading.Thread(target=get, daemon=True)  # a hanging download ends with the process
    thread.start()
    thread.join(seconds)
    return dict(encodings)


def compression_table(
    ours: Tokenizer,
    references: Mapping[str, tiktoken.Encoding],
    texts: Mapping[str, Sequence[str]],
) -> list[str]:
    """Lines of a table: UTF-8 bytes per token of each group of texts (rows) and tokenizer."""
    header = f"{'bytes per token':<16}{'bytes':>12}{'ours':>12}"
    lines = [header + "".join(f"{name:>14}" for name in references)]
    for name, group in texts.items():
        group = [valid_unicode(text) for text in group]
        size = sum(len(text.encode()) for text in group)
        rows = ours.encode_batch(group, bos=False)
        assert [ours.decode(row) for row in rows] == group, "decoding must invert encoding"
        tokens = sum(map(len, rows))
        line = f"{name:<16}{size:>12,}{size / max(tokens, 1):>12.2f}"
        for encoding in references.values():
            tokens = sum(
                len(encoding.encode_ordinary(piece))
                for text in group
                for piece in cut_long_space(text)
            )
            line += f"{size / max(tokens, 1):>14.2f}"
        lines.append(line)
    return lines


def table_texts(config: FrozenConfigDict) -> dict[str, list[str]]:
    """The samples and the first documents of both splits, by name."""
    texts = {name: [text] for name, text in SAMPLES.items()}
    for split in ("train", "validation"):
        documents = itertools.islice(stream.iterate_texts(config, split=split), TABLE_DOCUMENTS)
        limit = config.tokenizer_train_document_characters
        texts[split] = [document[:limit] for document in documents]
    return texts


def _is_same(config: FrozenConfigDict, trained: BpeTokenizer) -> bool:
    """Whether the tokenizer in tokenizer_path has the same tokens; False if it cannot be read."""
    try:
        return load_tokenizer(config).fingerprint() == trained.fingerprint()
    except ValueError:
        return False


# ---- Main ---------------------------------------------------------------------------------------


def main(config: FrozenConfigDict) -> None:
    if config.tokenizer_type != "bpe":
        raise ValueError(
            f"tokenizer_type={config.tokenizer_type} cannot be trained; set tokenizer_type=bpe"
        )
    where = sources.open_source(config, "train").where
    files.check_writable(config.tokenizer_path, "set tokenizer_path to another folder")
    print(f"Training a tokenizer of {config.vocab_size:,} tokens on {where}")
    start = time.monotonic()
    trained, inputs = train(config)
    path = epath.Path(config.tokenizer_path).expanduser() / INPUTS
    if (path.parent / FILE_NAME).exists() and not _is_same(config, trained):
        print(
            f"Replacing {config.tokenizer_path}: runs that were trained with it cannot be resumed"
        )
    path.unlink(missing_ok=True)  # before the tokenizer: it may be another's
    trained.save(config.tokenizer_path)
    files.write_whole(path, json.dumps(inputs, indent=1) + "\n")
    print(f"Trained in {time.monotonic() - start:.1f} s")
    print(f"Saved {config.tokenizer_path} (fingerprint {trained.fingerprint()[:16]})")

    references = reference_encodings(REFERENCES, REFERENCE_SECONDS)
    print()
    print("\n".join(compression_table(trained, references, table_texts(config))))
    missing = [name for name in REFERENCES if name not in references]
    if missing:
        print(
            f"No comparison with {', '.join(missing)}: not in TIKTOKEN_CACHE_DIR and could not be"
            " downloaded"
        )


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
