"""Ask an Ethernet segment whether another host has one of our IPv4 addresses (RFC 5227).

An ARP probe has no sender address, so it changes no host's table. Needs CAP_NET_RAW. Blocks for at
most PROBES times WAIT_SECONDS. Any thread, in the network namespace of that thread.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import time

ETH_P_ARP = 0x0806  # linux/if_ether.h
BROADCAST = b"\xff" * 6
# Ethernet, IPv4, lengths 6 and 4, request; then the sender's and the target's MAC and address.
PACKET = struct.Struct("!HHBBH6s4s6s4s")
REQUEST, REPLY = 1, 2
PROBES, WAIT_SECONDS = 2, 0.3


def other_owners(device: str, address: ipaddress.IPv4Address) -> set[str]:
    """Return the MAC addresses that answer for this address, without the one of the device. Other
    interfaces of this host may be among them. Raises OSError."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ARP)) as opened:
        opened.bind((device, ETH_P_ARP))
        own = opened.getsockname()[4]
        if len(own) != len(BROADCAST):
            return set()  # no Ethernet
        probe = PACKET.pack(1, 0x0800, 6, 4, REQUEST, own, bytes(4), bytes(6), address.packed)
        found: set[str] = set()
        for _ in range(PROBES):
            opened.sendto(probe, (device, ETH_P_ARP, 0, 0, BROADCAST))
            found |= _answers(opened, own, address.packed)
        return found


def _answers(opened: socket.socket, own: bytes, wanted: bytes) -> set[str]:
    found = set()
    deadline = time.monotonic() + WAIT_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        opened.settimeout(left)
        try:
            data = opened.recv(1500)
        except TimeoutError:
            break
        if len(data) < PACKET.size:
            continue
        _, _, _, _, kind, mac, sender, _, _ = PACKET.unpack_from(data)
        if kind == REPLY and sender == wanted and mac != own:
            found.add(mac.hex(":"))
    return found
