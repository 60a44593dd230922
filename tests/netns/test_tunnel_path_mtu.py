"""The path MTU is what arrives: no forged ICMP error lowers it, and no router has to report it."""

import contextlib
import ipaddress
import socket
import struct

import pytest

from tests.netns.netns_traffic import assert_invariant, snmp, transfer_tcp
from tests.netns.test_tunnel_probes import await_path, probing
from udptun.lab import Pair, pair, ping, wait_for
from udptun.lab.pair import Side

PORT = 8285
FULL = 1472 - 28  # of ping's payload, IPv4: a packet of the largest size
MIDDLE = 1400
STEP = 8  # the search for the largest size ends when its bounds are this close


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def inner(source: object, target: object) -> bytes:
    """The header of a packet in the tunnel, padded to 64 bytes."""
    addresses = (ipaddress.ip_address(str(each)).packed for each in (source, target))
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 1472, 7, 0x4000, 64, 6, 0, *addresses)
    return header.ljust(64, b"x")


class Forger:
    """Sends ICMP errors from one host to another that quote datagrams of the other."""

    def __init__(self, source: Side, victim: Side) -> None:
        self.victim, self.peer = victim.outer, source.outer
        self.socket = source.host.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)

    def send(
        self, mtu: int, quote: bytes = b"", kind: int = 3, code: int = 4,
        sport: int = PORT, dport: int = PORT,
    ) -> None:
        ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 1500, 1, 0x4000, 64, 17, 0, self.victim.packed,
                         self.peer.packed)
        udp = struct.pack("!HHHH", sport, dport, 1480, 0)
        body = struct.pack("!HH", 0, mtu) + ip + udp + quote
        message = struct.pack("!BBH", kind, code, 0) + body
        message = struct.pack("!BBH", kind, code, checksum(message)) + body
        self.socket.sendto(message, (str(self.victim), 0))


def path_mtu(side: Side) -> dict[str, object]:
    (peer,) = side.forwarder.get("/v1/peers")["peers"]
    return {key: peer[key] for key in ("path_mtu", "path_mtu_source", "path_mtu_seconds")}


def await_path_mtu(side: Side, *wanted: int) -> None:
    """Wait until the path MTU is one of the numbers."""
    try:
        wait_for(lambda: path_mtu(side)["path_mtu"] in wanted, f"a path MTU of {wanted}", 60)
    except Exception as e:
        raise AssertionError(f"{e}: {path_mtu(side)}") from None


def kernels_mtu(side: Side, target: object) -> str:
    """The route that this host's kernel uses; it has an MTU if the kernel has stored one."""
    return side.host.run(["ip", "route", "get", str(target)]).stdout


@contextlib.contextmanager
def silent_routers(tunnel: Pair):
    """Let the routers report nothing."""
    for router in tunnel.link.routers:
        router.nft(
            "table inet silent {\n chain c {\n  type filter hook output priority 0;\n"
            "  icmp type destination-unreachable drop\n  icmpv6 type packet-too-big drop\n }\n}\n"
        )
    yield


@contextlib.contextmanager
def bulk(tunnel: Pair):
    """Let the pair have traffic with full packets."""
    load = tunnel.a.host.start(["ping", "-i", "0.2", "-M", "dont", "-s", str(FULL),
                                str(tunnel.b.v4)])
    try:
        yield
    finally:
        load.stop()


# Forged errors


def test_a_forged_error_changes_no_path_mtu_of_a_peer_that_answers_probes(lab):
    tunnel = probing(lab)
    a, b = tunnel.sides
    forger = Forger(b, a)
    events = a.forwarder.start_udptun("events", "-w", "-o", "json")
    events.wait_for_output("hello")
    forged = [
        {"mtu": 552}, {"mtu": 0}, {"mtu": 68, "quote": b"12345678"}, {"mtu": 1400, "sport": 9},
        {"mtu": 552, "dport": 9}, {"mtu": 552, "quote": inner(a.v4, b.v4)},
        {"mtu": 1280, "quote": inner(a.v4, "10.99.0.1")},
        {"mtu": 552, "quote": b"\x60" + bytes(63)},
        {"mtu": 1300, "quote": b"utp1".ljust(64, b"\0")},
    ]
    for _ in range(3):
        for each in forged:
            forger.send(**each)
            assert ping(a.host, b.v4, count=2, size=FULL, df=True).received == 2, each
    # each probe that a hint causes is answered before these two
    for side in tunnel.sides:
        await_path(side, state="reachable", full_size_passes=True)
    transfer_tcp(a.host, b.host, b.v4)
    transfer_tcp(a.host, b.host, b.v6)
    assert path_mtu(a) == {"path_mtu": 1500, "path_mtu_source": "probe", "path_mtu_seconds": None}
    assert "mtu" not in kernels_mtu(a, b.outer)
    assert "peer_mtu" not in events.text()
    assert_invariant(a.forwarder)


@pytest.mark.parametrize("probed", [False, True])
def test_a_forged_error_about_a_peer_without_probes_is_limited(lab, probed):
    """The peer answers no probes. ``probed``: it gets some nevertheless."""
    tunnel = pair(lab, start=False)
    a, b = tunnel.sides
    if probed:
        a.options["routes"] = [f"{route} probe" for route in a.routes_to(b)]
    b.start()  # first, so that no early probe is refused
    a.start()
    forger = Forger(b, a)
    forger.send(552, inner(a.v4, "10.99.0.1"))  # is not routed to the peer
    forger.send(552, inner(a.v4, b.v4), dport=9)
    forger.send(552, kind=3, code=3)
    wait_for(lambda: a.forwarder.get("/v1/peers")["peers"][0]["errors"] == 1, "the last of them")
    assert path_mtu(a)["path_mtu"] == 1500
    forger.send(552, inner(a.v4, b.v4))
    await_path_mtu(a, 1280)
    reported = path_mtu(a)
    assert reported["path_mtu_source"] == "icmp"
    assert 0 < reported["path_mtu_seconds"] <= 60
    assert "mtu" not in kernels_mtu(a, b.outer)
    assert ping(a.host, b.v4, size=1280 - 28 - 28, df=True).received == 3
    assert ping(a.host, b.v6, size=1280 - 48, df=True).received == 3
    transfer_tcp(a.host, b.host, b.v4)
    transfer_tcp(a.host, b.host, b.v6)
    assert_invariant(a.forwarder)


@pytest.mark.slow
def test_a_forged_error_over_ipv6_is_not_seen(lab):
    tunnel = probing(lab, outer=6)
    a, b = tunnel.sides
    ip = struct.pack("!IHBB16s16s", 0x60000000, 1460, 17, 64, a.outer.packed, b.outer.packed)
    udp = struct.pack("!HHHH", PORT, PORT, 1460, 0)
    raw = b.host.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    for _ in range(3):  # the kernel computes the checksum
        raw.sendto(struct.pack("!BBHI", 2, 0, 0, 1280) + ip + udp, (str(a.outer), 0))
        assert ping(a.host, b.v4, count=3, size=FULL - 20, df=True).received == 3
    assert path_mtu(a)["path_mtu"] == 1500
    assert "mtu 1280" not in kernels_mtu(a, b.outer)


# Honest paths


@pytest.mark.parametrize(("reported", "outer"), [
    (True, 4), slow(False, 4), slow(True, 6), slow(False, 6),
])
def test_a_smaller_hop_is_found_and_its_repair_too(lab, reported, outer):
    tunnel = probing(lab, middle_mtu=1500, outer=outer)
    a, b = tunnel.sides
    with contextlib.nullcontext() if reported else silent_routers(tunnel), bulk(tunnel):
        for middle in (MIDDLE, 1500, 1320):
            tunnel.link.set_middle_mtu(middle)
            for side in tunnel.sides:
                await_path_mtu(side, *range(middle - STEP + 1, middle + 1))
            assert path_mtu(a)["path_mtu_source"] == "probe"
    transfer_tcp(a.host, b.host, b.v4)
    if reported or outer == 4:  # else the kernel cannot know how to fragment
        transfer_tcp(b.pod, a.pod, a.pod_v6)
    for side in tunnel.sides:
        assert_invariant(side.forwarder)


# Paths with less than IPv6 needs


def small_pair(lab, where: str, mtu: int, probes: bool) -> Pair:
    """A pair with a small underlay: at the hosts' own devices, or at a hop between them."""
    tunnel = pair(lab, middle_mtu=1500 if where == "hop" else None, start=False, pod_mtu=1280)
    if where == "hop":
        tunnel.link.set_middle_mtu(mtu)
    for side, other in (tunnel.sides, tunnel.sides[::-1]):
        if where == "device":
            side.host.interfaces[0].set_mtu(mtu)
        if probes:
            side.options["routes"] = [f"{route} probe" for route in side.routes_to(other)]
        side.start()
    return tunnel


@pytest.mark.parametrize(("where", "mtu", "probes"), [
    ("hop", 1200, True), slow("hop", 1200, False), slow("hop", 1280, True),
    slow("hop", 1280, False), slow("device", 1280, True), slow("device", 1280, False),
])
def test_ipv6_works_over_an_underlay_that_is_too_small_for_it(lab, where, mtu, probes):
    tunnel = small_pair(lab, where, mtu, probes)
    a, b = tunnel.sides
    if where == "device":
        assert a.forwarder.status()["device"]["mtu"] == 1280
    with bulk(tunnel):
        if probes:
            for side in tunnel.sides:
                await_path_mtu(side, *range(mtu - STEP + 1, mtu + 1))
        elif where == "hop":
            for side in tunnel.sides:
                await_path_mtu(side, 1280)
        else:
            await_path_mtu(a, mtu)
    wait_for(lambda: ping(a.host, b.v6, count=1, size=1280 - 48, df=True).received, "IPv6", 60)
    assert ping(a.pod, b.pod_v6, size=1280 - 48, df=True).received == 3
    fragmented = snmp_fragments(a)
    transfer_tcp(a.host, b.host, b.v6)
    transfer_tcp(b.pod, a.pod, a.pod_v6)
    transfer_tcp(a.pod, b.pod, b.pod_v4)
    assert snmp_fragments(a) > fragmented
    # IPv6 packets of up to 1280 bytes pass; a longer one gets an error with this number
    if where == "hop":
        result = ping(a.host, b.v6, count=1, size=1300, df=True, wait=0.5)
        assert any("1280" in text for text in result.errors), result
    for side in tunnel.sides:
        assert_invariant(side.forwarder)


def snmp_fragments(side: Side) -> int:
    """Fragments that this host made of datagrams, or joined to datagrams."""
    counters = snmp(side.host, "Ip")
    return counters["FragCreates"] + counters["ReasmOKs"]
