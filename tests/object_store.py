"""An object store on loopback that speaks Google Cloud Storage's JSON API, with errors on demand.

What it keeps of the real one, because programs break on it: names are flat (mkdir does nothing, a
"folder" is there only while an object has its prefix), an object is replaced whole or not at all
and never renamed in place, every write gets a new generation, preconditions (ifGenerationMatch)
answer 412, listings come in pages.

    with object_store.serve() as store:
        subprocess.run([..., f"base_output_directory={store.bucket}/runs"], env={**os.environ, **store.env})
        store.objects("runs/")                       # name -> content, of what is there now
        store.fail(503, "write", "metrics.jsonl")    # the next write of such a name; see its docstring
        fault = store.fail("hang", "write", "ocdbt", count=None)
        fault.wait()                                 # until a request has met it
        store.mend()                                 # no faults any more; what hangs is let go

`env` is for subprocesses; use(store, monkeypatch) is for the process of the test. It runs in a
process of its own, for pyarrow holds the interpreter's lock while it waits. `python
tests/object_store.py` prints the environment as `export` lines and serves until it is stopped; POST
/test/fail and /test/mend with arguments as JSON do what the methods of Store do. Source:
https://cloud.google.com/storage/docs/json_api/v1, and what gcsfs, tensorstore and pyarrow send.
"""

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

BUCKET = "ours"
OPERATIONS = ("read", "write", "stat", "list", "delete", "copy", "bucket", "any")
KINDS = ("hang", "drop", "lose")
PAGE = 1000  # most entries of one answer to a listing, as in the real one


@dataclasses.dataclass
class Object:
    """One immutable version of an object."""

    content: bytes
    generation: int
    about: dict  # contentType, metadata, ... as the writer gave them
    time: str

    def resource(self, bucket, name):
        """What the JSON API says of it."""
        quoted = urllib.parse.quote(name, safe="")
        return {
            **self.about,
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{self.generation}",
            "bucket": bucket,
            "name": name,
            "selfLink": f"/storage/v1/b/{bucket}/o/{quoted}",
            "generation": str(self.generation),
            "metageneration": "1",
            "size": str(len(self.content)),
            "storageClass": "STANDARD",
            "md5Hash": base64.b64encode(hashlib.md5(self.content).digest()).decode(),
            "etag": str(self.generation),
            "timeCreated": self.time,
            "updated": self.time,
        }


@dataclasses.dataclass
class _Fault:
    """What the next requests of a kind meet."""

    kind: int | str
    operation: str
    pattern: re.Pattern
    left: int | None  # None: for ever
    skip: int
    after_bytes: int | None
    hits: int = 0


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class _Objects:
    """Objects, faults and the requests so far, inside the server. All methods may be called from
    any thread.
    """

    def __init__(self):
        self.latency_seconds = 0.0
        self.bytes_per_second = None
        self.writes_per_second = None
        self.requests = []  # (operation, name, status or kind of fault) of all requests, in order
        self.released = threading.Event()  # lets go of what hangs
        self._objects = {BUCKET: {}}
        self.uploads = {}
        self._written = {}  # name -> when it was last
        self._faults = []
        self.lock = threading.RLock()
        self._generation = int(time.time() * 1e6)

    # ---- For tests, over HTTP

    def objects(self, prefix):
        with self.lock:
            found = sorted(self._objects[BUCKET].items())
            return {
                n: base64.b64encode(o.content).decode() for n, o in found if n.startswith(prefix)
            }

    def place(self, name, content):
        self.put(name, base64.b64decode(content))

    def fail(self, kind, operation, name, count, skip, after_bytes):
        with self.lock:
            self._faults.append(_Fault(kind, operation, re.compile(name), count, skip, after_bytes))
            self.released = threading.Event()
            return len(self._faults) - 1

    def hits(self, number):
        return self._faults[number].hits

    def mend(self):
        with self.lock:
            for fault in self._faults:
                fault.left = 0
            self.released.set()

    def slow(self, latency_seconds, bytes_per_second, writes_per_second):
        self.latency_seconds, self.bytes_per_second = latency_seconds, bytes_per_second
        self.writes_per_second = writes_per_second

    def log(self):
        return list(self.requests)

    def put(self, name, content, about=None, bucket=BUCKET):
        with self.lock:
            self._generation += 1
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            found = Object(bytes(content), self._generation, about or {}, now)
            self._bucket(bucket)[name] = found
            return found

    def delete(self, name):
        with self.lock:
            del self._objects[BUCKET][name]

    # ---- For the handler

    def meet(self, operation, name):
        """The fault that this request meets, if any."""
        with self.lock:
            for fault in self._faults:
                if (
                    fault.operation in (operation, "any")
                    and fault.pattern.search(name)
                    and fault.left != 0
                ):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    if fault.left is not None:
                        fault.left -= 1
                    return fault
        return None

    def _bucket(self, bucket):
        if bucket not in self._objects:
            raise Refused(404, f"The specified bucket does not exist: {bucket}")
        return self._objects[bucket]

    def get(self, bucket, name, query):
        """The object, if preconditions allow."""
        with self.lock:
            found = self._bucket(bucket).get(name)
            self._check(found, query)
            if found is None or query.get("generation", str(found.generation)) != str(
                found.generation
            ):
                raise Refused(404, f"No such object: {bucket}/{name}")
            return found

    def _check(self, found, query, prefix="if"):
        here = found.generation if found else 0
        if query.get(f"{prefix}GenerationMatch", str(here)) != str(here):
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if query.get(f"{prefix}MetagenerationMatch", "1") != "1":
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if query.get(f"{prefix}GenerationNotMatch") == str(here):
            raise Refused(304, "")

    def write(self, bucket, name, content, about, query):
        """Replaces an object, if preconditions and the rate of writes allow."""
        with self.lock:
            self._check(self._bucket(bucket).get(name), query)
            now = time.monotonic()
            if (
                self.writes_per_second
                and now - self._written.get(name, -1e9) < 1 / self.writes_per_second
            ):
                raise Refused(
                    429,
                    f"The object {bucket}/{name} exceeded the rate limit for object mutation operations",
                )
            self._written[name] = now
            return self.put(name, content, about, bucket)

    def remove(self, bucket, name, query):
        with self.lock:
            self.get(bucket, name, query)
            del self._objects[bucket][name]

    def copy(self, bucket, name, to_bucket, to_name, query, about):
        with self.lock:
            source = {
                key.replace("Source", ""): value for key, value in query.items() if "Source" in key
            }
            if "sourceGeneration" in query:
                source["generation"] = query["sourceGeneration"]
            found = self.get(bucket, name, source)
            return self.write(to_bucket, to_name, found.content, about or found.about, query)

    def list(self, bucket, query):
        """One page of a listing."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        size = min(int(query.get("maxResults", PAGE)), PAGE)
        with self.lock:
            entries = {}
            for name, found in self._bucket(bucket).items():
                if not name.startswith(prefix) or name < query.get("startOffset", ""):
                    continue
                if "endOffset" in query and name >= query["endOffset"]:
                    continue
                head, cut, _ = (
                    name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                )
                if cut:
                    entries[prefix + head + cut] = None
                else:
                    entries[name] = found.resource(bucket, name)
        names = sorted(name for name in entries if name > query.get("pageToken", ""))
        page = {"kind": "storage#objects"}
        if items := [entries[name] for name in names[:size] if entries[name]]:
            page["items"] = items
        if prefixes := [name for name in names[:size] if not entries[name]]:
            page["prefixes"] = prefixes
        if len(names) > size:
            page["nextPageToken"] = names[size - 1]
        return page


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request, address):
        if not isinstance(sys.exception(), (OSError, ValueError)):
            super().handle_error(request, address)


class _Cut(OSError):
    """The connection is to be cut."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *arguments):
        pass

    def do_GET(self):  # noqa: N802 (the name that http.server calls)
        self._body = None  # not read yet
        url = urllib.parse.urlsplit(self.path)
        self._query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        try:
            status, headers, content = self._route(url.path)
        except Refused as error:
            self._finish_body()
            status, headers, content = self._error(error.status, str(error))
        except _Cut:
            self._cut()
            return
        self._answer(status, headers, content)

    do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_GET  # noqa: N815

    # ---- Requests

    def _route(self, path):
        parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
        match [self.command, *parts]:
            case ["POST", "test", what]:
                return self._json(
                    getattr(self._store, what)(**json.loads(self._read_body() or b"{}"))
                )
            case ["GET", "storage", "v1", "b"]:
                return self._meet("bucket", "", lambda: self._buckets())
            case ["GET", "storage", "v1", "b", bucket]:
                return self._meet("bucket", "", lambda: self._bucket(bucket))
            case ["GET", "storage", "v1", "b", bucket, "o"]:
                return self._meet("list", self._listed(), lambda: self._list(bucket))
            case ["GET", *_, "b", bucket, "o", name] if self._query.get("alt") == "media":
                return self._read(bucket, name)
            case ["GET", "storage", "v1", "b", bucket, "o", name]:
                return self._meet("stat", name, lambda: self._stat(bucket, name))
            case ["DELETE", "storage", "v1", "b", bucket, "o", name]:
                return self._meet("delete", name, lambda: self._delete(bucket, name))
            case ["PATCH", "storage", "v1", "b", bucket, "o", name]:
                return self._meet("stat", name, lambda: self._stat(bucket, name))
            case ["POST", "storage", "v1", "b", bucket, "o", name, "compose"]:
                return self._meet("copy", name, lambda: self._compose(bucket, name))
            case ["POST", "storage", "v1", "b", bucket, "o", name, "moveTo", "o", to_name]:
                return self._meet(
                    "copy", to_name, lambda: self._copy(bucket, name, bucket, to_name, is_move=True)
                )
            case [
                "POST",
                "storage",
                "v1",
                "b",
                bucket,
                "o",
                name,
                how,
                "b",
                to_bucket,
                "o",
                to_name,
            ]:
                return self._meet(
                    "copy", to_name, lambda: self._copy(bucket, name, to_bucket, to_name, how)
                )
            case ["POST" | "PUT" | "DELETE", *_, "b", bucket, "o"] if "upload_id" in self._query:
                return self._resume(bucket)
            case ["POST" | "PUT", "upload", "storage", "v1", "b", bucket, "o"]:
                return self._upload(bucket)
            case ["POST", "batch", "storage", "v1"]:
                return self._batch()
            case ["GET", bucket, *name] if name:  # the XML API
                return self._read(bucket, "/".join(name))
        raise Refused(501, f"not in this store: {self.command} {self.path}")

    def _meet(self, operation, name, act, size=0):
        """Lets the request meet a fault, or does what it asks for."""
        fault = self._store.meet(operation, name)
        time.sleep(self._store.latency_seconds)
        kind = fault and fault.kind
        status = "hang"
        try:
            if kind is None or kind == "lose":
                if self._body is None:
                    self._read_body()
                answer = act()
                status = answer[0]
            if kind == "lose":
                status = kind
                raise _Cut
            if kind is None:
                return answer
            if isinstance(kind, int):
                raise Refused(kind, f"{kind} on demand")
            status = kind
            return self._strike(fault, operation, act)
        except Refused as error:
            status = error.status
            raise
        finally:
            self._store.requests.append((operation, name, status))
            if fault and status != "hang":
                fault.hits += 1

    def _strike(self, fault, operation, act):
        """Hangs or drops, in the middle of the content where there is one."""
        if operation == "write" and self._body is None:
            length = int(self.headers.get("Content-Length", 0))
            self._read_exactly(
                min(length, length // 2 if fault.after_bytes is None else fault.after_bytes)
            )
        elif operation == "read":
            with contextlib.suppress(Refused):
                status, headers, content = act()
                self._start(status, headers, len(content))
                self.wfile.write(
                    content[: len(content) // 2 if fault.after_bytes is None else fault.after_bytes]
                )
                self.wfile.flush()
        if fault.kind == "hang":
            fault.hits += 1
            self._store.released.wait()
        raise _Cut

    def _buckets(self):
        items = [{"kind": "storage#bucket", "name": name} for name in self._store._objects]
        return self._json({"kind": "storage#buckets", "items": items})

    def _bucket(self, bucket):
        self._store._bucket(bucket)
        return self._json(
            {"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "US-CENTRAL1"}
        )

    def _listed(self):
        """The prefix that a listing is of; tensorstore gives a range of names instead."""
        return self._query.get("prefix") or self._query.get("startOffset", "")

    def _list(self, bucket):
        return self._json(self._store.list(bucket, self._query))

    def _stat(self, bucket, name):
        return self._json(self._store.get(bucket, name, self._query).resource(bucket, name))

    def _delete(self, bucket, name):
        self._store.remove(bucket, name, self._query)
        return 204, {}, b""

    def _compose(self, bucket, name):
        wanted = json.loads(self._body)
        parts = [
            self._store.get(bucket, part["name"], {}).content for part in wanted["sourceObjects"]
        ]
        about = wanted.get("destination") or {}
        return self._json(
            self._store.write(bucket, name, b"".join(parts), about, self._query).resource(
                bucket, name
            )
        )

    def _copy(self, bucket, name, to_bucket, to_name, how="rewriteTo", is_move=False):
        about = json.loads(self._body) if self._body.strip() else {}
        found = self._store.copy(bucket, name, to_bucket, to_name, self._query, about)
        resource = found.resource(to_bucket, to_name)
        if is_move:
            self._store.remove(bucket, name, {})
            return self._json(resource)
        if how == "copyTo":
            return self._json(resource)
        size = str(len(found.content))
        done = {"kind": "storage#rewriteResponse", "done": True, "resource": resource}
        return self._json({**done, "totalBytesRewritten": size, "objectSize": size})

    def _read(self, bucket, name):
        return self._meet("read", name, lambda: self._media(bucket, name))

    def _media(self, bucket, name):
        found = self._store.get(bucket, name, self._query)
        total = len(found.content)
        headers = {
            "Content-Type": found.about.get("contentType", "application/octet-stream"),
            "x-goog-generation": str(found.generation),
            "x-goog-metageneration": "1",
            "ETag": f'"{found.generation}"',
            "x-goog-stored-content-length": str(total),
            "Accept-Ranges": "bytes",
            "Last-Modified": self.date_time_string(),
        }
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, headers, found.content
        if wanted[1]:
            begin, end = int(wanted[1]), min(int(wanted[2] or total - 1), total - 1)
        else:
            begin, end = max(0, total - int(wanted[2])), total - 1
        if begin >= total:
            raise Refused(416, f"The requested range cannot be satisfied: {wanted[0]} of {total}")
        headers["Content-Range"] = f"bytes {begin}-{end}/{total}"
        return 206, headers, found.content[begin : end + 1]

    def _upload(self, bucket):
        kind, name = self._query.get("uploadType"), self._query.get("name")
        if kind == "media":
            about = {"contentType": self.headers.get("Content-Type", "application/octet-stream")}
            return self._meet("write", name, lambda: self._put(bucket, name, self._body, about))
        if (
            kind == "multipart" and name is None
        ):  # its name stands in the body, which comes before any fault then
            about, content = self._parts(self._peek_body())
            name = about["name"]
            return self._meet("write", name, lambda: self._put(bucket, name, content, about))
        if kind == "multipart":
            return self._meet(
                "write", name, lambda: self._put(bucket, name, *self._parts(self._body)[::-1])
            )
        if kind == "resumable":
            about = json.loads(self._peek_body() or b"{}")
            name = name or about["name"]
            return self._meet("write", name, lambda: self._begin(bucket, name, about))
        raise Refused(400, f"uploadType={kind}")

    def _put(self, bucket, name, content, about):
        about = {
            key: value
            for key, value in about.items()
            if key in ("contentType", "metadata", "cacheControl")
        }
        return self._json(
            self._store.write(bucket, name, content, about, self._query).resource(bucket, name)
        )

    def _parts(self, body):
        """(what the JSON part says, content) of a multipart upload."""
        boundary = re.search(r"boundary=[\"']?([^\"';]+)", self.headers["Content-Type"])[1].encode()
        _, about, rest = body.split(b"--" + boundary, 2)
        line_end = (
            b"\r\n" if about.startswith(b"\r\n") else b"\n"
        )  # the sender's; content may end with any byte
        blank = re.search(rb"\r?\n\r?\n", about)
        about = json.loads(about[blank.end() :])
        content = rest[re.search(rb"\r?\n\r?\n", rest).end() : rest.rindex(b"--" + boundary)]
        return about, content.removesuffix(line_end)

    def _begin(self, bucket, name, about):
        store = self._store
        with store.lock:
            store._check(store._bucket(bucket).get(name), self._query)
            key = f"upload{len(store.uploads)}"
            store.uploads[key] = [bucket, name, about, dict(self._query), bytearray()]
        query = urllib.parse.urlencode({"uploadType": "resumable", "upload_id": key})
        host = self.headers.get("Host")
        return 200, {"Location": f"http://{host}/upload/storage/v1/b/{bucket}/o?{query}"}, b""

    def _resume(self, bucket):
        upload = self._store.uploads.get(self._query["upload_id"])
        if upload is None:
            raise Refused(404, "no such upload")
        return self._meet("write", upload[1], lambda: self._append(upload))

    def _append(self, upload):
        bucket, name, about, query, content = upload
        if self.command == "DELETE":
            del self._store.uploads[self._query["upload_id"]]
            return 499, {}, b""
        span = re.fullmatch(
            r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", "bytes */*")
        )
        if span[1] is not None:
            begin = int(span[1])
            if begin > len(content):
                raise Refused(503, f"bytes {len(content)}-{begin} are missing")
            content[begin:] = self._body
        elif "Content-Range" not in self.headers:
            content[:] = self._body
        total = span[3] if "Content-Range" in self.headers else str(len(content))
        if total != "*" and len(content) == int(total):
            self._query = query
            answer = self._put(bucket, name, bytes(content), about)
            return answer
        headers = {"Range": f"bytes=0-{len(content) - 1}"} if content else {}
        return 308, headers, b""

    def _batch(self):
        """Several deletions in one request."""
        boundary = re.search(r"boundary=\"?([^\";]+)", self.headers["Content-Type"])[1]
        answers = []
        for part in self._read_body().decode().split(f"--{boundary}")[1:-1]:
            path = re.search(r"DELETE (\S+) HTTP", part)[1]
            *_, bucket, _, name = path.split("?")[0].split("/")
            name = urllib.parse.unquote(name)
            fault = self._store.meet("delete", name)
            try:
                if fault:
                    fault.hits += 1
                    raise Refused(fault.kind if isinstance(fault.kind, int) else 503, "on demand")
                self._store.remove(urllib.parse.unquote(bucket), name, {})
                answers.append("HTTP/1.1 204 No Content\r\n")
            except Refused as error:
                answers.append(
                    f'HTTP/1.1 {error.status} X\r\n\r\n{{"error": {{"message": "{error}"}}}}'
                )
        text = "".join(f"--batch\r\nContent-Type: application/http\r\n\r\n{a}\r\n" for a in answers)
        return 200, {"Content-Type": "multipart/mixed; boundary=batch"}, f"{text}--batch--".encode()

    # ---- Bytes

    @property
    def _store(self):
        return self.server.store

    def _read_body(self):
        if self._body is not None:
            return self._body
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self._read_exactly(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            self._body = b"".join(chunks)
        else:
            self._body = self._read_exactly(int(self.headers.get("Content-Length", 0)))
        return self._body

    _peek_body = _read_body

    def _finish_body(self):
        """Reads what an error left unread, so that the connection can go on."""
        if self._body is None:
            self._read_body()

    def _read_exactly(self, length):
        parts, left = [], length
        while left:
            part = self.rfile.read(min(left, 1 << 16))
            if not part:
                raise _Cut
            self._pace(len(part))
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _pace(self, size):
        if self._store.bytes_per_second:
            time.sleep(size / self._store.bytes_per_second)

    def _json(self, value):
        return 200, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(value).encode()

    def _error(self, status, message):
        if status == 304:
            return 304, {}, b""
        reason = {429: "rateLimitExceeded", 412: "conditionNotMet", 404: "notFound"}.get(
            status, "backendError"
        )
        error = {
            "code": status,
            "message": message,
            "errors": [{"message": message, "reason": reason}],
        }
        return status, {"Content-Type": "application/json"}, json.dumps({"error": error}).encode()

    def _start(self, status, headers, length):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _answer(self, status, headers, content):
        try:
            self._start(status, headers, len(content))
            if self.command != "HEAD":
                for begin in range(0, len(content), 1 << 16):
                    part = content[begin : begin + (1 << 16)]
                    if self.command == "GET" and "x-goog-generation" in headers:
                        self._pace(len(part))
                    self.wfile.write(part)
            self.wfile.flush()
        except OSError:  # the client has gone
            self.close_connection = True

    def _cut(self):
        """Ends the connection with a reset, as a lost machine or a broken network does."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


class Fault:
    """A fault that Store.fail ordered."""

    def __init__(self, store, number):
        self._store, self._number = store, number

    @property
    def hits(self):
        """How many requests have met it."""
        return self._store.call("hits", number=self._number)

    def wait(self, timeout=200):
        """Returns when a request has met it."""
        end = time.monotonic() + timeout
        while not self.hits:
            assert time.monotonic() < end, f"no request met the fault in {timeout} s"
            time.sleep(0.01)


class Store:
    """An object store with one bucket, seen from a test."""

    def __init__(self, url):
        self.url = url
        self.bucket = f"gs://{BUCKET}"

    @property
    def env(self):
        """The environment that brings gcsfs, tensorstore, pyarrow and google.cloud.storage here,
        all anonymous.

        pyarrow asks the machine for credentials unless the address is gs://anonymous@ours/...
        """
        return {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs and google.cloud.storage
            "FSSPEC_GCS_TOKEN": "anon",
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anonymous",  # tensorstore
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,  # pyarrow
            "no_proxy": "127.0.0.1",
        }

    def objects(self, prefix=""):
        """Name -> content of what is in the bucket, sorted."""
        return {
            name: base64.b64decode(text)
            for name, text in self.call("objects", prefix=prefix).items()
        }

    def put(self, name, content):
        """Writes an object, as if another machine had."""
        self.call("place", name=name, content=base64.b64encode(content).decode())

    def delete(self, name):
        """Removes an object, as if another machine had."""
        self.call("delete", name=name)

    def fail(self, kind, operation="any", name="", *, count=1, skip=0, after_bytes=None):
        """Makes the next `count` requests fail (None: all), after `skip` good ones; returns the
        Fault.

        kind: an HTTP status such as 503, 429, 412 or 403; "hang": no answer until mend(); "drop":
        the connection is cut in the middle, an upload leaves nothing; "lose": it is done, but the
        connection is cut before the answer. operation: one of OPERATIONS. name: a regular
        expression found in the object's name or the listed prefix. after_bytes: of the content,
        after which "hang" and "drop" strike; half of it unless given.
        """
        assert isinstance(kind, int) or kind in KINDS, kind
        assert operation in OPERATIONS, operation
        order = {"count": count, "skip": skip, "after_bytes": after_bytes}
        return Fault(self, self.call("fail", kind=kind, operation=operation, name=name, **order))

    def mend(self):
        """Removes all faults and lets go of what hangs."""
        self.call("mend")

    def slow(self, latency_seconds=0.0, bytes_per_second=None, writes_per_second=None):
        """latency: before each answer. bytes_per_second: of each up- and download.
        writes_per_second: of the same name, above which the answer is 429; the real limit is
        one."""
        limits = {"bytes_per_second": bytes_per_second, "writes_per_second": writes_per_second}
        self.call("slow", latency_seconds=latency_seconds, **limits)

    @property
    def requests(self):
        """(operation, name, status or kind of fault) of all requests so far, in the order of their
        ends.
        """
        return [tuple(row) for row in self.call("log")]

    def call(self, what, **arguments):
        """What a method of the server returns."""
        order = urllib.request.Request(
            f"{self.url}/test/{what}", json.dumps(arguments).encode(), method="POST"
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(order, timeout=60) as answer:
            return json.load(answer)


@contextlib.contextmanager
def serve():
    """A running Store, empty."""
    command = [sys.executable, "-S", __file__, "stop with stdin"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Store(re.search(r"STORAGE_EMULATOR_HOST=(\S+)", process.stdout.readline())[1])
        finally:
            process.kill()


def use(store, monkeypatch):
    """Lets the clients in this process speak to the store."""
    for name, value in store.env.items():
        monkeypatch.setenv(name, value)


def main():
    server = _Server(("127.0.0.1", 0), _Handler)
    server.store = _Objects()
    store = Store(f"http://127.0.0.1:{server.server_address[1]}")
    for name, value in {**store.env, "BUCKET": store.bucket}.items():
        print(f"export {name}={value}", flush=True)
    if len(sys.argv) > 1:  # so that no test that is killed leaves it behind
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever(0.05)


if __name__ == "__main__":
    main()
