"""Checks of the peers: are they reachable both ways, up to which size, by which path?

The node daemon and the forwarder measure the paths all the time; these checks use the results. For
a peer that is not reachable, they also look for the layer at which the packets stop: the route, the
peer's host, the UDP port, or one direction.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import Any

from ...control.client import ControlClient
from ...errors import ControlError, NoForwarder, UdptunError
from ...model import Endpoint, IPAddress, parse_address
from ...net.echo import EchoPinger
from ...net.kernel_path import kernel_path
from ..check import Finding, Skip, check, failed, ok, skipped, warning
from ..facts import Facts, Row

NAMED = 8  # peers that are looked at one by one
ECHO_SECONDS, PROBE_SECONDS = 1.0, 1.0
LOSS, LOSS_N, LOSS_SECONDS = 0.1, 20, 0.4
BAD = ("no path", "refused", "unreachable")


@check("peers", "whether each peer is reachable; if not, the layer at which its packets stop",
       "diagnose.md#ping", seconds=12)
def peers(facts: Facts) -> Iterator[Finding]:
    rows = _rows(facts)
    bad = [row for row in rows if row["state"] in BAD]
    looked = _together([partial(_stops_at, facts, row) for row in bad[:NAMED]])
    looked += [None] * (len(bad) - len(looked))
    for row, layer in zip(bad, [one or ("", "") for one in looked], strict=True):
        reason = f": {row['reason']}" if row["reason"] else ""
        state = {"no path": "has no path", "refused": "was refused",
                 "unreachable": "is unreachable"}[row["state"]]
        where = f" {layer[0]}." if layer[0] else ""
        yield failed(f"{_name(row)} {state}{reason}.{where}", _by(row), layer[1])
    good = [row for row in rows if row["state"] in ("reachable", "limited")]
    others = len(rows) - len(good) - len(bad)
    if not bad:
        yield ok(f"reachable: {len(good)} of {len(rows)}" + (
            f"; not measured: {others}" if others else ""))


@check("silent-peers", "without a daemon: whether the peers that are not measured answer pings",
       "diagnose.md#ping", seconds=6)
def silent_peers(facts: Facts) -> Iterator[Finding]:
    """Echo requests to the base address of each peer, if no daemon measures the paths."""
    if facts.node.answer is not None:
        raise Skip("the node daemon measures the peers")
    targets = _overlay_addresses(facts)
    if not targets:
        raise Skip("no peers are known, or the forwarder measures all of them")
    if not facts.is_root:
        raise Skip("echo requests need root")
    answers = _together([partial(_echo, one) for one in [*targets.values()][:2 * NAMED]])
    for (name, address), error in zip(targets.items(), answers, strict=False):
        if error:
            yield warning(f"{name} does not answer pings through the overlay",
                          f"{address}: {error}", f"run: udptun ping {address}")
    yield ok(f"peers that were pinged: {len(answers)}")


@check("packet-size", "whether packets of full size reach each peer (path MTU, filtered ICMP)",
       "operations.md#choose-the-mtu", seconds=12)
def packet_size(facts: Facts) -> Iterator[Finding]:
    for row in _rows(facts):
        if row["state"] == "limited":
            size = row["largest_size"]
            largest = f"the largest packet that passes has {size} bytes" if size else ""
            yield failed(
                f"large packets do not reach {_name(row)}: {row['reason'] or largest}",
                "; ".join(filter(None, (largest, _by(row)))),
                f"run: udptun ping {row['name']}; let the path pass ICMP, or lower the MTU")
    for peer in [] if facts.forwarder.answer is None else facts.forwarder.answer["peers"]:
        source = peer.get("path_mtu_source")
        if source in ("icmp", "kernel"):
            yield warning(f"the path MTU to {peer['endpoint']} is only {peer['path_mtu']}",
                          f"reported by {'an ICMP error' if source == 'icmp' else 'the kernel'}",
                          "if this is not expected, look for a tunnel or a VPN on the path")


@check("loss", "the share of probes that each peer did not answer, measured again now",
       "diagnose.md#status", seconds=12)
def loss(facts: Facts) -> Iterator[Finding]:
    suspects = [row for row in _rows(facts) if row["state"] in ("reachable", "limited") and
                row["loss"] is not None and row["loss"] >= LOSS]
    now = _together([partial(_loss_now, facts, row) for row in suspects[:NAMED]])
    measured_n = 0
    for row, lost in zip(suspects, now, strict=False):
        if isinstance(lost, PermissionError):
            yield skipped(f"{row['loss']:.0%} of the last 32 probes of {_name(row)} were lost, and"
                          f" this process cannot measure again: {lost.strerror}")
            continue
        measured_n += 1
        if lost is None or lost >= LOSS:
            share, evidence = (row["loss"], "of the last 32 probes") if lost is None else \
                (lost, f"of {LOSS_N} packets now; of the last 32 probes: {row['loss']:.0%}")
            yield warning(f"{share:.0%} of the packets to {_name(row)} and back are lost",
                          "; ".join(filter(None, (evidence, _by(row)))),
                          "look for errors and drops of the network cards and switches on the path")
    if measured_n:
        yield ok(f"peers with lost probes, which were measured again: {measured_n}")


def _loss_now(facts: Facts, row: Row) -> float | PermissionError | None:
    """Return the share of LOSS_N packets that are not answered; None: no packet was answered.

    Return the error if this process may not send them.
    """
    try:
        answers = [*_answers(facts, row)]
    except PermissionError as exc:
        return exc
    return None if not any(answers) else 1 - sum(answers) / len(answers)


def _answers(facts: Facts, row: Row) -> Iterator[bool]:
    """Yield for each of LOSS_N packets whether it was answered."""
    if row["path"] == "udp" and row["probed"] and facts.forwarder.answer is not None:
        with ControlClient(str(facts.control), 3 * PROBE_SECONDS) as client:
            for _ in range(LOSS_N):
                yield client.probe(row["endpoint"], None, LOSS_SECONDS)["rtt_us"] is not None
        return
    with closing(EchoPinger(parse_address("address", row["subnets"][0].partition("/")[0]))) as one:
        for _ in range(LOSS_N):
            yield one.once(one.smallest, LOSS_SECONDS).rtt is not None


@check("preferred-path", "peers whose packets take another path than the preferred one",
       "node.md#measured-paths")
def preferred_path(facts: Facts) -> Iterator[Finding]:
    for row in _rows(facts):
        if row["path_reason"] and row["state"] not in BAD:
            yield warning(f"{_name(row)} is reached by {_path(row)} only: {row['path_reason']}",
                          remedy="let the path pass UDP port 8472 (VXLAN) in both directions"
                          if row["path"] == "udp" else "")


@check("other-path", "the paths that carry no packets now, but are needed if the first one fails",
       "node.md#measured-paths")
def other_path(facts: Facts) -> Iterator[Finding]:
    for row in _rows(facts):
        for name, path in row["paths"].items():
            if name != row["path"] and row["state"] not in BAD and not row["path_reason"] and \
                    path.get("state") in ("unreachable", "limited"):
                yield warning(
                    f"{name.upper()}, the second path to {_name(row)}, does not work:"
                    f" {path.get('reason') or path['state']}",
                    remedy="let the path pass the tunnel's UDP port in both directions")


def _rows(facts: Facts) -> list[Row]:
    if facts.node.answer is None and facts.forwarder.answer is None:
        raise Skip("neither the daemon nor the forwarder answers")
    return _with_names(facts)


def _with_names(facts: Facts) -> list[Row]:
    """Name the peers by their leases if the daemon does not answer."""
    if facts.node.answer is not None or facts.known is None:
        return facts.rows
    keys = {str(subnet): lease.key for lease in facts.known.leases for subnet in lease.subnets}
    return [row | {"name": next((keys[net] for net in row["subnets"] if net in keys), row["name"])}
            for row in facts.rows]


def _name(row: Row) -> str:
    subnets = [one for one in row["subnets"] if one.replace("/", "-") != row["name"]]
    address = row["endpoint"]
    shown = [*subnets, *([address] if address and address != row["name"] else [])]
    return f"{row['name']} ({', '.join(shown)})" if shown else str(row["name"])


def _by(row: Row) -> str:
    return f"probes on the path by {_path(row)}" if row["path"] in ("udp", "vxlan") else ""


def _path(row: Row) -> str:
    return {"udp": "UDP", "vxlan": "VXLAN"}.get(row["path"], str(row["path"]))


def _stops_at(facts: Facts, row: Row) -> tuple[str, str]:
    """Return the layer at which the packets to a peer stop, as a sentence, and a remedy."""
    address = _public(facts, row)
    if address is None:
        return "", ""
    path = kernel_path(address)
    if path.error:
        return f"This host has no route to {address}: {path.error}", f"run: ip route get {address}"
    if path.device in facts.devices:
        return f"This host routes {address} into the overlay itself ({path.device})", \
            f"run: ip route get {address}"
    link = facts.links.get(path.device)
    if link is not None and not (link.up and link.carrier):
        return f"{path.device}, the way to {address}, has no link", "see the check underlay"
    return _of_host(facts, row, address)


def _of_host(facts: Facts, row: Row, address: IPAddress) -> tuple[str, str]:
    """The same for a peer whose host has a route."""
    error = _echo(address) if facts.is_root else "not asked"
    directions = _directions(facts, row)
    if error == "not asked":
        return f"Whether its host answers pings was not measured{directions}", "run as root"
    if error:
        return f"Its host {address} does not answer pings either ({error}){directions}", \
            f"check that the machine runs, and check the network: ping {address}"
    port = f"UDP port {Endpoint.parse(row['endpoint']).port}" if row["endpoint"] and \
        row["path"] == "udp" else "the tunnel's UDP port"
    where = f"Its host {address} answers pings, so {port} is filtered, or udptun does not run there"
    remedy = "let the firewalls of both hosts and of the network pass the port in both" \
        " directions; run udptun doctor on the peer"
    if facts.node.answer is None:  # the routes of the peer were added by hand
        return f"{where}, or has no route to this host{directions}", \
            f"{remedy}; see udptun route list there"
    return f"{where}{directions}", remedy


def _directions(facts: Facts, row: Row) -> str:
    """Let the forwarder probe the peer, and say which direction works."""
    if facts.forwarder.answer is None or not row["endpoint"] or not row["probed"]:
        return ""
    try:
        with ControlClient(str(facts.control), 3 * PROBE_SECONDS) as client:
            found = client.probe(row["endpoint"], None, PROBE_SECONDS)
    except (NoForwarder, ControlError):
        return ""
    if found["rtt_us"] is not None:
        return "; a probe over UDP was answered just now"
    if found.get("from_peer"):
        return "; packets arrive from it, but ours do not arrive there" \
            if found.get("to_peer") is False else "; packets arrive from it"
    return "; nothing arrives from it over UDP"


def _public(facts: Facts, row: Row) -> IPAddress | None:
    """Return the address of a peer on the underlay."""
    if row["endpoint"]:
        return Endpoint.parse(row["endpoint"]).address
    if facts.known is not None:
        for lease in facts.known.leases:
            if lease.key == row["name"]:
                return lease.attributes.public_ip or lease.attributes.public_ipv6
    try:
        return parse_address("address", row["name"])
    except UdptunError:
        return None


def _overlay_addresses(facts: Facts) -> dict[str, IPAddress]:
    """Return the base address of each peer that nobody measures, by name."""
    if facts.forwarder.answer is not None:
        rows = [row for row in _with_names(facts) if row["state"] == "not probed"]
        return {_name(row): parse_address("address", row["subnets"][0].partition("/")[0])
                for row in rows if row["subnets"]}
    if facts.known is None or facts.known.lease is None:
        return {}
    own = facts.known.lease.key
    return {lease.key: subnet.network_address for lease in facts.known.leases
            for subnet in [*lease.subnets][:1] if lease.key != own}


def _echo(address: IPAddress) -> str:
    """Send an echo request, twice if needed. Return the reason why none was answered, or ""."""
    try:
        pinger = EchoPinger(address)
    except OSError as exc:
        return exc.strerror or str(exc)
    try:
        for _ in range(2):
            answer = pinger.once(pinger.smallest, ECHO_SECONDS)
            if answer.rtt is not None:
                return ""
    finally:
        pinger.close()
    return answer.error


def _together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run jobs at the same time; return their results in order. A job that fails has None."""
    results: list[Any] = [None] * len(jobs)

    def run(at: int) -> None:
        with suppress(UdptunError, OSError):
            results[at] = jobs[at]()

    threads = [threading.Thread(target=run, args=(at,), daemon=True) for at in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


CHECKS = (peers, silent_peers, packet_size, loss, preferred_path, other_path)
