"""The probe message: parse it from untrusted bytes, and build it.

Owns: the layout of a probe, version 1, on the UDP path. Pure functions. All fields are big-endian.
"""

import struct
from typing import NamedTuple

from .packet import Dropped

MAGIC = b"utp1"
LAYOUT = struct.Struct("!4sBBxxQIHxx")  # magic, kind, path, token, heard_ms, size
UDP_PATH = 1
REQUEST, REPLY = 1, 2


class Probe(NamedTuple):
    kind: int  # REQUEST or REPLY
    token: int
    heard_ms: int
    size: int  # bytes of the message


def parse_probe(datagram: bytes) -> Probe | None:
    """Return the probe; None if the datagram does not begin as a probe.

    drops  short_packet: shorter than a probe; bad_total_len: the size field is not the datagram's
           size; bad_version: neither a request nor a reply, or a probe of another path
    """
    if not datagram.startswith(MAGIC):
        return None
    if len(datagram) < LAYOUT.size:
        raise Dropped("short_packet")
    _, kind, path, token, heard_ms, size = LAYOUT.unpack_from(datagram)
    if size != len(datagram):
        raise Dropped("bad_total_len")
    if kind not in (REQUEST, REPLY) or path != UDP_PATH:
        raise Dropped("bad_version")
    return Probe(kind, token, heard_ms, size)


def build_probe(probe: Probe) -> bytes:
    """Return the message, padded with zeros to its size."""
    head = LAYOUT.pack(MAGIC, probe.kind, UDP_PATH, probe.token, probe.heard_ms, probe.size)
    return head.ljust(probe.size, b"\0")
