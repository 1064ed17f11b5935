"""The questions of CORE and their prompts in tokens.

A task is a list of questions in one of three forms. A question becomes a `Prompt`: a shared prefix
of tokens and one or several branches, the continuations. A scorer gives the loss of each token of
the branches.

Sources: https://arxiv.org/abs/2406.11794 (CORE); nanochat/core_eval.py and
scripts/base_eval.py@92d63d4, with the same prompts and draws.
"""

import csv
import hashlib
import io
import json
import lzma
import random
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import yaml
from etils import epath

from MaxNano import console
from MaxNano.inference.prompts import Prompt
from MaxNano.tokenization.tokenizer import Tokenizer

SHUFFLE_SEED = 1337  # for a task's questions, before max_per_task applies
SHOTS_SEED = 1234  # for the examples of a question, plus its index
QUESTIONS_AT_ONCE = 256  # tokenized together

Question = Mapping[str, Any]


# ---- The bundle ---------------------------------------------------------------------------------


class CoreTask(NamedTuple):
    """One task of the bundle, and its file of JSON lines."""

    label: str
    kind: str  # one of FIELDS
    shots: int
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing
    content: bytes

    def questions(self, limit: int = 0) -> list[Question]:
        """The shuffled questions, at most `limit` if that is not 0.

        Raises ValueError with the number of a line that is no question of this kind.
        """
        lines = list(enumerate(self.content.decode("utf-8", "replace").rstrip("\n").split("\n"), 1))
        random.Random(SHUFFLE_SEED).shuffle(lines)
        return [
            self._question(number, line) for number, line in (lines[:limit] if limit else lines)
        ]

    def fingerprint(self) -> str:
        """sha256 in hex of everything that the prompts and the score depend on."""
        digest = hashlib.sha256(repr(self._replace(content=b"")).encode())
        digest.update(self.content)
        return digest.hexdigest()

    def _question(self, number: int, line: str) -> Question:
        problem = "is no JSON"
        try:
            question = json.loads(line)
            problem = FIELDS[self.kind](question)
        except ValueError:
            pass
        except (KeyError, TypeError) as error:
            problem = f"has no {error}" if isinstance(error, KeyError) else "is no question"
        if problem:
            raise ValueError(
                f"line {number} of the CORE task {self.label} {problem}; download the bundle again"
            )
        return question


def _problem_of_choice(question: Question, options: str, *texts: str) -> str | None:
    if not question[options] or not isinstance(question[options], list):
        return f"has no list of {options}"
    if question["gold"] not in range(len(question[options])):
        return f"has gold {question['gold']!r}, which is none of its {options}"
    return _problem_of_texts(*question[options], *(question[name] for name in texts))


def _problem_of_texts(*texts: Any) -> str | None:
    return None if all(isinstance(text, str) for text in texts) else "has a value that is no text"


# Kind of task -> a function that says what is wrong with a question of that kind, None if nothing.
FIELDS: dict[str, Callable[[Question], str | None]] = {
    "multiple_choice": lambda question: _problem_of_choice(question, "choices", "query"),
    "schema": lambda question: _problem_of_choice(question, "context_options", "continuation"),
    "language_modeling": lambda question: _problem_of_texts(
        question["context"], question["continuation"]
    ),
}


def load_bundle(path: epath.PathLike) -> list[CoreTask]:
    """The tasks of a bundle: a folder with core.yaml, eval_meta_data.csv and eval_data/, or an
    archive of it.

    Raises ValueError if a part is missing or damaged.
    """
    path = epath.Path(path).expanduser()
    read = _open_folder(path) if path.is_dir() else _open_archive(path)
    try:
        listed = yaml.safe_load(read("core.yaml"))["icl_tasks"]
        table = csv.DictReader(io.StringIO(read("eval_meta_data.csv").decode()))
        baselines = {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in table}
        tasks = [
            CoreTask(
                label=entry["label"],
                kind=entry["icl_task_type"],
                shots=entry["num_fewshot"][0],
                delimiter=entry.get("continuation_delimiter", " "),
                baseline=baselines[entry["label"]],
                content=read(f"eval_data/{entry['dataset_uri']}"),
            )
            for entry in listed
        ]
    except FileNotFoundError as error:
        raise ValueError(f"core_bundle={path} has no {error}") from None
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"core.yaml and eval_meta_data.csv of core_bundle={path} are damaged: {console.one_line(error)}"
        ) from None
    for task in tasks:
        if task.kind not in FIELDS:
            raise ValueError(
                f"the CORE task {task.label} is of the unknown kind {task.kind}: known are {', '.join(FIELDS)}"
            )
    return tasks


def _open_folder(folder: epath.Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        if not (folder / name).exists():
            raise FileNotFoundError(name)
        return (folder / name).read_bytes()

    return read


def _open_archive(path: epath.Path) -> Callable[[str], bytes]:
    if not path.exists():
        raise ValueError(
            f"core_bundle={path} does not exist: download it with data/download.py and download=[core], or give "
            "the path of a folder or archive"
        )
    try:
        files = dict(_files_of_archive(path.read_bytes()))
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError):
        raise ValueError(
            f"core_bundle={path} is no .zip or .tar.* archive, or is damaged; download it again"
        ) from None
    # The bundle may be in a folder of any name.
    tops = [PurePosixPath(name).parent for name in files if PurePosixPath(name).name == "core.yaml"]

    def read(name: str) -> bytes:
        full = str(tops[0] / name) if tops else name
        if full not in files:
            raise FileNotFoundError(name)
        return files[full]

    return read


def _files_of_archive(content: bytes) -> Iterator[tuple[str, bytes]]:
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield str(PurePosixPath(name)), archive.read(name)
    else:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                if member.isfile():
                    yield str(PurePosixPath(member.name)), archive.extractfile(member).read()


# ---- Prompts ------------------------------------------------------------------------------------


def draw_shots(index: int, count: int, shots: int) -> list[int]:
    """Indices of the examples shown before question `index` of `count`; all others if there are too
    few.
    """
    drawn = random.Random(SHOTS_SEED + index).sample(range(count - 1), min(shots, count - 1))
    return [i + (i >= index) for i in drawn]


def render(task: CoreTask, questions: Sequence[Question], index: int) -> list[str]:
    """The texts of a question after its examples: one per answer; if there is only one, without and
    with it.
    """
    question, delimiter = questions[index], task.delimiter
    shots = [questions[i] for i in draw_shots(index, len(questions), task.shots)]
    if task.kind == "multiple_choice":
        before = "".join(f"{s['query']}{delimiter}{s['choices'][s['gold']]}\n\n" for s in shots)
        return [f"{before}{question['query']}{delimiter}{choice}" for choice in question["choices"]]
    if task.kind == "schema":
        before = "".join(
            f"{s['context_options'][s['gold']]}{delimiter}{s['continuation']}\n\n" for s in shots
        )
        return [
            f"{before}{option}{delimiter}{question['continuation']}"
            for option in question["context_options"]
        ]
    before = "".join(f"{s['context'].strip()}{delimiter}{s['continuation']}\n\n" for s in shots)
    asked = f"{before}{question['context'].strip()}{delimiter}"
    # Spaces before the answer belong to its first token.
    return [asked.strip(), asked + question["continuation"]]


def build_prompts(
    task: CoreTask,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    max_length: int = 0,
    limit: int | None = None,
) -> list[Prompt]:
    """The prompts of the first `limit` questions, or of all, with examples from all of them.

    Texts longer than max_length tokens lose their beginning, if that is not 0.
    """
    prompts = []
    indices = range(len(questions))[:limit]
    for start in indices[::QUESTIONS_AT_ONCE]:
        texts = [render(task, questions, i) for i in indices[start : start + QUESTIONS_AT_ONCE]]
        rows = iter(tokenizer.encode_batch([text for group in texts for text in group], bos=True))
        for group in texts:
            prompts.append(_prompt(task, [next(rows) for _ in group], max_length))
    return prompts


def _prompt(task: CoreTask, rows: list[np.ndarray], max_length: int) -> Prompt:
    """The prompt of the token rows of render(). Scored is what the rows do not share, or in a
    schema do share.
    """
    if task.kind == "schema":
        same = common_length([row[::-1] for row in rows])
        starts = [max(1, len(row) - same) for row in rows]
    else:
        same = common_length(rows)
        rows = rows if task.kind == "multiple_choice" else rows[1:]
        starts = [same] * len(rows)
    if max_length:
        starts = [
            max(1, start - max(0, len(row) - max_length))
            for start, row in zip(starts, rows, strict=True)
        ]
        rows = [row[-max_length:] for row in rows]
    cut = max(0, min(common_length(rows), *starts) - 1)
    unique: dict[tuple[int, bytes], int] = {}
    answers = [
        unique.setdefault((start, row.tobytes()), len(unique))
        for start, row in zip(starts, rows, strict=True)
    ]
    kept = [answers.index(branch) for branch in range(len(unique))]
    return Prompt(
        prefix=rows[0][:cut],
        branches=tuple(rows[i][cut:] for i in kept),
        starts=tuple(starts[i] - cut for i in kept),
        answers=tuple(answers),
    )


def common_length(rows: Sequence[np.ndarray]) -> int:
    """Number of leading tokens that all rows have in common."""
    length = min(map(len, rows))
    differ = np.zeros(length, bool)
    for row in rows[1:]:
        differ |= row[:length] != rows[0][:length]
    return int(differ.argmax()) if differ.any() else length


def center(accuracy: float, baseline: float) -> float:
    """Accuracy rescaled so that guessing is 0 and a perfect score 1; negative if guessing is
    better.
    """
    return (accuracy - baseline) / (1 - baseline)


def core_score(centered: Mapping[str, float]) -> float:
    """The CORE score: the mean of the tasks' centered accuracies, given by label."""
    return sum(centered.values()) / len(centered)
