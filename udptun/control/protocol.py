"""The control API's paths, limits, headers and error codes, for client and server.

Owns every name and number of the API (docs/control.md). Does not depend on sockets, an HTTP library
or the forwarder. Pure functions, no I/O: any thread.
"""

import json
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from ..errors import ControlError, FieldError, GenerationMismatch, RouteExists, RouteLoops

DEFAULT_SOCKET: Final = "/run/udptun/udptun.sock"  # equals Instance().control_socket() (tested)

STATUS: Final = "/v1/status"
STATUS_WITHOUT_PEERS: Final = f"{STATUS}?peers=0"  # the list of peers can be long
PEERS: Final = "/v1/peers"
PROBE: Final = "/v1/probe"
STANDBY: Final = "/v1/standby"
DEVICE: Final = "/v1/device"
DROPS: Final = "/v1/drops"
CAPTURE: Final = "/v1/capture"
ROUTES: Final = "/v1/routes"
TRACE: Final = "/v1/trace"
EVENTS: Final = "/v1/events"
STOP: Final = "/v1/stop"
HEALTHZ: Final = "/v1/healthz"
METRICS: Final = "/metrics"

# The node daemon's socket is in the directory of the forwarder's control socket. It serves
# NODE, HAND_OVER and EVENTS. The CNI plugin asks NODE_WITHOUT_PEERS, because the list of peers can
# be long.
NODE_SOCKET: Final = "node.sock"
NODE: Final = "/v1/node"
NODE_WITHOUT_PEERS: Final = f"{NODE}?peers=0"
HAND_OVER: Final = "/v1/node/hand-over"

JSON_TYPE: Final = "application/json"
NDJSON_TYPE: Final = "application/x-ndjson"
CAPTURE_TYPE: Final = "application/vnd.udptun.capture"
TEXT_TYPE: Final = "text/plain"

MAX_TABLE_BODY: Final = 64 * 1024 * 1024  # PUT /v1/routes: about a million routes
MAX_BODY: Final = 64 * 1024  # all other requests
MAX_STANDBY: Final = 500  # endpoints in one request of POST /v1/standby
RECENT_EVENTS: Final = 100  # kept for GET /v1/events?follow=0

# Each error code and its HTTP status. Clients should test the code, not the status.
STATUS_OF: Final = {
    "bad_request": 400,
    "bad_json": 400,
    "bad_route": 400,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "route_exists": 409,
    "route_loops": 409,
    "generation_mismatch": 409,
    "too_many": 409,
    "too_large": 413,
    "internal": 500,
}


def dump(value: object) -> bytes:
    """Encode as compact JSON, followed by a newline: the next shell prompt is then on a new line.
    """
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def error_of(exc: Exception) -> ControlError | None:
    """Return the error answer if the request caused ``exc``; None for any other exception."""
    if isinstance(exc, ControlError):
        return exc
    if isinstance(exc, RouteLoops):
        return ControlError("route_loops", str(exc))
    if isinstance(exc, FieldError):
        # The table parsers use the field "body" for a body that is not valid JSON or text.
        return ControlError("bad_json" if exc.field == "body" else "bad_route", str(exc))
    if isinstance(exc, RouteExists):
        return ControlError("route_exists", str(exc))
    if isinstance(exc, GenerationMismatch):
        return ControlError("generation_mismatch", str(exc))
    return None


def parse_error(status: int, body: bytes) -> ControlError:
    """Parse an error answer. An answer in another format gets the code ``internal``, and its HTTP
    status is in the message."""
    try:
        error = json.loads(body)["error"]
        return ControlError(str(error["code"]), str(error["message"]))
    except (ValueError, KeyError, TypeError):
        return ControlError("internal", f"the server answered HTTP {status} without an error code")


def route_path(dst: str) -> str:
    """Return the path of a route: ``10.244.2.0/24`` -> ``/v1/routes/10.244.2.0%2F24``."""
    return f"{ROUTES}/{quote(dst, safe='.:')}"


def parse_route_path(raw_path: str) -> str | None:
    """Return the destination in a path, or None if the path has none.

    The slash of the destination can be plain or percent-encoded. The caller checks that the
    destination is a prefix.
    """
    head, tail = ROUTES + "/", raw_path
    if not tail.startswith(head) or len(tail) == len(head):
        return None
    return unquote_to_bytes(tail[len(head) :]).decode("utf-8", "replace")


def format_generation(generation: int) -> str:
    """Format a generation as an entity tag for If-Match (RFC 9110 8.8.3)."""
    return f'"{generation}"'


def parse_if_match(value: str | None) -> int | None:
    """Return the generation in If-Match; None if the header is absent or ``*``."""
    if value is None or value.strip() == "*":
        return None
    tag = value.strip()
    digits = tag[1:-1]
    if len(tag) < 3 or tag[0] != '"' or tag[-1] != '"' or not _is_number(digits):
        raise ControlError("bad_request", f'If-Match: {value!r} is not a generation such as "7"')
    return int(digits)


def parse_if_none_match(value: str | None) -> bool:
    """Return whether the header is ``*``: the route may be added, but not replaced."""
    if value is None:
        return False
    if value.strip() != "*":
        raise ControlError("bad_request", f"If-None-Match: {value!r} is not supported: use *")
    return True


def parse_flag(name: str, value: str | None) -> bool:
    """Return the value of a parameter that is 1 if it is missing."""
    if value not in (None, "0", "1"):
        raise ControlError("bad_request", f"{name}: {value!r} is not valid: expected 0 or 1")
    return value != "0"


def _is_number(digits: str) -> bool:
    return digits.isascii() and digits.isdigit() and len(digits) <= 19
