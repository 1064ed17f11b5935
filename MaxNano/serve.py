"""An OpenAI-compatible server for one model, with a page to chat with it.

    python MaxNano/serve.py configs/base.yml model=d24 stage=sft     # then open http://127.0.0.1:8000

It serves /v1/models, /v1/completions, /v1/chat/completions, /health and /metrics (Prometheus), the page at /, and
/tokenize, /detokenize and /tokenizer_info as vLLM has them, by which lm-eval counts tokens. Many requests share the
engine's running batch; more than fit wait, and more than may wait are told to come back later.

Only this machine can reach it unless serve_host says otherwise, which takes an API key in the environment. What
people write is neither logged nor kept. SIGTERM lets the replies under way end, then the server leaves.
"""

import importlib.util
import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a script: MaxNano/ itself must not be where modules are looked for
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from MaxNano import pyconfig

    pyconfig.check_command_line()  # a typo is told now, not when JAX has been imported
    if not all(map(importlib.util.find_spec, ("starlette", "uvicorn", "prometheus_client"))):
        print(
            "error: the server's packages are not installed: EXTRAS=serve bash setup.sh",
            file=sys.stderr,
        )
        sys.exit(2)

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import math
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import h11
import prometheus_client
import uvicorn
from ml_collections import FrozenConfigDict
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from MaxNano import pyconfig
from MaxNano.distributed import runtime
from MaxNano.inference import dialogue
from MaxNano.inference import engine as engines
from MaxNano.serving import openai_api
from MaxNano.serving.openai_api import ApiError, Call, Choice, Delta, Replies, Rules
from MaxNano.training.loading import load_engine

log = logging.getLogger("maxnano.serve")

STATIC = Path(__file__).resolve().parent / "serving" / "static"
UPLOAD_SECONDS = 20.0  # within which a request's head, and then its body, must have come
MAX_REFUSED_BYTES = (
    8 << 20
)  # of a body that is too large, read and dropped so that the answer is not lost
MAX_UPLOADS = 256  # bodies that are being read at a time
KEEP_ALIVE_SECONDS = 15
GRACE_SECONDS = 5.0  # for a client to take the last of a reply that its deadline ended
SHORTEST_KEY = 16  # characters of an API key
LONGEST_RETRY = 60  # seconds after which a client is told to come back, at most

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; require-trusted-types-for 'script'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
CONTENT_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


# ---- The engine in its thread -------------------------------------------------------------------


class Stream:
    """What the engine has to say about the requests of one call, read on the event loop."""

    def __init__(self, call: Call):
        self.call = call
        self.news: asyncio.Queue[tuple[int, engines.Event] | Exception] = asyncio.Queue()
        self.numbers: list[int] = []  # the engine's, known to its thread alone
        self.is_over = False  # the call needs nothing any more


class _Running(NamedTuple):
    """A request in the engine."""

    stream: Stream
    position: int  # of its prompt in the call


class EngineThread:
    """The one thread that touches the engine; orders come in by a queue, events go out to the event loop."""

    def __init__(self, engine: engines.Engine):
        self.engine = engine
        self.is_alive = False
        self._orders: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = (
            queue.SimpleQueue()
        )
        self._running: dict[int, _Running] = {}
        self._left: dict[int, int] = {}  # samples that have not ended, by number
        self._stopping = False

    # On the event loop.

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.is_alive = True
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step; whoever waits for the engine then waits in vain."""
        self._orders.put((self._stop, ()))
        self._thread.join()

    def submit(self, call: Call) -> Stream:
        stream = Stream(call)
        self._orders.put((self._submit, (stream,)))
        return stream

    def cancel(self, stream: Stream) -> None:
        """Free its slots before the next step."""
        stream.is_over = True
        self._orders.put((self._cancel, (stream,)))

    # In the thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                if not self.engine.is_idle:
                    self._publish(self._step())
        except Exception:
            log.exception("the engine is broken beyond repair; start the server again")
        finally:
            self.is_alive = False
            self._tell(
                [(stream, ApiError(503, "the engine has stopped")) for stream in self._abandoned()]
            )

    def _abandoned(self) -> list[Stream]:
        """Whoever still waits for something."""
        streams = {id(running.stream): running.stream for running in self._running.values()}
        with contextlib.suppress(queue.Empty):
            while True:
                order, arguments = self._orders.get_nowait()
                if order == self._submit:
                    streams[id(arguments[0])] = arguments[0]
        return list(streams.values())

    def _obey(self) -> None:
        """Carry out what was ordered; wait for an order where there is nothing else to do."""
        wait = self.engine.is_idle
        with contextlib.suppress(queue.Empty):
            while True:
                order, arguments = self._orders.get(block=wait)
                order(*arguments)
                wait = False

    def _step(self) -> list[engines.Event]:
        try:
            return self.engine.step()
        except Exception:
            log.exception("a step of the engine failed; its requests end with an error")
            self.engine.reset()
            return []

    def _submit(self, stream: Stream) -> None:
        if stream.is_over:
            return
        try:
            for position, request in enumerate(stream.call.requests):
                number = self.engine.submit(request)
                stream.numbers.append(number)
                self._running[number] = _Running(stream, position)
                self._left[number] = request.samples
        except ValueError as error:
            self._cancel(stream)
            self._tell([(stream, ApiError(400, str(error)))])

    def _cancel(self, stream: Stream) -> None:
        for number in stream.numbers:
            self.engine.cancel(number)

    def _stop(self) -> None:
        self._stopping = True

    def _publish(self, events: Sequence[engines.Event]) -> None:
        told = []
        for event in events:
            running = self._running[event.request]
            told.append((running.stream, (running.position, event)))
            if event.finish:
                self._left[event.request] -= 1
                if not self._left[event.request]:
                    del self._running[event.request], self._left[event.request]
        if told:
            self._tell(told)

    def _tell(self, told: Sequence[tuple[Stream, Any]]) -> None:
        def put() -> None:
            for stream, news in told:
                if not stream.is_over:
                    stream.news.put_nowait(news)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(put)


# ---- Metrics ------------------------------------------------------------------------------------


class Metrics:
    """What /metrics tells."""

    def __init__(self, engine: engines.Engine):
        prometheus_client.disable_created_metrics()  # a second series for each, with the time of its start
        self.registry = prometheus_client.CollectorRegistry()
        own = {"namespace": "maxnano", "registry": self.registry}
        seconds = {**own, "buckets": (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)}
        counter, histogram = prometheus_client.Counter, prometheus_client.Histogram
        self.requests = counter("requests", "Requests answered", ["path", "status"], **own)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts taken", **own)
        self.generated_tokens = counter("generated_tokens", "Tokens of replies", **own)
        self.request_seconds = histogram("request_seconds", "Whole generations", **seconds)
        self.first_token_seconds = histogram(
            "first_token_seconds", "Time to the first token", **seconds
        )
        gauges = {
            "slots": ("Sequences that can be generated together", lambda: engine.slots),
            "sequences_running": ("Sequences in slots", lambda: engine.running),
            "requests_waiting": ("Requests in the engine's queue", lambda: engine.waiting),
        }
        for name, (help_text, read) in gauges.items():
            prometheus_client.Gauge(name, help_text, **own).set_function(read)

    def text(self) -> bytes:
        return prometheus_client.generate_latest(self.registry)


# ---- The service --------------------------------------------------------------------------------


class Service:
    """What stands behind the paths: the engine's thread, the rules, the metrics, and who may come in."""

    def __init__(self, config: FrozenConfigDict, engine: engines.Engine, api_key: str | None):
        self.config = config
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.thread = EngineThread(engine)
        self.metrics = Metrics(engine)
        self.api_key = api_key
        self.capacity = engine.slots + config.serve_queue  # sequences
        self.rules = Rules(
            model=config.run_name,
            max_length=engine.max_length,
            max_sequences=self.capacity,
            max_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
        )
        self.started = int(time.time())
        self.taken = 0  # sequences that run or wait
        self.uploads = 0
        self.usual_seconds = 1.0  # of a call, a moving mean

    @contextlib.contextmanager
    def upload(self) -> Iterator[None]:
        """A place among those who send a body; ApiError 429 where nothing that it says could be taken now."""
        if self.uploads >= MAX_UPLOADS or self.taken >= self.capacity:
            raise self._busy()
        self.uploads += 1
        try:
            yield
        finally:
            self.uploads -= 1

    @contextlib.contextmanager
    def admit(self, call: Call) -> Iterator[Stream]:
        """The call in the engine until the block ends, however it ends; ApiError 429 where the queue is full."""
        if not self.thread.is_alive:
            raise ApiError(503, "the engine has stopped")
        if self.taken + call.sequences > self.capacity:
            raise self._busy()
        self.taken += call.sequences
        started = time.monotonic()
        stream = self.thread.submit(call)
        self.metrics.prompt_tokens.inc(sum(len(request.prompt) for request in call.requests))
        try:
            yield stream
        finally:
            self.taken -= call.sequences
            self.thread.cancel(stream)  # nothing, where it has ended
            seconds = time.monotonic() - started
            self.metrics.request_seconds.observe(seconds)
            self.usual_seconds += 0.1 * (seconds - self.usual_seconds)

    def _busy(self) -> ApiError:
        ahead = max(1, self.taken - self.engine.slots) / self.engine.slots
        seconds = min(LONGEST_RETRY, max(1, math.ceil(ahead * self.usual_seconds)))
        message = f"the server is busy; try again in {seconds} s"
        return ApiError(
            429, message, code="rate_limit_exceeded", headers={"retry-after": str(seconds)}
        )

    def model(self) -> dict[str, Any]:
        """The model as /v1/models tells of it, with what the page wants to know."""
        return {
            "id": self.rules.model,
            "object": "model",
            "created": self.started,
            "owned_by": "maxnano",
            "max_model_len": self.rules.max_length,
            "chat": dialogue.in_turns(self.config),
            "defaults": {
                "temperature": self.rules.temperature,
                "top_k": self.rules.top_k,
                "max_tokens": self.rules.max_tokens,
            },
        }


# ---- Answers ------------------------------------------------------------------------------------


def _encode(value: Any) -> bytes:
    # A lone surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark.
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        "utf-8", "replace"
    )


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        _encode(value), status, {"cache-control": "no-store", **(headers or {})}, "application/json"
    )


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status, error.headers)


async def read_json(request: Request) -> dict[str, Any]:
    """The body as an object; ApiError where it is too large, too slow, of another type or no such object."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps other sites' pages out: a browser asks before it sends this type anywhere else.
        raise ApiError(415, "send application/json", headers={"connection": "close"})
    body, length = bytearray(), 0
    too_large = ApiError(
        413,
        f"the body is larger than {openai_api.MAX_BODY_BYTES} bytes",
        headers={"connection": "close"},
    )
    if int(request.headers.get("content-length", 0)) > MAX_REFUSED_BYTES:
        raise too_large
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            # A client that writes all before it reads never sees an answer that hangs up on it half-way.
            async for chunk in request.stream():
                length += len(chunk)
                if length > MAX_REFUSED_BYTES:
                    raise too_large
                if length <= openai_api.MAX_BODY_BYTES:
                    body += chunk
        if length > openai_api.MAX_BODY_BYTES:
            raise too_large
    except TimeoutError:
        message = f"the body took longer than {UPLOAD_SECONDS:g} s"
        raise ApiError(408, message, headers={"connection": "close"}) from None
    return await asyncio.to_thread(openai_api.parse_json, bytes(body))


Parser = Callable[[Mapping[str, Any], Any, Rules], Call]


class Generation:
    """The ASGI endpoint of /v1/completions or /v1/chat/completions."""

    def __init__(self, service: Service, parse: Parser):
        self.service = service
        self.parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self.service
        arrived = time.monotonic()
        with service.upload():
            body = await read_json(Request(scope, receive))
            call = await asyncio.to_thread(self.parse, body, service.tokenizer, service.rules)
        with service.admit(call) as stream:
            answer = _Answer(service, stream, arrived)
            reply = asyncio.ensure_future(answer.send(scope, receive, send))
            gone = asyncio.ensure_future(_disconnected(receive))
            limit = service.config.serve_timeout + GRACE_SECONDS
            try:
                await asyncio.wait(
                    {reply, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED
                )
                if reply.done():
                    reply.result()
                elif gone.done():
                    raise ClientDisconnect
            finally:
                for task in (reply, gone):
                    task.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Answer:
    """One call's answer on its way to the client."""

    def __init__(self, service: Service, stream: Stream, arrived: float):
        self.service = service
        self.stream = stream
        self.call = stream.call
        self.arrived = arrived
        self.replies = Replies(self.call, service.tokenizer)
        self.choices = [
            Choice(self.call, index, service.tokenizer) for index in range(self.call.sequences)
        ]

    async def send(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.call.stream:
            await self._send_chunks(send)
            return
        async for _ in self._deltas():
            pass
        await json_response(self.replies.whole(self.choices))(scope, receive, send)

    async def _send_chunks(self, send: Send) -> None:
        deltas = self._deltas()
        first = await anext(deltas)  # a request that cannot be served is told by its status
        headers = MutableHeaders(
            {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
        )
        await send({"type": "http.response.start", "status": 200, "headers": headers.raw})

        async def tell(chunks: Sequence[Any]) -> None:
            lines = b"".join(b"data: " + _encode(chunk) + b"\n\n" for chunk in chunks)
            if lines:
                await send({"type": "http.response.body", "body": lines, "more_body": True})

        await tell([*self.replies.opening(), *self.replies.chunks(first)])
        try:
            async for delta in deltas:
                await tell(self.replies.chunks(delta))
            await tell(self.replies.closing(self.choices))
        except ApiError as error:
            await tell([error.body()])
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _deltas(self) -> AsyncIterator[Delta]:
        """What the choices gain, until all have ended; ApiError where that goes wrong or takes too long."""
        service, waiting = self.service, len(self.choices)
        deadline = asyncio.get_running_loop().time() + service.config.serve_timeout
        deadline -= time.monotonic() - self.arrived
        while waiting:
            try:
                async with asyncio.timeout_at(deadline):
                    news = await self.stream.news.get()
            except TimeoutError:
                raise ApiError(
                    504, f"no end within {service.config.serve_timeout:g} s", code="timeout"
                ) from None
            if isinstance(news, Exception):
                raise news
            position, event = news
            if event.finish == "error":
                raise ApiError(500, "the engine failed; the request may be sent again")
            choice = self.choices[position * self.call.samples + event.sample]
            if choice.finish:
                continue  # a stop string that only we saw: its slot is freed with the others
            for delta in self._deltas_of(choice, event):
                yield delta
            waiting -= choice.finish is not None

    def _deltas_of(self, choice: Choice, event: engines.Event) -> Iterator[Delta]:
        if not choice.has_begun:
            self.service.metrics.first_token_seconds.observe(time.monotonic() - self.arrived)
            if self.call.echo:
                yield choice.echo((None, *event.prompt_logprobs))
        before = choice.drawn
        yield choice.feed(event)
        self.service.metrics.generated_tokens.inc(choice.drawn - before)


# ---- The application ----------------------------------------------------------------------------


def make_app(
    config: FrozenConfigDict, engine: engines.Engine, api_key: str | None = None
) -> Starlette:
    """The ASGI application; the engine belongs to it from its start to its end."""
    service = Service(config, engine, api_key)

    async def models(request: Request) -> Response:
        return json_response({"object": "list", "data": [service.model()]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != service.rules.model:
            raise ApiError(
                404, f"this server has one model, {service.rules.model}", code="model_not_found"
            )
        return json_response(service.model())

    async def health(request: Request) -> Response:
        is_well = service.thread.is_alive
        return json_response(
            {"status": "ok" if is_well else "the engine has stopped"}, 200 if is_well else 503
        )

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.thread.start(asyncio.get_running_loop())
        yield
        service.thread.stop()

    pages = _pages()
    routes = [
        *(Route(path, page) for path, page in pages.items()),
        Route("/v1/models", models),
        Route("/v1/models/{name}", model),
        Route(
            "/v1/completions", Generation(service, openai_api.parse_completion), methods=["POST"]
        ),
        Route("/v1/chat/completions", Generation(service, openai_api.parse_chat), methods=["POST"]),
        Route("/health", health),
        Route("/metrics", metrics),
        *_tokenizer_routes(service),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            *_cors(config),
            Middleware(
                Guard,
                service=service,
                public={"/health", *pages},
                known={route.path for route in routes},
            ),
        ],
        exception_handlers={ApiError: _refused, HTTPException: _not_found},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def _tokenizer_routes(service: Service) -> list[Route]:
    """Source: vLLM's endpoints of these names, as lm-eval's RemoteTokenizer uses them."""
    tokenizer = service.tokenizer
    bos = tokenizer.decode([tokenizer.bos_id])

    async def info(request: Request) -> Response:
        return json_response({"tokenizer_class": "maxnano", "bos_token": bos, "eos_token": bos})

    async def tokenize(request: Request) -> Response:
        text = (await read_json(request)).get("prompt")
        if not isinstance(text, str):
            raise ApiError(400, "prompt must be a text", "prompt")
        # By its name, and in no other way, the token is asked for that text cannot become.
        ids = [tokenizer.bos_id] if text == bos else await asyncio.to_thread(tokenizer.encode, text)
        return json_response(
            {"tokens": ids, "count": len(ids), "max_model_len": service.rules.max_length}
        )

    async def detokenize(request: Request) -> Response:
        tokens = (await read_json(request)).get("tokens")
        if not openai_api.are_ids(tokens, tokenizer):
            raise ApiError(400, "tokens must be a list of token ids", "tokens")
        return json_response({"prompt": tokenizer.decode(tokens)})

    return [
        Route("/tokenizer_info", info),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


def _pages() -> dict[str, Callable]:
    """The endpoint of each file in static/, read once: no path of a request ever reaches the file system."""

    def page(path: Path) -> Callable:
        content, kind = path.read_bytes(), CONTENT_TYPES[path.suffix]

        async def endpoint(request: Request) -> Response:
            return Response(content, 200, {"content-type": kind, "cache-control": "no-cache"})

        return endpoint

    files = sorted(path for path in STATIC.iterdir() if path.suffix in CONTENT_TYPES)
    return {
        "/" if path.name == "index.html" else f"/static/{path.name}": page(path) for path in files
    }


def _cors(config: FrozenConfigDict) -> list[Middleware]:
    if not config.serve_cors_origins:
        return []
    allowed = {"allow_methods": ["GET", "POST"], "allow_headers": ["authorization", "content-type"]}
    return [Middleware(CORSMiddleware, allow_origins=list(config.serve_cors_origins), **allowed)]


async def _refused(request: Request, error: ApiError) -> Response:
    return error_response(error)


async def _not_found(request: Request, error: HTTPException) -> Response:
    message = {404: "there is no such path", 405: "this path does not take that method"}
    refusal = ApiError(
        error.status_code, message.get(error.status_code, error.detail), headers=error.headers
    )
    return error_response(refusal)


class Guard:
    """Who may come in, what every answer carries, and what is counted."""

    def __init__(self, app: ASGIApp, service: Service, public: set[str], known: set[str]):
        self.app = app
        self.service = service
        self.public = public
        self.known = known
        self.key = service.api_key.encode() if service.api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # the client left before anything was said

        async def secured(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers.update(SECURITY_HEADERS)
            await send(message)

        path = scope["path"]
        refusal = self._refusal(Headers(scope=scope), path)
        try:
            app = error_response(refusal) if refusal else self.app
            await app(scope, receive, secured)
        except ClientDisconnect:
            pass
        except Exception:
            log.exception("a request failed")
            if status != 499:
                raise  # in the middle of an answer, which is cut
            await error_response(ApiError(500, "the server failed"))(scope, receive, secured)
        finally:
            path = path if path in self.known else "other"
            self.service.metrics.requests.labels(path, str(status)).inc()
            if path.startswith("/v1/"):
                log.info(
                    "%s %s %d %.2f s", scope["method"], path, status, time.monotonic() - started
                )

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        if self.key is None:
            if _is_loopback(_hostname(headers.get("host", ""))):
                return None
            # Or else another site's page could call this server under a name of its own (DNS rebinding).
            message = "without an API key this server answers only to localhost"
            return ApiError(403, message, headers={"connection": "close"})
        if path in self.public:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(
            key.strip().encode("utf-8", "replace"), self.key
        ):
            return None
        challenge = {"www-authenticate": "Bearer", "connection": "close"}
        return ApiError(
            401,
            "an API key is needed, as Authorization: Bearer KEY",
            None,
            "invalid_api_key",
            challenge,
        )


def _hostname(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ---- Main ---------------------------------------------------------------------------------------


class _Protocol(H11Protocol):
    """uvicorn's HTTP, which hangs up on a client that does not get a request's head through."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._last_cycle = None
        self._watch = self.loop.call_later(UPLOAD_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        if self.conn.their_state is h11.IDLE and self.cycle is self._last_cycle:
            self.transport.close()
            return
        self._last_cycle = self.cycle
        self._watch = self.loop.call_later(UPLOAD_SECONDS, self._look)


def api_key_of(
    config: FrozenConfigDict, environment: Mapping[str, str] = MappingProxyType(os.environ)
) -> str | None:
    """The API key in the environment; ValueError where an open address lacks one or it is too short."""
    name = config.serve_api_key_variable
    key = environment.get(name) or None
    if key is None and not _is_loopback(config.serve_host):
        raise ValueError(
            f"serve_host={config.serve_host} can be reached from other machines, which takes an API key:"
            f" set {name} in the environment"
        )
    if key is not None and len(key) < SHORTEST_KEY:
        raise ValueError(f"the API key in {name} is shorter than {SHORTEST_KEY} characters")
    return key


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, not listening yet: an address that is taken is told before the model is loaded."""
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"serve_host={host} serve_port={port} cannot be had: {reason}") from None
    return bound


def _log_to_stderr() -> None:
    """Our own lines, whatever handlers libraries have given the root."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def main(config: FrozenConfigDict) -> None:
    _log_to_stderr()
    key = api_key_of(config)
    bound = bind(config.serve_host, config.serve_port)
    runtime.initialize(config)
    engine = load_engine(config, streams=True)
    print(f"compiling for {engine.slots} sequences of up to {engine.max_length} tokens", flush=True)
    engine.compile()
    serve(make_app(config, engine, key), bound, config.serve_drain_seconds)


def make_server(app: Starlette, drain_seconds: float) -> uvicorn.Server:
    """The HTTP server of an application; it accepts connections once run with a bound socket."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(drain_seconds),
        )
    )


def serve(app: Starlette, bound: socket.socket, drain_seconds: float) -> None:
    """Serve until SIGTERM or SIGINT; replies under way then have some seconds to end."""
    server = make_server(app, drain_seconds)
    # uvicorn raises the signal again once it has left, which is to be no failure.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: None)
    host, port = bound.getsockname()[:2]
    at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(f"serving {app.state.service.rules.model} at http://{at} (Ctrl-C ends)", flush=True)
    server.run(sockets=[bound])


if __name__ == "__main__":
    sys.exit(pyconfig.launch(main))
