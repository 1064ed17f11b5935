"""The base of the chat tasks: the interface, rows of hub data sets, prompts and grading.

A task is a sequence of conversations {"messages": [...], ...} and, unless it is for training only,
a way to grade an answer. The same data gives the same conversations in the same order.
Source: nanochat/tasks/common.py@92d63d4.
"""

import abc
import io
import json
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

Conversation = dict[str, Any]

# Shuffles the rows of every hub data set; it determines which problem has which index.
_SHUFFLE_SEED = 42
_FINAL_NUMBER = re.compile(r"#### (-?[0-9.,]+)")


class Task(abc.ABC):
    """Conversations by index; the last message of each is the assistant's correct answer.

    kind is how a model answers: "categorical", by its logits over the conversation's "letters";
    "generative", by the text it generates; None if the task is for training only. baseline is the
    accuracy of guessing. Built as `Task(config, argument)`, where the argument is the split, or the
    rest of the task's name in config.
    """

    kind: str | None = None
    baseline: float = 0.0

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def conversation(self, index: int) -> Conversation:
        """A new copy of the conversation at 0 <= index < len(self)."""

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the text `completion` is a correct answer to the conversation."""
        raise NotImplementedError(f"{type(self).__name__} is for training only")

    def reward(self, conversation: Conversation, completion: str) -> float:
        """The reward of `completion` in reinforcement learning."""
        return float(self.evaluate(conversation, completion))


class MultipleChoice(Task):
    """A task whose answer is a letter of the conversation's "letters"."""

    kind = "categorical"
    baseline = 0.25

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion == conversation["messages"][-1]["content"]


def dialogue(question: str, answer: str | list[dict[str, str]], **facts: Any) -> Conversation:
    """A conversation of one question and its answer; facts are further keys of it."""
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, **facts}


def multiple_choice_prompt(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The question, a line per choice that ends in its letter, and the instruction.

    There is no space before the letter, so that it is the same token as the answer.
    """
    lines = [f"- {choice}={letter}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join(
        [
            f"Multiple Choice question: {question}",
            *lines,
            "",
            "Respond only with the letter of the correct answer.",
        ]
    )


def final_number(text: str) -> str | None:
    """The number after the first "#### " of a text, without commas and a final dot; None if none."""
    match = _FINAL_NUMBER.search(text)
    return (match[1].replace(",", "").rstrip(".") or None) if match else None


def same_final_number(conversation: Conversation, completion: str) -> bool:
    """Whether the final number of a completion equals that of the conversation's answer."""
    right = final_number(conversation["messages"][-1]["content"][-1]["text"])
    return right is not None and final_number(completion) == right


# ---- Hub data sets ------------------------------------------------------------------------------

MANIFEST = "manifest.json"  # lists the parquet files that make a split whole
# The files of one split by name, each with a function that opens it.
_Files = Mapping[str, Callable[[], IO[bytes]]]


# The columns to read; of several names in a tuple, the first that the data set has.
Columns = Sequence[str | tuple[str, ...]]


class Rows:
    """The rows of a table as dicts, in the order of nanochat's seeded shuffle."""

    def __init__(self, table: pa.Table):
        self._table = table
        self._order = np.random.default_rng(_SHUFFLE_SEED).permutation(table.num_rows)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self._order[index])
        return {name: self._table[name][row].as_py() for name in self._table.column_names}


class HubTask(Task):
    """A task whose rows are a split of a hub data set."""

    repository: str  # OWNER/NAME
    subset: str
    splits: tuple[str, ...]
    columns: Columns

    def __init__(self, config: Any, split: str):
        check_split(split, self.splits, f"{self.repository} {self.subset}")
        self.rows = load_rows(config, self.repository, self.subset, split, self.columns)

    def __len__(self) -> int:
        return len(self.rows)


def check_split(split: str, splits: Sequence[str], what: str) -> None:
    """Raise ValueError if a data set does not have the split."""
    if split not in splits:
        raise ValueError(
            f"{what} has no split {split!r}; write TASK/SPLIT with one of {', '.join(splits)}"
        )


def load_rows(config: Any, repository: str, subset: str, split: str, columns: Columns) -> Rows:
    """Load columns of one split of a hub data set, from config.chat_data or from the hub.

    chat_data is a folder or a tar archive with parquet files in OWNER--NAME/SUBSET/SPLIT, or in
    task_data/OWNER--NAME/SUBSET/SPLIT as in nanochat. Raises ValueError if files or columns are
    missing.
    """
    location = f"{repository.replace('/', '--')}/{subset}/{split}"
    if config.chat_data is None:
        from MaxNano.data import hub  # imported only if the network is needed

        folder = hub.fetch_split(config, repository, subset, split)
        return Rows(_read_table(_folder_files(epath.Path(folder)), columns, str(folder)))
    path = epath.Path(config.chat_data).expanduser()
    where = f"chat_data={config.chat_data}"
    if not path.exists():
        raise ValueError(f"{where} does not exist; name a folder or archive with {location} in it")
    files = _archive_files(path, location) if path.is_file() else None
    if files is None:
        folders = (path / location, path / "task_data" / location)
        files = next((_folder_files(folder) for folder in folders if folder.exists()), {})
    if not files:
        raise ValueError(
            f"{where} does not have {location}; put the parquet files of {repository} there, or "
            "set chat_data=null to download them"
        )
    return Rows(_read_table(files, columns, f"{where}, {location}"))


def _folder_files(folder: epath.Path) -> _Files:
    return {path.name: lambda path=path: path.open("rb") for path in folder.iterdir()}


def _archive_files(path: epath.Path, location: str) -> _Files:
    """The files of a folder in the archive, in memory."""
    files = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:*") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if member.isfile() and f"/{folder}".endswith(f"/{location}"):
                    content = archive.extractfile(member).read()
                    files[name] = lambda content=content: io.BytesIO(content)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"chat_data={path} is neither a folder nor a tar archive: {error}"
        ) from None
    return files


def _read_table(files: _Files, columns: Columns, where: str) -> pa.Table:
    names = sorted(name for name in files if name.endswith(".parquet"))
    try:
        if MANIFEST in files:
            with files[MANIFEST]() as file:
                names = json.load(file)
        missing = [name for name in names if name not in files]
        if missing or not names:
            raise ValueError(f"{where}: {', '.join(missing) or 'a parquet file'} is missing")
        tables = []
        for name in names:
            with files[name]() as file:
                parquet = pq.ParquetFile(file)
                present = _present_columns(columns, parquet.schema_arrow.names, where)
                tables.append(parquet.read(columns=present))
        return pa.concat_tables(tables)
    except (pa.ArrowException, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: cannot be read ({str(error).splitlines()[0]})") from None


def _present_columns(columns: Columns, names: Sequence[str], where: str) -> list[str]:
    """The name of each column in a file with columns `names`. Raises ValueError."""
    choices = [(column,) if isinstance(column, str) else column for column in columns]
    present = [next((name for name in choice if name in names), None) for choice in choices]
    if None in present:
        absent = (" or ".join(c) for c, name in zip(choices, present, strict=True) if name is None)
        raise ValueError(f"{where}: has no column {', '.join(absent)}")
    return present
