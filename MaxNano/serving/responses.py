"""JSON bodies of requests and responses."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from MaxNano.serving.api_fields import MAX_BODY_BYTES, ApiError, parse_json

UPLOAD_SECONDS = 20.0  # time limit for the head of a request, and for its body
MAX_REFUSED_BYTES = 8 << 20  # a body between MAX_BODY_BYTES and this is read before it is refused


def encode_json(value: Any) -> bytes:
    """Compact UTF-8 JSON. A lone surrogate, which UTF-8 cannot encode, becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response that is not cached."""
    headers = {"cache-control": "no-store", **(headers or {})}
    return Response(encode_json(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """The response for an error."""
    return json_response(error.body(), error.status, error.headers)


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises ApiError for another content type, and for a body that is too large, too slow or no JSON
    object.
    """
    close = {"connection": "close"}
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # CSRF: browsers ask for permission before they send this type to another site.
        raise ApiError(415, "the content type must be application/json", headers=close)
    body, length = bytearray(), 0
    too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", headers=close)
    if int(request.headers.get("content-length", 0)) > MAX_REFUSED_BYTES:
        raise too_large
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            # A client that sends the whole body first would not read a response sent earlier.
            async for chunk in request.stream():
                length += len(chunk)
                if length > MAX_REFUSED_BYTES:
                    raise too_large
                if length <= MAX_BODY_BYTES:
                    body += chunk
        if length > MAX_BODY_BYTES:
            raise too_large
    except TimeoutError:
        message = f"timed out after {UPLOAD_SECONDS:g} s receiving the body"
        raise ApiError(408, message, headers=close) from None
    return await asyncio.to_thread(parse_json, bytes(body))
