"""The HTTP server: uvicorn with time limits for slow clients and a graceful shutdown."""

import asyncio
import math
import signal
import socket
import threading
from collections.abc import Callable

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from MaxNano import console
from MaxNano.serving import responses

KEEP_ALIVE_SECONDS = 15


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol; closes a connection whose request head takes too long."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._last_cycle = None
        self._timer = self.loop.call_later(responses.UPLOAD_SECONDS, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        if self.conn.their_state is h11.IDLE and self.cycle is self._last_cycle:
            self.transport.close()
            return
        self._last_cycle = self.cycle
        self._timer = self.loop.call_later(responses.UPLOAD_SECONDS, self._close_if_idle)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises ValueError if the address cannot be used."""
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"could not bind serve_host={host} serve_port={port}: {reason}") from None
    return bound


def make_server(app: Starlette, drain_seconds: float) -> uvicorn.Server:
    """The server of an application, to be run with a bound socket."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=TimedProtocol,
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


def serve(
    app: Starlette,
    bound: socket.socket,
    drain_seconds: float,
    load: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then let running replies end for up to `drain_seconds`.

    load: loads the models of app.state.models, in a thread of its own while the server answers that
    they are loading; None: they are ready. If it raises, the server stops and the error is raised.
    """
    server = make_server(app, drain_seconds)
    # uvicorn raises the signal again after shutdown; the exit status is to be 0.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: None)
    host, port = bound.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    names = ", ".join(app.state.models.names)
    serving = f"Serving {names} at http://{address} (Ctrl-C to stop)"
    errors: list[BaseException] = []

    def run_load() -> None:
        try:
            load()
            print(serving, flush=True)
        except BaseException as error:  # noqa: BLE001 (raised below)
            errors.append(error)
            server.should_exit = True

    bound.listen()  # clients may connect from now on
    if load is None:
        print(serving, flush=True)
        server.run(sockets=[bound])
        return
    print(f"Loading {names}; http://{address}/health tells when it is ready", flush=True)
    thread = threading.Thread(target=run_load, name="load", daemon=True)
    thread.start()
    server.run(sockets=[bound])
    if errors:
        raise errors[0]
    if thread.is_alive():
        console.exit_now(0)  # JAX works on in the thread
