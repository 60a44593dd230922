"""Notice packets from peers that answer no echo: a peer may drop ICMP and be reachable.

One packet socket per IP version and device, only while there are such peers. It is bound to the
device through which their packets arrive: a packet from another device, for example from a local
pod that uses a peer's address, proves nothing. A filter in the kernel passes packets from the
subnets of these peers. After the first packet of a subnet, the filter leaves the subnet out until
the next ``watch``. So a fast sender costs one packet per call. Needs CAP_NET_RAW. Runs on the
daemon's loop.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import struct
from collections.abc import Callable, Iterable

from ...model import IPNetwork

SUBNETS_N = 64  # per IP version; more are watched in turns
SNAP_LEN = 40  # the IP header is enough
BUFFER_LEN = 1 << 16
SO_ATTACH_FILTER = 26  # asm-generic/socket.h
ETHERTYPE = {4: 0x0800, 6: 0x86DD}
SOURCE = {4: 12, 6: 8}  # offset of the source address in the IP header
ADDRESS_LEN = {4: 4, 6: 16}
# linux/bpf_common.h
LOAD_WORD, AND, JUMP_IF_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
INSTRUCTION = struct.Struct("=HBBI")


class Listener:
    """Listens on one device, also after it was created again.

    received  is called with a subnet when a packet from it arrives
    """

    def __init__(
        self, version: int, device: str, received: Callable[[IPNetwork], None]
    ) -> None:
        self._version, self._device = version, device
        self._received = received
        self._watched: dict[IPNetwork, None] = {}
        self._turn = 0
        self._index = 0  # of the device to which the socket is bound
        self._socket: socket.socket | None = None

    def watch(self, subnets: Iterable[IPNetwork]) -> None:
        """Wait for a packet from each of these subnets. Raises OSError."""
        wanted = list(subnets)
        if len(wanted) > SUBNETS_N:
            self._turn = (self._turn + SUBNETS_N) % len(wanted)
            wanted = [*wanted[self._turn :], *wanted[: self._turn]][:SUBNETS_N]
        if not wanted:
            self.close()
            return
        if (index := socket.if_nametoindex(self._device)) != self._index:
            self.close()
            self._index = index
        now = dict.fromkeys(wanted)
        if self._socket is None or self._watched != now:
            self._watched = now
            self._filter()

    def close(self) -> None:
        self._watched = {}
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _filter(self) -> None:
        """Attach the filter. Open the socket first if necessary.

        Packets that passed a former filter may still wait in the socket; ``_receive`` ignores them.
        """
        # Protocol 0: nothing is received before the bind.
        opened = self._socket or socket.socket(
            socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0)
        try:
            program = packet_filter(self._watched)
            buffer = ctypes.create_string_buffer(program)
            opened.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack(
                "HL", len(program) // INSTRUCTION.size, ctypes.addressof(buffer)))
            if self._socket is None:
                opened.setblocking(False)
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_LEN)
                opened.bind((self._device, ETHERTYPE[self._version]))
                asyncio.get_running_loop().add_reader(opened, self._receive, opened)
                self._socket = opened
        except BaseException:
            if self._socket is None:
                opened.close()
            raise

    def _receive(self, opened: socket.socket) -> None:
        try:
            packet = opened.recv(SNAP_LEN)
        except OSError:  # an interface is down, or no more datagram is waiting
            return
        start = SOURCE[self._version]
        source = int.from_bytes(packet[start : start + ADDRESS_LEN[self._version]])
        found = next((net for net in self._watched if _contains(net, source)), None)
        if found is not None:
            del self._watched[found]
            self._filter()
            self._received(found)


def _contains(subnet: IPNetwork, address: int) -> bool:
    return (address ^ int(subnet.network_address)) >> (subnet.max_prefixlen - subnet.prefixlen) == 0


def packet_filter(subnets: Iterable[IPNetwork]) -> bytes:
    """Return a classic BPF program that passes the IP packets from these subnets.

    The packet begins with its IP header. All subnets have one IP version.
    """
    program = b""
    for subnet in subnets:
        words = struct.unpack(f">{subnet.max_prefixlen // 32}I", subnet.network_address.packed)
        masks = struct.unpack(f">{subnet.max_prefixlen // 32}I", subnet.netmask.packed)
        used = [(at, word, mask) for at, (word, mask) in enumerate(zip(words, masks, strict=True))
                if mask]
        for at, word, mask in used:
            left = 3 * (used[-1][0] - at) + 1  # instructions after this test, up to the next subnet
            program += INSTRUCTION.pack(LOAD_WORD, 0, 0, SOURCE[subnet.version] + 4 * at)
            program += INSTRUCTION.pack(AND, 0, 0, mask)
            program += INSTRUCTION.pack(JUMP_IF_EQUAL, 0, left, word)
        program += INSTRUCTION.pack(RETURN, 0, 0, SNAP_LEN)
    return program + INSTRUCTION.pack(RETURN, 0, 0, 0)
