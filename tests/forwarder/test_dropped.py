"""The description of dropped packets from their first bytes."""

import ipaddress
import random

import pytest

from udptun.flows import UNKNOWN, flow
from udptun.forwarder.dropped import Clock, to_json
from udptun.model import DroppedPacket

SRC, DST = "10.244.1.7", "10.244.9.9"
PORTS = b"\x9c\x40\x00\x35"  # 40000 and 53


def packet4(protocol: int, payload: bytes, offset: int = 0, options: bytes = b"") -> bytes:
    head = bytes([0x45 + len(options) // 4, 0, 0, 84, 0, 0]) + offset.to_bytes(2)
    head += bytes([64, protocol, 0, 0])
    for address in (SRC, DST):
        head += ipaddress.ip_address(address).packed
    return head + options + payload


def packet6(protocol: int, payload: bytes) -> bytes:
    addresses = ipaddress.ip_address("fd00::1").packed + ipaddress.ip_address("fd00::2").packed
    return bytes([0x60, 0, 0, 0, 0, 9, protocol, 64]) + addresses + payload


@pytest.mark.parametrize(
    ("head", "protocol", "ports"),
    [
        (packet4(17, PORTS), "udp", (40000, 53)),
        (packet4(6, PORTS, options=b"\1" * 8), "tcp", (40000, 53)),
        (packet4(1, PORTS), "icmp", (None, None)),
        (packet4(200, PORTS), "200", (None, None)),
        (packet4(17, PORTS, offset=0x2000), "udp", (40000, 53)),  # the first fragment has ports
        (packet4(17, PORTS, offset=1), "udp", (None, None)),
        (packet4(17, PORTS[:3]), "udp", (None, None)),
        (packet6(58, PORTS), "icmp6", (None, None)),
        (packet6(17, PORTS), "udp", (40000, 53)),
    ],
)
def test_flow(head: bytes, protocol: str, ports: tuple[int | None, int | None]) -> None:
    found = flow(head)
    assert (found["protocol"], found["src_port"], found["dst_port"]) == (protocol, *ports)
    v6 = head[0] >> 4 == 6
    assert (found["src"], found["dst"]) == (("fd00::1", "fd00::2") if v6 else (SRC, DST))


def test_bytes_that_are_no_packet_have_no_flow() -> None:
    for head in (b"", b"\x45", b"\x60" * 39, b"\x75" * 64, b"\x45" * 19):
        assert flow(head) == UNKNOWN


def test_any_bytes_have_a_description() -> None:
    chance = random.Random(14)
    for _ in range(2000):
        head = chance.randbytes(chance.randrange(65))
        head = bytes([chance.choice((0x45, 0x40, 0x4F, 0x60, 0x75))]) + head[1:] if head else head
        assert flow(head).keys() == UNKNOWN.keys()


def test_the_time_of_a_packet_does_not_change() -> None:
    clock = Clock()
    packet = DroppedPacket(0, 7, 123456789, 1, 84, ipaddress.ip_address("192.0.2.9").packed, 0,
                           packet4(17, PORTS))
    first, second = to_json(packet, clock), to_json(packet, clock)
    assert first == second
    assert (first["id"], first["endpoint"]) == ("0-7", "192.0.2.9:1")
