"""Fingerprints of data sets: whether a split still has the contents that it had.

A file counts with its name, its size and its bytes: all of them up to WHOLE_BYTES, evenly spaced
blocks of a larger file. A file that a download lists counts with the SHA-256 in that list, so that
it is known before it arrives. Times and folders do not count: data may be moved or copied. What
this does not see: a change in place that keeps a file's size and falls between the blocks; in a
bucket, one in a file that is not sampled; in a chat task of many conversations, one between the
sampled conversations.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
from etils import epath

from MaxNano import console, tasks
from MaxNano.data.sources import SOURCES, MixtureSource, TfdsSource, mixture_parts, open_source

WHOLE_BYTES = 1 << 20  # files up to this size are read whole
BLOCK_BYTES = 1 << 12
LOCAL_BLOCKS, REMOTE_BLOCKS = 16, 2  # of a larger file; each is a request to a bucket
REMOTE_FILES = 64  # files of a bucket whose blocks are read; the others count with their size
SAMPLED_CONVERSATIONS = 256  # of a task
THREADS = 16
DIGITS = 16  # hexadecimal digits of a fingerprint

# The keys that, with the files, decide the rows of a split.
ROW_KEYS = (
    "dataset_type dataset_splits text_column dataset_mixture seed global_batch_tokens data_readers"
    " tokenize_batch_documents packing_buffer_documents long_documents skip_corrupt_data"
    " chat_train_mixture chat_validation_mixture chat_mixture_unit"
).split()

Contents = dict[str, str]  # name of a file or a task -> its fingerprint


def contents_of_run(config: Any) -> dict[str, Contents]:
    """The contents of the splits that a run trains on and, unless eval_interval is 0, validates
    with. Raises ValueError if data are missing.
    """
    splits = ("train", "validation") if config.eval_interval else ("train",)
    if config.dataset_type == "rollouts":
        names = {"train": config.rl_task, "validation": config.rl_eval_task}
        return {split: _contents_of_tasks(config, [names[split]]) for split in splits}
    return {split: contents_of_split(config, split) for split in splits}


def contents_of_split(config: Any, split: str) -> Contents:
    """The contents of split "train" or "validation", in the order in which they are read.

    {} for a dataset_type that is not known here: its changes are not noticed. Raises ValueError if data are missing.
    """
    if config.dataset_type == "chat":
        mixture = config.chat_train_mixture if split == "train" else config.chat_validation_mixture
        return _contents_of_tasks(config, [row[0] for row in mixture if row])
    if config.dataset_type not in SOURCES:
        return {}
    return contents_of_source(config, open_source(config, split))


def contents_of_source(config: Any, source: Any) -> Contents:
    """The contents of an opened source of text."""
    if isinstance(source, MixtureSource):
        return {
            f"part {number}: {name}": digest
            for number, (part, (_, values)) in enumerate(
                zip(source.parts, mixture_parts(config), strict=True), start=1
            )
            for name, digest in contents_of_source(values, part).items()
        }
    if isinstance(source, TfdsSource):
        return _contents_of_tfds(config)
    if not hasattr(
        source, "filesystem"
    ):  # without files, such as synthetic: follows from config keys
        return dict.fromkeys(source.files, "")
    listed = source.listed()
    known = {
        name: _short(f"{listed[name]['size']} {listed[name]['sha256']}")
        for name in source.files
        if listed.get(name, {}).get("sha256") and "done" in listed[name]
    }
    paths = {
        name: path
        for number, name in enumerate(source.files)
        if name not in known and isinstance(path := source.path_of(number), str)
    }
    digests = known | _digests(source.filesystem, paths)
    return {name: digests.get(name, "") for name in source.files}


def summary(contents: Any) -> str:
    """One fingerprint of contents of any depth."""
    return _short(json.dumps(contents, sort_keys=True))


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """How contents differ, such as "b.parquet has changed"; None if they do not."""
    for name in (*before, *now):
        if name not in now:
            return f"{name} is missing"
        if name not in before:
            return f"{name} is new"
        if before[name] != now[name]:
            return f"{name} has changed"
    return None


def run_difference(
    before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> str | None:
    """How the contents of splits that both have differ, as `difference` words it."""
    for split, name in (("train", "training"), ("validation", "validation")):
        if split not in before or split not in now:
            continue
        problem = difference(before[split], now[split])
        if problem is not None:
            return f"in the {name} data {problem}"
    return None


def _contents_of_tasks(config: Any, names: Sequence[str]) -> Contents:
    return {name: _digest_of_task(config, name) for name in names}


def _digest_of_task(config: Any, name: str) -> str:
    kind, _, argument = name.partition(":")
    if kind == "json":
        path = epath.Path(argument).expanduser()
        try:
            return _short(path.read_bytes())
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror or error}") from None
    task = tasks.open_task(config, name)
    step = max(1, len(task) // SAMPLED_CONVERSATIONS)
    sample = [task.conversation(index) for index in range(0, len(task), step)]
    return _short(json.dumps([len(task), sample], sort_keys=True, default=str))


def _contents_of_tfds(config: Any) -> Contents:
    folder = Path(os.path.expanduser(config.dataset_path))
    files = sorted(path for path in folder.glob(f"{config.dataset_name.split(':')[0]}/**/*"))
    paths = {str(path.relative_to(folder)): str(path) for path in files if path.is_file()}
    return _digests(pafs.LocalFileSystem(), paths)


def _digests(filesystem: pafs.FileSystem, paths: Mapping[str, str]) -> Contents:
    """The fingerprint of each file by name. Raises ValueError if one cannot be read."""
    if not paths:
        return {}
    is_local = isinstance(filesystem, pafs.LocalFileSystem)
    blocks = LOCAL_BLOCKS if is_local else REMOTE_BLOCKS
    names = list(paths)
    step = 1 if is_local else -(-len(names) // REMOTE_FILES)
    sampled = {*names[::step], names[-1]}

    def digest(name: str) -> str:
        try:
            if name not in sampled:
                return _short(str(filesystem.get_file_info(paths[name]).size))
            with filesystem.open_input_file(paths[name]) as file:
                return _short(_sample(file, blocks))
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = console.one_line(error, 300)
            raise ValueError(f"{paths[name]}: cannot be read ({reason})") from None

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _sample(file: pa.NativeFile, blocks: int) -> bytes:
    """The size of a file, and all of its bytes or the first, the last and evenly spaced blocks."""
    size = file.size()
    if size <= WHOLE_BYTES:
        parts = [file.read()]
    else:
        last = size - BLOCK_BYTES
        offsets = [round(last * number / (blocks - 1)) for number in range(blocks)]
        parts = [file.read_at(BLOCK_BYTES, offset) for offset in offsets]
    return b"".join([f"{size} ".encode(), *parts])


def _short(content: str | bytes) -> str:
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:DIGITS]
