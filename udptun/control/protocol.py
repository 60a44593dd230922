"""What both ends of the control API agree on: paths, limits, headers, error codes.

Owns: every name and number of the API that docs/control.md documents. Refuses to know: sockets,
HTTP libraries, the forwarder. Sans-IO, pure functions: callable from any thread.
"""

import json
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from ..errors import ControlError, FieldError, GenerationMismatch, RouteExists

DEFAULT_SOCKET: Final = "/run/udptun/udptun.sock"

STATUS: Final = "/v1/status"
DROPS: Final = "/v1/drops"
ROUTES: Final = "/v1/routes"
TRACE: Final = "/v1/trace"
EVENTS: Final = "/v1/events"
STOP: Final = "/v1/stop"
HEALTHZ: Final = "/v1/healthz"
METRICS: Final = "/metrics"

JSON_TYPE: Final = "application/json"
NDJSON_TYPE: Final = "application/x-ndjson"
TEXT_TYPE: Final = "text/plain"

MAX_TABLE_BODY: Final = 64 * 1024 * 1024  # PUT /v1/routes: about a million routes
MAX_BODY: Final = 64 * 1024  # everything else
RECENT_EVENTS: Final = 100  # kept for GET /v1/events?follow=0

# Each error code and the HTTP status it comes with. Clients decide on the code.
STATUS_OF: Final = {
    "bad_request": 400,
    "bad_json": 400,
    "bad_route": 400,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "route_exists": 409,
    "generation_mismatch": 409,
    "too_large": 413,
    "internal": 500,
}


def dump(value: object) -> bytes:
    """Compact JSON and a line end, so that answers read well in a terminal too."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"



def error_of(exc: Exception) -> ControlError | None:
    """The answer to an error raised on purpose, or None for one that is nobody's request."""
    if isinstance(exc, ControlError):
        return exc
    if isinstance(exc, FieldError):
        # The table parsers say "body" where a body is not the JSON or text they read.
        return ControlError("bad_json" if exc.field == "body" else "bad_route", str(exc))
    if isinstance(exc, RouteExists):
        return ControlError("route_exists", str(exc))
    if isinstance(exc, GenerationMismatch):
        return ControlError("generation_mismatch", str(exc))
    return None


def parse_error(status: int, body: bytes) -> ControlError:
    """The error in an answer; an answer that is not ours becomes ``internal`` with its status."""
    try:
        error = json.loads(body)["error"]
        return ControlError(str(error["code"]), str(error["message"]))
    except (ValueError, KeyError, TypeError):
        return ControlError("internal", f"the answer was HTTP {status} without a reason")


def route_path(dst: str) -> str:
    """``10.244.2.0/24`` -> ``/v1/routes/10.244.2.0%2F24``."""
    return f"{ROUTES}/{quote(dst, safe='.:')}"


def parse_route_path(raw_path: str) -> str | None:
    """The destination named by a path, its slash percent-encoded or plain; None if it names none.

    Not checked to be a prefix: that is the model's job.
    """
    head, tail = ROUTES + "/", raw_path
    if not tail.startswith(head) or len(tail) == len(head):
        return None
    return unquote_to_bytes(tail[len(head) :]).decode("utf-8", "replace")


def format_generation(generation: int) -> str:
    """A generation as an entity tag, for If-Match (RFC 9110 8.8.3)."""
    return f'"{generation}"'


def parse_if_match(value: str | None) -> int | None:
    """The generation a change is conditional on, or None if on none (absent, or ``*``)."""
    if value is None or value.strip() == "*":
        return None
    tag = value.strip()
    digits = tag[1:-1]
    if len(tag) < 3 or tag[0] != '"' or tag[-1] != '"' or not _is_number(digits):
        raise ControlError("bad_request", f'If-Match: {value!r} is not a generation such as "7"')
    return int(digits)


def parse_if_none_match(value: str | None) -> bool:
    """True if the route may only be added, not replaced: ``If-None-Match: *``."""
    if value is None:
        return False
    if value.strip() != "*":
        raise ControlError("bad_request", f"If-None-Match: {value!r} is not understood: use *")
    return True


def parse_follow(value: str | None) -> bool:
    if value not in (None, "0", "1"):
        raise ControlError("bad_request", f"follow: {value!r} is not valid: expected 0 or 1")
    return value != "0"


def _is_number(digits: str) -> bool:
    return digits.isascii() and digits.isdigit() and len(digits) <= 19
