"""CORE: 22 tasks answered by likelihood, centered on guessing and averaged; the number that base models compare.

A task is a list of questions in one of three forms. A question becomes a `Prompt`: a prefix in tokens and the
continuations that branch off from it. A scorer computes how likely each token of the continuations is:
`inference.prefix_scoring.PrefixScorer` for models of this package, `logits_scorer` for any function from tokens to
logits.

Sources: https://arxiv.org/abs/2406.11794 (CORE); nanochat/core_eval.py and scripts/base_eval.py@92d63d4, whose prompts,
draws and choices are kept exactly, so that scores can be compared.
"""

import csv
import hashlib
import io
import json
import lzma
import math
import random
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import yaml
from etils import epath

from MaxNano import console
from MaxNano.inference.prompts import Prompt, Scorer
from MaxNano.tokenization.tokenizer import Tokenizer

SHUFFLE_SEED = 1337  # of a task's questions, before a cut
SHOTS_SEED = 1234  # of a question's examples; its index is added
QUESTIONS_AT_ONCE = 256  # that are tokenized together

Question = Mapping[str, Any]


# ---- The bundle -----------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One task: what the bundle says of it, and its file, which has a JSON object a line."""

    label: str
    kind: str  # one of FIELDS
    shots: int
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing
    content: bytes

    def questions(self, limit: int = 0) -> list[Question]:
        """The questions in the order in which they are asked, at most `limit` if that is not 0.

        Raises ValueError naming the line that is no question of this kind.
        """
        lines = list(enumerate(self.content.decode("utf-8", "replace").rstrip("\n").split("\n"), 1))
        random.Random(SHUFFLE_SEED).shuffle(lines)
        return [
            self._question(number, line) for number, line in (lines[:limit] if limit else lines)
        ]

    def fingerprint(self) -> str:
        """sha256, in hex, of everything that decides the prompts and the score."""
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
            problem = f"lacks {error}" if isinstance(error, KeyError) else "is no question"
        if problem:
            raise ValueError(
                f"line {number} of the CORE task {self.label} {problem}; get the bundle again"
            )
        return question


def _problem_of_choice(question: Question, options: str, *texts: str) -> str | None:
    if not question[options] or not isinstance(question[options], list):
        return f"has no list of {options}"
    if question["gold"] not in range(len(question[options])):
        return f"has gold {question['gold']!r}, which is none of its {options}"
    return _problem_of_texts(*question[options], *(question[name] for name in texts))


def _problem_of_texts(*texts: Any) -> str | None:
    return (
        None if all(isinstance(text, str) for text in texts) else "holds something else than texts"
    )


# The kinds of tasks -> what is wrong with a question of that kind.
FIELDS: dict[str, Callable[[Question], str | None]] = {
    "multiple_choice": lambda question: _problem_of_choice(question, "choices", "query"),
    "schema": lambda question: _problem_of_choice(question, "context_options", "continuation"),
    "language_modeling": lambda question: _problem_of_texts(
        question["context"], question["continuation"]
    ),
}


def load_bundle(path: epath.PathLike) -> list[Task]:
    """The tasks of a bundle: a folder with core.yaml, eval_meta_data.csv and eval_data/, or an archive of it.

    Raises ValueError with one line where something is missing or damaged.
    """
    path = epath.Path(path).expanduser()
    read = _open_folder(path) if path.is_dir() else _open_archive(path)
    try:
        listed = yaml.safe_load(read("core.yaml"))["icl_tasks"]
        table = csv.DictReader(io.StringIO(read("eval_meta_data.csv").decode()))
        baselines = {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in table}
        tasks = [
            Task(
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
                f"the CORE task {task.label} is of kind {task.kind}: there are {', '.join(FIELDS)}"
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
            f"there is no core_bundle={path}: data/download.py brings it with download=[core]; or give the path of a "
            "folder or archive"
        )
    try:
        files = dict(_files_of_archive(path.read_bytes()))
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError):
        raise ValueError(
            f"core_bundle={path} is no .zip or .tar.* archive, or is damaged; get it again"
        ) from None
    # The bundle may lie in a folder of any name.
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


# ---- Prompts --------------------------------------------------------------------------------------------------------


def draw_shots(index: int, count: int, shots: int) -> list[int]:
    """Indices of the examples shown before question `index` of `count`, all others where there are too few."""
    drawn = random.Random(SHOTS_SEED + index).sample(range(count - 1), min(shots, count - 1))
    return [i + (i >= index) for i in drawn]


def render(task: Task, questions: Sequence[Question], index: int) -> list[str]:
    """The texts of a question, behind its examples: one an answer; without and with the answer if there is only one."""
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
    task: Task,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    max_length: int = 0,
    limit: int | None = None,
) -> list[Prompt]:
    """The prompts of the first `limit` questions, or of all, with examples from all of them.

    Texts longer than `max_length` tokens lose their beginning, if that is not 0.
    """
    prompts = []
    indices = range(len(questions))[:limit]
    for start in indices[::QUESTIONS_AT_ONCE]:
        texts = [render(task, questions, i) for i in indices[start : start + QUESTIONS_AT_ONCE]]
        rows = iter(tokenizer.encode_batch([text for group in texts for text in group], bos=True))
        for group in texts:
            prompts.append(_prompt(task, [next(rows) for _ in group], max_length))
    return prompts


def _prompt(task: Task, rows: list[np.ndarray], max_length: int) -> Prompt:
    """From the token rows of render(): what is scored is what the rows do not, or in a schema do, have in common."""
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


# ---- Scoring --------------------------------------------------------------------------------------------------------


def logits_scorer(forward: Callable[[np.ndarray], Any], bos_id: int) -> Scorer:
    """A scorer from `forward(tokens (B, L) int32) -> logits (B, L, V)`, of any model whose rows see only their past.

    One prompt at a time, each of its branches a row, padded on the right with `bos_id`.
    """

    def score(prompts, *, greedy):
        for index, prompt in enumerate(prompts):
            rows = [np.concatenate([prompt.prefix, branch]) for branch in prompt.branches]
            tokens = np.full((len(rows), max(map(len, rows))), bos_id, np.int32)
            for row, ids in zip(tokens, rows, strict=True):
                row[: len(ids)] = ids
            logits = np.asarray(forward(tokens), np.float32)
            scores = []
            for own, ids, start in zip(logits, rows, prompt.starts, strict=True):
                first = len(prompt.prefix) + start
                own, targets = own[first - 1 : len(ids) - 1], ids[first:]
                if greedy:
                    scores.append(own.argmax(-1) == targets)
                else:
                    highest = own.max(-1, keepdims=True)
                    total = np.log(np.exp(own - highest).sum(-1)) + highest[:, 0]
                    scores.append(total - own[np.arange(len(targets)), targets])
            yield index, scores

    return score


class Answer(NamedTuple):
    """What the model answers; `choice` and the mean `losses` of the answers are of questions that offer several."""

    correct: bool
    choice: int | None = None
    losses: tuple[float, ...] = ()


def decide(prompt: Prompt, scores: Sequence[np.ndarray], gold: int | None) -> Answer:
    """The answer with the least mean loss, the first of equals; without `gold`, whether every token is the likeliest.

    An answer whose tokens the others all begin with has no loss of its own: it is chosen if it comes first.
    """
    if gold is None:
        return Answer(bool(scores[0].all()))
    means = [float(np.mean(losses)) if len(losses) else math.nan for losses in scores]
    losses = [means[branch] for branch in prompt.answers]
    choice = losses.index(min(losses))
    return Answer(choice == gold, choice, tuple(losses))


# ---- Tasks ----------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """A task's outcome. `centered` is 0 for guessing and 1 for knowing all."""

    label: str
    shots: int
    examples: int
    accuracy: float
    centered: float
    seconds: float
    answers: list[Answer]


def answer(
    task: Task,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    score: Scorer,
    progress: Callable[[Prompt], None] = lambda prompt: None,
) -> list[Answer]:
    """The answers to prompts, in their order. `progress` is called with each prompt that is done."""
    answers: dict[int, Answer] = {}
    for index, scores in score(prompts, greedy=task.kind == "language_modeling"):
        answers[index] = decide(prompts[index], scores, questions[index].get("gold"))
        progress(prompts[index])
    return [answers[index] for index in range(len(prompts))]


def evaluate(
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    score: Scorer,
    *,
    max_per_task: int = 0,
    max_length: int = 0,
    progress: Callable[[Prompt], None] = lambda prompt: None,
) -> Iterator[Result]:
    """The result of each task as it is done; the next one is tokenized meanwhile.

    max_per_task: questions, 0 for all. max_length: see build_prompts.
    """

    def prepare(task):
        questions = task.questions(max_per_task)
        return questions, build_prompts(task, questions, tokenizer, max_length=max_length)

    pool = ThreadPoolExecutor(1)
    try:
        coming = [pool.submit(prepare, task) for task in tasks[:1]]
        for number, task in enumerate(tasks, 1):
            started = time.monotonic()
            questions, prompts = coming.pop().result()
            coming = [pool.submit(prepare, task) for task in tasks[number : number + 1]]
            answers = answer(task, questions, prompts, score, progress)
            accuracy = sum(given.correct for given in answers) / len(answers)
            yield Result(
                task.label,
                task.shots,
                len(answers),
                accuracy,
                center(accuracy, task.baseline),
                time.monotonic() - started,
                answers,
            )
    finally:
        pool.shutdown(cancel_futures=True)


def center(accuracy: float, baseline: float) -> float:
    """Accuracy as a share of the way from guessing to knowing all; negative where guessing is better."""
    return (accuracy - baseline) / (1 - baseline)


def summarize(centered: Mapping[str, float]) -> dict[str, float]:
    """{"core": the mean, and each task's centered accuracy under its label}."""
    return {"core": sum(centered.values()) / len(centered), **centered}
