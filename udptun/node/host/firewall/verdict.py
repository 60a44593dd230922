"""What the rules of a host do to the packets of pods, and to the tunnel's own. Pure; no I/O.

Owns: the three kinds of conditions (true, false, unknown for a flow), and how the kernel walks
through chains. ``iptables`` and ``nft`` translate their output into these types.

A flow stands for all packets between two networks. A condition is unknown if it is true for only
some of these packets, or if udptun cannot evaluate it (a set, a mark, a rate). A rule with an
unknown condition does not decide the verdict. If such a rule would accept, the finding is only
likely.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_network

from ....model import IPAddress, IPNetwork


@dataclass(frozen=True, slots=True)
class Flow:
    """Packets of one direction, without address translation: those of pods through this host, or
    the tunnel's datagrams to or from this host.

    name     the packets, as the start of a sentence
    arrives  True: packets arrive through ``devices``; False: they leave through them
    devices  pods: the overlay's devices; the devices of the pods are not known. Tunnel: the
             underlay's device
    port     tunnel: the UDP port to which the datagrams are sent; None: packets of pods
    state    the state of connection tracking. Packets of pods are new. So are VXLAN's datagrams,
             whose source ports vary. Those of the forwarders have one port on both sides, so they
             belong to a known connection
    """

    name: str
    source: IPNetwork
    destination: IPNetwork
    arrives: bool
    devices: frozenset[str]
    port: int | None = None
    state: str = "new"

    @property
    def version(self) -> int:
        return self.source.version


def datagrams(own: IPAddress, device: str, port: int, state: str) -> list[Flow]:
    """Return the flows of the tunnel's datagrams to and from our address on the underlay."""
    ours, others = ip_network(own), ip_network(f"{type(own)(0)}/0")
    name, devices = f"IPv{own.version} datagrams of the tunnel", frozenset({device})
    return [
        Flow(f"{name} to this node (UDP {port})", others, ours, True, devices, port, state),
        Flow(f"{name} from this node (UDP {port})", ours, others, False, devices, port, state),
    ]


# True, False, or None for unknown
Condition = Callable[[Flow], bool | None]


class Action(Enum):
    ACCEPT = "accept"
    DROP = "drop"
    RETURN = "return"
    JUMP = "jump"
    GOTO = "goto"
    NEXT = "next"  # no verdict: for example a counter, or a target that udptun does not know


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. It acts if every condition is true.

    target  the chain, if the action is JUMP or GOTO
    text    the rule or its verdict, for messages
    """

    conditions: tuple[Condition, ...]
    action: Action
    target: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Chain:
    """policy  of a base chain, in lower case; "" for other chains"""

    rules: Sequence[Rule]
    policy: str = ""


@dataclass(frozen=True, slots=True)
class Drop:
    """A flow is dropped.

    chain  the chain that has the rule or the policy
    text   the rule, or the policy
    at     the index of the rule of the base chain that leads to the drop; None: the policy drops
    sure   False: a rule before that has an unknown condition may accept the packets
    """

    chain: str
    text: str
    at: int | None
    sure: bool


def drop_of(chains: Mapping[str, Chain], base: str, flow: Flow) -> Drop | None:
    """Return how a base chain drops the flow, or None if the chain lets it pass."""
    walk = _Walk(chains, flow)
    for at, rule in enumerate(chains[base].rules):
        verdict, chain, text = walk.rule(base, rule)
        if verdict is Action.DROP:
            return Drop(chain, text, at, walk.sure)
        if verdict is Action.ACCEPT:
            return None
        if verdict in (Action.RETURN, Action.GOTO):
            break  # the policy decides
    policy = chains[base].policy
    return Drop(base, f"policy {policy}", None, walk.sure) if policy == "drop" else None


_Verdict = tuple[Action, str, str]  # the verdict; the chain and the rule that gave it
_NONE: _Verdict = (Action.NEXT, "", "")


class _Walk:
    """sure  no rule that may accept was passed because of an unknown condition"""

    def __init__(self, chains: Mapping[str, Chain], flow: Flow) -> None:
        self.sure = True
        self._chains = chains
        self._flow = flow

    def rule(self, chain: str, rule: Rule) -> _Verdict:
        """Return the verdict of one rule. GOTO: it went to a chain that gave no verdict."""
        results = [condition(self._flow) for condition in rule.conditions]
        if False in results:
            return _NONE
        if None in results:
            self.sure = self.sure and not self._may_accept(rule)
            return _NONE
        if rule.action in (Action.JUMP, Action.GOTO):
            inner = self._chain(rule.target)
            if inner[0] in (Action.ACCEPT, Action.DROP):
                return inner
            return _NONE if rule.action is Action.JUMP else (Action.GOTO, "", "")
        return rule.action, chain, rule.text

    def _chain(self, name: str) -> _Verdict:
        for rule in self._rules(name):
            verdict = self.rule(name, rule)
            if verdict[0] is not Action.NEXT:
                return verdict
        return _NONE

    def _may_accept(self, rule: Rule) -> bool:
        if rule.action in (Action.JUMP, Action.GOTO):
            return any(self._may_accept(inner) for inner in self._rules(rule.target)
                       if False not in [condition(self._flow) for condition in inner.conditions])
        return rule.action is Action.ACCEPT

    def _rules(self, name: str) -> Iterable[Rule]:
        return self._chains[name].rules if name in self._chains else ()


# -- conditions -----------------------------------------------------------------------------------


def negated(condition: Condition) -> Condition:
    def inverse(flow: Flow) -> bool | None:
        result = condition(flow)
        return None if result is None else not result

    return inverse


def any_of(conditions: Collection[Condition]) -> Condition:
    def joined(flow: Flow) -> bool | None:
        results = [condition(flow) for condition in conditions]
        return True if True in results else None if None in results else False

    return joined


def always(_: Flow) -> bool:
    return True


def never(_: Flow) -> bool:
    return False


def unknown(_: Flow) -> None:
    return None


def source_in(network: IPNetwork) -> Condition:
    return lambda flow: _within(flow.source, network)


def destination_in(network: IPNetwork) -> Condition:
    return lambda flow: _within(flow.destination, network)


def arrives_through(device: str, wildcard: str) -> Condition:
    """wildcard  the character at the end of ``device`` that matches any rest: "+" or "*" """
    return lambda flow: _through(flow, device, wildcard, flow.arrives)


def leaves_through(device: str, wildcard: str) -> Condition:
    return lambda flow: _through(flow, device, wildcard, not flow.arrives)


def has_state(states: Iterable[str]) -> Condition:
    """The state of connection tracking is one of ``states``."""
    wanted = {state.lower() for state in states}
    return lambda flow: flow.state in wanted


def to_udp_port(first: int, last: int) -> Condition:
    return lambda flow: None if flow.port is None else first <= flow.port <= last


def is_protocol(name: str) -> Condition:
    """``name``: of the protocol, or its number."""
    return lambda flow: None if flow.port is None else name in ("udp", "17", "all")


def is_version(version: int) -> Condition:
    return lambda flow: flow.version == version


def _within(part: IPNetwork, network: IPNetwork) -> bool | None:
    if part.version != network.version or not part.overlaps(network):
        return False
    return True if part.prefixlen >= network.prefixlen else None


def _through(flow: Flow, device: str, wildcard: str, on_overlay: bool) -> bool | None:
    if device.endswith(wildcard):
        matching = frozenset(name for name in flow.devices if name.startswith(device[:-1]))
    else:
        matching = flow.devices & {device}
    if on_overlay:
        return False if not matching else True if matching == flow.devices else None
    if flow.port is not None:  # the other end is this host itself, without a device
        return False
    # A pod's device is neither one of the overlay's devices nor the loopback device.
    if device in ("", wildcard):
        return True
    return False if device == "lo" or device in flow.devices else None
