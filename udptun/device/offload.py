"""Offloads: names, and which of them are requested, supported by the kernel, and in use.

Owns the feature names, the grammar of ``--offload`` and the dependencies between features. ``tun``
and ``net.udp`` probe the features and pass the results to this module. Any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import FieldError

MEANINGS: dict[str, str] = {
    "tun-gso": "vnet_hdr: TCP super-packets from and to the TUN",
    "tun-uso": "UDP super-packets from and to the TUN (kernel 6.2)",
    "udp-gso": "UDP_SEGMENT: many datagrams in one send",
    "udp-gro": "UDP_GRO: many datagrams in one receive",
    "tcp-merge": "received TCP segments are merged into one TUN write",
    "udp-merge": "received UDP packets of a flow are merged into one TUN write",
    "batch": "recvmmsg, sendmmsg and several packets per turn",
}
FEATURES: tuple[str, ...] = tuple(MEANINGS)
NEEDS: dict[str, str] = {"tun-uso": "tun-gso", "tcp-merge": "tun-gso", "udp-merge": "tun-uso"}
FIRST_KERNEL: dict[str, tuple[int, int]] = {"tun-uso": (6, 2)}  # newer than the oldest we support
KERNEL_FEATURES = frozenset({"tun-gso", "tun-uso", "udp-gso", "udp-gro"})

ASKED = "asked"  # the cause if the operator turned the feature off


@dataclass(frozen=True)
class OffloadRequest:
    """The features that the operator allows.

    Text: ``auto``, ``off``, ``auto,-udp-merge``, ``off,+batch``; ``auto`` can be omitted.
    """

    features: frozenset[str] = frozenset(FEATURES)

    @classmethod
    def parse(cls, text: str) -> OffloadRequest:
        words = [word.strip() for word in text.split(",")]
        features = set(FEATURES)
        if words[0] in ("auto", "off") and words.pop(0) == "off":
            features.clear()
        for word in words:
            sign, name = word[:1], word[1:]
            if sign not in ("+", "-") or name not in MEANINGS:
                raise FieldError(
                    "offload", word, f"auto, off, or one of {', '.join(FEATURES)} with + or -"
                )
            if sign == "+":
                features.add(name)
            else:
                features.discard(name)
        return cls(frozenset(features))

    def __str__(self) -> str:
        without = [f"-{name}" for name in FEATURES if name not in self.features]
        only = [f"+{name}" for name in FEATURES if name in self.features]
        return ",".join(["auto", *without] if len(without) <= len(only) else ["off", *only])


class Probed(Protocol):
    """The result of probing a device or socket. ``Tun`` and ``UdpSocket`` implement this."""

    @property
    def features(self) -> frozenset[str]: ...

    @property
    def off(self) -> Mapping[str, str]: ...


@dataclass
class Capabilities:
    """The offloads as ``status`` shows them.

    found   kernel features for which the probe succeeded
    in_use  features that the data path may use now
    off     all other features, with the cause
    """

    found: frozenset[str] = frozenset()
    in_use: frozenset[str] = frozenset()
    off: dict[str, str] = field(default_factory=dict)

    @classmethod
    def combine(cls, request: OffloadRequest, parts: Iterable[Probed]) -> Capabilities:
        """Combine the probe results of all devices and sockets (the parts).

        A feature is off if one part does not support it. A kernel feature is also off if no part
        has probed it.
        """
        granted: set[str] = set()
        refused: dict[str, str] = {}
        for part in parts:
            granted |= part.features
            refused = {**part.off, **refused}
        capabilities = cls(found=frozenset(KERNEL_FEATURES & granted - refused.keys()))
        in_use: set[str] = set()
        for name in FEATURES:  # in FEATURES, a feature comes after those that it needs
            cause: str | None = refused.get(name)
            if name not in request.features:
                cause = ASKED
            elif cause is None and name in NEEDS and NEEDS[name] not in in_use:
                cause = f"needs {NEEDS[name]}"
            elif cause is None and name in KERNEL_FEATURES and name not in granted:
                cause = "not probed"
            if cause is None:
                in_use.add(name)
            else:
                capabilities.off[name] = cause
        capabilities.in_use = frozenset(in_use)
        return capabilities

    def lose(self, name: str, cause: str) -> tuple[str, ...]:
        """Turn off ``name`` and the features that need it. Return what this call has turned off.
        """
        lost: list[str] = []
        for other in FEATURES:
            if other in self.in_use and (other == name or NEEDS.get(other) in lost):
                self.off[other] = cause if other == name else f"needs {NEEDS[other]}"
                lost.append(other)
        self.in_use -= frozenset(lost)
        return tuple(lost)

    def to_json(self) -> dict[str, object]:
        return {
            "found": [name for name in FEATURES if name in self.found],
            "in_use": [name for name in FEATURES if name in self.in_use],
            "off": {name: self.off[name] for name in FEATURES if name in self.off},
        }
