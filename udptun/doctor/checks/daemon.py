"""Checks that repeat the results of the node daemon's own checks.

If the daemon does not answer, the same functions that the daemon uses look at the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any

from ...node.host.forwarding import FORWARD4, FORWARD6, sysctl
from ...spans import span
from ..check import Check, Finding, Result, Skip, check, failed, ok, warning
from ..facts import Facts

SEE_LOG = "see the log: journalctl -u udptun-node"
NO_DAEMON = "the node daemon does not answer"

Problem = dict[str, Any]  # of the daemon's answer


def reported(
    facts: Facts, name: str, counts: Callable[[Problem], bool] = lambda _: True, fine: str = ""
) -> list[Finding] | None:
    """Return what the daemon reports under this name; None: it does not answer.

    counts  whether a problem belongs to the caller's check
    fine    the text if no problem counts; "": that of the daemon's check
    """
    if facts.node.answer is None:
        return None
    found = next((one for one in facts.node.answer["checks"] if one["name"] == name), None)
    if found is None:
        raise Skip(f"this version of the daemon has no check {name}")
    make, text = failed if found["state"] == "failed" else warning, "; ".join(found["text"])
    if "problems" not in facts.node.answer:  # an earlier version
        return [ok(text) if found["state"] == "ok" else make(text)]
    problems = [one for one in facts.node.answer["problems"]
                if one["check"] == name and counts(one)]
    if not problems:
        return [ok(fine or text)]
    return [make(one["text"], _lasting(one["since"]), one["remedy"]) for one in problems]


def _lasting(since: str | None) -> str:
    if since is None:
        return ""
    return f"for {span(max(time.time() - datetime.fromisoformat(since).timestamp(), 0.0))}"


def _from_daemon(name: str, looks_at: str, page: str) -> Check:
    def look(facts: Facts) -> list[Finding]:
        found = reported(facts, name)
        if found is None:
            raise Skip(NO_DAEMON if facts.expects_node else "no node daemon has run here")
        return [one if one.result is Result.OK or one.remedy else replace(one, remedy=SEE_LOG)
                for one in found]

    return check(name, looks_at, page)(look)


start = _from_daemon("start", "whether the daemon's start is complete", "node.md#health")
store = _from_daemon(
    "store", "whether the store of the leases answers, and whether its data are valid",
    "node.md#where-leases-come-from")
interface = _from_daemon(
    "interface", "the choice of the interface and of the published address",
    "node.md#which-interface-and-address-other-nodes-use")


files = _from_daemon(
    "daemon", "whether the node daemon has written its files and opened its sockets",
    "node.md#health")


@check("lease", "this node's lease: held, not expired, not published by another machine",
       "node.md#which-interface-and-address-other-nodes-use")
def lease(facts: Facts) -> Iterator[Finding]:
    found = reported(facts, "lease")
    if found is not None:
        yield from found
        return
    if facts.known is None:
        raise Skip(facts.known_error if facts.expects_node else "no node daemon has run here")
    if facts.known.lease is None:
        yield failed("this node had no lease when its daemon ran last",
                     remedy=SEE_LOG)
        return
    yield ok(f"{facts.known.lease.subnets}, as the daemon has saved it")


@check("host", "the overlay's devices: state, MTU, addresses, routes, sysctls",
       "node.md#health")
def host(facts: Facts) -> Iterator[Finding]:
    # The check ``forwarding`` reports these two itself, ``routes`` what concerns peers.
    elsewhere = {sysctl(FORWARD4), sysctl(FORWARD6)}
    found = reported(facts, "host",
                     lambda one: one["setting"] not in elsewhere and not _of_peers(one),
                     "devices, addresses, routes and sysctls are as they should be")
    if found is not None:
        yield from found
        return
    from .devices import differences

    yield from differences(facts)


def _of_peers(problem: Problem) -> bool:
    # The number of further peers is a problem without a single peer.
    return bool(problem["peer"]) or problem["text"].endswith(" more: misrouted")


@check("routes", "other programs' routes and policy rules that send packets for a peer elsewhere",
       "node.md#health")
def routes(facts: Facts) -> Iterator[Finding]:
    found = reported(facts, "host", _of_peers,
                     "the kernel routes each peer through the overlay")
    if found is not None:
        yield from found
        return
    from .routing import misrouted

    yield from misrouted(facts)


@check("firewall", "rules of iptables, iptables-legacy and nftables that drop packets of pods or of"
       " the tunnel; udptun's own rules", "node.md#firewall", seconds=20)
def firewall(facts: Facts) -> Iterator[Finding]:
    found = reported(facts, "firewall")
    if found is not None:
        yield from found
        return
    from .filters import drops

    yield from drops(facts)


CHECKS = (start, files, store, lease, interface, host, routes, firewall)
