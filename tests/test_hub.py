"""Downloads: whatever a server does, a file is right in every byte or missing."""

import contextlib
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import close_session, constants, file_download
from huggingface_hub.utils import _http
from hypothesis import given, settings
from hypothesis import strategies as st

from MaxNano import pyconfig
from MaxNano.data import download, hub, sources, stream

ROOT = Path(__file__).parents[1]
HTML = b"<!DOCTYPE html><html><body>Sign in to this network</body></html>"
COMMIT = "c" * 40


def parquet(seed, documents=400):
    """About 20 kB that do not compress, in row groups of 50 documents."""
    random = np.random.default_rng(seed)
    texts = [random.bytes(30).hex() for _ in range(documents)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, row_group_size=50)
    return buffer.getvalue()


CONTENT = parquet(0)
OTHER = parquet(1)[: len(CONTENT)].ljust(len(CONTENT), b"x")
VALIDATION = parquet(2, 100)
HALF = len(CONTENT) // 2


def bundle(damaged=False):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        # A ZipInfo has a fixed date: every call returns the same bytes.
        entry = zipfile.ZipInfo("eval_bundle/core.yaml")
        archive.writestr(entry, "icl_tasks: []\n" * 1000)
    content = bytearray(buffer.getvalue())
    content[200] ^= damaged
    return bytes(content)


# ---- A hub --------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, urlsplit(self.path)
        server.requests.append((self.command, unquote(path.path), dict(self.headers)))
        parts = unquote(path.path).split("/", 6)
        with contextlib.suppress(ConnectionError, ValueError):
            if parts[1] == "api":  # /api/datasets/OWNER/NAME/tree/REVISION/...
                self.tree(parts[6] if len(parts) > 6 else "", parse_qs(path.query))
            elif self.command == "HEAD":
                next(server.head_script, Handler.facts)(self)
            else:
                name = next((n for n in server.files if self.path.endswith(n)), None)
                self.content = server.files.get(name, b"")
                scripted = name == server.scripted
                next(server.script if scripted else iter(()), lambda h: h.begin(None))(self)

    def tree(self, folder, query):
        if self.server.tree is not None:
            self.server.tree(self)
            return
        below = folder.partition("/")[2] if not folder.startswith("refs/") else folder[21:]
        entries = [{"type": "directory", "path": "data", "oid": "0" * 40}]
        for path, content in self.server.files.items():
            digest = hashlib.sha256(content).hexdigest()
            lfs = {"oid": digest, "size": len(content), "pointerSize": 130}
            entry = {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            if path.startswith(below):
                entries.append(entry | {"lfs": lfs} | self.server.stated.get(path, {}))
        begin = int(query.get("cursor", ["0"])[0])
        following, headers = begin + 4, {"Content_Type": "application/json"}
        if following < len(entries):
            url = f"{self.server.url}{urlsplit(self.path).path}?recursive=true&cursor={following}"
            headers["Link"] = f'<{url}>; rel="next"'
        self.whole(json.dumps(entries[begin:following]).encode(), **headers)

    def facts(self, **headers):
        """What the hub answers to HEAD: the file's hash and size, and where its bytes are."""
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        content = self.server.files.get(unquote(name))
        if content is None:
            self.head(404, Content_Length=0, X_Error_Code="EntryNotFound")
            return
        linked = {
            "X_Repo_Commit": COMMIT,
            "X_Linked_Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X_Linked_Size": len(content),
            "Location": f"{self.server.cdn}/cdn/{name}",
            "Content_Length": 0,
        }
        self.head(302, **(linked | headers))

    # What behaviors are made of.

    def head(self, status=200, **headers):
        self.send_response_only(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def leave(self):
        """Close the connection in the middle of things."""
        self.wfile.flush()
        self.close_connection = True

    def begin(self, end, **headers):
        """A right answer, but only up to byte `end`."""
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        content = self.content
        headers = {"Content_Length": len(content) - start} | headers
        if start:
            last = len(content) - 1
            headers = {"Content_Range": f"bytes {start}-{last}/{len(content)}"} | headers
        self.head(206 if start else 200, **headers)
        self.wfile.write(content[start:end])

    def whole(self, content, **headers):
        self.head(200, Content_Length=len(content), **headers)
        self.wfile.write(content)


class Server(http.server.ThreadingHTTPServer):
    """A hub with one repository. Its answers for one file follow `script`, then they are right."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}"  # another origin
        self.closing = threading.Event()
        self.files = {"file.parquet": CONTENT, "last.parquet": VALIDATION}
        self.scripted, self.script, self.head_script = "file.parquet", iter(()), iter(())
        self.tree, self.stated, self.requests = None, {}, []

    def handle_error(self, *_):
        pass

    def asked(self, command="GET", under="/cdn/"):
        """(path, Range) of the requests so far."""
        return [
            (path.rpartition("/")[2], headers.get("Range"))
            for kind, path, headers in self.requests
            if kind == command and path.startswith(under)
        ]


@pytest.fixture(autouse=True)
def library(monkeypatch, tmp_path):
    """The library without a user's cache and token, without telemetry, and in a hurry."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home/token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    impatient = types.SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr(_http, "time", impatient)
    monkeypatch.setattr(file_download, "time", impatient)
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.5)
    monkeypatch.setattr(hub, "ATTEMPTS", 3)
    monkeypatch.setattr(hub, "FIRST_WAIT_SECONDS", 0.002)
    yield
    close_session()


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


BASE = pyconfig.initialize(["configs/base.yml", "dataset_type=hf", "dataset_name=someone/texts"])


def make_config(server, folder, **values):
    url = server if isinstance(server, str) else server.url
    given = {"hub_url": url, "download_path": str(folder), "core_bundle_url": f"{url}/bundle.zip"}
    return pyconfig.replace(BASE, "test", **(given | values))


def get(server, folder, say=lambda line: None, **values):
    return hub.fetch_dataset(make_config(server, folder, **values), say)


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


# ---- Misbehavior: each a function of a position in the file, giving what a handler does ---------


def cut(position):
    def behave(handler):
        handler.begin(position)
        handler.leave()

    return behave


def reset(position):
    def behave(handler):
        handler.begin(position)
        handler.wfile.flush()
        linger = struct.pack("ii", 1, 0)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        handler.connection.close()

    return behave


def stall(position):
    def behave(handler):
        handler.begin(position)
        handler.wfile.flush()
        handler.server.closing.wait(5)
        handler.leave()

    return behave


def flip(position):
    content = bytearray(CONTENT)
    content[position - 1] ^= 4
    return lambda handler: handler.whole(bytes(content))


def length_too_small(position):
    return lambda handler: handler.whole(CONTENT[:position])


def length_too_large(position):
    def behave(handler):
        handler.head(200, Content_Length=len(CONTENT) + position)
        handler.wfile.write(CONTENT)
        handler.leave()

    return behave


def no_length(position):
    def behave(handler):
        handler.head(200, Connection="close")
        handler.wfile.write(CONTENT[:position])
        handler.leave()

    return behave


def more_than_stated(position):
    def behave(handler):
        handler.head(200, Connection="close")
        handler.wfile.write(CONTENT + CONTENT[:position])
        handler.leave()

    return behave


def unfinished_chunks(position):
    def behave(handler):
        handler.head(200, Transfer_Encoding="chunked")
        handler.wfile.write(b"%x\r\n%s\r\n" % (position, CONTENT[:position]))
        handler.leave()

    return behave


def zeros_after(position):
    return lambda handler: handler.whole(CONTENT[:position] + bytes(len(CONTENT) - position))


def status(number, **headers):
    return lambda handler: handler.head(number, Content_Length=0, **headers)


def bytes_instead_of_http(content):
    def behave(handler):
        handler.wfile.write(content)
        handler.leave()

    return behave


def silence(handler):
    handler.server.closing.wait(5)
    handler.leave()


def partial(body, extent):
    """An answer 206 to the request for the second half."""
    return lambda handler: (
        handler.head(206, Content_Length=len(body), Content_Range=extent)
        or handler.wfile.write(body)
    )


REST, EXTENT = CONTENT[HALF:], f"bytes {HALF}-{len(CONTENT) - 1}/{len(CONTENT)}"
SCRIPTS = {
    f"{kind.__name__} at the {where}": [kind(position)]
    for kind in (
        cut,
        reset,
        flip,
        length_too_small,
        length_too_large,
        no_length,
        more_than_stated,
        unfinished_chunks,
        zeros_after,
    )
    for where, position in {"start": 1, "middle": HALF, "end": len(CONTENT) - 1}.items()
}
SCRIPTS |= {
    "a stall": [stall(HALF)],
    "an HTML page": [lambda h: h.whole(HTML, Content_Type="text/html")],
    "HTML of the right length": [lambda h: h.whole(HTML.ljust(len(CONTENT)))],
    "another file of the right length": [lambda h: h.whole(OTHER)],
    "nothing": [lambda h: h.whole(b"")],
    "204": [status(204)],
    "an address that has expired": [status(403)],
    "404": [status(404)],
    "416": [status(416)],
    "429": [status(429, Retry_After="0")],
    "500": [status(500)],
    "503": [status(503)],
    "a redirect to nowhere": [status(302, Location="http://127.0.0.1:1/file.parquet")],
    "a redirect to a web page": [status(302, Location="/page.html"), lambda h: h.whole(HTML)],
    "a redirect to a local file": [status(302, Location="file:///etc/passwd")],
    "silence": [silence],
    "a closed connection": [bytes_instead_of_http(b"")],
    "half a header": [bytes_instead_of_http(b"HTTP/1.1 200 OK\r\nContent-Le")],
    "another protocol": [bytes_instead_of_http(b"SSH-2.0-OpenSSH_9.2\r\n")],
    "compressed": [lambda h: h.whole(gzip.compress(CONTENT), Content_Encoding="gzip")],
    # After a cut in the middle, when the library asks for the rest.
    "a range that is another": [cut(HALF), partial(CONTENT[: len(REST)], EXTENT)],
    "a range of another file": [cut(HALF), partial(OTHER[HALF:], EXTENT)],
    "a range with too much": [cut(HALF), partial(REST + b"more", EXTENT)],
    "a range of HTML": [cut(HALF), partial(HTML, EXTENT)],
    "a range of nothing": [cut(HALF), partial(b"", EXTENT)],
    "a range that is not satisfiable": [cut(HALF), status(416)],
    "no ranges": [cut(HALF), lambda h: h.whole(CONTENT)],
}
HARMLESS = {"no ranges", "compressed"}
# What brings new bytes each time is tried again for as long: here it ends in an empty answer.
BRING = ("cut", "a stall", "length_too_large", "unfinished_chunks")
FOR_EVER = [n for n in SCRIPTS if n not in HARMLESS and not n.endswith((" start", " end"))]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_server_that_misbehaves_for_a_while_gives_the_right_file(server, tmp_path, name):
    server.script = iter(SCRIPTS[name])
    folder = get(server, tmp_path)
    assert (folder / "file.parquet").read_bytes() == CONTENT
    assert visible(folder) == ["file.parquet", "last.parquet", "manifest.json"]
    facts = manifest_of(folder)["files"]["file.parquet"]
    assert facts == {
        "size": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "done": True,
    }


@pytest.mark.parametrize("name", FOR_EVER)
def test_a_server_that_misbehaves_for_ever_gives_no_file(server, tmp_path, name):
    server.script = itertools.cycle(SCRIPTS[name])
    folder = tmp_path / "someone--texts"
    if name.startswith(BRING):
        server.script = itertools.chain(SCRIPTS[name] * 2, itertools.repeat(cut(0)))
    with pytest.raises(ValueError, match=r"file.parquet: .*gave up after 3 attempts") as caught:
        get(server, tmp_path)
    assert "\n" not in str(caught.value)
    assert visible(folder) == ["last.parquet", "manifest.json"]
    assert not (folder / hub.STAGING).exists()
    assert not manifest_of(folder)["files"]["file.parquet"]["done"]
    server.script = iter(())
    get(server, tmp_path)
    assert (folder / "file.parquet").read_bytes() == CONTENT


def test_there_are_fifty_kinds_of_misbehavior():
    assert len(SCRIPTS) >= 50


@settings(max_examples=15, deadline=None)
@given(
    kinds=st.lists(
        st.sampled_from([cut, reset, flip, length_too_small, no_length, zeros_after]), max_size=4
    ),
    positions=st.lists(st.integers(1, len(CONTENT) - 1), min_size=4, max_size=4),
)
def test_any_mixture_of_faults_gives_the_right_file_or_none(tmp_path_factory, kinds, positions):
    folder = tmp_path_factory.mktemp("any")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        server.script = iter([kind(at) for kind, at in zip(kinds, positions, strict=False)])
        with contextlib.suppress(ValueError):
            get(server, folder)
        server.shutdown()
    path = folder / "someone--texts/file.parquet"
    assert not path.exists() or path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "behavior",
    [silence, status(500), status(503), bytes_instead_of_http(b""), status(200, ETag='"1"')],
    ids=["silence", "500", "503", "closed", "no commit"],
)
def test_a_server_that_fails_to_describe_a_file_is_asked_again(server, tmp_path, behavior):
    server.head_script = iter([behavior])
    assert (get(server, tmp_path) / "file.parquet").read_bytes() == CONTENT


# ---- Resuming -----------------------------------------------------------------------------------


def test_a_lost_connection_resumes_in_the_middle(server, tmp_path):
    said = []
    server.script = iter([cut(HALF)])
    get(server, tmp_path, said.append)
    first, second = (asked for name, asked in server.asked() if name == "file.parquet")
    assert first is None and HALF - 1000 < int(second[len("bytes=") : -1]) <= HALF
    assert "2 of 2 files" in said[-1] and said[-1].endswith(" MB/s")


def test_a_file_that_is_complete_is_not_downloaded_again(server, tmp_path):
    folder = get(server, tmp_path)
    server.requests.clear()
    assert get(server, tmp_path) == folder
    assert server.requests == []  # not even the hub's list
    # A kill between the file's arrival and its entry in the manifest: its hash decides.
    manifest = manifest_of(folder)
    manifest["files"]["file.parquet"]["done"] = False
    (folder / "manifest.json").write_text(json.dumps(manifest))
    get(server, tmp_path)
    assert server.asked() == []
    (folder / "file.parquet").write_bytes(OTHER)
    (folder / "manifest.json").unlink()
    get(server, tmp_path)
    assert (folder / "file.parquet").read_bytes() == CONTENT


def test_a_folder_of_the_previous_version_stays_valid(server, tmp_path):
    """Its manifest has etags, and an interrupted file is a hidden part."""
    folder = get(server, tmp_path, download_shards=1)
    manifest = manifest_of(folder)
    for facts in manifest["files"].values():
        facts["etag"] = '"1"'
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / ".other.parquet.part").write_bytes(b"PAR1")
    server.requests.clear()
    get(server, tmp_path, download_shards=1)
    assert server.requests == []
    server.files["middle.parquet"] = OTHER
    get(server, tmp_path, download_shards=2)
    assert [name for name, _ in server.asked()] == ["middle.parquet"]
    assert not list(folder.glob(".*.part"))


def test_a_file_in_the_hubs_cache_is_copied(server, tmp_path):
    snapshot = tmp_path / f"home/hub/datasets--someone--texts/snapshots/{COMMIT}"
    snapshot.mkdir(parents=True)
    (snapshot / "last.parquet").write_bytes(VALIDATION)
    (snapshot / "file.parquet").write_bytes(OTHER)  # damaged: it is replaced by a download
    folder = get(server, tmp_path)
    assert (folder / "last.parquet").read_bytes() == VALIDATION
    assert (folder / "file.parquet").read_bytes() == CONTENT
    assert [name for name, _ in server.asked()] == ["file.parquet"]


# ---- Data sets ----------------------------------------------------------------------------------

SHARDS = {f"shard_{number:05}.parquet": parquet(number, 200) for number in range(6)}


def test_shards_by_count_always_come_with_the_last_one(server, tmp_path):
    server.files = SHARDS
    folder = get(server, tmp_path, download_shards=2)
    assert folder == tmp_path / "someone--texts"
    assert visible(folder) == ["manifest.json", *(f"shard_0000{n}.parquet" for n in (0, 1, 5))]
    server.requests.clear()
    get(server, tmp_path, download_shards=4)  # keeps those that are there
    assert sorted(server.asked()) == [("shard_00002.parquet", None), ("shard_00003.parquet", None)]
    get(server, tmp_path)
    for name, content in SHARDS.items():
        assert (folder / name).read_bytes() == content
    config = make_config(server, tmp_path)
    assert sources.HubSource(config, "validation").files == ["shard_00005.parquet"]
    assert len(list(stream.iterate_texts(config, "train"))) == 5 * 200


def test_a_part_of_a_repository_can_be_named(server, tmp_path):
    shard = next(iter(SHARDS.values()))
    paths = ["data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet"]
    server.files = dict.fromkeys([*paths, "data/README.md", "other/a.parquet"], shard)
    folder = get(server, tmp_path, dataset_name="someone/texts/data/train-*")
    assert visible(folder) == ["data--train-0.parquet", "data--train-1.parquet", "manifest.json"]
    folder = get(server, tmp_path, dataset_name="hf:someone/texts/data")
    assert folder.name == "someone--texts--data" and len(visible(folder)) == 4
    with pytest.raises(ValueError, match="has 1 parquet files on the hub, 0 of them to train"):
        get(server, tmp_path, dataset_name="hf:someone/texts/other")
    server.files["../../../evil.parquet"] = shard
    with pytest.raises(ValueError, match="gave up|'..' path segment"):
        get(server, tmp_path / "new")
    assert not list(tmp_path.rglob("evil*"))


def test_the_hubs_splits_decide_what_trains(server, tmp_path):
    """`test-*` was trained on, and the last `train-*` was held out beside a validation split."""
    shard = next(iter(SHARDS.values()))
    names = ("train-0", "train-1", "train-2", "validation-0", "test-0")
    server.files = {f"data/{name}.parquet": shard for name in names}
    folder = get(server, tmp_path, download_shards=2)
    training = ["data--train-0.parquet", "data--train-1.parquet"]
    assert visible(folder) == [*training, "data--validation-0.parquet", "manifest.json"]
    config = make_config(server, tmp_path)
    assert sources.HubSource(config, "train").files == training
    assert sources.HubSource(config, "validation").files == ["data--validation-0.parquet"]


def test_a_file_that_changed_on_the_hub_is_refused(server, tmp_path):
    folder = get(server, tmp_path)
    server.files["file.parquet"] = OTHER
    with pytest.raises(ValueError, match="has changed on the hub"):
        get(server, tmp_path, download_shards=1)
    assert (folder / "file.parquet").read_bytes() == CONTENT
    (folder / "manifest.json").write_text('{"source": "hf:other", "selection": "", "files": {}}')
    with pytest.raises(ValueError, match="holds other data"):
        get(server, tmp_path)


def test_a_missing_file_does_not_stop_the_others(server, tmp_path):
    server.files["good.parquet"] = OTHER
    server.head_script = iter([lambda h: h.facts(), status(404, X_Error_Code="EntryNotFound")])
    with pytest.raises(ValueError, match=r"does not have /datasets/someone/texts.*file.parquet"):
        get(server, tmp_path, download_connections=1)
    present = visible(tmp_path / "someone--texts")
    assert "last.parquet" in present and "file.parquet" not in present


def test_too_little_disk_space_is_reported_before_the_download(server, tmp_path):
    server.stated["file.parquet"] = {"size": 10**15}
    with pytest.raises(ValueError, match=r"GB free but needs 1000000\.0 GB"):
        get(server, tmp_path)
    assert server.asked() == []


def test_gits_hash_serves_for_small_files(server, tmp_path):
    right = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
    server.stated["file.parquet"] = {"lfs": None, "oid": right}
    get(server, tmp_path)
    server.stated["file.parquet"]["oid"] = "0" * 40
    with pytest.raises(ValueError, match=f"hash {right} instead of 0000"):
        get(server, tmp_path / "new")


@pytest.mark.parametrize(
    "page", [HTML, b"[" * 100_000, b'{"error": "many"}', b'[{"type": "file"}]', b"\xff\xfe"]
)
def test_an_answer_that_is_no_list_of_files_is_reported(server, tmp_path, page):
    server.tree = lambda handler: handler.whole(page)
    with pytest.raises(ValueError, match="did not answer with a list of files") as caught:
        get(server, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_list_of_files_that_never_arrives_times_out(server, tmp_path):
    """The library sets no timeout for it."""
    server.tree = silence
    begin = time.monotonic()
    with pytest.raises(ValueError, match="could not download the data set.*timed out"):
        get(server, tmp_path)
    assert time.monotonic() - begin < 100


# ---- Access -------------------------------------------------------------------------------------


def test_a_gated_data_set_is_explained(server, tmp_path):
    server.head_script = itertools.repeat(status(403, X_Error_Code="GatedRepo"))
    message = (
        f"someone/texts is gated: accept its terms at {server.url}/datasets/someone/texts, then "
        "log in with `hf auth login` or set HF_TOKEN"
    )
    with pytest.raises(ValueError, match=message) as caught:
        get(server, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(server.asked("HEAD", "/datasets")) <= 2  # no second attempt


@pytest.mark.parametrize("number", [401, 404])
def test_a_private_or_missing_data_set_is_explained(server, tmp_path, number):
    server.tree = status(number, X_Error_Code="RepoNotFound")
    with pytest.raises(ValueError, match=r"does not exist at .* or is private.*HF_TOKEN"):
        get(server, tmp_path)


def tokens_sent(server):
    return {
        (path.split("/")[1], headers.get("authorization", headers.get("Authorization")))
        for _, path, headers in server.requests
    }


@pytest.mark.parametrize("where", ["environment", "file"])
def test_a_token_goes_to_the_hub_only(server, tmp_path, monkeypatch, where):
    if where == "environment":
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    else:
        (tmp_path / "home").mkdir()
        (tmp_path / "home/token").write_text("hf_secret")
    get(server, tmp_path)  # a hub_url that is not HF_ENDPOINT
    assert tokens_sent(server) == {("api", None), ("datasets", None), ("cdn", None)}
    server.requests.clear()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    get(server.url, tmp_path / "new", hub_url=None)
    secret = "Bearer hf_secret"
    assert tokens_sent(server) == {("api", secret), ("datasets", secret), ("cdn", None)}


def test_offline_mode_uses_what_is_there(server, tmp_path, monkeypatch):
    folder = get(server, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert get(server, tmp_path) == folder
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set.*put its parquet files into"):
        get(server, tmp_path / "new")
    with pytest.raises(ValueError, match=r"the CORE bundle: HF_HUB_OFFLINE is set.*core_bundle="):
        hub.fetch_core(make_config(server, tmp_path), print)
    assert server.requests == []


@pytest.mark.parametrize(
    ("fetch", "message"),
    [
        (
            hub.fetch_dataset,
            "could not download the data set someone/texts: .*refused.* Without network, put its "
            "parquet files into .*someone--texts, or train on those of dataset_path=FOLDER",
        ),
        (hub.fetch_core, "the CORE bundle: .* set core_bundle=FOLDER or ARCHIVE"),
        (
            lambda config: hub.fetch_split(config, "openai/gsm8k", "main", "test"),
            "openai/gsm8k main/test: .* Without network, set chat_data=FOLDER or ARCHIVE",
        ),
    ],
)
def test_without_network_one_line_says_what_to_do(tmp_path, fetch, message):
    with pytest.raises(ValueError, match=message) as caught:
        fetch(make_config("http://127.0.0.1:1", tmp_path))
    assert "\n" not in str(caught.value)


# ---- Chat tasks and CORE ------------------------------------------------------------------------


def test_a_split_of_a_chat_task_has_nanochats_layout(server, tmp_path):
    shard = next(iter(SHARDS.values()))
    server.files = {"main/train/0000.parquet": shard, "main/train/0001.parquet": CONTENT}
    config = make_config(server, tmp_path)
    args = ("openai/gsm8k", "main", "train")
    folder = hub.fetch_split(config, *args, say=lambda line: None)
    assert folder == tmp_path / "task_data/openai--gsm8k/main/train"
    assert json.loads((folder / "manifest.json").read_text()) == ["00000.parquet", "00001.parquet"]
    assert (folder / "00001.parquet").read_bytes() == CONTENT
    trees = [path for _, path, _ in server.requests if path.startswith("/api")]
    assert trees == ["/api/datasets/openai/gsm8k/tree/refs/convert/parquet/main/train"]
    # A split that is there, also one that nanochat downloaded, needs no request.
    (folder.parent / "test").mkdir()
    (folder.parent / "test/00000.parquet").write_bytes(shard)
    (folder.parent / "test/manifest.json").write_text('["00000.parquet"]')
    server.requests.clear()
    assert hub.fetch_split(config, *args) == folder
    assert hub.fetch_split(config, *args[:2], "test").name == "test"
    assert server.requests == []
    # An interrupted one keeps its complete files.
    (folder / "manifest.json").unlink()
    (folder / "00000.parquet").unlink()
    hub.fetch_split(config, *args, say=lambda line: None)
    assert [name for name, _ in server.asked()] == ["0000.parquet"]
    with pytest.raises(ValueError, match="no parquet files for main/validation"):
        hub.fetch_split(config, *args[:2], "validation")


def test_the_core_bundle_is_intact_or_missing(server, tmp_path, monkeypatch):
    """Its length is all that is stated: the archive's own checksums decide."""
    monkeypatch.setattr(hub, "ATTEMPTS", 1)
    config = make_config(server, tmp_path)
    server.files, server.scripted = {"bundle.zip": bundle()}, "bundle.zip"
    page, damaged = (lambda h: h.whole(HTML)), (lambda h: h.whole(bundle(damaged=True)))
    for behavior, expected in ((page, "no zip archive"), (damaged, "damaged zip archive")):
        server.script = iter([behavior])
        with pytest.raises(ValueError, match=expected):
            hub.fetch_core(config, say=lambda line: None)
        assert visible(tmp_path / "core") == []
    monkeypatch.setattr(hub, "ATTEMPTS", 5)
    server.script = iter([cut(5000), stall(7000)])
    path = hub.fetch_core(config, say=lambda line: None)
    assert path.read_bytes() == bundle()
    server.files = {}  # a finished bundle needs no server
    assert hub.fetch_core(config) == path and path.read_bytes() == bundle()


def test_mistakes_in_the_config_are_reported(tmp_path):
    with pytest.raises(ValueError, match="needs dataset_name=OWNER/NAME"):
        get("http://127.0.0.1:1", tmp_path, dataset_name="climbmix")
    with pytest.raises(ValueError, match="must be a local folder"):
        get("http://127.0.0.1:1", "gs://bucket")
    with pytest.raises(ValueError, match="dataset_type=text has nothing to download"):
        download.main(make_config("http://127.0.0.1:1", tmp_path, dataset_type="text"))


# ---- The program --------------------------------------------------------------------------------


def start(server, folder):
    words = {
        "download_path": folder,
        "dataset_type": "hf",
        "dataset_name": "someone/texts",
        "download_connections": 1,
    }
    environment = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.Popen(
        [sys.executable, "MaxNano/data/download.py", "configs/base.yml"]
        + [f"{key}={value}" for key, value in words.items()],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_program_resumes_after_any_end(server, tmp_path):
    """kill -9 and SIGTERM in the middle of a file, then on to the end."""
    server.files, folder = SHARDS, tmp_path / "someone--texts"

    def hang(handler):
        handler.begin(5000)
        handler.wfile.flush()
        hanging.set()
        server.closing.wait(60)

    for number, expected in ((signal.SIGKILL, -9), (signal.SIGTERM, os.EX_TEMPFAIL)):
        hanging = threading.Event()
        server.scripted = min(SHARDS.keys() - set(visible(folder) if folder.exists() else ()))
        server.script = iter([hang])
        with start(server, tmp_path) as process:
            assert hanging.wait(200), process.communicate(timeout=30)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=200)
        assert process.returncode == expected, stderr
        assert "Traceback" not in stderr
        assert server.scripted not in visible(folder)
    assert "the same command resumes" in stderr
    complete = {name for name in visible(folder) if name.endswith(".parquet")}
    server.requests.clear()
    with start(server, tmp_path) as process:
        stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert "6 of 6 files" in stdout and f"Downloaded {folder}" in stdout
    for name, content in SHARDS.items():
        assert (folder / name).read_bytes() == content
    assert {name for name, _ in server.asked()} == SHARDS.keys() - complete
    assert not (folder / hub.STAGING).exists()
