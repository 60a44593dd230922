"""Read the features of a network device with ioctl(2).

Owns the layout of the requests. Threading: any thread, in the network namespace of that thread; a
call takes some microseconds. Source: ethtool(8), linux/ethtool.h.
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct

SIOCETHTOOL = 0x8946
GDRVINFO, GSTRINGS, GSSET_INFO, GFEATURES = 0x03, 0x1B, 0x37, 0x3A
FEATURE_NAMES = 4  # ETH_SS_FEATURES
NAME_BYTES = 32  # ETH_GSTRING_LEN
DRIVER_INFO_BYTES = 196  # struct ethtool_drvinfo
FEATURE_BLOCK = struct.Struct("=IIII")  # available, requested, active, never changed


def driver(device: str) -> str:
    """Return the name of a device's driver. Raises OSError."""
    answer = _ask(device, struct.pack("=I", GDRVINFO), DRIVER_INFO_BYTES)
    return answer[4:36].split(b"\0", 1)[0].decode("utf-8", "replace")


def active_features(device: str) -> frozenset[str]:
    """Return the names of the features that are on, such as tx-tcp-segmentation. Raises OSError."""
    counts = _ask(device, struct.pack("=IIQ", GSSET_INFO, 0, 1 << FEATURE_NAMES), 20)
    (n,) = struct.unpack_from("=I", counts, 16)
    names = _ask(device, struct.pack("=III", GSTRINGS, FEATURE_NAMES, n), 12 + n * NAME_BYTES)
    blocks_n = (n + 31) // 32
    size = 8 + blocks_n * FEATURE_BLOCK.size
    blocks = _ask(device, struct.pack("=II", GFEATURES, blocks_n), size)
    found = set()
    for bit in range(n):
        _, _, active, _ = FEATURE_BLOCK.unpack_from(blocks, 8 + bit // 32 * FEATURE_BLOCK.size)
        if active >> bit % 32 & 1:
            name = names[12 + bit * NAME_BYTES :][:NAME_BYTES]
            found.add(name.split(b"\0", 1)[0].decode("utf-8", "replace"))
    return frozenset(found)


def _ask(device: str, request: bytes, size: int) -> bytes:
    data = array.array("B", request.ljust(size, b"\0"))
    address, _ = data.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("16sP16x", device.encode()[:15], address))
    return data.tobytes()
