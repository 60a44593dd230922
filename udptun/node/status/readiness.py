"""Decide from the daemon's report whether this node is ready, and list its problems.

Owns: the checks, their names, and the condition for each result. FAILED means that this machine's
own pods cannot use the overlay, so the node is not ready. DEGRADED means that there is a problem
but the pods can use the overlay, so the node is ready. Examples of DEGRADED: the store is down, or
one peer is unreachable. The functions have no side effects.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from ...spans import span
from ...text import printable
from ..backends import BACKENDS
from .report import NodeReport, PairReport

# For this time, the forwarder's routes may differ from the leases. They differ for a moment after
# each change in the store, and our pods can use the overlay nevertheless.
CHANGE_SECONDS = 5.0
MAX_LINE = 2000  # characters; some parts were chosen by the store or a server
MAX_NAMED = 20  # limit of entries of a list that are shown one by one


class State(Enum):
    """The state of a check. The value is the character that is printed before the check's name.

    Kubernetes prints "+" and "-" too. Only udptun prints "!".
    """

    OK = "+"
    DEGRADED = "!"
    FAILED = "-"


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    text  the lines to print; at least one
    """

    name: str
    state: State
    text: tuple[str, ...]

    def __str__(self) -> str:
        first, *more = self.text
        return "\n".join((f"[{self.state.value}]{self.name}: {first}", *(f"    {m}" for m in more)))


def judge(report: NodeReport) -> tuple[Check, ...]:
    """Return the results of all checks, always in the same order."""
    return tuple(_printable(name, *check(report)) for name, check in CHECKS.items())


def _printable(name: str, state: State, text: tuple[str, ...]) -> Check:
    return Check(name, state, tuple(printable(line, MAX_LINE) for line in text))


def is_ready(checks: tuple[Check, ...]) -> bool:
    return all(check.state is not State.FAILED for check in checks)


_Result = tuple[State, tuple[str, ...]]


def _result(state: State, *text: str) -> _Result:
    return state, text


def _start(report: NodeReport) -> _Result:
    if report.waiting:
        return _result(State.FAILED, report.waiting)
    return _result(State.OK, f"complete; started {span(time.time() - report.started)} ago")


def _store(report: NodeReport) -> _Result:
    source, store = report.source, report.store
    skipped = _named("cannot be used", source.skipped)
    if not source.connected:
        why = f"{store}: {source.error or 'no answer yet'}"
        if source.last_contact is not None:
            why += f"; last answer {span(time.monotonic() - source.last_contact)} ago"
        if report.applied is None:
            return _result(State.FAILED, why, *skipped)
        active = "from the cache" if report.stale else "those of the store's last answer"
        return _result(State.DEGRADED, why, f"the active leases are {active}", *skipped)
    state = State.DEGRADED if skipped or report.stale else State.OK
    stale = ("the active leases are from the cache",) if report.stale else ()
    return _result(state, f"{store} answers; leases: {report.leases_n}", *stale, *skipped)


def _lease(report: NodeReport) -> _Result:
    source, lease = report.source, report.lease
    if lease is None:
        return _result(State.FAILED, report.lease_error or source.lease_error or "none yet")
    wrong = report.lease_error or source.lease_error
    left = None if source.lease_expires is None else source.lease_expires - time.time()
    if source.lease == "lost":
        wrong = f"lost, being acquired again: {source.lease_error}"
    elif source.lease == "none":
        wrong = wrong or "from the cache, not confirmed by the store yet"
    elif left is not None and left <= 0:
        wrong = wrong or f"expired {span(-left)} ago"
    wrong = "; ".join(filter(None, (wrong, source.contested)))
    if wrong:
        return _result(State.DEGRADED, f"{lease.subnets}: {wrong}")
    expiry = "does not expire" if left is None else f"expires in {span(left)} unless renewed"
    return _result(State.OK, f"{lease.subnets}, {expiry}")


def _interface(report: NodeReport) -> _Result:
    underlay = report.underlay
    if underlay is None:
        return _result(State.FAILED, report.interface_error or "not chosen yet")
    if report.interface_error:
        return _result(State.FAILED, report.interface_error)
    addresses = " and ".join(str(one) for one in (underlay.public, underlay.public6) if one)
    chosen = f"{underlay.name}, published as {addresses}; inner MTU {report.mtu}"
    if report.interface_note:
        return _result(State.DEGRADED, chosen, report.interface_note)
    return _result(State.OK, chosen)


def _mtu(report: NodeReport) -> _Result:
    lease = report.lease
    if report.ipv6_error and lease is not None and lease.subnets.v6 is not None:
        state = State.FAILED if lease.subnets.v4 is None else State.DEGRADED
        return _result(state, f"IPv6 is not carried: {report.ipv6_error}")
    if not report.mtu:
        return _result(State.FAILED, report.ipv6_error or "not known yet")
    return _result(State.OK, f"inner packets have up to {report.mtu} bytes")


def _forwarder(report: NodeReport) -> _Result:
    forwarder = report.forwarder
    if not forwarder.needed:
        return _result(State.OK, f"not needed: the backend is {report.backend}")
    if not forwarder.connected:
        return _result(State.FAILED, forwarder.error or "does not answer")
    behind = forwarder.behind
    if not forwarder.synced and behind is not None and time.monotonic() < behind + CHANGE_SECONDS:
        return _result(State.OK, f"gets changed routes; routes: {forwarder.routes_n}")
    if not forwarder.synced:
        return _result(State.FAILED, f"its routes are not up to date; routes: {forwarder.routes_n}")
    return _result(State.OK, f"has all routes: {forwarder.routes_n}")


def _host(report: NodeReport) -> _Result:
    host = report.host
    texts = [f"{text}, for {span(time.time() - since)}"
             for text, since in (*host.wrong.items(), *host.impaired.items())]
    texts += _named("misrouted", {key: f"{why}, for {span(time.time() - since)}"
                                  for key, (why, since) in host.misrouted.items()})
    if not texts:
        return _result(State.OK, "devices, addresses, routes and sysctls are as they should be")
    return _result(State.FAILED if host.wrong else State.DEGRADED, *texts)


def _subnet_env(report: NodeReport) -> _Result:
    if report.subnet_env_error:
        return _result(State.FAILED, report.subnet_env_error)
    return _result(State.OK, "written")


def _firewall(report: NodeReport) -> _Result:
    if report.firewall_error:
        return _result(State.FAILED, report.firewall_error)
    if not report.firewall_drops:
        return _result(State.OK, "rules are active")
    cuts = any(drop.cuts for drop in report.firewall_drops)
    return _result(
        State.FAILED if cuts else State.DEGRADED,
        "our rules are active, but rules of other programs drop packets of the overlay:",
        *(f"{drop.text}, for {span(time.time() - drop.since)}; {drop.remedy}"
          for drop in report.firewall_drops))


def _conntrack(report: NodeReport) -> _Result:
    if report.conntrack:
        return _result(State.DEGRADED, report.conntrack)
    return _result(State.OK, "the table has room")


def _peers(report: NodeReport) -> _Result:
    peers = report.peers
    paths = peers.by_path()
    for backend, why in report.unavailable.items():
        paths += f"; no {backend} here: {why}"
    silent, limited = report.in_state("unreachable"), report.in_state("limited")
    wrong = (
        *_named("cannot be reached", peers.unreachable), *_named("refused", peers.refused),
        *_named("not answering", _troubles(silent)),
        *_named("not reached by large packets", _troubles(limited)),
        *(f"not measured: {why}" for why in report.measure_errors),
    )
    moved = {_name(pair): f"{BACKENDS[pair.path]} for {span(time.time() - pair.since)}; {pair.why}"
             for pair in report.pairs.values() if pair.why}
    lines = (*wrong, *_named("by another path than the preferred one", moved))
    if _is_alone(report, silent):
        return _result(State.FAILED, f"no peer answers; {paths}", *lines)
    return _result(State.DEGRADED if wrong else State.OK, paths, *lines)


def _is_alone(report: NodeReport, silent: Collection[PairReport]) -> bool:
    """Return whether there are several peers and none of them answers.

    With a single peer, the cause can also be that this peer has ended.
    """
    return len(silent) == len(report.pairs) and len({pair.key for pair in silent}) > 1


def _troubles(pairs: Iterable[PairReport]) -> dict[str, str]:
    now = time.time()
    return {_name(pair): f"for {span(now - pair.changed)}: {pair.trouble}" for pair in pairs}


def _name(pair: PairReport) -> str:
    return pair.key if str(pair.subnet).replace("/", "-") == pair.key else \
        f"{pair.key} ({pair.subnet})"


CHECKS: Mapping[str, Callable[[NodeReport], _Result]] = {
    "start": _start, "store": _store, "lease": _lease, "interface": _interface, "mtu": _mtu,
    "forwarder": _forwarder, "host": _host, "subnet-env": _subnet_env, "firewall": _firewall,
    "conntrack": _conntrack, "peers": _peers,
}


def _named(what: str, entries: Mapping[str, str]) -> tuple[str, ...]:
    """Return a line with the number of entries, and lines for the first MAX_NAMED entries."""
    if not entries:
        return ()
    first = [f"{key}: {why}" for key, why in sorted(entries.items())[:MAX_NAMED]]
    more = [f"and {len(entries) - MAX_NAMED} more"] if len(entries) > MAX_NAMED else []
    return f"{len(entries)} {what}:", *first, *more
