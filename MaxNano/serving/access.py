"""Access to the server: API key, requests from this machine, security headers, request log."""

import hmac
import ipaddress
import logging
import os
import time
from collections.abc import Mapping
from types import MappingProxyType

from ml_collections import FrozenConfigDict
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from MaxNano.serving.api_fields import ApiError
from MaxNano.serving.models import Models
from MaxNano.serving.responses import error_response

log = logging.getLogger("maxnano.serve")

# How programs in a container name the machine that they run on. Like localhost, no site on the
# internet can have these names.
CONTAINER_HOSTS = ("host.docker.internal", "host.containers.internal")

MIN_KEY_CHARACTERS = 16
CLIENT_CLOSED = 499  # status in log and metrics of a request whose client left before the response

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class AccessControl:
    """ASGI middleware: checks access, adds security headers, logs and counts requests.

    public: paths that need no API key. known: paths that are metric labels; others count as
    "other".
    """

    def __init__(self, app: ASGIApp, models: Models, public: set[str], known: set[str]):
        self.app = app
        self.metrics = models.metrics
        self.public = public
        self.known = known
        self.key = models.api_key.encode() if models.api_key else None
        self.hosts = models.config.serve_allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), CLIENT_CLOSED

        async def send_secured(message: Message) -> None:
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
            await app(scope, receive, send_secured)
        except ClientDisconnect:
            pass
        except Exception:
            log.exception("A request failed")
            if status != CLIENT_CLOSED:
                raise  # the response has begun: close the connection
            await error_response(ApiError(500, "the server failed"))(scope, receive, send_secured)
        finally:
            label = path if path in self.known else "other"
            self.metrics.requests.labels(label, str(status)).inc()
            if label.startswith("/v1/"):
                seconds = time.monotonic() - started
                log.info("%s %s %d %.2f s", scope["method"], label, status, seconds)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        host = _hostname(headers.get("host", ""))
        if not self._is_allowed(host):
            # DNS rebinding: another site's page can reach this server under its own host name.
            message = f"the server does not answer to the host name {host[:64]!r}"
            message += ": add it to serve_allowed_hosts"
            return ApiError(403, message, headers={"connection": "close"})
        if self.key is None:
            return None
        if path in self.public:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip().encode("utf-8", "replace")
        if scheme.lower() == "bearer" and hmac.compare_digest(key, self.key):
            return None
        headers = {"www-authenticate": "Bearer", "connection": "close"}
        message = "an API key is required: send Authorization: Bearer KEY"
        return ApiError(401, message, code="invalid_api_key", headers=headers)

    def _is_allowed(self, host: str) -> bool:
        """Whether requests to a host name are answered: by patterns, as in Starlette."""
        host = host.lower()
        if self.hosts is None:
            return self.key is not None or is_loopback(host) or host in CONTAINER_HOSTS
        return any(
            pattern in ("*", host) or pattern.startswith("*.") and host.endswith(pattern[1:])
            for pattern in map(str.lower, self.hosts)
        )


def _hostname(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's loopback."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_api_key(
    config: FrozenConfigDict, environment: Mapping[str, str] = MappingProxyType(os.environ)
) -> str | None:
    """The API key in the environment, or None.

    Raises ValueError if serve_host is reachable from other machines and there is no key, or if the
    key is short.
    """
    name = config.serve_api_key_variable
    key = environment.get(name) or None
    if key is None and not is_loopback(config.serve_host):
        raise ValueError(
            f"serve_host={config.serve_host} is reachable from other machines and needs an API key:"
            f" set {name} in the environment"
        )
    if key is not None and len(key) < MIN_KEY_CHARACTERS:
        raise ValueError(f"the API key in {name} is shorter than {MIN_KEY_CHARACTERS} characters")
    return key
