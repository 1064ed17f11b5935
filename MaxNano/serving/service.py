"""A model that is served: its engine's thread, the admission queue, limits; and the metrics."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import prometheus_client
from ml_collections import FrozenConfigDict

from MaxNano import scaling
from MaxNano.inference import dialogue
from MaxNano.inference.engine import Engine
from MaxNano.serving.api_fields import ApiError
from MaxNano.serving.engine_thread import EngineThread, EventStream
from MaxNano.serving.openai_api import ApiCall, ApiRules

MAX_UPLOADS = 256  # bodies that are received at the same time
MAX_RETRY_SECONDS = 60  # in the Retry-After header


class ServerMetrics:
    """The Prometheus metrics of /metrics."""

    def __init__(self, engines: Callable[[], Sequence[Engine]]):
        prometheus_client.disable_created_metrics()  # a second time series per metric
        self.registry = prometheus_client.CollectorRegistry()
        common = {"namespace": "maxnano", "registry": self.registry}
        seconds = {**common, "buckets": (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)}
        counter, histogram = prometheus_client.Counter, prometheus_client.Histogram
        self.requests = counter("requests", "Requests answered", ["path", "status"], **common)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens processed", **common)
        self.generated_tokens = counter("generated_tokens", "Tokens generated", **common)
        self.request_seconds = histogram("request_seconds", "Latency of a generation", **seconds)
        self.first_token_seconds = histogram(
            "first_token_seconds", "Time to first token", **seconds
        )
        gauges = {
            "slots": ("Slots of the engines", lambda engine: engine.slots),
            "sequences_running": ("Sequences in slots", lambda engine: engine.running),
            "requests_waiting": ("Requests in the engines' queues", lambda engine: engine.waiting),
            "prefix_tokens_looked_up": (
                "Prompt tokens since the start, with those that the prefix cache held",
                lambda engine: engine.prefix_cache.tokens_looked_up,
            ),
            "prefix_tokens_reused": (
                "Prompt tokens since the start that the prefix cache held",
                lambda engine: engine.prefix_cache.tokens_reused,
            ),
        }
        for name, (help_text, read) in gauges.items():
            gauge = prometheus_client.Gauge(name, help_text, **common)
            gauge.set_function(lambda read=read: sum(map(read, engines())))

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)


class Service:
    """A model that is served; `pending` sequences run or wait, at most `capacity`.

    programs: what the engine's thread compiles while it is idle, a program per step.
    """

    def __init__(
        self,
        config: FrozenConfigDict,
        engine: Engine,
        metrics: ServerMetrics,
        programs: Iterator[str] | None = None,
    ):
        self.config = config
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.thread = EngineThread(engine, programs)
        self.metrics = metrics
        self.capacity = engine.slots + config.serve_queue
        self.rules = ApiRules(
            model=config.run_name,
            max_length=engine.max_length,
            max_sequences=self.capacity,
            max_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            trims=config.serve_long_chats == "trim",
        )
        self.created = int(time.time())
        self.pending = 0
        self.uploads = 0
        self._mean_seconds = 1.0  # moving mean of a call's duration

    @contextlib.contextmanager
    def upload(self) -> Iterator[None]:
        """Receive a body. Raises ApiError 429 for too many uploads or a full queue."""
        if self.uploads >= MAX_UPLOADS or self.pending >= self.capacity:
            raise self._busy()
        self.uploads += 1
        try:
            yield
        finally:
            self.uploads -= 1

    @contextlib.contextmanager
    def admit(self, call: ApiCall) -> Iterator[EventStream]:
        """Run a call in the engine; it is canceled at the end of the block.

        Raises ApiError 429 if the queue is full and 503 if the engine has stopped.
        """
        if not self.thread.is_alive:
            raise ApiError(503, "the engine has stopped")
        if self.pending + call.sequences > self.capacity:
            raise self._busy()
        self.pending += call.sequences
        started = time.monotonic()
        stream = self.thread.submit(call)
        self.metrics.prompt_tokens.inc(sum(len(request.prompt) for request in call.requests))
        try:
            yield stream
        finally:
            self.pending -= call.sequences
            self.thread.cancel(stream)
            seconds = time.monotonic() - started
            self.metrics.request_seconds.observe(seconds)
            self._mean_seconds += 0.1 * (seconds - self._mean_seconds)

    def _busy(self) -> ApiError:
        rounds = max(1, self.pending - self.engine.slots) / self.engine.slots
        seconds = min(MAX_RETRY_SECONDS, max(1, math.ceil(rounds * self._mean_seconds)))
        message = f"the server is busy: try again in {seconds} s"
        headers = {"retry-after": str(seconds)}
        return ApiError(429, message, code="rate_limit_exceeded", headers=headers)

    def model(self) -> dict[str, Any]:
        """The model object of /v1/models, with fields for the web page."""
        return {
            "id": self.rules.model,
            "object": "model",
            "created": self.created,
            "owned_by": "maxnano",
            "max_model_len": self.rules.max_length,
            "chat": dialogue.in_turns(self.config),
            "defaults": {
                "temperature": self.rules.temperature,
                "top_k": self.rules.top_k,
                "max_tokens": self.rules.max_tokens,
            },
            "details": {
                "run": self.config.run_name,
                "stage": self.config.stage or "pretraining",
                "step": self.engine.trained_steps,
                "parameters": scaling.parameter_counts(scaling.shape_of(self.config)).total,
            },
        }
