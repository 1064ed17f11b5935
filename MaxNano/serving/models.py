"""The models of the server by name: those that are ready, and those that are still loading."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import FrozenConfigDict

from MaxNano.inference.engine import Engine
from MaxNano.serving.api_fields import ApiError
from MaxNano.serving.service import ServerMetrics, Service

LOADING = "loading"


class Models:
    """One service per model, and what they share. Used on the event loop; a thread adds models.

    config: of the server. names: of the models, in the order of /v1/models; the first one answers
    requests that name none.
    """

    def __init__(self, config: FrozenConfigDict, names: Sequence[str], api_key: str | None = None):
        self.config = config
        self.api_key = api_key
        self.names = list(names)
        self.services: dict[str, Service] = {}  # of the models that are ready
        self.progress = "starting"  # what is done to load the others
        self.metrics = ServerMetrics(lambda: [service.engine for service in self._in_order()])
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(
        self, config: FrozenConfigDict, engine: Engine, programs: Iterator[str] | None = None
    ) -> None:
        """A model is ready; see Service for the arguments."""
        service = Service(config, engine, self.metrics, programs)
        with self._lock:
            if self._loop is not None:
                service.thread.start(self._loop)
            self.services = {**self.services, config.run_name: service}

    def set_progress(self, text: str) -> None:
        """What is done now to load a model, for /health."""
        self.progress = text

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the engines' threads."""
        with self._lock:
            self._loop = loop
            for service in self.services.values():
                service.thread.start(loop)

    def stop(self) -> None:
        """End the engines' threads."""
        for service in self.services.values():
            service.thread.stop()

    def _in_order(self) -> list[Service]:
        return [self.services[name] for name in self.names if name in self.services]

    def ready(self) -> list[Service]:
        """The models that are ready. Raises ApiError 503 if there is none yet."""
        if not self.services:
            raise self._loading(self.names[0])
        return self._in_order()

    def choose(self, name: Any) -> Service:
        """The model of a request, the first one for none.

        Raises ApiError: 404 for an unknown name, 503 for a model that is still loading.
        """
        if not name or not isinstance(name, str):  # parsing the request refuses what is no name
            name = self.names[0]
        if name not in self.names:
            known = f"the model of this server is {self.names[0]}"
            if len(self.names) > 1:
                known = f"the models of this server are {', '.join(self.names)}"
            raise ApiError(404, known, "model", "model_not_found")
        if name not in self.services:
            raise self._loading(name)
        return self.services[name]

    def least_busy(self) -> Service:
        """The model with the most room in its queue, before it is known which one is asked."""
        return min(self.ready(), key=lambda service: service.pending / service.capacity)

    def _loading(self, name: str) -> ApiError:
        message = f"the model {name} is loading ({self.progress}): try again in a few seconds"
        return ApiError(503, message, code="model_loading", headers={"retry-after": "1"})

    def health(self) -> tuple[dict[str, Any], int]:
        """(body, status) of /health: 503 while a model is loading, and if an engine has stopped."""
        if any(not service.thread.is_alive for service in self.services.values()):
            return {"status": "the engine has stopped"}, 503
        if len(self.services) == len(self.names):
            return {"status": "ok"}, 200
        states = {name: "ready" if name in self.services else LOADING for name in self.names}
        return {"status": LOADING, "progress": self.progress, "models": states}, 503
