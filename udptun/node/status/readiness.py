"""Is this node ready, and what about it is not: the daemon's report, judged.

Owns the checks, their names, and what counts as broken. The rule: FAILED is what keeps this
machine's own pods from the overlay; what goes on working without a thing (a store that is down,
one peer that cannot be reached) is DEGRADED, and the node stays ready. Pure; no I/O.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from .report import NodeReport

MAX_NAMED = 20  # entries of a list that are told one by one


class State(Enum):
    """The value is the mark before the check's line, as Kubernetes has it, and ours between."""

    OK = "+"
    DEGRADED = "!"
    FAILED = "-"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at, and what there is to say of it; a line for each entry of ``text``."""

    name: str
    state: State
    text: tuple[str, ...]

    def __str__(self) -> str:
        first, *more = self.text
        return "\n".join((f"[{self.state.value}]{self.name}: {first}", *(f"    {m}" for m in more)))


def judge(report: NodeReport) -> tuple[Check, ...]:
    """All checks, always the same ones in the same order."""
    return tuple(Check(name, *look(report)) for name, look in CHECKS.items())


def is_ready(checks: tuple[Check, ...]) -> bool:
    return all(check.state is not State.FAILED for check in checks)


_Said = tuple[State, tuple[str, ...]]


def _say(state: State, *text: str) -> _Said:
    return state, text


def _start(report: NodeReport) -> _Said:
    if report.waiting:
        return _say(State.FAILED, report.waiting)
    return _say(State.OK, f"all set up; started {_span(time.time() - report.started)} ago")


def _store(report: NodeReport) -> _Said:
    source, store = report.source, report.store
    skipped = _named("cannot be used", source.skipped)
    if not source.connected:
        why = f"{store}: {source.error or 'not asked yet'}"
        if source.last_contact is not None:
            why += f"; last answer {_span(time.monotonic() - source.last_contact)} ago"
        if report.applied is None:
            return _say(State.FAILED, why, *skipped)
        kept = "those kept on disk" if report.stale else "the last it told"
        return _say(State.DEGRADED, why, f"the leases in force are {kept}", *skipped)
    state = State.DEGRADED if skipped or report.stale else State.OK
    stale = ("the leases in force are those kept on disk",) if report.stale else ()
    return _say(state, f"{store} answers; leases: {report.leases_n}", *stale, *skipped)


def _lease(report: NodeReport) -> _Said:
    source, lease = report.source, report.lease
    if lease is None:
        return _say(State.FAILED, report.lease_error or source.lease_error or "none yet")
    wrong = report.lease_error or source.lease_error
    left = None if source.lease_expires is None else source.lease_expires - time.time()
    if source.lease == "lost":
        wrong = f"lost, being taken back: {source.lease_error}"
    elif source.lease == "none":
        wrong = wrong or "as kept on disk, not confirmed by the store yet"
    elif left is not None and left <= 0:
        wrong = wrong or f"ran out {_span(-left)} ago"
    if wrong:
        return _say(State.DEGRADED, f"{lease.subnets}: {wrong}")
    until = "for good" if left is None else f"for {_span(left)}, renewed before"
    return _say(State.OK, f"{lease.subnets}, {until}")


def _interface(report: NodeReport) -> _Said:
    underlay = report.underlay
    if underlay is None:
        return _say(State.FAILED, report.interface_error or "not chosen yet")
    if report.interface_error:
        return _say(State.FAILED, report.interface_error)
    addresses = " and ".join(str(one) for one in (underlay.public, underlay.public6) if one)
    return _say(State.OK, f"{underlay.name}, published as {addresses}; inner MTU {report.mtu}")


def _forwarder(report: NodeReport) -> _Said:
    forwarder = report.forwarder
    if report.backend == "vxlan":
        return _say(State.OK, "not needed: the backend is vxlan")
    if not forwarder.connected:
        return _say(State.FAILED, forwarder.error or "does not answer")
    if not forwarder.in_step:
        return _say(State.FAILED, f"not all of its routes are right; routes: {forwarder.routes_n}")
    return _say(State.OK, f"has all routes: {forwarder.routes_n}")


def _subnet_env(report: NodeReport) -> _Said:
    if report.subnet_env_error:
        return _say(State.FAILED, report.subnet_env_error)
    return _say(State.OK, "written")


def _firewall(report: NodeReport) -> _Said:
    if report.firewall_error:
        return _say(State.FAILED, report.firewall_error)
    return _say(State.OK, "as wanted")


def _peers(report: NodeReport) -> _Said:
    peers = report.peers
    paths = f"{peers.udp_n} by UDP, {peers.vxlan_n} by VXLAN"
    if report.no_vxlan:
        paths += f"; no VXLAN here: {report.no_vxlan}"
    wrong = (*_named("cannot be reached", peers.unreachable), *_named("refused", peers.refused))
    return _say(State.DEGRADED if wrong else State.OK, paths, *wrong)


CHECKS: Mapping[str, Callable[[NodeReport], _Said]] = {
    "start": _start, "store": _store, "lease": _lease, "interface": _interface,
    "forwarder": _forwarder, "subnet-env": _subnet_env, "firewall": _firewall, "peers": _peers,
}


def _named(what: str, entries: Mapping[str, str]) -> tuple[str, ...]:
    """How many, and the first of them each with its reason."""
    if not entries:
        return ()
    first = [f"{key}: {why}" for key, why in sorted(entries.items())[:MAX_NAMED]]
    more = [f"and {len(entries) - MAX_NAMED} more"] if len(entries) > MAX_NAMED else []
    return f"{len(entries)} {what}:", *first, *more


def _span(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
