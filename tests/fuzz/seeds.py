"""The first inputs of each harness, in case its corpus is empty. Pure functions."""

import json
import struct
from collections.abc import Iterator

from tests.reference import Probe, build_probe
from tests.wire.craft import Flow, addr
from udptun.control import flannel
from udptun.model import Peer, PeerError
from udptun.probe import message
from udptun.takeover import document
from udptun.takeover import message as takeover


def _flows() -> Iterator[Flow]:
    yield Flow(dst=addr("10.244.2.5"))
    yield Flow(dst=addr("10.244.5.5"), flags=0, ip_options=bytes.fromhex("94040000"))
    yield Flow(6, dst=addr("fd00:1::5"))
    yield Flow(6, dst=addr("fd00:2::5"), extensions=((60, bytes(6)),))


def _frames() -> Iterator[bytes]:
    for flow in _flows():
        yield flow.tcp_super(bytes(300), 100)
        yield flow.udp_super(bytes(300), 100)
        yield flow.tcp_super(bytes(8), 4)
        yield flow.udp_super(bytes(8), 4)
        yield bytes(10) + flow.udp(b"abc")
        yield bytes(10) + flow.tcp(b"abcd")
    yield Flow(dst=addr("10.244.2.5"), ip_options=bytes(40)).tcp_super(bytes(8), 4)[:50]


def _packets() -> Iterator[bytes]:
    for flow in _flows():
        yield flow.udp(b"abc")
        yield flow.tcp(b"abcd")


def _chunks(parts: list[bytes], head: str) -> bytes:
    return b"".join(struct.pack(head, len(part), len(part)) + part for part in parts)


def _probes() -> Iterator[bytes]:
    yield build_probe(Probe(1, 1, 0, 24))
    yield build_probe(Probe(2, 2, 5, 60))
    yield message.Probe(1, message.VXLAN_PATH, 3, 4, 24).encode()


_TEXT = b"10.244.2.0/24 via 192.0.2.1 port 99 mtu 1300 probe # x\nfd00:2::/64 via 2001:db8::1\n"
_ROUTE = {"dst": "10.244.2.0/24", "via": "192.0.2.1", "port": 99, "mtu": 1300, "probe": True}
_ROUTE6 = {"dst": "fd00::/64", "via": "2001:db8::2"}
_JSON = json.dumps({"routes": [_ROUTE, _ROUTE6], "generation": 7}).encode()
_PORT = json.dumps({"routes": [_ROUTE, _ROUTE | {"dst": "10.1.0.0/16", "port": 65536}]}).encode()
_NET = {"Network": "10.244.0.0/16", "SubnetLen": 24, "SubnetMin": "10.244.1.0", "EnableIPv6": True,
        "IPv6Network": "fd00::/56", "Backend": {"Type": "vxlan", "VNI": 1, "Port": 8472}}
_VALUE = {"PublicIP": "192.0.2.1", "PublicIPv6": None, "BackendType": "udp",
          "BackendData": {"udptun": {"port": 8285, "mtu": 1450, "v": 1, "features": ["probe"]}}}
_HOSTS = b"""network = ["10.244.0.0/16", "fd00::/48"]
[[nodes]]
name = "a"
public = ["192.0.2.1", "2001:db8::1"]
subnets = ["10.244.1.0/24", "fd00:0:0:1::/64"]
"""
_HOSTS_JSON = json.dumps({
    "network": "10.244.0.0/16",
    "nodes": [{"name": "a", "public": "192.0.2.1", "subnets": "10.244.1.0/24"}],
}).encode()
_MESSAGES = (
    takeover.Hello(program="1.0", pid=3, options={"tun": "udptun0"}), takeover.State(size=10),
    takeover.Descriptors(["tun-0"], more=True), takeover.Done(["lock"]), takeover.Refused("busy"),
)
_PEERS = [document.peer_to_json(Peer(
    addr("192.0.2.1"), 8285, 1400, 1, 2, 3, 4, None, False, 5, 6, 1300, 7,
    PeerError(111, "icmp", 3, 1, addr("192.0.2.9"), 8),
))]
_HAVING = document.StateDocument(
    generation=7, mtu=1472, off={"udp-gso": "x"}, device={"name": "udptun0", "vnet_hdr": True},
    sockets=[{"endpoint": "192.0.2.1:8285"}], peers=_PEERS, paths={"lock": "/run/udptun/lock"},
    routes="10.244.2.0/24 via 192.0.2.1",
)
_COUNTED = document.CountersDocument(
    packets={"encap": {"read": 1}}, drops=[["no_route", "encap", 1]], peer_errors={"sent": 1},
    workers=[{"turns": 1}], peers=_PEERS, probe_counts={"sent": 1},
)


def seeds(harness: str) -> list[bytes]:
    """Return a few inputs, valid ones in the harness' format."""
    frames, packets, probes = list(_frames()), list(_packets()), list(_probes())
    datagram = [struct.pack("<BHHH", 0x20, 0, len(p), len(p)) + p
                for p in [*packets, *probes[:2], probes[0][:12]]]
    table = {
        "encap": [bytes([7, 0]) + _chunks([frame], "<HH") for frame in frames],
        "decap": [bytes([7, 0]) + one for one in datagram],
        "merge": [bytes([0, 20, 0] * 8), bytes([8, 20, 0] * 8), bytes([4, 255, 0] * 80)],
        "flush": [bytes([7, 2, 0x80, 0x81]) + bytes([k, 5, 0xA0, 60, 1]) * 3 for k in range(9)],
        "errors": [bytes([0x80, 1, 1, 44, 60]) + bytes(28),
                   bytes([0x81, 2, 4, 44, 90]) + bytes(28)],
        "publish": [bytes([0, 2, 1, 8, 3, 5, 24, 9, 20, 5, 8, 12]) * 4],
        "text": [_TEXT], "json": [_JSON], "route-text": [_TEXT], "route-json": [_JSON, _PORT],
        "step-cut": [struct.pack("!H", len(f)) + f for f in frames],
        "step-packet": packets, "step-fragment": [struct.pack("!H", 60) + p for p in packets],
        "step-icmp": [bytes([k]) + bytes(20) + p for k in range(3) for p in packets],
        "step-merge": [b"\x03" + b"".join(struct.pack("!H", len(p)) + p for p in some) for some in
                       (packets, [flow.ip(bytes(10), 6) for flow in _flows()] + packets[:1])],
        "probe": probes,
        "control": [b'"7"', b"*", b"0", b"10.244.2.0%2F24", json.dumps(_ROUTE).encode(),
                    b"192.0.2.1:8285", b"[2001:db8::1]:9", b"10.1.0.0/16 via 192.0.2.1"],
        "flannel": [flannel.MESSAGE.pack(kind, addr("10.1.0.0"), 16, addr("192.0.2.1"), 8285)
                    for kind in (1, 2, 3)],
        "lease": [b"10.5.52.0-24&fc00:0:0:1::-64\n" + json.dumps(_VALUE).encode()],
        "node": [b"10.244.1.0/24\n" + second + b"\ntrue\nudp\n{}\n{}\n192.0.2.1\n2001:db8::1"
                 for second in (b"fd00:1::/64", b"10.244.2.0/24")],
        "advert": [json.dumps(_VALUE["BackendData"]).encode()],
        "hosts": [_HOSTS, _HOSTS.replace(b'"10.244.1.0/24", "fd00:0:0:1::/64"', b""), _HOSTS_JSON],
        "net-conf": [json.dumps(_NET).encode()],
        "takeover": [*map(takeover.encode, _MESSAGES), document.dump(_HAVING),
                     document.dump(_COUNTED)],
    }
    return table[harness]
