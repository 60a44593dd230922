"""Write packets as pcapng, the file format of Wireshark and tcpdump.

Owns the blocks and their options (draft-ietf-opsawg-pcapng). Does not depend on where the packets
come from. One thread for each writer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

LINKTYPE_RAW = 101  # an IPv4 or IPv6 packet, without a link header
SECTION, INTERFACE, PACKET, STATISTICS = 0x0A0D0D0A, 1, 6, 5
COMMENT = 1
HARDWARE, OS, APPLICATION = 2, 3, 4  # options of the section
IF_NAME, IF_DESCRIPTION, IF_TSRESOL, IF_FILTER, IF_OS = 2, 3, 9, 11, 12
FLAGS, DROPCOUNT = 2, 4  # options of a packet
INBOUND, OUTBOUND = 1, 2  # in FLAGS
START_TIME, END_TIME, IF_RECEIVED, IF_DROPPED = 2, 3, 4, 5  # options of the statistics

Option = tuple[int, bytes]


class PcapngWriter:
    """Writes one section with one interface. Each block is written with one call of ``write``."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write

    def begin(
        self, *, hardware: str, system: str, application: str, name: str, description: str,
        filtered: str, snaplen: int,
    ) -> None:
        self._block(SECTION, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1), [
            (HARDWARE, hardware.encode()), (OS, system.encode()),
            (APPLICATION, application.encode()),
        ])
        options = [(IF_NAME, name.encode()), (IF_DESCRIPTION, description.encode()),
                   (IF_TSRESOL, b"\x09"), (IF_OS, system.encode())]
        if filtered:
            options.append((IF_FILTER, b"\0" + filtered.encode()))
        self._block(INTERFACE, struct.pack("<HHI", LINKTYPE_RAW, 0, snaplen), options)

    def packet(
        self, time_ns: int, data: bytes, length: int, *, outbound: bool, lost: int, comment: str,
    ) -> None:
        """lost: packets that were not captured between the packet before and this one."""
        options = [(FLAGS, struct.pack("<I", OUTBOUND if outbound else INBOUND))]
        if lost:
            options.append((DROPCOUNT, struct.pack("<Q", lost)))
        if comment:
            options.append((COMMENT, comment.encode()))
        self._block(PACKET, b"".join((
            struct.pack("<IIIII", 0, time_ns >> 32, time_ns & 0xFFFFFFFF, len(data), length),
            data, bytes(-len(data) % 4),
        )), options)

    def end(self, begin_ns: int, end_ns: int, received: int, lost: int) -> None:
        """Write the statistics of the interface."""
        self._block(STATISTICS, _times(0, end_ns), [
            (START_TIME, _split(begin_ns)), (END_TIME, _split(end_ns)),
            (IF_RECEIVED, struct.pack("<Q", received)), (IF_DROPPED, struct.pack("<Q", lost)),
        ])

    def _block(self, kind: int, body: bytes, options: Iterable[Option]) -> None:
        text = b"".join((body, *map(_option, options), b"\0\0\0\0"))
        size = struct.pack("<I", len(text) + 12)
        self._write(b"".join((struct.pack("<I", kind), size, text, size)))


def _option(option: Option) -> bytes:
    code, value = option
    value = value[:0xFFFF]
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def _split(time_ns: int) -> bytes:
    return struct.pack("<II", time_ns >> 32, time_ns & 0xFFFFFFFF)


def _times(interface: int, time_ns: int) -> bytes:
    return struct.pack("<I", interface) + _split(time_ns)
