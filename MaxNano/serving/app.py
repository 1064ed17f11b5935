"""The server's application: endpoints of the OpenAI API and vLLM's tokenizer API, the web page."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import prometheus_client
from ml_collections import FrozenConfigDict
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from MaxNano.inference.dialogue import prompt_ids
from MaxNano.inference.engine import Engine
from MaxNano.inference.requests import Event
from MaxNano.serving.access import AccessControl
from MaxNano.serving.api_fields import ApiError, BodyFields
from MaxNano.serving.chat_api import parse_chat, take_messages
from MaxNano.serving.engine_thread import EventStream
from MaxNano.serving.models import Models
from MaxNano.serving.openai_api import ApiCall, are_ids, parse_completion
from MaxNano.serving.openai_replies import ReplyChoice, ReplyDelta, ReplyObjects
from MaxNano.serving.openai_responses import ResponseObjects, parse_response
from MaxNano.serving.responses import encode_json, error_response, json_response, read_json
from MaxNano.serving.service import Service
from MaxNano.tokenization.tokenizer import Tokenizer

STATIC = Path(__file__).resolve().parent / "static"
GRACE_SECONDS = 5.0  # after serve_timeout, for a client to read the end of its reply
# Of samples, by how they end: (status, message). Clients repeat what fails with 500.
FAILURES = {
    "error": (500, "the engine failed; the request may be sent again"),
    "grammar_error": (400, "the reply failed: its JSON schema takes too much work"),
}
CONTENT_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def make_app(config: FrozenConfigDict, engine: Engine, api_key: str | None = None) -> Starlette:
    """The ASGI application of one engine."""
    models = Models(config, [config.run_name], api_key)
    models.add(config, engine)
    return make_models_app(models)


def make_models_app(models: Models) -> Starlette:
    """The ASGI application, which runs the models' engines from its startup to its shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        models.start(asyncio.get_running_loop())
        yield
        models.stop()

    pages = _pages()
    generations = {
        "/v1/completions": GenerationEndpoint(models, parse_completion, ReplyObjects),
        "/v1/chat/completions": GenerationEndpoint(models, parse_chat, ReplyObjects),
        "/v1/responses": GenerationEndpoint(models, parse_response, ResponseObjects),
    }
    routes = [
        *(Route(path, page) for path, page in pages.items()),
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in generations.items()),
        *_service_routes(models),
        *_tokenizer_routes(models),
    ]
    public, known = {"/health", *pages}, {route.path for route in routes}
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            *_cors(models.config),
            Middleware(AccessControl, models=models, public=public, known=known),
        ],
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error},
    )
    app.router.redirect_slashes = False
    app.state.models = models
    return app


def _cors(config: FrozenConfigDict) -> list[Middleware]:
    origins, pattern = list(config.serve_cors_origins), config.serve_cors_origin_regex
    if not origins and not pattern:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_origin_regex=pattern,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # openai's client for JavaScript sends several of its own
            expose_headers=["retry-after"],
        )
    ]


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return error_response(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    messages = {404: "path not found", 405: "method not allowed"}
    message = messages.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, headers=error.headers))


# ---- Endpoints ----------------------------------------------------------------------------------


def _service_routes(models: Models) -> list[Route]:
    async def list_models(request: Request) -> Response:
        data = [service.model() for service in models.ready()]
        return json_response({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        return json_response(models.choose(request.path_params["name"]).model())

    async def health(request: Request) -> Response:
        body, status = models.health()
        return json_response(body, status, {"retry-after": "1"} if status == 503 else None)

    async def metrics(request: Request) -> Response:
        return Response(models.metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return [
        Route("/v1/models", list_models),
        Route("/v1/models/{name}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]


def _tokenizer_routes(models: Models) -> list[Route]:
    """Source: vLLM's endpoints of these names, as lm-eval's RemoteTokenizer uses them."""

    async def info(request: Request) -> Response:
        bos = _bos_text(models.choose(request.query_params.get("model")).tokenizer)
        return json_response({"tokenizer_class": "maxnano", "bos_token": bos, "eos_token": bos})

    async def tokenize(request: Request) -> Response:
        body = await read_json(request)
        service = models.choose(body.get("model"))
        ids = await asyncio.to_thread(_ids_to_count, body, service.tokenizer)
        return json_response(
            {"tokens": ids, "count": len(ids), "max_model_len": service.rules.max_length}
        )

    async def detokenize(request: Request) -> Response:
        body = await read_json(request)
        tokenizer, tokens = models.choose(body.get("model")).tokenizer, body.get("tokens")
        if not are_ids(tokens, tokenizer):
            raise ApiError(400, "tokens must be a list of token ids", "tokens")
        return json_response({"prompt": tokenizer.decode(tokens)})

    return [
        Route("/tokenizer_info", info),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


def _bos_text(tokenizer: Tokenizer) -> str:
    return tokenizer.decode([tokenizer.bos_id])


def _ids_to_count(body: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Token ids of the prompt, or of the messages with the beginning of a reply."""
    fields = BodyFields(body)
    if "messages" in body:
        return prompt_ids(tokenizer, take_messages(fields))
    text = fields.take("prompt")
    if not isinstance(text, str):
        raise ApiError(400, "prompt must be a string, or messages a list of messages", "prompt")
    if text == _bos_text(
        tokenizer
    ):  # text never encodes to special tokens, but lm-eval asks for this
        return [tokenizer.bos_id]
    return [tokenizer.bos_id] * fields.flag("add_special_tokens") + tokenizer.encode(text)


def _pages() -> dict[str, Callable]:
    """The endpoint of each file in static/. Request paths never reach the file system."""

    def page(path: Path) -> Callable:
        content, kind = path.read_bytes(), CONTENT_TYPES[path.suffix]

        async def endpoint(request: Request) -> Response:
            return Response(content, 200, {"content-type": kind, "cache-control": "no-cache"})

        return endpoint

    files = sorted(path for path in STATIC.iterdir() if path.suffix in CONTENT_TYPES)
    return {
        "/" if path.name == "index.html" else f"/static/{path.name}": page(path) for path in files
    }


# ---- Generation ---------------------------------------------------------------------------------


class GenerationEndpoint:
    """The ASGI endpoint that generates replies to one kind of call.

    parse: (body, tokenizer, rules) -> call. make_objects: (call, tokenizer) -> JSON of its reply.
    """

    def __init__(
        self,
        models: Models,
        parse: Callable[[Mapping[str, Any], Any, Any], ApiCall],
        make_objects: Callable[[ApiCall, Any], ReplyObjects | ResponseObjects],
    ):
        self.models = models
        self.parse = parse
        self.make_objects = make_objects

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        with self.models.least_busy().upload():
            body = await read_json(Request(scope, receive))
            service = self.models.choose(body.get("model"))
            call = await asyncio.to_thread(self.parse, body, service.tokenizer, service.rules)
        with service.admit(call) as stream:
            objects = self.make_objects(call, service.tokenizer)
            sender = ReplySender(service, stream, arrived, objects)
            reply = asyncio.ensure_future(sender.send(scope, receive, send))
            disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))
            limit = service.config.serve_timeout + GRACE_SECONDS
            try:
                await asyncio.wait(
                    {reply, disconnect}, timeout=limit, return_when=asyncio.FIRST_COMPLETED
                )
                if reply.done():
                    reply.result()
                elif disconnect.done():
                    raise ClientDisconnect
            finally:
                reply.cancel()
                disconnect.cancel()


def _encode_event(chunk: Mapping[str, Any]) -> bytes:
    """A server-sent event; those of /v1/responses have a type."""
    name = f"event: {chunk['type']}\n".encode() if "type" in chunk else b""
    return name + b"data: " + encode_json(chunk) + b"\n\n"


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class ReplySender:
    """Sends the reply to one call."""

    def __init__(
        self,
        service: Service,
        stream: EventStream,
        arrived: float,
        objects: ReplyObjects | ResponseObjects,
    ):
        self.service = service
        self.stream = stream
        self.call = call = stream.call
        self.arrived = arrived  # time.monotonic()
        self.objects = objects
        self.choices = [
            ReplyChoice(call, index, service.tokenizer) for index in range(call.sequences)
        ]

    async def send(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply, streamed or whole. Raises ApiError if it fails before it begins."""
        if self.call.stream:
            await self._send_chunks(send)
            return
        async for _ in self._deltas():
            pass
        await json_response(self.objects.whole(self.choices))(scope, receive, send)

    async def _send_chunks(self, send: Send) -> None:
        """Send server-sent events."""
        deltas = self._deltas()
        first = await anext(deltas)  # before the status is sent: it may raise ApiError
        headers = MutableHeaders(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-store",
                "x-accel-buffering": "no",  # nginx passes each event on at once
            }
        )
        await send({"type": "http.response.start", "status": 200, "headers": headers.raw})

        async def send_chunks(chunks: Sequence[Any]) -> None:
            lines = b"".join(map(_encode_event, chunks))
            if lines:
                await send({"type": "http.response.body", "body": lines, "more_body": True})

        await send_chunks([*self.objects.opening(), *self.objects.chunks(first)])
        try:
            async for delta in deltas:
                await send_chunks(self.objects.chunks(delta))
            await send_chunks(self.objects.closing(self.choices))
        except ApiError as error:
            await send_chunks([self.objects.failure(error)])
        await send({"type": "http.response.body", "body": self.objects.end, "more_body": False})

    async def _deltas(self) -> AsyncIterator[ReplyDelta]:
        """The deltas of all choices until the last ends. Raises ApiError on failure or timeout."""
        timeout_seconds, running = self.service.config.serve_timeout, len(self.choices)
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        deadline -= time.monotonic() - self.arrived
        while running:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await self.stream.items.get()
            except TimeoutError:
                message = f"the reply timed out after {timeout_seconds:g} s"
                raise ApiError(504, message, code="timeout") from None
            if isinstance(item, Exception):
                raise item
            position, event = item
            if event.finish in FAILURES:
                raise ApiError(*FAILURES[event.finish])
            choice = self.choices[position * self.call.samples + event.sample]
            for delta in self._deltas_of(choice, event):
                yield delta
            running -= event.finish is not None

    def _deltas_of(self, choice: ReplyChoice, event: Event) -> Iterator[ReplyDelta]:
        if not choice.has_begun:
            self.service.metrics.first_token_seconds.observe(time.monotonic() - self.arrived)
            if self.call.echo:
                yield choice.echo((None, *event.prompt_logprobs))
        before = choice.completion_tokens
        yield choice.feed(event)
        self.service.metrics.generated_tokens.inc(choice.completion_tokens - before)
