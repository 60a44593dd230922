"""The express path as text, for ``status``, ``top`` and ``web``.

Reads the status of a forwarder. Pure functions: any thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..text import counted
from .samples import Pair

LABEL = "express path"


def is_wanted(status: Mapping[str, Any]) -> bool:
    """Return whether the operator has asked for it."""
    return bool(status.get("accelerate", {}).get("mode") == "auto")


def state(status: Mapping[str, Any]) -> str:
    """Return whether packets may pass in the kernel; if not, why."""
    found = status.get("accelerate")
    if found is None:
        return "unknown to this version of the forwarder"
    if found["active"]:
        return f"active on {', '.join(found['devices'])}"
    return f"off: {found['reason']}"


def lines(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a label and a text: the state, and if any packet has met a program, the counters."""
    yield LABEL, state(status)
    kernel = status.get("accelerate", {}).get("packets", {})
    if not any(kernel.values()):
        return
    packets = status["packets"]
    passed = [
        f"{kernel[name]} of {counted(n, f'{name} packet')}{_share(kernel[name], n)}"
        for name, n in (("sent", packets["encap"]["delivered"]),
                        ("received", packets["decap"]["read"]))]
    yield "in the kernel", ", ".join([*passed, *(
        f"{kernel[name]} {name}" for name in ("send_dropped", "receive_dropped") if kernel[name])])
    left = [f"{n} {name}" for name, n in kernel.items() if n and "_" in name
            and not name.endswith(("_dropped", "_marked"))]
    if left:
        yield "left to workers", ", ".join(left)


def of_peer(peer: Mapping[str, Any]) -> str:
    """Return whether packets to and from the peer may pass in the kernel; if not, why."""
    found = peer.get("express")
    if found is None:
        return "unknown to this version of the forwarder"
    return "active" if found["active"] else f"off: {found['reason']}"


def rates(status: Mapping[str, Any], kernel: Pair, packets: Pair) -> str:
    """Return the state, or while the path is active, the share of the packets of this moment.

    kernel, packets  packets per second in the kernel, and all: sent, received
    """
    if not status.get("accelerate", {}).get("active"):
        return state(status)
    shares = ["-" if one is None or not every else f"{one / every:.0%}"
              for one, every in zip(kernel, packets, strict=True)]
    return f"carries {shares[0]} of the sent packets, {shares[1]} of the received"


def _share(n: int, every: int) -> str:
    return f" ({n / every:.0%})" if every else ""
