"""The forwarders' counters compared with the kernel's.

With the express path everywhere (ACCELERATED), the forwarders' counters are compared with each
other: its packets pass neither the counter of the TUN nor nftables.
"""

from tests.netns.netns_traffic import (
    ACCELERATED,
    UdpFlow,
    assert_invariant,
    device_counters,
    nft_counters,
    settled,
    settled_packets,
    transfer_tcp,
    wait_for_express,
)
from udptun.lab import Forwarder, Host, Link, Pair, pair, ping


def test_single_packets(lab):
    """Every counter on the path counts each single packet."""
    tunnel = pair(lab)
    a, b = tunnel.sides
    wait_for_express(a.forwarder, b.forwarder)
    quiet(a.host)
    count = 500
    with UdpFlow(a.host, b.host, b.v4) as flow, at_wire(tunnel.link) as wire:
        before = steady(tunnel, wire)
        for _ in range(count // 20):
            flow.exchange([bytes([n]) * 100 for n in range(20)])
        after = steady(tunnel, wire)
    counted = after.since(before)
    if not ACCELERATED:
        assert (counted["a: TUN"], counted["wire"]) == (count, count)
    else:
        assert kernel_packets(a.forwarder) >= count
    del counted["a: TUN"], counted["wire"]
    assert counted == {
        "a: encap read": count, "a: encap delivered": count,
        "b: decap read": count, "b: decap delivered": count,
    }
    for side in tunnel.sides:
        assert_invariant(side.forwarder)


def kernel_packets(forwarder: Forwarder) -> int:
    """Return the number of packets that the express path has sent."""
    sent: int = forwarder.status()["accelerate"]["packets"]["sent"]
    return sent


def quiet(host: Host) -> None:
    """Stop the kernel's own IPv6 multicast packets, which it sends on a new device."""
    host.nft(
        "table ip6 quiet {\n chain c {\n  type filter hook output priority 0;\n"
        "  ip6 daddr ff00::/8 drop\n }\n}\n"
    )


class Counts(dict):
    """The counters on the path from a to b, when no packets move."""

    def __init__(self, tunnel: Pair, wire) -> None:
        a, b = tunnel.sides
        for side, name, direction in ((a, "a", "encap"), (b, "b", "decap")):
            packets = settled_packets(side.forwarder)[direction]
            for what in ("read", "delivered"):
                self[f"{name}: {direction} {what}"] = packets[what]
        self["a: TUN"] = device_counters(a.host, "udptun0")["sent"]
        self["wire"] = wire.packets()["tunnel"]

    def since(self, before: "Counts") -> dict[str, int]:
        return {name: value - before[name] for name, value in self.items()}


def steady(tunnel: Pair, wire) -> Counts:
    """Read until two readings are equal: no packet moved between the reads of single counters."""
    while (counts := Counts(tunnel, wire)) != Counts(tunnel, wire):
        pass
    return counts


def at_wire(link: Link):
    """Every packet as it crosses: nothing joins super-packets here, and nothing is joined."""
    link.profile("P3")
    return nft_counters(
        link.b.host, link.b.name,
        tunnel="udp dport 8285",
        fragments="ip frag-off & 0x3fff != 0",
        long="meta length > 1500",
        # Besides the tunnel only ARP, and ICMPv6 for MLD and ND.
        other_ipv4="ip protocol != udp",
        tcp="meta l4proto tcp",
        other_ports="udp dport != 8285",
    )


def test_bulk_crosses_the_wire_in_the_tunnel_only(lab):
    """TCP over IPv4 and IPv6: each packet is one datagram, not fragmented and not too long."""
    tunnel = pair(lab)
    a, b = tunnel.sides
    with at_wire(tunnel.link) as wire:
        before, start = steady(tunnel, wire), wire.packets()
        for address in (b.v4, b.v6, b.pod_v4):
            transfer_tcp(a.pod, b.pod if address == b.pod_v4 else b.host, address)
        after, end = steady(tunnel, wire), wire.packets()
    moved = after.since(before)
    assert moved["b: decap read"] > 3 * (4 << 20) / 1472
    assert moved["a: encap delivered"] == moved["b: decap read"]
    if not ACCELERATED:
        assert moved["wire"] == moved["b: decap read"]
    crossed = {name: end[name] - start[name] for name in end}
    assert crossed.pop("tunnel") == moved["wire"]
    assert crossed == dict.fromkeys(crossed, 0)
    for side in tunnel.sides:
        assert_invariant(side.forwarder)


def test_drops_are_part_of_the_invariant(lab):
    tunnel = pair(lab)
    a, b = tunnel.sides
    wait_for_express(a.forwarder, b.forwarder)
    quiet(a.host)
    _, before = settled(a.forwarder)
    ping(a.host, "10.244.99.1", count=20, interval=0.002, wait=0.2)
    _, drops = settled(a.forwarder)
    assert drops["encap", "no_route"] - before.get(("encap", "no_route"), 0) == 20
    for side in (a, b):
        assert_invariant(side.forwarder)
