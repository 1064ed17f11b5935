"""Downloads: whatever a server does, a file is right in every byte or not there."""

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
import zipfile
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from MaxNano import pyconfig
from MaxNano.data import download, sources

ROOT = Path(__file__).parents[1]
LIMITS = download.Limits(connections=2, timeout_seconds=0.25, attempts=3, backoff_seconds=0.005)
HTML = b"<!DOCTYPE html><html><body>Sign in to this network</body></html>"


def parquet(seed, documents=400):
    """About 20 kB that do not compress, in row groups of 50 documents."""
    random = np.random.default_rng(seed)
    texts = [random.bytes(30).hex() for _ in range(documents)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, row_group_size=50)
    return buffer.getvalue()


CONTENT = parquet(0)
OTHER = parquet(1)[: len(CONTENT)].ljust(len(CONTENT), b"x")


# ---- The server ---------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        behavior = next(self.server.script, None)
        with contextlib.suppress(ConnectionError, ValueError):
            if behavior is None or not self.path.endswith((".parquet", ".zip")):
                self.server.answer(self)
            else:
                behavior(self)

    # What behaviors are made of.

    def head(self, status=200, **headers):
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def leave(self):
        """Close the connection in the middle of things."""
        self.wfile.flush()
        self.close_connection = True

    def start(self):
        """The first byte asked for."""
        asked = self.headers.get("Range")
        return int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0

    def begin(self, end, **headers):
        """A right answer, but only as far as byte `end`."""
        content, start = self.server.content, self.start()
        headers = {"Content_Length": len(content) - start, "ETag": '"1"'} | headers
        if start:
            last = len(content) - 1
            headers = {"Content_Range": f"bytes {start}-{last}/{len(content)}"} | headers
        self.head(206 if start else 200, **headers)
        self.wfile.write(content[start:end])

    def whole(self, content, **headers):
        self.head(200, Content_Length=len(content), **headers)
        self.wfile.write(content)


class Server(http.server.ThreadingHTTPServer):
    """One file, or several by path; answers as the script says, and then as it should."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.closing = threading.Event()
        self.content, self.answer = CONTENT, lambda handler: handler.begin(None)
        self.script, self.requests = iter(()), []

    def handle_error(self, *_):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


# ---- Misbehavior: each a function of the place in the file, giving what a handler does --------


def cut(place):
    def behave(handler):
        handler.begin(place)
        handler.leave()

    return behave


def reset(place):
    def behave(handler):
        handler.begin(place)
        handler.wfile.flush()
        linger = struct.pack("ii", 1, 0)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        handler.connection.close()

    return behave


def stall(place):
    def behave(handler):
        handler.begin(place)
        handler.wfile.flush()
        handler.server.closing.wait(5)
        handler.leave()

    return behave


def drip(place):
    def behave(handler):
        handler.begin(place)
        for byte in handler.server.content[place : place + 100]:
            handler.wfile.write(bytes([byte]))
            if handler.server.closing.wait(0.05):
                break
        handler.leave()

    return behave


def flip(place):
    content = bytearray(CONTENT)
    content[place - 1] ^= 4
    return lambda handler: handler.whole(bytes(content))


def length_too_small(place):
    return lambda handler: handler.whole(CONTENT[:place])


def length_too_large(place):
    def behave(handler):
        handler.head(200, Content_Length=len(CONTENT) + place)
        handler.wfile.write(CONTENT)
        handler.leave()

    return behave


def no_length(place):
    def behave(handler):
        handler.head(200, Connection="close")
        handler.wfile.write(CONTENT[:place])
        handler.leave()

    return behave


def more_than_stated(place):
    def behave(handler):
        handler.head(200, Connection="close")
        handler.wfile.write(CONTENT + CONTENT[:place])
        handler.leave()

    return behave


def unfinished_chunks(place):
    def behave(handler):
        handler.head(200, Transfer_Encoding="chunked")
        handler.wfile.write(b"%x\r\n%s\r\n" % (place, CONTENT[:place]))
        handler.leave()

    return behave


def other_file_behind(place):
    return lambda handler: handler.whole(CONTENT[:place] + OTHER[place:-1] + b"\0")


def zeros_behind(place):
    return lambda handler: handler.whole(CONTENT[:place] + bytes(len(CONTENT) - place))


PLACES = {"start": 1, "middle": len(CONTENT) // 2, "end": len(CONTENT) - 1}
SOMEWHERE = {
    f"{kind.__name__} at the {where}": [kind(place)]
    for kind in (
        cut,
        reset,
        stall,
        drip,
        flip,
        length_too_small,
        length_too_large,
        no_length,
        more_than_stated,
        unfinished_chunks,
        other_file_behind,
        zeros_behind,
    )
    for where, place in PLACES.items()
}


def status(number, **headers):
    return lambda handler: handler.head(number, Content_Length=0, **headers)


def redirect(to):
    return status(302, Location=to)


def bytes_instead_of_http(content):
    def behave(handler):
        handler.wfile.write(content)
        handler.leave()

    return behave


def silence(handler):
    handler.server.closing.wait(5)
    handler.leave()


ANYWHERE = {
    "an HTML page": [lambda h: h.whole(HTML, Content_Type="text/html")],
    "HTML called parquet": [lambda h: h.whole(HTML, Content_Type="application/octet-stream")],
    "HTML of the right length": [lambda h: h.whole(HTML.ljust(len(CONTENT)))],
    "HTML in chunks": [unfinished_chunks(0), lambda h: h.whole(HTML)],
    "another file of the right length": [lambda h: h.whole(OTHER)],
    "nothing": [lambda h: h.whole(b"")],
    "204": [status(204)],
    "304": [status(304)],
    "408": [status(408)],
    "416": [status(416)],
    "429": [status(429, Retry_After="0")],
    "429 until a date": [status(429, Retry_After=formatdate(0, usegmt=True))],
    "429 in nonsense": [status(429, Retry_After="soon, nan")],
    "500": [status(500)],
    "503": [status(503, Retry_After="0.01")],
    "a circle of redirects": [redirect("/file.parquet")] * 12,
    "a redirect to a web page": [redirect("/page.parquet"), lambda h: h.whole(HTML)],
    "a redirect that has expired": [redirect("/signed.parquet"), status(403)],
    "a redirect to nowhere": [redirect("http://127.0.0.1:1/file.parquet")],
    "a redirect to no address": [redirect("http://[::1/file.parquet")],
    "a redirect to a local file": [redirect("file:///etc/passwd")],
    "silence": [silence],
    "a closed connection": [bytes_instead_of_http(b"")],
    "half a header": [bytes_instead_of_http(b"HTTP/1.1 200 OK\r\nContent-Le")],
    "another protocol": [bytes_instead_of_http(b"SSH-2.0-OpenSSH_9.2\r\n")],
    "two lengths": [bytes_instead_of_http(b"HTTP/1.1 200 OK\r\nContent-Length: 5, 7\r\n\r\nPAR1")],
    "compressed": [lambda h: h.whole(gzip.compress(CONTENT), Content_Encoding="gzip")],
    "a chunk of no length": [
        bytes_instead_of_http(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nPAR1\r\n")
    ],
}

HALF = len(CONTENT) // 2
REST = CONTENT[HALF:]


def partial(body=REST, stated=None, **headers):
    """An answer 206 to the request for the second half."""

    def behave(handler):
        extent = f"bytes {HALF}-{len(CONTENT) - 1}/{len(CONTENT)}" if stated is None else stated
        extent = {"Content_Range": extent} if extent else {}
        handler.head(206, Content_Length=len(body), **extent, **headers)
        handler.wfile.write(body)

    return behave


# Behind a cut in the middle, which leaves a part to go on from.
RESUMED = {
    "the wrong range": partial(
        CONTENT[HALF + 1 :], f"bytes {HALF + 1}-{len(CONTENT) - 1}/{len(CONTENT)}"
    ),
    "an earlier range": partial(CONTENT[5:], f"bytes 5-{len(CONTENT) - 1}/{len(CONTENT)}"),
    "a shorter range": partial(REST[:9], f"bytes {HALF}-{HALF + 8}/{len(CONTENT)}"),
    "a range of a longer file": partial(
        REST, f"bytes {HALF}-{len(CONTENT) - 1}/{len(CONTENT) + 9}"
    ),
    "a range without bounds": partial(REST, ""),
    "a range in nonsense": partial(REST, "bytes ?-?/*"),
    "a range that is another": partial(CONTENT[: len(REST)]),
    "a range of another file": partial(OTHER[HALF:]),
    "a range with too much": partial(REST + b"more"),
    "a range of HTML": partial(HTML, Content_Type="text/html"),
    "a range not satisfiable": status(416),
    "a range of nothing": partial(b""),
}
SCRIPTS = SOMEWHERE | ANYWHERE | {name: [cut(HALF), what] for name, what in RESUMED.items()}


def remote(server, content=CONTENT, name="file.parquet", **stated):
    sha256 = hashlib.sha256(content).hexdigest()
    known = {"size": len(content), "sha256": sha256} | stated
    return download.Remote(name, f"{server.url}/{name}", **known)


def get(folder, *remotes, say=lambda line: None, limits=LIMITS):
    return download.fetch(folder, "test", lambda: remotes, limits, say=say)


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def facts_of(folder, name="file.parquet"):
    return json.loads((folder / "manifest.json").read_text())["files"][name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_server_that_misbehaves_for_a_while_gives_the_right_file(server, tmp_path, name):
    server.script = iter(SCRIPTS[name])
    get(tmp_path, remote(server))
    assert (tmp_path / "file.parquet").read_bytes() == CONTENT
    assert visible(tmp_path) == ["file.parquet", "manifest.json"]
    facts = facts_of(tmp_path)
    assert facts["done"] and facts["size"] == len(CONTENT)
    assert facts["sha256"] == hashlib.sha256(CONTENT).hexdigest()


FOR_EVER = SCRIPTS.keys() - {"drip at the end"}  # there the one byte that is missing does come


@pytest.mark.parametrize("name", sorted(FOR_EVER))
def test_a_server_that_misbehaves_for_ever_gives_no_file(server, tmp_path, name):
    server.script = itertools.cycle(SCRIPTS[name])
    with pytest.raises(ValueError, match=r"file.parquet.*given up after 3 attempts") as caught:
        get(tmp_path, remote(server))
    assert "\n" not in str(caught.value)
    assert visible(tmp_path) == ["manifest.json"]
    assert not facts_of(tmp_path)["done"]
    # And afterwards, what was left behind does no harm.
    server.script = iter(())
    get(tmp_path, remote(server))
    assert (tmp_path / "file.parquet").read_bytes() == CONTENT


def test_there_are_more_than_fifty_ways():
    assert len(SCRIPTS) >= 50


@settings(max_examples=15, deadline=None)
@given(
    kinds=st.lists(
        st.sampled_from([cut, reset, flip, length_too_small, no_length, zeros_behind]), max_size=4
    ),
    places=st.lists(st.integers(1, len(CONTENT) - 1), min_size=4, max_size=4),
)
def test_any_mixture_of_faults_gives_the_right_file_or_none(tmp_path_factory, kinds, places):
    folder = tmp_path_factory.mktemp("any")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        server.script = iter([kind(place) for kind, place in zip(kinds, places, strict=False)])
        with contextlib.suppress(ValueError):
            get(folder, remote(server))
        server.shutdown()
    path = folder / "file.parquet"
    assert not path.exists() or path.read_bytes() == CONTENT


# ---- Going on -----------------------------------------------------------------------------------


def test_a_cut_download_goes_on_in_the_middle(server, tmp_path):
    said = []
    server.script = iter([cut(HALF)])
    get(tmp_path, remote(server), say=said.append)
    assert server.requests == [("/file.parquet", None), ("/file.parquet", f"bytes={HALF}-")]
    assert any("trying again" in line for line in said)
    assert said[-1].endswith("/s") and "1 of 1 files" in said[-1]


def test_the_next_call_goes_on_in_the_middle(server, tmp_path):
    server.script = iter([cut(HALF)])
    with pytest.raises(ValueError):
        get(tmp_path, remote(server), limits=LIMITS._replace(attempts=1))
    get(tmp_path, remote(server))
    assert server.requests[-1] == ("/file.parquet", f"bytes={HALF}-")
    assert (tmp_path / "file.parquet").read_bytes() == CONTENT


def test_what_is_there_is_not_fetched_again_and_nobody_is_asked(server, tmp_path):
    get(tmp_path, remote(server))
    server.requests.clear()
    download.fetch(tmp_path, "test", lambda: pytest.fail("asked"), LIMITS)
    assert server.requests == []
    # Where the manifest does not know of it yet, as after kill -9, it is hashed.
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files"]["file.parquet"]["done"] = False
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    get(tmp_path, remote(server))
    assert server.requests == []
    (tmp_path / "file.parquet").write_bytes(OTHER)
    (tmp_path / "manifest.json").unlink()
    get(tmp_path, remote(server))
    assert (tmp_path / "file.parquet").read_bytes() == CONTENT


@pytest.mark.parametrize("honours", [True, False])
def test_a_new_version_without_a_stated_hash_is_taken_whole(server, tmp_path, honours):
    """What the If-Range header is for; and a server that does not know it is found out."""
    unstated = remote(server, size=None, sha256=None)
    server.script = iter([cut(HALF)])
    with pytest.raises(ValueError):
        get(tmp_path, unstated, limits=LIMITS._replace(attempts=1))
    new = parquet(2, documents=450)
    server.content = new

    def answer(handler):
        asked = handler.headers.get("If-Range")
        if honours and asked == '"1"':
            handler.whole(new, ETag='"2"')
        else:
            handler.begin(None, ETag='"2"')

    server.answer = answer
    get(tmp_path, unstated)
    assert (tmp_path / "file.parquet").read_bytes() == new
    assert facts_of(tmp_path)["etag"] == '"2"'


def test_a_file_that_changed_on_the_hub_is_told(server, tmp_path):
    get(tmp_path, remote(server))
    with pytest.raises(ValueError, match="has changed on the hub"):
        download.fetch(
            tmp_path, "test", lambda: [remote(server, OTHER)], LIMITS, selection="another"
        )
    assert (tmp_path / "file.parquet").read_bytes() == CONTENT
    with pytest.raises(ValueError, match="holds something else"):
        download.fetch(tmp_path, "another", lambda: [remote(server)], LIMITS)


def test_one_file_that_cannot_be_had_does_not_take_the_others_along(server, tmp_path):
    server.answer = lambda handler: (
        handler.begin(None) if "good" in handler.path else handler.head(404, Content_Length=0)
    )
    remotes = [
        remote(server, name=name) for name in ("good1.parquet", "bad.parquet", "good2.parquet")
    ]
    with pytest.raises(ValueError, match=r"bad.parquet is not there: the server answers 404"):
        get(tmp_path, *remotes, limits=LIMITS._replace(connections=1))
    assert visible(tmp_path) == ["good1.parquet", "manifest.json"]


def test_too_little_room_is_told_before_anything_is_fetched(server, tmp_path):
    with pytest.raises(ValueError, match=r"has room for .* GB and needs 1000000\.0 GB more"):
        get(tmp_path, remote(server, size=10**15))
    assert server.requests == []


def test_a_git_hash_serves_where_the_hub_states_no_other(server, tmp_path):
    right = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
    get(tmp_path / "a", remote(server, sha256=None, git_sha1=right))
    with pytest.raises(ValueError, match="git_sha1"):
        get(tmp_path / "b", remote(server, sha256=None, git_sha1="0" * 40))
    assert visible(tmp_path / "b") == ["manifest.json"]


# ---- A hub --------------------------------------------------------------------------------------

SHARDS = {f"shard_{number:05}.parquet": parquet(number, 200) for number in range(6)}


class Hub:
    """The part of the hub's interface that downloads use, over one repository."""

    def __init__(self, server, files, page=4):
        self.server, self.files, self.page = server, files, page
        self.trees, self.sent, self.hangs_at = [], [], None
        server.answer = self.answer

    def answer(self, handler):
        url = urlsplit(handler.path)
        parts = unquote(url.path).split("/", 6)
        if parts[1] == "api":  # /api/datasets/OWNER/NAME/tree/...
            self.trees.append(handler.path)
            self.list(handler, parse_qs(url.query))
        elif parts[1] == "datasets":  # /datasets/OWNER/NAME/resolve/...
            handler.head(
                302, Content_Length=0, Location=f"/cdn/{url.path.partition('/resolve/')[2]}"
            )
        else:
            name = next(name for name in self.files if unquote(url.path).endswith(f"/{name}"))
            handler.server.content = self.files[name]
            self.sent.append((name, handler.headers.get("Range")))
            if len(self.sent) == self.hangs_at:
                handler.begin(HALF // 4)
                handler.wfile.flush()
                handler.server.closing.wait(60)
            else:
                handler.begin(None)

    def list(self, handler, query):
        begin = int(query.get("cursor", ["0"])[0])
        entries = [{"type": "directory", "path": "data", "size": 0, "oid": "0" * 40}]
        for path, content in self.files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            sha256 = hashlib.sha256(content).hexdigest()
            entries.append(entry | {"lfs": {"oid": sha256, "size": len(content)}})
        following = begin + self.page
        headers = {"Content_Type": "application/json"}
        if following < len(entries):
            # As a mirror does that hands on what the hub has said.
            url = f"https://huggingface.co/elsewhere?recursive=true&cursor={following}"
            headers["Link"] = f'<{url}>; rel="next"'
        handler.whole(json.dumps(entries[begin:following]).encode(), **headers)


def make_config(server, folder, **values):
    url = server if isinstance(server, str) else server.url
    given = {
        "hub_url": url,
        "download_path": folder,
        "download_timeout_seconds": 0.5,
        "download_attempts": 1,
        "download_connections": 1,  # the test hub knows one content at a time
        "dataset_type": "hf",
        "dataset_name": "hf:someone/texts",
    } | values
    return pyconfig.initialize(["configs/base.yml", *(f"{k}={v}" for k, v in given.items())])


def quiet(config):
    return download.fetch_dataset(config, say=lambda line: None)


def test_shards_by_count_always_come_with_the_last_one(server, tmp_path):
    hub = Hub(server, SHARDS)
    folder = quiet(make_config(server, tmp_path, download_shards=2))
    assert folder == tmp_path / "someone--texts"
    assert visible(folder) == ["manifest.json", *(f"shard_0000{n}.parquet" for n in (0, 1, 5))]
    assert [tree.partition("?")[0] for tree in hub.trees] == [
        "/api/datasets/someone/texts/tree/main"
    ] * 2
    # More of them keep those that are there; the same again asks nobody.
    server.requests.clear()
    quiet(make_config(server, tmp_path, download_shards=4))
    fetched = [path for path, _ in server.requests if "/cdn/" in path]
    assert [Path(path).name for path in fetched] == ["shard_00002.parquet", "shard_00003.parquet"]
    server.requests.clear()
    quiet(make_config(server, tmp_path, download_shards=4))
    assert server.requests == []
    quiet(make_config(server, tmp_path))
    assert len(visible(folder)) == 7
    for name, content in SHARDS.items():
        assert (folder / name).read_bytes() == content
    config = make_config(server, tmp_path)
    assert sources.HubSource(config, "validation").files == ["shard_00005.parquet"]
    assert len(list(sources.iterate_texts(config, "train"))) == 5 * 200


def test_a_part_of_a_repository_can_be_named(server, tmp_path):
    shard = next(iter(SHARDS.values()))
    paths = [
        "data/train-0.parquet",
        "data/train-1.parquet",
        "data/test-0.parquet",
        "data/README.md",
    ]
    hub = Hub(server, dict.fromkeys([*paths, "other/a.parquet"], shard))
    folder = quiet(make_config(server, tmp_path, dataset_name="someone/texts/data/train-*"))
    assert visible(folder) == [
        "data--train-0.parquet",
        "data--train-1.parquet",
        "manifest.json",
    ]
    folder = quiet(make_config(server, tmp_path, dataset_name="hf:someone/texts/data"))
    assert folder.name == "someone--texts--data"
    assert len(visible(folder)) == 4
    with pytest.raises(ValueError, match="has 1 parquet files on the hub; at least 2"):
        quiet(make_config(server, tmp_path, dataset_name="hf:someone/texts/other"))
    hub.files["../../../evil.parquet"] = shard
    with pytest.raises(ValueError, match="no list of files"):
        quiet(make_config(server, tmp_path / "new"))


@pytest.mark.parametrize(
    "page",
    [
        HTML,
        b"[" * 100_000,
        b'{"error": "too many"}',
        b'[{"type": "file"}]',
        b'[{"type": "file", "path": "a.parquet", "size": -1, "oid": "00"}]',
        b'[{"type": "file", "path": "/etc/a.parquet", "size": 1, "oid": "%s"}]' % (b"0" * 40),
        b"\xff\xfe",
    ],
)
def test_what_is_no_list_of_files_is_told(server, tmp_path, page):
    server.answer = lambda handler: handler.whole(page)
    with pytest.raises(ValueError, match="the answer is no list of files") as caught:
        quiet(make_config(server, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_list_that_goes_round_in_a_circle_ends(server, tmp_path):
    link = {"Link": '<http://x/?cursor=1>; rel="next"'}
    server.answer = lambda handler: handler.whole(b"[]", **link)
    with pytest.raises(ValueError, match="round in a circle"):
        quiet(make_config(server, tmp_path))


def test_a_split_of_a_chat_task_lies_as_nanochat_has_it(server, tmp_path):
    shard = next(iter(SHARDS.values()))
    hub = Hub(server, {"main/train/0000.parquet": shard, "main/train/0001.parquet": CONTENT})
    config = make_config(server, tmp_path)
    args = ("openai/gsm8k", "main", "train")
    folder = download.fetch_split(config, *args, say=lambda line: None)
    assert folder == tmp_path / "task_data/openai--gsm8k/main/train"
    assert json.loads((folder / "manifest.json").read_text()) == ["00000.parquet", "00001.parquet"]
    assert (folder / "00001.parquet").read_bytes() == CONTENT
    assert hub.trees == [
        "/api/datasets/openai/gsm8k/tree/refs%2Fconvert%2Fparquet/main/train?recursive=true"
    ]
    # It is there, and so is one that nanochat has fetched: nobody is asked.
    (folder.parent / "test").mkdir()
    (folder.parent / "test/00000.parquet").write_bytes(shard)
    (folder.parent / "test/manifest.json").write_text('["00000.parquet"]')
    server.requests.clear()
    assert download.fetch_split(config, *args) == folder
    assert download.fetch_split(config, *args[:2], "test").name == "test"
    assert server.requests == []
    # A second split beside them leaves the first as it was.
    hub.files = {"main/validation/0000.parquet": parquet(3)}
    other = download.fetch_split(config, *args[:2], "validation", say=lambda line: None)
    assert visible(other) == ["00000.parquet", "manifest.json"]
    assert download.fetch_split(config, *args) == folder


def bundle(damaged=False):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("eval_bundle/core.yaml", "icl_tasks: []\n" * 1000)
    content = bytearray(buffer.getvalue())
    content[200] ^= damaged
    return bytes(content)


def test_the_core_bundle_is_whole_or_not_there(server, tmp_path):
    """Nothing is stated of it but its length: the archive's own checksums decide."""
    config = make_config(server, tmp_path, core_bundle_url=f"{server.url}/eval_bundle.zip")
    server.content = bundle()
    server.script = iter(
        [lambda h: h.whole(HTML), cut(5000), lambda h: h.whole(bundle(damaged=True))]
    )
    for expected in ("not as a .zip", "ended after|IncompleteRead", "damaged"):
        server.content = bundle(damaged=expected == "damaged")
        with pytest.raises(ValueError, match=expected):
            download.fetch_core(config, say=lambda line: None)
        assert visible(tmp_path / "core") == ["manifest.json"]
    server.content = bundle()
    path = download.fetch_core(config, say=lambda line: None)
    assert path.read_bytes() == bundle()
    server.requests.clear()
    assert download.fetch_core(config) == path
    assert server.requests == []


@pytest.mark.parametrize(
    ("fetch", "message"),
    [
        (
            quiet,
            "the data set someone/texts cannot be had.*refused.*; without network, put its parquet "
            "files into .*someone--texts, or train on those of dataset_path=FOLDER",
        ),
        (
            download.fetch_core,
            "the CORE bundle cannot be had.*; without network, give core_bundle=FOLDER or ARCHIVE",
        ),
        (
            lambda config: download.fetch_split(config, "openai/gsm8k", "main", "test"),
            "openai/gsm8k main/test cannot be had.*; without network, give chat_data=FOLDER or ARCHIVE",
        ),
    ],
)
def test_without_network_one_line_says_what_is_needed_and_how_to_give_it(tmp_path, fetch, message):
    nowhere = "http://127.0.0.1:1"
    config = make_config(nowhere, tmp_path, core_bundle_url=f"{nowhere}/eval_bundle.zip")
    with pytest.raises(ValueError, match=message) as caught:
        fetch(config)
    assert "\n" not in str(caught.value)


def test_mistakes_in_the_config_are_told(tmp_path):
    with pytest.raises(ValueError, match="needs dataset_name=OWNER/NAME"):
        quiet(make_config("http://127.0.0.1:1", tmp_path, dataset_name="climbmix"))
    with pytest.raises(ValueError, match="to a local folder"):
        quiet(make_config("http://127.0.0.1:1", "gs://bucket"))
    with pytest.raises(ValueError, match="dataset_type=text has nothing to download"):
        download.main(make_config("http://127.0.0.1:1", tmp_path, dataset_type="text"))


# ---- The program --------------------------------------------------------------------------------


def start(server, folder):
    words = {
        "hub_url": server.url,
        "download_path": folder,
        "dataset_type": "hf",
        "dataset_name": "someone/texts",
        "download_connections": 1,
    }
    return subprocess.Popen(
        [sys.executable, "MaxNano/data/download.py", "configs/base.yml"]
        + [f"{key}={value}" for key, value in words.items()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_program_can_be_ended_in_any_way_and_loses_nothing(server, tmp_path):
    """kill -9 and SIGTERM in the middle of a file, then on to the end."""
    hub = Hub(server, SHARDS)
    folder = tmp_path / "someone--texts"
    for number, expected in ((signal.SIGKILL, -9), (signal.SIGTERM, os.EX_TEMPFAIL)):
        hub.hangs_at = len(hub.sent) + 2
        with start(server, tmp_path) as process:
            wait_for(lambda: len(hub.sent) == hub.hangs_at, process)
            wait_for(lambda: has_grown(folder / f".{hub.sent[-1][0]}.part"), process)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=30)
        assert process.returncode == expected, stderr
        assert "Traceback" not in stderr
    assert "the same command goes on" in stderr
    with start(server, tmp_path) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "6 of 6 files" in stdout and "is complete" in stdout
    for name, content in SHARDS.items():
        assert (folder / name).read_bytes() == content
    # What had come was not fetched again: each file was begun once, and two were gone on with.
    begun = [name for name, asked in hub.sent if asked is None]
    assert sorted(begun) == sorted(SHARDS)
    gone_on = [(name, asked) for name, asked in hub.sent if asked]
    assert gone_on == [(name, f"bytes={HALF // 4}-") for name in begun[1:3]]


def has_grown(part):
    return part.exists() and part.stat().st_size == HALF // 4


def wait_for(condition, process):
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    pytest.fail("nothing came")
