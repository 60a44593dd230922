"""What an act is, and what it leads to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from udptun.lab.cluster import Member

from ..world import ClusterKind, World

ALL = frozenset({"auto", "mixed", "udp", "vxlan"})
Pair = tuple[str, str]


@dataclass
class Scene:
    """One act that was done, and what must follow from it.

    text           what was done, with the names, for the log
    touched        the nodes that the act concerns: only these may be unready
    cut            the pairs that have no path while the act lasts, each in both directions
    undo           undoes the act; None: the act ends at once, and the node must repair its effect
    lasts_seconds  the shortest time until the act is undone
    says           a regular expression that must match the status of a touched node while the act
                   lasts
    must_log       whether the logs of the touched nodes must get a new line
    changes        whether the hosts rightly differ afterwards
    lossy          the pairs on which single packets are lost; the traffic on them is not judged
    extra_seconds  additional time for a repair, because the node rightly waits
    """

    text: str
    touched: list[Member] = field(default_factory=list)
    cut: set[Pair] = field(default_factory=set)
    undo: Callable[[], object] | None = None
    lasts_seconds: float = 3.0
    says: str = ""
    must_log: bool = False
    changes: bool = False
    lossy: set[Pair] = field(default_factory=set)
    extra_seconds: float = 0.0


@dataclass(frozen=True)
class Act:
    """One thing that an administrator, a package or the network does.

    ipv6  it needs an overlay with IPv6
    """

    name: str
    text: str
    do: Callable[[World, Random], Scene]
    modes: frozenset[str] = ALL
    ipv6: bool = False

    def suits(self, cluster: ClusterKind) -> bool:
        return cluster.mode in self.modes and (cluster.ipv6 or not self.ipv6)


def isolates(world: World, member: Member) -> set[Pair]:
    """Return the pairs of one node with all others."""
    name = member.host.name
    return {pair for other in world.others(member)
            for pair in ((name, other.host.name), (other.host.name, name))}


def both_ways(a: Member, b: Member) -> set[Pair]:
    return {(a.host.name, b.host.name), (b.host.name, a.host.name)}


def pick(world: World, rng: Random) -> Member:
    return rng.choice(world.members)


def pick_device(world: World, rng: Random) -> tuple[Member, str]:
    member = pick(world, rng)
    return member, rng.choice(world.devices(member))


def pick_two(world: World, rng: Random) -> tuple[Member, Member]:
    a, b = rng.sample(world.members, 2)
    return a, b
