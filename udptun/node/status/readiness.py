"""Decide from the daemon's report whether this node is ready, and list its problems.

Owns: the checks, their names, and the condition for each result. FAILED means that this machine's
own pods cannot use the overlay, so the node is not ready. DEGRADED means that there is a problem
but the pods can use the overlay, so the node is ready. Examples of DEGRADED: the store is down, or
one peer is unreachable. The functions have no side effects.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from ...spans import span
from ...text import printable
from ..backends import BACKENDS
from ..host import conntrack
from .report import NodeReport, PairReport

# For this time, the forwarder's routes may differ from the leases. They differ for a moment after
# each change in the store, and our pods can use the overlay nevertheless.
CHANGE_SECONDS = 5.0
CONTESTED_REMEDY = "look for a second machine with this name or address, and check the clocks"
INTERFACE_REMEDY = "give the node --iface, or restore the interface"
LEFTOVER_REMEDY = "remove it if no flannel runs here, or give the daemon's pod hostPID"
PEER_REMEDY = "run `udptun doctor` here and on the peer"
REPAIR_REMEDY = "the daemon tries to repair it; see its log"
ROUTE_REMEDY = "remove this route or rule, or change its prefix"
STORE_REMEDY = "look at the store and at the network to it. Packets of known nodes still pass"
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
class Problem:
    """One thing that is wrong. The text does not change while the problem lasts.

    check    the name of the check that has found it
    text     what is wrong
    remedy   what an operator can do; "": not known
    since    Unix time of the first look that found it; None: not known
    peer     the key of the peer that it concerns; "": it concerns no single peer
    setting  the sysctl that has a wrong value; "": none
    """

    text: str
    remedy: str = ""
    since: float | None = None
    peer: str = ""
    setting: str = ""
    check: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    text      the lines to print; at least one
    problems  what is wrong, in parts; empty if the state is OK
    """

    name: str
    state: State
    text: tuple[str, ...]
    problems: tuple[Problem, ...] = ()

    def __str__(self) -> str:
        first, *more = self.text
        return "\n".join((f"[{self.state.value}]{self.name}: {first}", *(f"    {m}" for m in more)))


def judge(report: NodeReport) -> tuple[Check, ...]:
    """Return the results of all checks, always in the same order."""
    return tuple(_printable(name, *check(report)) for name, check in CHECKS.items())


def _printable(
    name: str, state: State, text: tuple[str, ...], problems: tuple[Problem, ...]
) -> Check:
    return Check(
        name, state, tuple(printable(line, MAX_LINE) for line in text),
        tuple(replace(one, check=name, text=printable(one.text, MAX_LINE)) for one in problems))


def is_ready(checks: tuple[Check, ...]) -> bool:
    return all(check.state is not State.FAILED for check in checks)


_Result = tuple[State, tuple[str, ...], tuple[Problem, ...]]


def _result(state: State, *text: str, problems: Iterable[Problem] | None = None) -> _Result:
    """problems: by default, each line is one, unless the state is OK."""
    if problems is None:
        problems = () if state is State.OK else map(Problem, text)
    return state, text, tuple(problems)


def _start(report: NodeReport) -> _Result:
    if report.waiting:
        return _result(State.FAILED, report.waiting,
                       problems=[Problem(report.waiting, since=report.started)])
    return _result(State.OK, f"complete; started {span(time.time() - report.started)} ago")


def _store(report: NodeReport) -> _Result:
    source, store = report.source, report.store
    skipped = _named("cannot be used", source.skipped)
    unusable = _limited("cannot be used", [
        Problem(f"the entry {key} cannot be used: {why}", "correct or delete the entry")
        for key, why in sorted(source.skipped.items())])
    active = "from the cache" if report.stale else "those of the store's last answer"
    if not source.connected:
        why = text = f"{store}: {source.error or 'no answer yet'}"
        if source.last_contact is not None:
            why += f"; last answer {span(time.monotonic() - source.last_contact)} ago"
        if report.applied is None:
            return _result(State.FAILED, why, *skipped, problems=[
                Problem(text, STORE_REMEDY, _wall(source.last_contact)), *unusable])
        return _result(
            State.DEGRADED, why, f"the active leases are {active}", *skipped, problems=[
                Problem(f"{text}; the active leases are {active}", STORE_REMEDY,
                        _wall(source.last_contact)), *unusable])
    answers = f"{store} answers; leases: {report.leases_n}"
    if report.stale:
        stale = f"the active leases are {active}"
        return _result(State.DEGRADED, answers, stale, *skipped,
                       problems=[Problem(stale), *unusable])
    return _result(State.DEGRADED if skipped else State.OK, answers, *skipped, problems=unusable)


def _lease(report: NodeReport) -> _Result:
    source, lease = report.source, report.lease
    if lease is None:
        return _result(State.FAILED, report.lease_error or source.lease_error or "none yet")
    wrong = report.lease_error or source.lease_error
    since = None
    left = None if source.lease_expires is None else source.lease_expires - time.time()
    if source.lease == "lost":
        wrong = f"lost, being acquired again: {source.lease_error}"
    elif source.lease == "none":
        wrong = wrong or "from the cache, not confirmed by the store yet"
    elif left is not None and left <= 0:
        since = None if wrong else source.lease_expires
        wrong = wrong or "expired"
    lines = [wrong if since is None else f"{wrong} {span(time.time() - since)} ago",
             source.contested]
    problems = [Problem(f"{lease.subnets}: {text}", remedy, at) for text, remedy, at in (
        (wrong, "", since), (source.contested, CONTESTED_REMEDY, None)) if text]
    if problems:
        return _result(State.DEGRADED, f"{lease.subnets}: {'; '.join(filter(None, lines))}",
                       problems=problems)
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
        return _result(State.DEGRADED, chosen, report.interface_note,
                       problems=[Problem(report.interface_note, INTERFACE_REMEDY)])
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
        text = forwarder.error or "does not answer"
        return _result(State.FAILED, text, problems=[Problem(f"the forwarder: {text}")])
    behind = forwarder.behind
    if not forwarder.synced and behind is not None and time.monotonic() < behind + CHANGE_SECONDS:
        return _result(State.OK, f"gets changed routes; routes: {forwarder.routes_n}")
    if not forwarder.synced:
        text = "its routes are not up to date"
        return _result(State.FAILED, f"{text}; routes: {forwarder.routes_n}",
                       problems=[Problem(f"the forwarder: {text}", since=_wall(behind))])
    return _result(State.OK, f"has all routes: {forwarder.routes_n}")


def _host(report: NodeReport) -> _Result:
    host = report.host
    problems = [
        *(Problem(text, REPAIR_REMEDY, since)
          for text, since in host.wrong.items()),
        *(Problem(text, f"run: sysctl -w {name}=1", since, setting=name)
          for name, (text, since) in host.off.items())]
    texts = [_lasting(one) for one in problems]
    misrouted = [Problem(f"{key}: {why}", ROUTE_REMEDY, since, peer=key)
                 for key, (why, since) in sorted(host.misrouted.items())]
    texts += _listed("misrouted", [_lasting(one) for one in misrouted])
    problems += _limited("misrouted", misrouted)
    if not problems:
        return _result(State.OK, "devices, addresses, routes and sysctls are as they should be")
    return _result(State.FAILED if host.wrong else State.DEGRADED, *texts, problems=problems)


def _subnet_env(report: NodeReport) -> _Result:
    if report.subnet_env_error:
        return _result(State.FAILED, report.subnet_env_error)
    return _result(State.OK, "written")


def _firewall(report: NodeReport) -> _Result:
    if report.firewall_error:
        return _result(State.FAILED, report.firewall_error)
    left = [Problem(text, LEFTOVER_REMEDY, since) for text, since in report.leftovers.values()]
    problems = [Problem(drop.text, drop.remedy, drop.since) for drop in report.firewall_drops]
    if not problems and not left:
        return _result(State.OK, "rules are active")
    cuts = any(drop.cuts for drop in report.firewall_drops)
    drops = "our rules are active, but rules of other programs drop packets of the overlay:"
    lines = [f"{_lasting(one)}; {one.remedy}" for one in problems]
    return _result(
        State.FAILED if cuts else State.DEGRADED, *((drops, *lines) if problems else ()),
        *(f"{_lasting(one)}; {one.remedy}" for one in left), problems=[*problems, *left])


def _conntrack(report: NodeReport) -> _Result:
    if report.conntrack:
        return _result(State.DEGRADED, f"{report.conntrack}; {conntrack.REMEDY}",
                       problems=[Problem(conntrack.PROBLEM, conntrack.REMEDY)])
    return _result(State.OK, "the table has room")


def _daemon(report: NodeReport) -> _Result:
    """The daemon's own files and sockets. Packets pass without them."""
    if not report.troubles:
        return _result(State.OK, "its files are written, and its sockets listen")
    problems = [Problem(one.text, one.remedy, one.since) for one in report.troubles.values()]
    return _result(State.DEGRADED, *map(_lasting, problems), problems=problems)


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
    problems = [
        *_limited("cannot be reached", [
            Problem(f"{key} cannot be reached: {why}", peer=key)
            for key, why in sorted(peers.unreachable.items())]),
        *_limited("refused", [Problem(f"{key} is refused: {why}", peer=key)
                              for key, why in sorted(peers.refused.items())]),
        *_limited("not answering", [_of_pair(pair, "does not answer") for pair in silent]),
        *_limited("not reached by large packets", [
            _of_pair(pair, "is not reached by large packets") for pair in limited]),
        *(Problem(f"not measured: {why}") for why in report.measure_errors)]
    if _is_alone(report, silent):
        return _result(State.FAILED, f"no peer answers; {paths}", *lines, problems=problems)
    return _result(State.DEGRADED if wrong else State.OK, paths, *lines, problems=problems)


def _of_pair(pair: PairReport, what: str) -> Problem:
    return Problem(f"{_name(pair)} {what}: {pair.trouble}", PEER_REMEDY, pair.changed,
                   peer=pair.key)


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
    "conntrack": _conntrack, "daemon": _daemon, "peers": _peers,
}


def _wall(monotonic: float | None) -> float | None:
    """Return the Unix time of a monotonic time."""
    return None if monotonic is None else time.time() - (time.monotonic() - monotonic)


def _lasting(problem: Problem) -> str:
    assert problem.since is not None
    return f"{problem.text}, for {span(time.time() - problem.since)}"


def _limited(what: str, problems: list[Problem]) -> list[Problem]:
    """Return the first MAX_NAMED problems, and one that has the number of the others."""
    left = len(problems) - MAX_NAMED
    return [*problems[:MAX_NAMED], *([Problem(f"{left} more: {what}")] if left > 0 else [])]


def _named(what: str, entries: Mapping[str, str]) -> tuple[str, ...]:
    """Return a line with the number of entries, and lines for the first MAX_NAMED entries."""
    return _listed(what, [f"{key}: {why}" for key, why in sorted(entries.items())])


def _listed(what: str, lines: Sequence[str]) -> tuple[str, ...]:
    if not lines:
        return ()
    more = [f"and {len(lines) - MAX_NAMED} more"] if len(lines) > MAX_NAMED else []
    return f"{len(lines)} {what}:", *lines[:MAX_NAMED], *more
