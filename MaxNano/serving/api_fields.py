"""The fields of a request's JSON body, one by one, and the errors of the OpenAI API.

Clients write "off" in several ways. null and an empty box, "", are the same as a missing field; -1
and 0 are off where the field says so. Unknown fields are ignored and logged once.
Source: https://platform.openai.com/docs/api-reference.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

log = logging.getLogger("maxnano.serve")

MAX_BODY_BYTES = 1 << 20
MAX_JSON_DEPTH = 64
MAX_INTEGER = 1 << 63
MAX_LOGGED = 200  # unknown fields: clients could fill the log

# Known fields without an effect on the reply of this server.
IGNORED = {
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}
# Known fields that this server does not have are accepted with the values that have no effect.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": ({},),
    "background": (False,),
    "best_of": (0, 1, -1, ""),
    "conversation": ("",),
    "function_call": ("none", "auto", ""),
    "functions": ([],),
    "modalities": ([], ["text"]),
    "previous_response_id": ("",),
    "prompt": ({}, ""),  # of /v1/responses: a stored prompt
    "suffix": ("",),
    "web_search_options": ({},),
}


class ApiError(Exception):
    """An HTTP status with an error object of the OpenAI API."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body. Raises ApiError if invalid or nested too deeply."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} is invalid") from None
    except RecursionError:
        raise ApiError(400, f"the body is nested more than {MAX_JSON_DEPTH} deep") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for parent in level for child in _children(parent)]
    if level:
        raise ApiError(400, f"the body is nested more than {MAX_JSON_DEPTH} deep")
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


_logged: set[str] = set()  # names of unknown fields, at most MAX_LOGGED


def _log_ignored(name: str) -> None:
    """Log the name of an unknown field once."""
    if name not in _logged and len(_logged) < MAX_LOGGED:
        _logged.add(name)
        log.info("Ignoring the field %r of requests: it is not a field of this API", name)


class BodyFields:
    """The fields of a body, taken one by one. prefix: where they are in the body, for messages."""

    def __init__(self, body: Mapping[str, Any], prefix: str = ""):
        self._left = {name: value for name, value in body.items() if value is not None}
        self._prefix = prefix

    def take(self, name: str, default: Any = None) -> Any:
        """A field as it is."""
        return self._left.pop(name, default)

    def refusal(self, name: str, problem: str, code: str | None = None) -> ApiError:
        """The error for a field: "NAME PROBLEM"."""
        path = self._prefix + name
        return ApiError(400, f"{path} {problem}", path, code)

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string; an empty one is missing."""
        value = self._take_filled(name, default)
        if value is not None and not isinstance(value, str):
            raise self.refusal(name, "must be a string")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean field."""
        value = self._take_filled(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, "must be true or false")
        return value

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """An integer field; 2.0 is an integer."""
        value = self._take_filled(name, default)
        if value is None:
            return None
        is_whole = isinstance(value, int) or isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not is_whole or not low <= value <= high:
            raise self.refusal(name, f"must be an integer from {low} to {high}")
        return int(value)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A finite number."""
        value = self._take_filled(name, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not low <= value <= high:
            raise self.refusal(name, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object; an empty one is missing."""
        value = self._take_filled(name, None)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(name, "must be an object")
        return value or None

    def finish(self) -> None:
        """Log the unknown fields that are left.

        Raises ApiError for a known field that would have an effect in OpenAI's API.
        """
        for name, value in self._left.items():
            if name in NEUTRAL and value not in NEUTRAL[name]:
                raise self.refusal(name, "is not supported by this server", "unsupported_parameter")
            if name not in NEUTRAL and name not in IGNORED:
                _log_ignored(name[:64])

    def _take_filled(self, name: str, default: Any) -> Any:
        value = self.take(name, default)
        return default if value == "" else value
