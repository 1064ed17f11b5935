"""A server on loopback in a thread of the test process, and raw requests to it."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator

from MaxNano import pyconfig
from MaxNano.serving.app import make_app
from MaxNano.serving.http_server import bind, make_server


def wait_until(condition, seconds=100):
    """Wait until the condition holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {seconds} s"
        time.sleep(0.005)


class Server:
    """Serves an engine within a `with` block. overrides: key=value words, without a config.

    app: what to serve instead of the engine alone.
    """

    def __init__(self, engine, *overrides, key=None, config=None, app=None):
        self.engine = engine
        self.config = config or pyconfig.initialize(
            ["configs/base.yml", "run_name=tiny", *overrides]
        )
        app = app or make_app(self.config, engine, key)
        self.service = next(iter(app.state.models.services.values()), None)
        self.key = key
        bound = bind("127.0.0.1", 0)
        self.port = bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._server = make_server(app, drain_seconds=5)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [bound]})

    def __enter__(self):
        self._thread.start()
        wait_until(lambda: self._server.started)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    def request(self, method, path, body=None, headers=None, raw=None):
        """(status, headers, body) of one request; a body is sent as JSON, `raw` as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=200)
        headers = {"Content-Type": "application/json", **(headers or {})}
        if self.key:
            headers.setdefault("Authorization", f"Bearer {self.key}")
        data = json.dumps(body).encode() if body is not None else raw
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), content

    def chat(self, text="hi", **more):
        """(status, object) of a chat of one message."""
        body = {"messages": [{"role": "user", "content": text}], **more}
        status, _, content = self.request("POST", "/v1/chat/completions", body)
        return status, json.loads(content)

    @property
    def client(self):
        """A client of the openai package."""
        import openai  # here: it takes a second in every process of the tests

        return openai.OpenAI(
            base_url=self.url, api_key=self.key or "none", max_retries=0, timeout=300
        )

    @contextlib.contextmanager
    def streaming(self, **more) -> Iterator[socket.socket]:
        """A connection with a reply that has begun."""
        body = json.dumps(
            {"messages": [{"role": "user", "content": "hi"}], "stream": True, **more}
        ).encode()
        with self.connection(f"Content-Length: {len(body)}\r\n\r\n".encode() + body) as connection:
            assert b" 200 " in connection.recv(1000)
            yield connection

    def connection(self, rest: bytes) -> socket.socket:
        """A connection with the beginning of a chat request."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=200)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + rest)
        return connection
