"""Acts on udptun's devices and their settings: `ip link`, `ip addr`, `ip neigh`, sysctl."""

from random import Random

from ..world import TUN, VXLAN, World
from .act import ALL, Act, Scene, isolates, pick, pick_device


def _on_device(*commands: str):
    """Return an act: commands of ip(8) on one of our devices. The node repairs the effect.

    The repair may be faster than the second command, which then fails.
    """

    def do(world: World, rng: Random) -> Scene:
        member, device = pick_device(world, rng)
        lines = [command.format(device) for command in commands]
        for line in lines:
            member.host.run(["ip", *line.split()], check=line is lines[0])
        text = "; ".join(f"ip {line}" for line in lines)
        return Scene(f"{member.host.name}: {text}", [member], must_log=True)

    return do


def _entries(*commands: str):
    """Return an act on the entries of the VXLAN device."""

    def do(world: World, rng: Random) -> Scene:
        member = rng.choice([one for one in world.members if VXLAN in world.devices(one)])
        for command in commands:
            member.host.run(["sh", "-c", command])
        return Scene(f"{member.host.name}: {'; '.join(commands)}", [member], must_log=True)

    return do


def _sysctl(must_log: bool, *settings: str):
    def do(world: World, rng: Random) -> Scene:
        member = pick(world, rng)
        done = [setting.format(TUN) for setting in settings]
        before = [member.host.run(["sysctl", "-n", one.partition("=")[0]]).stdout.strip()
                  for one in done]
        member.host.sysctl(*done)

        def undo() -> None:
            member.host.sysctl(*(f"{one.partition('=')[0]}={value}"
                                 for one, value in zip(done, before, strict=True)))

        return Scene(f"{member.host.name}: sysctl -w {' '.join(done)}", [member],
                     must_log=must_log, undo=None if must_log else undo)

    return do


def _disable_ipv6(world: World, rng: Random) -> Scene:
    member, device = pick_device(world, rng)
    member.host.sysctl(f"net/ipv6/conf/{device}/disable_ipv6=1")
    return Scene(f"{member.host.name}: IPv6 is disabled on {device}", [member], must_log=True)


def _no_forwarding6(world: World, rng: Random) -> Scene:
    """This setting belongs to the administrator: the node reports it, and does not change it."""
    member = pick(world, rng)
    member.host.sysctl("net.ipv6.conf.all.forwarding=0")

    def undo() -> None:
        member.host.sysctl("net.ipv6.conf.all.forwarding=1")
        world.add_default_route(member)

    return Scene(f"{member.host.name}: sysctl -w net.ipv6.conf.all.forwarding=0", [member],
                 isolates(world, member), undo, says="net.ipv6.conf.all.forwarding is 0")


NEEDS_VXLAN = frozenset({"auto", "mixed", "vxlan"})
NEEDS_TUN = frozenset({"auto", "mixed", "udp"})

ACTS = [
    Act("addr-flush", "the addresses of our device are removed", _on_device("addr flush dev {}")),
    Act("link-down", "our device is set down", _on_device("link set {} down")),
    Act("link-bounce", "our device is set down and up: its routes are gone",
        _on_device("link set {} down", "link set {} up")),
    Act("link-rename", "our device is renamed",
        _on_device("link set {} down", "link set {} name ours0", "link set ours0 up")),
    Act("link-mtu", "the MTU of our device is changed", _on_device("link set {} mtu 1000")),
    Act("link-delete", "our device is deleted", _on_device("link del {}")),
    Act("neigh-flush-vxlan", "the neighbour entries of the VXLAN device are removed",
        _entries(f"ip neigh flush dev {VXLAN} nud permanent"), NEEDS_VXLAN),
    Act("fdb-flush", "the FDB entries of the VXLAN device are removed",
        _entries(f"bridge fdb show dev {VXLAN} | while read mac rest; "
                 f"do bridge fdb del $mac dev {VXLAN}; done"), NEEDS_VXLAN),
    Act("vxlan-address", "the VXLAN device gets another MAC address",
        _on_device("link set {} address 02:00:00:00:00:77"), frozenset({"vxlan"})),
    Act("forwarding-off", "IPv4 forwarding is switched off",
        _sysctl(True, "net.ipv4.ip_forward=0")),
    Act("forwarding6-off", "IPv6 forwarding is switched off", _no_forwarding6, ALL, ipv6=True),
    Act("ipv6-off", "IPv6 is disabled on our device", _disable_ipv6, ALL, ipv6=True),
    Act("rp-filter", "strict reverse path filtering on all devices",
        _sysctl(False, "net.ipv4.conf.all.rp_filter=1", "net.ipv4.conf.default.rp_filter=1")),
    Act("rp-filter-tun", "strict reverse path filtering on our TUN as well",
        _sysctl(True, "net.ipv4.conf.{}.rp_filter=1", "net.ipv4.conf.all.rp_filter=1"), NEEDS_TUN),
]
