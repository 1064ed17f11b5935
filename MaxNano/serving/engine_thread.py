"""The thread that runs the engine, and the streams of events from it to the event loop."""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from MaxNano.inference.engine import Engine
from MaxNano.inference.requests import Event
from MaxNano.serving.api_fields import ApiError
from MaxNano.serving.openai_api import ApiCall

log = logging.getLogger("maxnano.serve")


class EventStream:
    """Events of the requests of one call, to be read on the event loop."""

    def __init__(self, call: ApiCall):
        self.call = call
        self.items: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()
        self.numbers: list[int] = []  # of the engine's requests; used by its thread only
        self.is_closed = False  # by the reader


class RunningCall(NamedTuple):
    """A request in the engine: its stream, and the index of its prompt in the call."""

    stream: EventStream
    position: int


class EngineThread:
    """The only thread that uses the engine. Commands come by a queue, events go to the loop.

    programs: compiles a program per step, which the thread does while the engine is idle.
    """

    def __init__(self, engine: Engine, programs: Iterator[str] | None = None):
        self.engine = engine
        self._programs = programs  # None: all are compiled
        self.is_alive = False
        self._commands: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = (
            queue.SimpleQueue()
        )
        self._running: dict[int, RunningCall] = {}
        self._samples_left: dict[int, int] = {}  # by request number
        self._is_stopping = False

    # ---- Called on the event loop ----

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; events go to `loop`."""
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.is_alive = True
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current step. Open streams end with an error."""
        self._commands.put((self._stop, ()))
        self._thread.join()

    def submit(self, call: ApiCall) -> EventStream:
        """Queue the requests of a call."""
        stream = EventStream(call)
        self._commands.put((self._submit, (stream,)))
        return stream

    def cancel(self, stream: EventStream) -> None:
        """Close a stream and free the slots of its requests that still run."""
        stream.is_closed = True
        self._commands.put((self._cancel, (stream,)))

    # ---- Called in the thread ----

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._run_commands()
                if not self.engine.is_idle:
                    self._publish(self._step())
                elif self._programs is not None and next(self._programs, None) is None:
                    self._programs = None
        except Exception:
            log.exception("The engine failed and cannot be reset: restart the server")
        finally:
            self.is_alive = False
            error = ApiError(503, "the engine has stopped")
            self._send([(stream, error) for stream in self._open_streams()])

    def _open_streams(self) -> list[EventStream]:
        """The streams of running requests and of those still in the queue."""
        streams = {id(running.stream): running.stream for running in self._running.values()}
        with contextlib.suppress(queue.Empty):
            while True:
                command, arguments = self._commands.get_nowait()
                if command == self._submit:
                    streams[id(arguments[0])] = arguments[0]
        return list(streams.values())

    def _run_commands(self) -> None:
        """Run the queued commands; wait for one if there is nothing else to do."""
        wait = self.engine.is_idle and self._programs is None
        with contextlib.suppress(queue.Empty):
            while True:
                command, arguments = self._commands.get(block=wait)
                command(*arguments)
                wait = False

    def _step(self) -> list[Event]:
        try:
            return self.engine.step()
        except Exception:
            log.exception("A step of the engine failed; its requests end with an error")
            self.engine.reset()
            return []

    def _submit(self, stream: EventStream) -> None:
        if stream.is_closed:
            return
        try:
            for position, request in enumerate(stream.call.requests):
                number = self.engine.submit(request)
                stream.numbers.append(number)
                self._running[number] = RunningCall(stream, position)
                self._samples_left[number] = request.samples
        except ValueError as error:
            self._cancel(stream)
            self._send([(stream, ApiError(400, str(error)))])

    def _cancel(self, stream: EventStream) -> None:
        for number in stream.numbers:
            self.engine.cancel(number)

    def _stop(self) -> None:
        self._is_stopping = True

    def _publish(self, events: Sequence[Event]) -> None:
        items = []
        for event in events:
            running = self._running[event.request]
            items.append((running.stream, (running.position, event)))
            if event.finish:
                self._samples_left[event.request] -= 1
                if not self._samples_left[event.request]:
                    del self._running[event.request], self._samples_left[event.request]
        if items:
            self._send(items)

    def _send(self, items: Sequence[tuple[EventStream, Any]]) -> None:
        def put() -> None:
            for stream, item in items:
                if not stream.is_closed:
                    stream.items.put_nowait(item)

        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(put)
