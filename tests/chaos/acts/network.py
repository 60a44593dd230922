"""Acts of the network between the nodes: filters on the switch, links, addresses, MTU."""

from random import Random

from udptun.lab.cluster import Member

from ..world import PORTS, TUN, World
from .act import ALL, Act, Pair, Scene, both_ways, isolates, pick, pick_two

LARGE = "meta length > 1000"
GRACE_SECONDS = 10.0  # --address-grace: a node waits before it publishes another address


def _cut(world: World, blocked: set[str], pairs: set[Pair]) -> set[Pair]:
    """Return which of the pairs have no path if these ports are blocked."""
    def paths(name: str) -> set[str]:
        return {"udp" if device == TUN else "vxlan"
                for device in world.devices(world.named(name))}

    return {(a, b) for a, b in pairs if not (paths(a) & paths(b)) - blocked}


def _between(world: World, paths: tuple[str, ...], one_way: bool = False, large: bool = False):
    """Return a function that filters the ports of ``paths`` between two nodes."""

    def block(a: Member, b: Member) -> list[str]:
        size = LARGE if large else ""
        ways = [(a, b)] if one_way else [(a, b), (b, a)]
        rules = [f"{addresses} udp dport {PORTS[path]} {size} drop" for path in paths
                 for x, y in ways for addresses in (
                     f"ip saddr {x.host.v4} ip daddr {y.host.v4}",
                     f"ip6 saddr {x.host.v6} ip6 daddr {y.host.v6}")]
        for rule in rules:
            world.block(rule)
        return rules

    return block


def _blocks(*paths: str, one_way: bool = False, large: bool = False):
    def do(world: World, rng: Random) -> Scene:
        a, b = pick_two(world, rng)
        rules = _between(world, paths, one_way, large)(a, b)
        cut = _cut(world, set(paths), both_ways(a, b))

        def undo() -> None:
            for rule in rules:
                world.unblock(rule)

        ports = ", ".join(str(PORTS[path]) for path in paths)
        way = "->" if one_way else "<->"
        which = " longer than 1000 bytes" if large else ""
        return Scene(f"{a.host.name} {way} {b.host.name}: UDP {ports}{which} is dropped",
                     [a, b] if cut else [], cut, undo, lasts_seconds=6)

    return do


def _isolate(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    rules = [f"{address} udp dport {{ 8285, 8472 }} drop" for way in ("saddr", "daddr")
             for address in (f"ip {way} {member.host.v4}", f"ip6 {way} {member.host.v6}")]
    for rule in rules:
        world.block(rule)

    def undo() -> None:
        for rule in rules:
            world.unblock(rule)

    return Scene(f"{member.host.name}: UDP 8285 and 8472 are dropped to and from it", [member],
                 isolates(world, member), undo)


def _no_icmp(world: World, rng: Random) -> Scene:
    world.block("ip protocol icmp drop")
    return Scene("the network drops all ICMP", undo=lambda: world.unblock("ip protocol icmp drop"),
                 lasts_seconds=8)


def _loss(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    rule = f"ip daddr {member.host.v4} udp dport {{ 8285, 8472 }} numgen random mod 100 < 30 drop"
    world.block(rule)
    return Scene(f"{member.host.name}: 30 % of the datagrams to it are lost", [member],
                 lossy=isolates(world, member), undo=lambda: world.unblock(rule), lasts_seconds=8)


def _link(member: Member, state: str) -> None:
    member.host.ip(f"link set {member.host.interfaces[0].name} {state}")


def _up_again(world: World, member: Member) -> None:
    _link(member, "up")
    end = member.host.interfaces[0]
    member.host.ip(f"address replace {end.v6} dev {end.name} nodad")
    world.add_default_route(member)


def _flap(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    _link(member, "down")
    _up_again(world, member)
    return Scene(f"{member.host.name}: the underlay's link goes down and up", [member])


def _down(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    _link(member, "down")
    return Scene(f"{member.host.name}: the underlay's link is down", [member],
                 isolates(world, member), lambda: _up_again(world, member), lasts_seconds=5)


def _renumber(world: World, rng: Random) -> Scene:
    """DHCP gives another address."""
    member = pick(world, rng)
    end = member.host.interfaces[0]
    fresh = end.v4.network[rng.randrange(100, 200)]
    length = end.v4.network.prefixlen

    def change(old, new) -> None:
        member.host.ip(f"address del {old}/{length} dev {end.name}",
                       f"address add {new}/{length} dev {end.name}")
        world.add_default_route(member)

    change(end.v4.ip, fresh)
    return Scene(f"{member.host.name}: the underlay's address changes to {fresh}", [member],
                 undo=lambda: change(fresh, end.v4.ip), changes=True, extra_seconds=GRACE_SECONDS)


def _second_address(world: World, rng: Random) -> Scene:
    """keepalived adds its address, first in the list."""
    member = pick(world, rng)
    end = member.host.interfaces[0]
    vip = end.v4.network[rng.randrange(210, 250)]
    member.host.ip(f"address add {vip}/32 dev {end.name}")
    return Scene(f"{member.host.name}: a virtual address {vip}/32 on the underlay", [member],
                 undo=lambda: member.host.ip(f"address del {vip}/32 dev {end.name}"),
                 lasts_seconds=6)


def _underlay_mtu(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    end = member.host.interfaces[0]
    end.set_mtu(1300)
    # Full-size packets of the peers are larger than this link: they are lost without an ICMP error.
    return Scene(f"{member.host.name}: the MTU of the underlay is 1300", [member],
                 isolates(world, member), lambda: end.set_mtu(1500), lasts_seconds=6, changes=True)


AUTO = frozenset({"auto", "mixed"})

ACTS = [
    Act("block-vxlan", "UDP 8472 is dropped between two nodes", _blocks("vxlan")),
    Act("block-vxlan-one-way", "UDP 8472 is dropped from one node to another",
        _blocks("vxlan", one_way=True)),
    Act("block-vxlan-large", "large datagrams to UDP 8472 are dropped between two nodes",
        _blocks("vxlan", large=True)),
    Act("block-udp", "UDP 8285 is dropped between two nodes", _blocks("udp")),
    Act("block-udp-one-way", "UDP 8285 is dropped from one node to another",
        _blocks("udp", one_way=True)),
    Act("block-udp-large", "large datagrams to UDP 8285 are dropped between two nodes",
        _blocks("udp", large=True)),
    Act("block-pair", "both ports are dropped between two nodes", _blocks("vxlan", "udp"), ALL),
    Act("block-node", "both ports are dropped to and from a node", _isolate),
    Act("no-icmp", "the network drops all ICMP", _no_icmp),
    Act("loss", "30 % of the datagrams to a node are lost", _loss),
    Act("underlay-flap", "the underlay's link goes down and up", _flap),
    Act("underlay-down", "the underlay's link is down for a while", _down),
    Act("underlay-address", "the underlay's address changes, and back", _renumber),
    Act("underlay-vip", "a virtual address comes and goes", _second_address),
    Act("underlay-mtu", "the MTU of the underlay falls, and rises again", _underlay_mtu),
]
