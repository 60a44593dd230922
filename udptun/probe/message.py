"""The probe message: encode and decode.

Owns the wire format, version 1. All numbers are big-endian, and the message is padded with zeros to
its size:

    0  u32  magic "utp1"; the high nibble of the first byte is 7, so it is not an IP packet
    4  u8   kind: 1 request, 2 reply
    5  u8   path: 1 UDP tunnel, 2 VXLAN
    6  u16  zero
    8  u64  token: new in each request; the reply has the request's token.
            Upper 32 bits of a request's token: a new random number.
            Lower 32 bits: the upper 32 bits of the last request that came from the peer; random if
            none came
   16  u32  heard: milliseconds since the sender of this message last received a probe from the
            other side on this path;
            0xFFFFFFFF: never. Over UDP, it is 0 in a reply and is not used
   20  u16  size of the message in bytes; a reply has the request's size
   22  u16  zero

The lower half shows that a request comes from the peer. For example, node A puts a random number
into each request to node B. Only a node that receives at B's address knows this number. B repeats
it in its next request to A. A sender that forges B's address does not receive A's request, so it
does not know the number.

``src_ext/wire/probe.pxd`` has the compiled code for the same format. Pure functions: any thread.
"""

from __future__ import annotations

import os
import random
import struct
from typing import NamedTuple

from .. import model

REQUEST, REPLY = model.PROBE_REQUEST, model.PROBE_REPLY
NEVER_HEARD = model.NEVER_HEARD
UDP_PATH, VXLAN_PATH = 1, 2

HALF_BITS = 32  # of a token
MAGIC = 0x75747031  # "utp1"
MAX_SIZE = 0xFFFF

_HEADER = struct.Struct(">IBBxxQIHxx")
HEADER_SIZE = _HEADER.size  # 24


class Probe(NamedTuple):
    kind: int
    path: int
    token: int
    heard_ms: int
    size: int

    def reply(self, heard_ms: int) -> Probe:
        """Return the reply to this request."""
        return Probe(REPLY, self.path, self.token, heard_ms, self.size)

    def encode(self) -> bytes:
        if not HEADER_SIZE <= self.size <= MAX_SIZE:
            raise ValueError(f"size: {self.size} is not from {HEADER_SIZE} to {MAX_SIZE}")
        header = _HEADER.pack(MAGIC, self.kind, self.path, self.token, self.heard_ms, self.size)
        return header.ljust(self.size, b"\0")


def decode(message: bytes) -> Probe | None:
    """Return the probe in a received datagram, or None if the datagram is not a valid probe.

    The fields that are zero in this version, and the padding, are not checked: a later version may
    use them.
    """
    if len(message) < HEADER_SIZE:
        return None
    magic, kind, path, token, heard_ms, size = _HEADER.unpack_from(message)
    known = kind in (REQUEST, REPLY) and path in (UDP_PATH, VXLAN_PATH)
    if magic != MAGIC or not known or size != len(message):
        return None
    return Probe(kind, path, token, heard_ms, size)


def heard_field(last_heard: float | None, now: float) -> int:
    """Return the field ``heard`` for a peer that was last heard at ``last_heard``."""
    if last_heard is None:
        return NEVER_HEARD
    return min(max(int((now - last_heard) * 1000), 0), NEVER_HEARD - 1)


class KernelRandom(random.SystemRandom):
    """Random numbers from the kernel. They are read in larger pieces, because one system call for
    each probe would take more time than everything else that scheduling the probe needs."""

    PIECE_BYTES = 1024

    def __init__(self) -> None:
        super().__init__()
        self._piece, self._at = b"", 0

    def getrandbits(self, k: int) -> int:
        size = (k + 7) // 8
        if self._at + size > len(self._piece):
            self._piece, self._at = os.urandom(max(self.PIECE_BYTES, size)), 0
        self._at += size
        return int.from_bytes(self._piece[self._at - size : self._at]) >> (8 * size - k)


def half(token: int) -> int:
    """Return the upper half of a request's token. The peer repeats it in the lower half of its next
    request."""
    return token >> HALF_BITS


def new_token(rng: random.Random, peer_half: int) -> int:
    """Return the token of a new request to a peer.

    peer_half  ``half`` of the token of the peer's last request; 0: there was none
    """
    return rng.getrandbits(HALF_BITS) << HALF_BITS | (peer_half or rng.getrandbits(HALF_BITS))


def proves(token: int, own_half: int) -> bool:
    """Return whether the sender of a request with this token has received our last
    answered request.

    own_half  ``half`` of the token of our last request that was answered; 0: none was
    """
    return own_half != 0 and token & (1 << HALF_BITS) - 1 == own_half
