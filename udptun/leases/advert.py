"""What a node says in its lease beyond flannel: that it speaks our UDP data path, and how.

It stands in the lease's BackendData under one key of ours, beside what flannel's backend put
there; a flannel node reads its own fields and passes over ours:

    {"VNI": 1, "VtepMAC": "aa:bb:cc:dd:ee:ff", "udptun": {"port": 8285, "mtu": 1450}}

Pure functions of their arguments: from any thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..model import MAX_MTU, MIN_MTU
from .base import Attributes

KEY = "udptun"


@dataclass(frozen=True, slots=True)
class Advert:
    """The node takes inner packets, IPv4 and IPv6, as UDP payload.

    port  where it listens, at its public addresses
    mtu   the largest inner packet it takes, in bytes; None where it does not say
    """

    port: int
    mtu: int | None = None


def read(attributes: Attributes) -> Advert | None:
    """None where there is none, or none that can be used: what peers write must not stop us."""
    said = _object(attributes.backend_data).get(KEY)
    if not isinstance(said, Mapping):
        return None
    port = _number(said.get("port"), 1, 65535)
    mtu = _number(said.get("mtu"), MIN_MTU, MAX_MTU)
    if port is None or (mtu is None and said.get("mtu") is not None):
        return None
    return Advert(port, mtu)


def embed(backend_data: Any, advert: Advert) -> dict[str, Any]:
    """The backend's own data, an object or None, with the advertisement in it."""
    said = {"port": advert.port} | ({} if advert.mtu is None else {"mtu": advert.mtu})
    return {**(backend_data or {}), KEY: said}


def _object(backend_data: Any) -> Mapping[str, Any]:
    """flannel's extension backend has a string there: what its command printed."""
    if isinstance(backend_data, str):
        try:
            backend_data = json.loads(backend_data)
        except (ValueError, RecursionError):
            return {}
    return backend_data if isinstance(backend_data, Mapping) else {}


def _number(value: Any, low: int, high: int) -> int | None:
    sound = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    return value if sound else None
