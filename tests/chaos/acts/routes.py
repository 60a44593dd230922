"""Acts on routes and policy rules: ours deleted, others added, leftovers of other programs."""

from collections.abc import Callable
from random import Random

from udptun.lab.cluster import Member
from udptun.model import IPNetwork

from ..world import TUN, VXLAN, World
from .act import ALL, Act, Scene, both_ways, isolates, pick, pick_device, pick_two


def _routes_of(member: Member, device: str) -> list[str]:
    shown = member.host.run(["ip", "route", "show", "dev", device]).stdout
    return [line.strip() for line in shown.splitlines() if line.strip()]


def _delete_one(world: World, rng: Random) -> Scene:
    member, device = pick_device(world, rng)
    routes = _routes_of(member, device)
    if not routes:
        return Scene(f"{member.host.name}: {device} has no route to delete")
    route = rng.choice(routes)
    target = route.split()[0]
    member.host.ip(f"route del {target} dev {device}")
    return Scene(f"{member.host.name}: ip route del {target} dev {device}", [member], must_log=True)


def _flush(world: World, rng: Random) -> Scene:
    member, device = pick_device(world, rng)
    member.host.ip(f"route flush dev {device}")
    return Scene(f"{member.host.name}: ip route flush dev {device}", [member], must_log=True)


def _as_networkd(world: World, rng: Random) -> Scene:
    """systemd-networkd with ManageForeignRoutes: it removes all routes and rules of others."""
    member = pick(world, rng)
    for device in world.devices(member):
        member.host.ip(f"route flush dev {device}", f"addr flush dev {device} scope global")
    return Scene(f"{member.host.name}: all routes and addresses of our devices removed, as "
                 "systemd-networkd does", [member], must_log=True)


def _more_specific(world: World, rng: Random) -> Scene:
    """A route of host-gw, Calico or an administrator that takes precedence over ours."""
    a, b = pick_two(world, rng)
    half = next(iter(b.subnet.subnets()))
    via = rng.choice(world.others(a))
    add = f"route add {half} via {via.host.v4}"
    a.host.ip(add)
    # Not even if b is the next hop: b drops packets of the overlay that arrive without the tunnel.
    return Scene(f"{a.host.name}: ip {add}", [a], both_ways(a, b),
                 lambda: a.host.ip(f"route del {half}"), says=str(half))


def _blackhole(world: World, rng: Random) -> Scene:
    return _into_blackhole(world, rng, lambda member: member.subnet)


def _blackhole6(world: World, rng: Random) -> Scene:
    return _into_blackhole(world, rng, lambda member: member.subnet6)


def _into_blackhole(
    world: World, rng: Random, subnet: Callable[[Member], IPNetwork]
) -> Scene:
    a, b = pick_two(world, rng)
    half = next(iter(subnet(b).subnets()))
    a.host.ip(f"route add blackhole {half}")
    return Scene(f"{a.host.name}: ip route add blackhole {half}", [a], both_ways(a, b),
                 lambda: a.host.ip(f"route del blackhole {half}"), says=str(half))


def _flush6(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    device = rng.choice([one for one in world.devices(member) if one != VXLAN])  # it has IPv4 only
    member.host.run(["ip", "-6", "route", "flush", "dev", device])
    return Scene(f"{member.host.name}: ip -6 route flush dev {device}", [member], must_log=True)


def _rule(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    rule = "to 10.244.0.0/16 lookup 100 pref 100"
    member.host.ip("route add unreachable default table 100", f"rule add {rule}")

    def undo() -> None:
        member.host.ip(f"rule del {rule}", "route flush table 100")

    # The table covers the node's own pods too: nothing reaches them.
    return Scene(f"{member.host.name}: ip rule add {rule}, whose table has no route", [member],
                 isolates(world, member), undo, says="rule|table 100|unreachable")


def _leftover_flannel(world: World, rng: Random) -> Scene:
    """A former flanneld with the vxlan backend has left its device, entries and routes."""
    member = pick(world, rng)
    end = member.host.interfaces[0]
    member.host.ip(
        f"link add {VXLAN} type vxlan id 1 dstport 8472 local {member.host.v4} dev {end.name} "
        "nolearning", f"addr add {member.subnet[0]}/32 dev {VXLAN}", f"link set {VXLAN} up")
    for other in world.others(member):
        member.host.ip(f"route add {other.subnet} via {other.subnet[0]} dev {VXLAN} onlink")
    return Scene(f"{member.host.name}: {VXLAN} of a former flanneld, with routes to all peers",
                 [member], must_log=True)


def _default_route(world: World, rng: Random) -> Scene:
    """A VPN comes up, with a better default route."""
    member = pick(world, rng)
    member.host.ip("link add vpn0 type veth peer name vpn1", "link set vpn1 up",
                   "addr add 100.64.9.9/24 dev vpn0", "link set vpn0 up", "route del default",
                   f"route add default via {world.store.host.v4} metric 100",
                   "route add default via 100.64.9.1 dev vpn0 metric 50")

    def undo() -> None:
        member.host.ip("link del vpn0", "route del default")
        world.add_default_route(member)

    return Scene(f"{member.host.name}: a VPN's device vpn0 with the default route of metric 50",
                 [member], undo=undo, lasts_seconds=8, says="vpn0")


def _endpoint_into_tun(world: World, rng: Random) -> Scene:
    """A peer's public address is routed into our own TUN."""
    a, b = pick_two(world, rng)
    a.host.ip(f"route add {b.host.v4}/32 dev {TUN}")
    return Scene(f"{a.host.name}: ip route add {b.host.v4} dev {TUN}", [a], both_ways(a, b),
                 lambda: a.host.ip(f"route del {b.host.v4}/32 dev {TUN}"), says=str(b.host.v4))


def _neighbours(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    member.host.ip("neigh flush all")
    return Scene(f"{member.host.name}: ip neigh flush all", [member])


ACTS = [
    Act("route-del", "one route of our device is deleted", _delete_one),
    Act("route-flush", "all routes of our device are deleted", _flush),
    Act("networkd", "a network manager removes foreign routes and addresses", _as_networkd),
    Act("route-other", "another program's more specific route to a peer's pods", _more_specific),
    Act("route-blackhole", "a blackhole route to a peer's pods", _blackhole),
    Act("route6-flush", "all IPv6 routes of our device are deleted", _flush6, ALL, ipv6=True),
    Act("route6-blackhole", "a blackhole route to a peer's pods, IPv6", _blackhole6, ALL,
        ipv6=True),
    Act("policy-rule", "a policy rule sends the overlay to a table without a route", _rule),
    Act("leftover-flannel", "flannel.1 of a former flanneld, with its routes", _leftover_flannel,
        frozenset({"udp"})),
    Act("default-route", "a VPN takes the default route", _default_route),
    Act("endpoint-in-tun", "a peer's endpoint is routed into our TUN", _endpoint_into_tun,
        frozenset({"auto", "udp"})),
    Act("neigh-flush", "all neighbour entries are flushed", _neighbours),
]
