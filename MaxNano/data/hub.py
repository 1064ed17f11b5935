"""Downloads of data sets, chat tasks and the CORE bundle: a file is complete and verified, or
missing.

huggingface_hub transfers the files: its cache, tokens (`hf auth login`, HF_TOKEN), HF_ENDPOINT,
HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT, xet, and resumption after a lost connection are the
library's. This module adds what training relies on:
- A file gets its name only after its length and hash match those that the hub lists.
- manifest.json lists the files of a data set before the first one arrives, so that training can
  start while later shards download (sources.py waits for them).
- The same command after an interruption skips complete files and downloads the others.
Source: nanochat/dataset.py, tasks/common.py and scripts/base_eval.py@92d63d4.
"""

import collections
import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import httpx2
import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.tqdm import tqdm

from MaxNano import console
from MaxNano.data import sources
from MaxNano.data.folder import split_files
from MaxNano.data.manifest import MANIFEST, Manifest
from MaxNano.storage import files as storage

ATTEMPTS = 5  # per file; the library retries lost connections within each
FIRST_WAIT_SECONDS = 1.0  # before the second attempt; doubles after each further one
REPORT_SECONDS = 5.0  # between progress lines
RATE_REPORTS = 6  # progress lines over which the throughput is averaged

STAGING = ".incoming"  # folder for files that are not verified yet
CORE_FOLDER, CORE_BUNDLE = "core", "eval_bundle.zip"
CHAT_FOLDER = "task_data"
PARQUET_EXPORT = "refs/convert/parquet"  # the revision to which the hub exports every data set

Say = Callable[[str], None]


def print_line(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


class DownloadError(ValueError):
    """A file could not be downloaded; the message is one line for the user."""


class _Stopped(Exception):
    """The program is ending: a transfer stops at its next chunk."""


# ---- The hub ------------------------------------------------------------------------------------


def _open_client() -> httpx2.Client:
    """The library's HTTP client, with a timeout for the requests that the library sends without."""

    def limit(request: httpx2.Request) -> None:
        timeouts = request.extensions.setdefault("timeout", {})
        for kind in ("connect", "read", "write", "pool"):
            if timeouts.get(kind) is None:
                timeouts[kind] = constants.HF_HUB_DOWNLOAD_TIMEOUT

    client = default_client_factory()
    client.event_hooks["request"].append(limit)
    return client


huggingface_hub.set_client_factory(_open_client)
logging.getLogger("huggingface_hub").propagate = False  # it prints its warnings itself


class HubRepository(NamedTuple):
    """One revision of a data set repository.

    A saved token is sent to huggingface.co and to HF_ENDPOINT only, never to another hub_url.
    """

    endpoint: str
    name: str  # OWNER/NAME
    revision: str = "main"

    @property
    def _token(self) -> bool | None:
        trusted = self.endpoint in (constants.ENDPOINT, "https://huggingface.co")
        return None if trusted else False

    def list_files(self, folder: str = "") -> list[RepoFile]:
        """The files below a folder, each with its size and hash. Raises DownloadError."""
        api = huggingface_hub.HfApi(endpoint=self.endpoint, token=self._token)
        try:
            entries = api.list_repo_tree(
                self.name,
                folder or None,
                recursive=True,
                revision=self.revision,
                repo_type="dataset",
            )
            return [entry for entry in entries if isinstance(entry, RepoFile)]
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, errors.HFValidationError) as error:
            raise DownloadError(self.explain(error) or _first_line(error)) from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise DownloadError(
                f"{self.endpoint} did not answer with a list of files: check hub_url and HF_ENDPOINT"
            ) from None

    def download(self, path: str, folder: Path, bar: type[tqdm], force: bool) -> Path:
        """Download one file to the same path below `folder`, or copy it from the hub's cache."""
        with _naming_cause():
            local = huggingface_hub.hf_hub_download(
                self.name,
                path,
                repo_type="dataset",
                revision=self.revision,
                local_dir=folder,
                endpoint=self.endpoint,
                token=self._token,
                force_download=force,
                tqdm_class=bar,
            )
        return Path(local)

    def explain(self, error: Exception) -> str | None:
        """The message for an error that another attempt cannot fix; None for other errors."""
        log_in = "log in with `hf auth login` or set HF_TOKEN"
        status = None
        if isinstance(error, errors.HfHubHTTPError):
            if not str(error.response.request.url).startswith(self.endpoint):
                return None  # a signed address of a file, which may have expired
            status = error.response.status_code
        if isinstance(error, errors.GatedRepoError):
            page = f"{self.endpoint}/datasets/{self.name}"
            return f"{self.name} is gated: accept its terms at {page}, then {log_in}"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{self.name} has no revision {self.revision}"
        if isinstance(error, errors.EntryNotFoundError) and status == 404:
            return f"{self.name} does not have {error.response.request.url.path}"
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
            return (
                f"{self.name} does not exist at {self.endpoint} or is private (status {status}): "
                f"check the name, or {log_in}"
            )
        return _explain_offline(error)


@contextlib.contextmanager
def _naming_cause() -> Iterator[None]:
    """Raise the network error itself, which the library hides under "no local file"."""
    try:
        yield
    except (errors.LocalEntryNotFoundError, ValueError) as error:
        raise error.__cause__ or error from None


def _explain_offline(error: Exception) -> str | None:
    return "HF_HUB_OFFLINE is set" if isinstance(error, errors.OfflineModeIsEnabled) else None


def _first_line(error: Exception) -> str:
    """The first line of an error's message, or the HTTP status that it stands for."""
    if isinstance(error, errors.HfHubHTTPError):
        return f"the server answered with status {error.response.status_code}"
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# ---- Verified transfers -------------------------------------------------------------------------


class _Progress:
    """Bytes and files of one download, counted by several threads."""

    def __init__(self, sizes: Mapping[str, int | None], complete_files: int):
        self._sizes = sizes
        self._bytes = dict.fromkeys(sizes, 0)  # each entry is written by one thread
        self._complete_files, self._all_files = complete_files, complete_files + len(sizes)
        self._seen_bytes = 0
        self._history = collections.deque([(time.monotonic(), 0)], RATE_REPORTS + 1)
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    def bar(self, name: str) -> type[tqdm]:
        """A progress bar class for one attempt at a file, as the library wants one."""
        progress, counts = self, self._bytes
        counts[name] = 0

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **{**kwargs, "disable": True})

            def update(self, n: float | None = 1) -> None:
                if progress.stopping.is_set():
                    raise _Stopped
                counts[name] += int(n or 0)

            def update_transfer(self, n: float | None = 1) -> None:
                """Bytes on the wire, which xet counts apart from those of the file."""

        return Bar

    def finish(self, name: str) -> None:
        """Count a file as complete."""
        self._bytes[name] = self._sizes[name] or self._bytes[name]
        with self._lock:
            self._complete_files += 1

    def moved(self) -> bool:
        """Whether bytes have arrived since the last call."""
        before, self._seen_bytes = self._seen_bytes, sum(self._bytes.values())
        return self._seen_bytes != before

    def line(self) -> str:
        """Files, bytes, throughput and time left."""
        now, received = time.monotonic(), sum(self._bytes.values())
        total = sum(size or 0 for size in self._sizes.values())
        then, before = self._history[0]
        self._history.append((now, received))
        rate = max(received - before, 0) / max(now - then, 1e-9)
        line = f"{self._complete_files:,} of {self._all_files:,} files, {received / 1e6:,.1f}"
        line += f" of {total / 1e6:,.1f} MB" if total else " MB"
        line += f", {rate / 1e6:,.1f} MB/s"
        if rate and total > received:
            seconds = (total - received) / rate
            line += f", {seconds // 60:,.0f} min {seconds % 60:.0f} s left"
        return line


def _retry(
    name: str,
    transfer: Callable[[bool], Path],
    problem_of: Callable[[Path], str | None],
    explain: Callable[[Exception], str | None],
    progress: _Progress,
    say: Say,
) -> Path:
    """The path of a transfer after which `problem_of` finds nothing wrong.

    transfer(force) downloads the file; force: not from a cache. Raises DownloadError after ATTEMPTS
    failures, or at once if `explain` has a message for the error.
    """
    force, wait_seconds = False, FIRST_WAIT_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            path = transfer(force)
            problem = problem_of(path)
            if problem is None:
                return path
            path.unlink()
            force = True
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise ValueError(f"cannot write {name}: {error}") from None
            if line := explain(error):
                raise DownloadError(line) from None
            problem = _first_line(error)
        if attempt < ATTEMPTS:
            say(f"{name}: {problem}; retrying in {wait_seconds:.0f} s")
            # Random, so that parallel transfers do not retry at the same moment.
            if progress.stopping.wait(wait_seconds * random.uniform(0.5, 1.0)):
                raise _Stopped
            wait_seconds *= 2
    raise DownloadError(f"{name}: {problem}; gave up after {ATTEMPTS} attempts")


def _hash_problem(path: Path, file: RepoFile) -> str | None:
    """How a local file differs from the size and hash that the hub lists; None if it does not."""
    size = path.stat().st_size
    if size != file.size:
        return f"received {size} bytes instead of {file.size}"
    # Small files outside LFS have git's hash instead.
    expected = file.lfs.sha256 if file.lfs else file.blob_id
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as stream:
        while data := stream.read(1 << 20):
            digest.update(data)
    if digest.hexdigest() != expected:
        return f"received a file with hash {digest.hexdigest()} instead of {expected}"
    return None


def _zip_problem(path: Path) -> str | None:
    """Why a file is not an intact zip archive; None if it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        return f"received no zip archive ({error})"
    return f"received a damaged zip archive ({damaged})" if damaged else None


def _publish(path: Path, final: Path) -> None:
    """Give a verified file its name, after its bytes are on the disk. Raises ValueError."""
    try:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        path.replace(final)
    except OSError as error:
        raise ValueError(f"cannot write {final}: {error}") from None


def _run_jobs(
    jobs: Sequence[Callable[[], None]],
    workers: int,
    progress: _Progress,
    say: Say,
    heartbeat: Callable[[], None] = lambda: None,
) -> None:
    """Run jobs in threads, with a progress line every REPORT_SECONDS.

    heartbeat is called with each line if bytes have arrived. After a job fails the others that run
    finish, and the error is raised.
    """
    pool = futures.ThreadPoolExecutor(workers)
    try:
        waiting = {pool.submit(job) for job in jobs}
        while waiting:
            finished, waiting = futures.wait(
                waiting, REPORT_SECONDS, return_when=futures.FIRST_EXCEPTION
            )
            for future in finished:
                future.result()
            if progress.moved():
                heartbeat()
            say(progress.line())
    except Exception:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    except BaseException:  # Ctrl-C
        progress.stopping.set()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


@contextlib.contextmanager
def _staging(folder: Path, say: Say) -> Iterator[Path]:
    """An empty folder for unverified files; waits for another download into the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".download.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"Waiting for another download into {folder}")
        lock.acquire()
    staging = folder / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)
        for part in folder.glob(".*.part"):  # of an earlier version
            part.unlink()
        staging.mkdir()
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        lock.release()


def fetch_files(
    staging: Path,
    repository: HubRepository,
    files: Mapping[Path, RepoFile],
    complete_files: int,
    workers: int,
    say: Say,
    on_file: Callable[[Path], None] = lambda path: None,
    heartbeat: Callable[[], None] = lambda: None,
) -> None:
    """Download files to their paths, several at a time and in order; verified ones are kept.

    on_file is called from a thread with the path of each complete file. Raises DownloadError; files
    that are complete stay.
    """
    progress = _Progress({file.path: file.size for file in files.values()}, complete_files)

    def fetch(path: Path, file: RepoFile) -> None:
        if not path.is_file() or _hash_problem(path, file):
            downloaded = _retry(
                file.path,
                lambda force: repository.download(
                    file.path, staging, progress.bar(file.path), force
                ),
                lambda path: _hash_problem(path, file),
                repository.explain,
                progress,
                say,
            )
            _publish(downloaded, path)
        on_file(path)
        progress.finish(file.path)

    need = sum(file.size for file in files.values())
    free = shutil.disk_usage(staging).free
    if need > free:
        raise ValueError(
            f"{staging.parent} has {console.bytes_text(free)} free but needs {console.bytes_text(need)}: set "
            "another download_path or fewer download_shards"
        )
    jobs = [lambda path=path, file=file: fetch(path, file) for path, file in files.items()]
    _run_jobs(jobs, workers, progress, say, heartbeat)


# ---- Data sets, chat tasks and CORE -------------------------------------------------------------


def fetch_dataset(config: Any, say: Say = print_line) -> Path:
    """Download a parquet data set: its first `download_shards` files, and those that validate.

    Returns the folder that dataset_type=hf reads. Raises ValueError with one line.
    """
    name, folder = sources.hub_name(config), _local(sources.hub_folder(config))
    source = f"hf:{'/'.join(filter(None, name))}"
    selection = f"download_shards={config.download_shards}"
    instead = f"put its parquet files into {folder}, or train on those of dataset_path=FOLDER"
    with _staging(folder, say) as staging, _advice(f"the data set {name.repository}", instead):
        manifest = Manifest(folder, source)
        if manifest.is_complete(selection):
            return folder
        repository = _repository(config, name.repository)
        listed = [file for file in repository.list_files() if name.includes(file.path)]
        # A flat folder; a dot would hide the file.
        shards = {file.path.replace("/", "--").lstrip("."): file for file in listed}
        splits = split_files(shards)
        if not (splits.train and splits.validation):
            raise ValueError(
                f"{source} has {len(shards)} parquet files on the hub, {len(splits.train)} of them "
                "to train on; at least 2 are needed, because those of the validation split, or "
                "the last one, are held out"
            )
        # Validation first: training evaluates before its first step.
        wanted = [*splits.validation, *splits.train[: config.download_shards]]
        facts = {
            shard: (shards[shard].size, shards[shard].lfs and shards[shard].lfs.sha256)
            for shard in wanted
        }
        missing = manifest.plan(facts, selection)
        fetch_files(
            staging,
            repository,
            {folder / shard: shards[shard] for shard in missing},
            len(wanted) - len(missing),
            config.download_connections,
            say,
            on_file=lambda path: manifest.mark_done(path.name),
            heartbeat=manifest.touch,
        )
    return folder


def fetch_split(
    config: Any, repository: str, subset: str, split: str, say: Say = print_line
) -> Path:
    """Download one split of a chat task's data set: parquet files, and a list of their names.

    The files are the hub's parquet export in nanochat's layout, and folders that nanochat made are
    used as they are. Returns the split's folder. Raises ValueError with one line.
    """
    folder = _local(config.download_path) / CHAT_FOLDER / repository.replace("/", "--") / subset
    folder = folder / split
    instead = "set chat_data=FOLDER or ARCHIVE, a copy of the chat data"
    with contextlib.ExitStack() as stack:
        if _is_whole_split(folder):
            return folder
        staging = stack.enter_context(_staging(folder, say))
        stack.enter_context(_advice(f"{repository} {subset}/{split}", instead))
        source = _repository(config, repository, PARQUET_EXPORT)
        listed = source.list_files(f"{subset}/{split}")
        paths = sorted(file.path for file in listed if file.path.endswith(".parquet"))
        if not paths:
            raise ValueError(f"{repository} has no parquet files for {subset}/{split} on the hub")
        by_path = {file.path: file for file in listed}
        files = {
            folder / f"{number:05}.parquet": by_path[path] for number, path in enumerate(paths)
        }
        fetch_files(staging, source, files, 0, config.download_connections, say)
        # Written last: the list marks the split as complete.
        storage.write_whole(folder / MANIFEST, json.dumps([path.name for path in files]))
    return folder


def _is_whole_split(folder: Path) -> bool:
    try:
        names = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return isinstance(names, list) and all((folder / name).is_file() for name in names)
    except (OSError, ValueError, TypeError):
        return False


def fetch_core(config: Any, say: Say = print_line) -> Path:
    """Download the CORE bundle from its URL, as the archive that core_bundle can name.

    No hash is published for it: the checksums in the archive decide. Raises ValueError with one
    line.
    """
    path = _local(config.download_path) / CORE_FOLDER / CORE_BUNDLE
    if path.is_file():
        return path
    instead = "set core_bundle=FOLDER or ARCHIVE, a copy of it"
    with _staging(path.parent, say) as staging, _advice("the CORE bundle", instead):
        progress = _Progress({CORE_BUNDLE: None}, 0)

        def transfer(force: bool) -> Path:
            with (staging / CORE_BUNDLE).open("wb") as file:
                http_get(config.core_bundle_url, file, tqdm_class=progress.bar(CORE_BUNDLE))
            return staging / CORE_BUNDLE

        def fetch() -> None:
            if not path.is_file():  # another process may have just downloaded it
                _publish(
                    _retry(
                        config.core_bundle_url,
                        transfer,
                        _zip_problem,
                        _explain_offline,
                        progress,
                        say,
                    ),
                    path,
                )
            progress.finish(CORE_BUNDLE)

        _run_jobs([fetch], 1, progress, say)
    return path


def _repository(config: Any, name: str, revision: str = "main") -> HubRepository:
    endpoint = (config.hub_url or constants.ENDPOINT).rstrip("/")
    return HubRepository(endpoint, name, revision)


def _local(path: str) -> Path:
    if "://" in path:
        raise ValueError(
            f"download_path={path} must be a local folder; copy the files to the bucket from there"
        )
    return Path(path).expanduser()


@contextlib.contextmanager
def _advice(what: str, instead: str) -> Iterator[None]:
    """Complete the message of a DownloadError by its purpose and by the way without network."""
    try:
        yield
    except DownloadError as error:
        message = f"could not download {what}: {error}. Without network, {instead}"
        raise ValueError(message) from None
