"""What a browser sends, read with care, and how it is told what cannot be: small JSON, numbers, the names of parts."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.dashboard.books import GoneError, TooLongError
from daemon.errors import BundleError, DataError, UsageError
from daemon.line.control import NoAnswerError

_MOST_BODY_BYTES = 4096
_STATUS: dict[type[Exception], int] = {
    GoneError: 404, TooLongError: 503, NoAnswerError: 503, UsageError: 409, DataError: 400, BundleError: 404,
}  # fmt: skip


class RefusedError(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers


async def read_body(request: Request) -> dict[str, Any]:
    """A small JSON object. Anything else is refused before it is taken in."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise RefusedError(415, "wanted application/json")
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > _MOST_BODY_BYTES:
            raise RefusedError(413, f"wanted at most {_MOST_BODY_BYTES} bytes")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise RefusedError(400, "wanted a JSON object") from None
    if not isinstance(fields, dict):
        raise RefusedError(400, "wanted a JSON object")
    return fields


def parse_number(text: str | None) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise RefusedError(400, f"found {text[:40]!r}, wanted a number")
    return min(int(text), 2**63 - 1)


def part_key(request: Request) -> tuple[str, str, int]:
    asked = request.query_params
    seq = parse_number(asked.get("seq"))
    if seq is None:
        raise RefusedError(400, "wanted camera, epoch and seq")
    return asked.get("camera", ""), asked.get("epoch", ""), seq


def place_in_list(text: str) -> tuple[int, str, str, int]:
    try:
        decided_ns, camera, epoch, seq = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise RefusedError(400, "before is not a place that a page of rejects ended with") from None
    if type(decided_ns) is not int or not isinstance(camera, str) or not isinstance(epoch, str) or type(seq) is not int:
        raise RefusedError(400, "before is not a place that a page of rejects ended with")
    return decided_ns, camera, epoch, seq


def tell_refusal(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return JSONResponse({"error": str(error)}, error.status, headers=error.headers)


def tell_error(_request: Request, error: Exception) -> Response:
    status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
    return JSONResponse({"error": str(error)}, status)
