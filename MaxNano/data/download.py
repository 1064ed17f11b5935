"""Downloads of data sets, the CORE bundle and the chat tasks' data: whole and verified, or not there.

    python MaxNano/data/download.py configs/base.yml dataset_type=hf \\
        dataset_name=karpathy/climbmix-400b-shuffle download_shards=8
    python MaxNano/data/download.py configs/base.yml download=[core,chat]

A file grows under a hidden name and gets its own when its length and hash are those that the hub
states; whatever a server does, nothing else ever stands under that name. The manifest beside the
files lists all that are to come, so that training can begin with the first. Stopped in any way, the
same command goes on in the middle of each file.
Source: nanochat/dataset.py, tasks/common.py and scripts/base_eval.py@92d63d4.
"""

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # not MaxNano/data/, which hides modules

import collections
import contextlib
import email.utils
import hashlib
import http.client
import json
import os
import queue
import random
import re
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import filelock
import requests
import urllib3
from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.data import sources

CHUNK_BYTES = 1 << 20
PROGRESS_BYTES = 1 << 20  # a failed attempt that brought as much does not count against the file
SLOWEST_BYTES_PER_SECOND = 1024  # below this a connection is as good as dead
FIRST_ATTEMPTS = (
    3  # at most for what is asked first, so that a machine without network is told soon
)
MAX_REDIRECTS = 10
MAX_WAIT_SECONDS = 60.0  # between attempts, unless the server asks for more ...
MAX_RETRY_AFTER_SECONDS = 600.0  # ... of which this much is granted
REPORT_SECONDS = 5.0  # between progress lines
RATE_REPORTS = 6  # progress lines over which the rate is taken

CORE_FOLDER, CORE_BUNDLE = "core", "eval_bundle.zip"
CHAT_FOLDER = "task_data"
# nanochat's chat tasks: repository, subset, splits.
CHAT_DATA = (
    ("allenai/ai2_arc", "ARC-Easy", ("train", "test")),
    ("allenai/ai2_arc", "ARC-Challenge", ("train", "test")),
    ("cais/mmlu", "all", ("auxiliary_train", "test")),
    ("openai/gsm8k", "main", ("train", "test")),
    ("openai/openai_humaneval", "openai_humaneval", ("test",)),
    ("HuggingFaceTB/smol-smoltalk", "default", ("train", "test")),
)
PARQUET_EXPORT = "refs/convert/parquet"  # the revision to which the hub exports every data set


class Remote(NamedTuple):
    """A file to fetch, and what is stated of it beforehand."""

    name: str  # path below the folder in which it is kept
    url: str
    size: int | None = None  # bytes
    sha256: str | None = None
    git_sha1: str | None = None  # of small files the hub states git's hash instead


class Limits(NamedTuple):
    """How hard to try."""

    connections: int = 4
    timeout_seconds: float = 30.0
    attempts: int = 8
    backoff_seconds: float = 1.0  # after a first failure; doubled after each further one

    @classmethod
    def of(cls, config: Any) -> "Limits":
        return cls(
            config.download_connections, config.download_timeout_seconds, config.download_attempts
        )


class _Failure(Exception):
    """An attempt failed where another may not; `spoiled`: what has come so far is of no use."""

    def __init__(self, reason: str, spoiled: bool = False, wait_seconds: float | None = None):
        super().__init__(" ".join(reason.split()))
        self.spoiled = spoiled
        self.wait_seconds = wait_seconds


class _Unreachable(ValueError):
    """The network does not give what is asked for; the message is one line for the user."""


class _Stopped(Exception):
    """This thread is to end."""


# ---- One request -------------------------------------------------------------------------------


_NETWORK_ERRORS = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
)


def _open_session() -> requests.Session:
    session = requests.Session()  # proxies and certificates as the environment says
    session.max_redirects = MAX_REDIRECTS
    session.headers["User-Agent"] = "MaxNano"
    session.headers["Accept-Encoding"] = "identity"  # lengths and ranges are those of the file
    return session


@contextlib.contextmanager
def _request(
    session: requests.Session, url: str, timeout_seconds: float, headers: dict[str, str]
) -> Iterator[requests.Response]:
    """An answer of status 200 or 206, its body still to be read.

    Raises _Failure for what may pass, _Unreachable for what will not.
    """
    token = os.environ.get("HF_TOKEN")
    if token and url.startswith("https://huggingface.co/"):  # never to a mirror
        headers = headers | {"Authorization": f"Bearer {token}"}
    try:
        response = session.get(url, headers=headers, stream=True, timeout=timeout_seconds)
    except requests.TooManyRedirects:
        raise _Failure("redirects in a circle") from None
    except (*_NETWORK_ERRORS, ValueError) as error:  # ValueError: a redirect to no address
        raise _Failure(_reason_of(error)) from None
    with response:
        _check_status(response, url)
        yield response


def _reason_of(error: Exception) -> str:
    """What went wrong, in a few words: the innermost reason, which libraries wrap in layers."""
    while isinstance(inner := getattr(error, "reason", None) or (*error.args, None)[0], Exception):
        error = inner
    text = inner if isinstance(inner, str) else str(error) or type(error).__name__
    return re.sub(r"^[\w.]+\([^)]*\): ", "", text)[:200]  # Connection(host=..., port=...):


def _check_status(response: requests.Response, url: str) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status in (401, 403, 404, 410, 451) and not response.history:
        why = {401: "private or gated", 403: "private or gated"}.get(status, "not there")
        raise _Unreachable(f"{url} is {why}: the server answers {status} {response.reason}")
    # What a redirect led to may have expired; 416 follows from a wrong start.
    wait_seconds = _seconds_of(response.headers.get("Retry-After"))
    raise _Failure(f"the server answers {status} {response.reason}", status == 416, wait_seconds)


def _seconds_of(retry_after: str | None) -> float | None:
    """The wait that a Retry-After header asks for, in seconds or by a date."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS) if seconds == seconds else None


def _chunks(response: requests.Response, timeout_seconds: float) -> Iterator[bytes]:
    """The body as it comes. Raises _Failure where it breaks off or all but stops coming."""
    begin, received = time.monotonic(), 0
    while True:
        try:
            data = response.raw.read1(CHUNK_BYTES, decode_content=False)
        except _NETWORK_ERRORS as error:
            raise _Failure(_reason_of(error)) from None
        if not data:
            return
        yield data
        received += len(data)
        seconds = time.monotonic() - begin
        if seconds >= timeout_seconds:
            if received < seconds * SLOWEST_BYTES_PER_SECOND:
                raise _Failure(f"stalls: {received} bytes in {seconds:.0f} s")
            begin, received = time.monotonic(), 0


# ---- One file ----------------------------------------------------------------------------------


class _Download:
    """One file on its way into `folder`; its facts are the manifest's and are kept up to date."""

    def __init__(
        self,
        folder: Path,
        remote: Remote,
        facts: dict[str, Any],
        limits: Limits,
        stop: threading.Event,
        progress: "_Progress",
        say: Callable[[str], None],
    ):
        self._remote, self._facts, self._limits = remote, facts, limits
        self._stop, self._progress, self._say = stop, progress, say
        self._path = folder / remote.name
        self._part = part_of(self._path)

    def run(self, session: requests.Session) -> None:
        """Fetch the file, unless it is there. Raises ValueError with one line where that fails."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.is_file() and self._is_right(self._path):
            self._progress.add(self._path.stat().st_size)
        else:
            self._progress.add(_size_of(self._part))
            self._fetch(session)
            with self._part.open("rb") as file:
                os.fsync(file.fileno())
            self._part.replace(self._path)
        self._facts["done"] = True

    def _is_right(self, path: Path) -> bool:
        """Whether a file that was there before is the one that is stated."""
        try:
            self._verify(path)
        except _Failure:
            return False
        return self._remote.sha256 is not None or self._remote.git_sha1 is not None

    def _fetch(self, session: requests.Session) -> None:
        """Bring the part to its full length, right in every byte."""
        failures = spoiled = 0
        while True:
            before = _size_of(self._part)
            try:
                self._receive(session)
                self._verify(self._part)
                return
            except _Failure as failure:
                reason = failure
            if reason.spoiled:
                self._progress.add(-_size_of(self._part))
                self._part.unlink(missing_ok=True)
                spoiled += 1
            elif _size_of(self._part) - before >= PROGRESS_BYTES:
                failures = 0
            failures += 1
            if max(failures, spoiled) >= self._limits.attempts:
                raise _Unreachable(
                    f"{self._remote.url}: {reason}; given up after {self._limits.attempts} attempts"
                )
            wait = min(self._limits.backoff_seconds * 2 ** (failures - 1), MAX_WAIT_SECONDS)
            wait *= random.uniform(0.5, 1.0)  # not all connections at the same moment
            wait = max(wait, reason.wait_seconds or 0.0)
            self._say(f"{self._remote.name}: {reason}; trying again in {wait:.1f} s")
            if self._stop.wait(wait):
                raise _Stopped

    def _receive(self, session: requests.Session) -> None:
        """Bring the part to its full length in one request."""
        offset, size = _size_of(self._part), self._facts["size"]
        if size is not None and offset == size:
            return
        can_resume = self._facts["etag"] is not None or self._remote.sha256 or self._remote.git_sha1
        if offset and (not can_resume or (size is not None and offset > size)):
            self._progress.add(-offset)
            self._part.unlink()
            offset = 0
        headers = {}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if self._facts["etag"] is not None:
                headers["If-Range"] = self._facts["etag"]
        url, timeout = self._remote.url, self._limits.timeout_seconds
        with _request(session, url, timeout, headers) as response:
            start, total = _extent_of(response, offset)
            etag = response.headers.get("ETag")
            if start and None not in (etag, self._facts["etag"]) and etag != self._facts["etag"]:
                raise _Failure("the server goes on with another version of the file", True)
            known = size if start else self._remote.size
            if known is not None and total not in (None, known):
                raise _Failure(
                    f"the server states {total} bytes where {known} are right", start > 0
                )
            self._facts["size"] = total if known is None else known
            self._facts["etag"] = etag if etag and not etag.startswith("W/") else None
            if start != offset:  # all of it, because the server has another version or no ranges
                self._progress.add(-offset)
            self._write(response, start)
        offset, size = _size_of(self._part), self._facts["size"]
        if size is not None and offset < size:
            raise _Failure(f"the connection ended after {offset} of {size} bytes")
        self._facts["size"] = offset

    def _write(self, response: requests.Response, start: int) -> None:
        size = self._facts["size"]
        with self._part.open("r+b" if start else "wb", buffering=0) as file:
            file.seek(start)
            for data in _chunks(response, self._limits.timeout_seconds):
                if self._stop.is_set():
                    raise _Stopped
                if size is not None and file.tell() + len(data) > size:
                    raise _Failure(f"the server sends more than the {size} bytes stated", True)
                if file.tell() == 0:
                    _check_head(self._path.name, data)
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                self._progress.add(len(data), received=len(data))

    def _verify(self, path: Path) -> None:
        """Raises _Failure unless a file is what it is stated to be, as far as anything is stated."""
        size = path.stat().st_size
        if self._remote.size not in (None, size):
            raise _Failure(f"has {size} bytes where {self._remote.size} are right", True)
        sha256, git_sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                if self._stop.is_set():
                    raise _Stopped
                sha256.update(data)
                if self._remote.git_sha1:
                    git_sha1.update(data)
        for name, found in (("sha256", sha256.hexdigest()), ("git_sha1", git_sha1.hexdigest())):
            stated = getattr(self._remote, name)
            if stated not in (None, found):
                raise _Failure(f"came with the {name} {found} where {stated} is right", True)
        _check_form(path, self._path.name)
        self._facts["sha256"] = sha256.hexdigest()


def part_of(path: Path) -> Path:
    """The hidden file in which a download of `path` grows."""
    return path.with_name(f".{path.name}.part")


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _extent_of(response: requests.Response, offset: int) -> tuple[int, int | None]:
    """(first byte of the body, bytes of the whole file) as the headers of an answer have it.

    Raises _Failure for an answer that is not to the question.
    """
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise _Failure(f"the server sends {response.headers['Content-Encoding']}, not the file")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise _Failure("the server sends an HTML page, not the file")
    length = response.headers.get("Content-Length", "")
    length = int(length) if re.fullmatch(r"\d{1,18}", length, re.ASCII) else None
    if response.status_code == 200:
        return 0, length
    stated = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", stated, re.ASCII)
    first, last, total = map(int, match.groups()) if match else (-1, -1, -1)
    if first != offset or last != total - 1 or length not in (None, total - first):
        raise _Failure(f"asked for bytes from {offset}, the server sends {stated!r}", True)
    return offset, total


def _check_head(name: str, head: bytes) -> None:
    """Raises _Failure as soon as the first bytes of a file show that it is another one."""
    magic = {".parquet": b"PAR1", ".zip": b"PK"}.get(Path(name).suffix, b"")
    if head[: len(magic)] != magic[: len(head)]:
        raise _Failure(f"begins with {head[:16]!r}, not as a {Path(name).suffix} file", True)


def _check_form(path: Path, name: str) -> None:
    """Raises _Failure where a file is not of the kind that its name says."""
    with path.open("rb") as file:
        _check_head(name, file.read(4))
        if name.endswith(".parquet"):
            file.seek(-min(4, path.stat().st_size), os.SEEK_END)
            if path.stat().st_size < 12 or file.read() != b"PAR1":
                raise _Failure("does not end as a .parquet file", True)
    if name.endswith(".zip"):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            damaged = str(error)
        if damaged:
            raise _Failure(f"is a damaged .zip file ({damaged})", True)


# ---- Many files --------------------------------------------------------------------------------


class Manifest:
    """The files of a folder and what is known of each, in a JSON file beside them.

    {"source", "selection", "files": {name: {"size", "sha256", "etag", "done"}}}; what is null is
    not known. The selection says which of the source's files were asked for.
    """

    def __init__(self, folder: Path, source: str):
        self._path = folder / sources.MANIFEST
        self._text = ""
        self.source, self.selection = source, ""
        self.files: dict[str, dict[str, Any]] = {}
        if not self._path.exists():
            return
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            self.selection = saved["selection"]
            for name, facts in saved["files"].items():
                self.files[name] = {key: facts[key] for key in ("size", "sha256", "etag", "done")}
        except (ValueError, LookupError, TypeError, AttributeError):
            saved = {"source": None}
        if saved["source"] != source:
            raise ValueError(
                f"{folder} holds something else: its {sources.MANIFEST} is not of {source}; give "
                "another download_path, or move that folder away"
            )

    def list(self, remotes: Sequence[Remote]) -> None:
        """Take up what the hub states now, and forget what was only planned.

        Raises ValueError where a file that is here has changed there.
        """
        files = {name: facts for name, facts in self.files.items() if facts["done"]}
        for remote in remotes:
            facts = self.files.get(remote.name)
            known = facts is not None and remote.sha256 in (None, facts["sha256"])
            if facts is not None and facts["done"] and not known:
                raise ValueError(
                    f"{self._path.parent / remote.name} has changed on the hub since it was "
                    "downloaded; move the folder away to take the new version"
                )
            if facts is not None and not known:  # begun in another version
                part_of(self._path.parent / remote.name).unlink(missing_ok=True)
            if not known:
                facts = {"sha256": remote.sha256, "etag": None, "done": False}
            files[remote.name] = {**facts, "size": facts.get("size", remote.size)}
        self.files = dict(sorted(files.items()))

    def save(self) -> None:
        """Write what has changed since the last time, at once or not at all."""
        content = {"source": self.source, "selection": self.selection, "files": self.files}
        text = json.dumps(content, indent=1) + "\n"
        if text != self._text:
            temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self._path)
            self._text = text

    def touch(self) -> None:
        """A sign of life for those who wait for a file."""
        os.utime(self._path)


def fetch(
    folder: Path,
    source: str,
    find: Callable[[], Sequence[Remote]],
    limits: Limits,
    *,
    selection: str = "",
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> list[str]:
    """Bring the files that `find` lists into a folder, in this order, several at a time.

    find: asks the hub; not called where the same selection of the same source is there already.
    Returns the names of all files that the folder now holds of this source. One process at a time:
    another one waits. Raises ValueError with one line where a file cannot be had; those that are
    there stay, and another call goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, say):
        manifest = Manifest(folder, source)
        whole = all(_is_there(folder / name, facts) for name, facts in manifest.files.items())
        if manifest.files and whole and manifest.selection == selection:
            return list(manifest.files)
        remotes = find()
        manifest.list(remotes)
        manifest.selection = selection
        manifest.save()
        missing = []
        for remote in remotes:
            if _is_there(folder / remote.name, manifest.files[remote.name]):
                continue
            manifest.files[remote.name]["done"] = False
            missing.append(remote)
        _check_space(folder, missing)
        try:
            _fetch_all(folder, remotes, missing, manifest, limits, say)
        finally:
            manifest.save()
        return list(manifest.files)


def _is_there(path: Path, facts: dict[str, Any]) -> bool:
    return facts["done"] and path.is_file() and path.stat().st_size == facts["size"]


@contextlib.contextmanager
def _locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    lock = filelock.FileLock(folder / ".download.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"waiting for another download into {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_space(folder: Path, missing: Iterable[Remote]) -> None:
    need = sum((remote.size or 0) - _size_of(part_of(folder / remote.name)) for remote in missing)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(
            f"{folder} has room for {free / 1e9:.1f} GB and needs {need / 1e9:.1f} GB more; give "
            "another download_path or fewer download_shards"
        )


def _fetch_all(
    folder: Path,
    remotes: Sequence[Remote],
    missing: Sequence[Remote],
    manifest: Manifest,
    limits: Limits,
    say: Callable[[str], None],
) -> None:
    """Fetch what is missing in threads that end with the process, and report."""
    waiting = collections.deque(missing)
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()  # one element a thread
    stop = threading.Event()
    progress = _Progress(remotes, missing)

    def next_remote() -> Remote | None:
        try:
            return waiting.popleft()
        except IndexError:
            return None

    def work() -> None:
        session, problem = _open_session(), None
        try:
            while remote := next_remote():
                facts = manifest.files[remote.name]
                _Download(folder, remote, facts, limits, stop, progress, say).run(session)
                progress.finish()
        except _Stopped:
            pass
        except OSError as error:  # of the disk: those of the network are failures of an attempt
            problem = ValueError(f"{folder} cannot be written: {error}")
        except Exception as error:
            problem = error
        if problem:
            waiting.clear()  # the others end what they are at
        ended.put(problem)

    running = min(limits.connections, len(missing))
    for _ in range(running):
        threading.Thread(target=work, daemon=True).start()
    problems = []
    try:
        while running:
            try:
                problems.append(ended.get(timeout=REPORT_SECONDS))
                running -= 1
            except queue.Empty:
                manifest.save()
                if progress.moved():
                    manifest.touch()
                say(progress.line())
    finally:
        stop.set()
    for problem in filter(None, problems):
        raise problem
    say(f"{folder}: {progress.line()}")


class _Progress:
    """Files and bytes of a call of `fetch`, counted by several threads."""

    def __init__(self, remotes: Sequence[Remote], missing: Sequence[Remote]):
        self._lock = threading.Lock()
        self._files, self._all_files = len(remotes) - len(missing), len(remotes)
        self._total = sum(remote.size or 0 for remote in missing)
        self._bytes = self._received = self._seen = 0
        self._past = collections.deque([(time.monotonic(), 0)], RATE_REPORTS + 1)

    def add(self, count: int, received: int = 0) -> None:
        """Bytes that are there now, less those thrown away, and how many of them have just come."""
        with self._lock:
            self._bytes += count
            self._received += received

    def finish(self) -> None:
        with self._lock:
            self._files += 1

    def moved(self) -> bool:
        """Whether anything has come since the last call."""
        before, self._seen = self._seen, self._received
        return self._seen != before

    def line(self) -> str:
        """Where it stands, for people."""
        now = time.monotonic()
        then, before = self._past[0]
        self._past.append((now, self._received))
        rate = (self._received - before) / max(now - then, 1e-9)
        line = f"{self._files:,} of {self._all_files:,} files, {self._bytes / 1e6:,.1f}"
        if self._total:
            line += f" of {self._total / 1e6:,.1f}"
        line += f" MB, {rate / 1e6:,.1f} MB/s"
        if rate and self._total > self._bytes:
            seconds = (self._total - self._bytes) / rate
            line += f", {seconds // 60:,.0f} min {seconds % 60:.0f} s left"
        return line


# ---- The hub -----------------------------------------------------------------------------------


def list_hub(
    hub_url: str, repository: str, revision: str, folder: str, limits: Limits
) -> list[dict[str, Any]]:
    """The files below a folder of a data set repository, as the hub lists them: path, size, lfs...

    Raises ValueError with one line where the list cannot be had.
    """
    api = f"{hub_url.rstrip('/')}/api/datasets/{repository}/tree/{quote(revision, safe='')}"
    api += f"/{quote(folder)}" if folder else ""
    session, entries, seen = _open_session(), [], set()
    query: str | None = "recursive=true"
    while query:
        if query in seen:
            raise _Unreachable(f"{api}?{query}: the list of files goes round in a circle")
        seen.add(query)
        page, following = _request_json(session, f"{api}?{query}", limits)
        entries += page
        # Of the address only the question: a mirror may hand on the hub's own.
        query = urlsplit(following).query if following else None
    return [entry for entry in entries if entry["type"] == "file"]


def _request_json(
    session: requests.Session, url: str, limits: Limits
) -> tuple[list[dict[str, Any]], str | None]:
    """One page of a list of files, and the address of the next."""
    attempts = min(limits.attempts, FIRST_ATTEMPTS)
    for attempt in range(attempts):
        try:
            with _request(session, url, limits.timeout_seconds, {}) as response:
                following = response.links.get("next", {}).get("url")
                page = _parse_page(b"".join(_chunks(response, limits.timeout_seconds)))
            return page, following
        except _Failure as error:
            failure = error
        if attempt + 1 < attempts:
            time.sleep(max(limits.backoff_seconds * 2**attempt, failure.wait_seconds or 0.0))
    raise _Unreachable(f"{url}: {failure}")


def _parse_page(content: bytes) -> list[dict[str, Any]]:
    try:
        page = json.loads(content)
    except (ValueError, RecursionError):
        page = None
    if not isinstance(page, list) or not all(map(_is_entry, page)):
        raise _Failure("the answer is no list of files")
    return page


def _is_entry(entry: Any) -> bool:
    """Whether an element of a list of files has what is needed of it, and a path that stays inside."""
    if not isinstance(entry, dict) or entry.get("type") != "file":
        return isinstance(entry, dict) and isinstance(entry.get("type"), str)
    path, size, lfs = entry.get("path"), entry.get("size"), entry.get("lfs") or {}
    return (
        isinstance(path, str)
        and path.isprintable()
        and "\\" not in path
        and not any(part in ("", ".", "..") for part in path.split("/"))
        and len(path) < 200
        and isinstance(size, int)
        and size >= 0
        and isinstance(lfs, dict)
        and bool(re.fullmatch(r"[0-9a-f]{64}" if lfs else r"[0-9a-f]{40}", _oid_of(entry)))
    )


def _oid_of(entry: dict[str, Any]) -> str:
    """The sha256 of a large file, git's hash of a small one."""
    return str((entry.get("lfs") or entry).get("oid"))


def _remote_of(
    hub_url: str, repository: str, revision: str, entry: dict[str, Any], name: str
) -> Remote:
    """The file of a list's entry, to be kept as `name`."""
    url = f"{hub_url.rstrip('/')}/datasets/{repository}/resolve/{quote(revision, safe='')}"
    kind = "sha256" if entry.get("lfs") else "git_sha1"
    address = f"{url}/{quote(entry['path'])}"
    return Remote(name, address, entry["size"], **{kind: _oid_of(entry)})


# ---- What there is to fetch --------------------------------------------------------------------


def fetch_dataset(config: Any, **options: Any) -> Path:
    """A data set of the hub by its dataset_name: the first download_shards of its files and the last.

    Returns the folder that dataset_type=hf reads. Raises ValueError with one line.
    """
    name, folder = sources.hub_name(config), _local(sources.hub_folder(config))

    def find() -> list[Remote]:
        entries = list_hub(config.hub_url, name.repository, "main", "", Limits.of(config))
        remotes = {
            flat: _remote_of(config.hub_url, name.repository, "main", entry, flat)
            for entry in entries
            if name.includes(entry["path"])
            # Folders are for the hub only; a dot would hide the file.
            for flat in [entry["path"].replace("/", "--").lstrip(".")]
        }
        *training, validation = (remotes[flat] for flat in sorted(remotes)) if remotes else [None]
        if not training:
            raise ValueError(
                f"hf:{'/'.join(filter(None, name))} has {len(remotes)} parquet files on the hub; at "
                "least 2 are needed, the last is for validation"
            )
        # The one for validation first: training asks for it before its first step.
        return [validation, *training[: config.download_shards]]

    instead = f"put its parquet files into {folder}, or train on those of dataset_path=FOLDER"
    with _offline_help(f"the data set {name.repository}", instead):
        fetch(
            folder,
            f"hf:{'/'.join(filter(None, name))}",
            find,
            Limits.of(config),
            selection=f"download_shards={config.download_shards}",
            **options,
        )
    return folder


def fetch_core(config: Any, **options: Any) -> Path:
    """The CORE bundle, as the archive that core_bundle can name. Raises ValueError with one line."""
    folder = _local(config.download_path) / CORE_FOLDER
    remote, limits = Remote(CORE_BUNDLE, config.core_bundle_url), Limits.of(config)
    limits = limits._replace(attempts=min(limits.attempts, FIRST_ATTEMPTS))
    with _offline_help("the CORE bundle", "give core_bundle=FOLDER or ARCHIVE, a copy of it"):
        fetch(folder, remote.url, lambda: [remote], limits, **options)
    return folder / CORE_BUNDLE


def fetch_split(config: Any, repository: str, subset: str, split: str, **options: Any) -> Path:
    """The folder of one split of a chat task's data set: parquet files, and a list of their names.

    The files are the hub's parquet export. The layout is nanochat's, whose own folders serve too.
    Raises ValueError with one line.
    """
    place = Path(repository.replace("/", "--")) / subset
    folder = _local(config.download_path) / CHAT_FOLDER / place

    def find() -> list[Remote]:
        entries = list_hub(
            config.hub_url, repository, PARQUET_EXPORT, f"{subset}/{split}", Limits.of(config)
        )
        entries = [entry for entry in entries if entry["path"].endswith(".parquet")]
        if not entries:
            raise ValueError(f"{repository} has no parquet files for {subset}/{split} on the hub")
        entries.sort(key=lambda entry: entry["path"])
        return [
            _remote_of(
                config.hub_url, repository, PARQUET_EXPORT, entry, f"{split}/{number:05}.parquet"
            )
            for number, entry in enumerate(entries)
        ]

    if not _is_whole_split(folder / split):
        what = f"{repository} {subset}/{split}"
        with _offline_help(what, "give chat_data=FOLDER or ARCHIVE, a copy of the chat data"):
            source, limits = f"hf:{repository}/{subset}", Limits.of(config)
            names = fetch(folder, source, find, limits, selection=split, **options)
        own = [Path(name).name for name in names if name.startswith(f"{split}/")]
        _write_list(folder / split / sources.MANIFEST, own)
    return folder / split


def _write_list(path: Path, names: Sequence[str]) -> None:
    """nanochat's manifest of a split; written last, it says that the split is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(names), encoding="utf-8")
    temporary.replace(path)


def _is_whole_split(folder: Path) -> bool:
    try:
        names = json.loads((folder / sources.MANIFEST).read_text(encoding="utf-8"))
        return isinstance(names, list) and all((folder / name).is_file() for name in names)
    except (OSError, ValueError, TypeError):
        return False


def _local(path: str) -> Path:
    if "://" in path:
        raise ValueError(
            f"download_path={path}: downloads go to a local folder; copy them to the bucket from there"
        )
    return Path(path).expanduser()


@contextlib.contextmanager
def _offline_help(what: str, instead: str) -> Iterator[None]:
    """Add to what the network does not give what it was for, and what to do without network."""
    try:
        yield
    except _Unreachable as error:
        raise ValueError(f"{what} cannot be had ({error}); without network, {instead}") from None


# ---- Main --------------------------------------------------------------------------------------


def _datasets(config: Any) -> list[Any]:
    """The configs of all parts of the data set that come from the hub."""
    parts = [config]
    if config.dataset_type == "mixture":
        parts = [part for _, part in sources.mixture_parts(config)]
    parts = [part for part in parts if part.dataset_type == "hf"]
    if not parts:
        raise ValueError(
            f"dataset_type={config.dataset_type} has nothing to download; give dataset_type=hf and "
            "dataset_name=OWNER/NAME, such as karpathy/climbmix-400b-shuffle"
        )
    return parts


def main(config: FrozenConfigDict) -> int:
    # As Ctrl-C; what has come is on disk, and the threads end with the process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if "dataset" in config.download:
            for part in _datasets(config):
                print(f"{fetch_dataset(part)} is complete")
        if "core" in config.download:
            print(f"{fetch_core(config)} is complete")
        if "chat" in config.download:
            for repository, subset, splits in CHAT_DATA:
                for split in splits:
                    print(f"{fetch_split(config, repository, subset, split)} is complete")
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return os.EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
