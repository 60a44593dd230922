"""Fixed input for the micro benchmarks: consecutive TCP or UDP packets of one flow.

Owns: the bytes of the packets. The functions have no side effects. The reference implementation
computes the checksums, so that a benchmark fails if the compiled checksum is wrong.
"""

from __future__ import annotations

import struct

from tests import reference

_SOURCE, _TARGET = bytes((10, 244, 1, 7)), bytes((10, 244, 2, 9))
_TCP, _UDP = 6, 17


def run(protocol: str, n: int, payload_len: int) -> list[bytes]:
    """Return ``n`` consecutive packets with different payloads."""
    return [_packet(protocol, i, _payload(i, payload_len)) for i in range(n)]


def _payload(i: int, length: int) -> bytes:
    return bytes((i * 7 + k) & 0xFF for k in range(length))


def _packet(protocol: str, i: int, payload: bytes) -> bytes:
    if protocol == "tcp":
        number, at = _TCP, 16
        l4 = struct.pack("!HHIIBBHHH", 4321, 80, 1 + i * len(payload), 1, 0x50, 0x10, 512, 0, 0)
    else:
        number, at = _UDP, 6
        l4 = struct.pack("!HHHH", 4321, 80, 8 + len(payload), 0)
    pseudo = _SOURCE + _TARGET + struct.pack("!HH", number, len(l4) + len(payload))
    ip = struct.pack(
        "!BBHHHBBH", 0x45, 0, 20 + len(l4) + len(payload), i, 0x4000, 64, number, 0
    ) + _SOURCE + _TARGET
    return _summed(ip, 10) + _summed(l4 + payload, at, pseudo)


def _summed(data: bytes, at: int, before: bytes = b"") -> bytes:
    value = 0xFFFF - reference.checksum(before + data) or 0xFFFF
    return data[:at] + value.to_bytes(2, "big") + data[at + 2 :]
