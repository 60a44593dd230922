"""The advert: the data that a node publishes in its lease in addition to flannel's fields.

The advert states that the node has udptun's UDP data path, and gives the parameters of this path.
The advert is one key in the lease's BackendData, next to the fields of flannel's backend. flannel
nodes ignore this key. Example:

    {"VNI": 1, "VtepMAC": "aa:bb:cc:dd:ee:ff",
     "udptun": {"port": 8285, "mtu": 1450, "v": 1, "features": ["ecn", "express", "probe"],
                "source_ports": [9000, 9015]}}

A reader ignores unknown keys and unknown features. An older udptun node publishes neither "v" nor
"features".

Owns: the key, its encoding and its validation. Pure functions; any thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..model import MAX_MTU, MAX_PORT, MIN_MTU

KEY = "udptun"
VERSION = 1  # of the advert's format; written with features, and not checked by readers
PROBE = "probe"  # the node answers probes on each path, and sends probes
EXPRESS = "express"  # the node can receive in the kernel, and may send from there
ECN = "ecn"  # the node copies the congestion marks of the path to the packets (RFC 6040)
FEATURES = frozenset({PROBE, EXPRESS, ECN})  # the features that this version of udptun knows


@dataclass(frozen=True, slots=True)
class Advert:
    """States that the node accepts inner packets, IPv4 and IPv6, as UDP payload.

    port      the UDP port at the node's public addresses
    mtu       the largest inner packet that the node accepts, in bytes; None: the node does not
              state a limit
    features  those of ``FEATURES`` that the node has; nothing that needs a feature is sent to a
              node without the feature
    source_ports  first and last of the further ports from which the node's datagrams
              arrive at other nodes; None: no other port
    """

    port: int
    mtu: int | None = None
    features: frozenset[str] = frozenset()
    source_ports: tuple[int, int] | None = None


def read(backend_data: Any) -> Advert | None:
    """Return the advert in a lease's BackendData.

    Return None if there is no advert, or if the advert is invalid. Never raises, because a peer's
    data must not cause an error here.
    """
    fields = _object(backend_data).get(KEY)
    if not isinstance(fields, Mapping):
        return None
    port = _number(fields.get("port"), 1, MAX_PORT)
    mtu = _number(fields.get("mtu"), MIN_MTU, MAX_MTU)
    if port is None or (mtu is None and fields.get("mtu") is not None):
        return None
    return Advert(port, mtu, _features(fields.get("features")), _ports(fields.get("source_ports")))


def embed(backend_data: Any, advert: Advert) -> dict[str, Any]:
    """Return the backend's data (an object or None) with the advert added."""
    fields: dict[str, Any] = {"port": advert.port}
    if advert.mtu is not None:
        fields["mtu"] = advert.mtu
    if advert.features:
        fields |= {"v": VERSION, "features": sorted(advert.features)}
    if advert.source_ports is not None:
        fields["source_ports"] = list(advert.source_ports)
    return {**(backend_data or {}), KEY: fields}


def _object(backend_data: Any) -> Mapping[str, Any]:
    """Return BackendData as an object, or {} if BackendData is not an object.

    flannel's extension backend publishes a string, which is the output of its command. If this
    string is the JSON text of an object, return this object.
    """
    if isinstance(backend_data, str):
        try:
            backend_data = json.loads(backend_data)
        except (ValueError, RecursionError):
            return {}
    return backend_data if isinstance(backend_data, Mapping) else {}


def _features(value: Any) -> frozenset[str]:
    if not isinstance(value, list):
        return frozenset()
    return frozenset(one for one in value if isinstance(one, str) and one in FEATURES)


def _ports(value: Any) -> tuple[int, int] | None:
    """Return the first and the last port. If the value is invalid, the node may use no other port.
    """
    if not isinstance(value, list) or len(value) != 2:
        return None
    first = _number(value[0], 1, MAX_PORT)
    last = None if first is None else _number(value[1], first, MAX_PORT)
    return None if first is None or last is None else (first, last)


def _number(value: Any, low: int, high: int) -> int | None:
    valid = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    return value if valid else None
