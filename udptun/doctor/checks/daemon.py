"""Checks that repeat the results of the node daemon's own checks.

If the daemon does not answer, the same functions that the daemon uses look at the host.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from ..check import Check, Finding, Result, Skip, check, failed, ok, warning
from ..facts import Facts

# The first lines that say what works; the problem follows.
WORKS = re.compile(r" answers; leases: |, published as ")
FORWARDING = re.compile(r"net\.ipv[46]\.(ip_forward|conf\.all\.forwarding) is 0")
MISROUTED = re.compile(r"^\d+ misrouted:$")
CONTESTED = "look for a second machine with this name or address, and check this host's clock"
NO_DAEMON = "the node daemon does not answer"


def reported(facts: Facts, name: str) -> list[Finding] | None:
    """Return what the daemon reports under this name; None: it does not answer."""
    lines = reported_lines(facts, name)
    if lines is None:
        return None
    state, texts = lines
    if state == "ok":
        return [ok("; ".join(texts))]
    make = failed if state == "failed" else warning
    good, problems = _problems(texts)
    return [make(text, evidence or good, remedy)
            for text, evidence, remedy in map(_split, problems)]


def reported_lines(facts: Facts, name: str) -> tuple[str, list[str]] | None:
    if facts.node.answer is None:
        return None
    for one in facts.node.answer["checks"]:
        if one["name"] == name:
            return one["state"], one["text"]
    raise Skip(f"this version of the daemon has no check {name}")


def _problems(texts: list[str]) -> tuple[str, list[str]]:
    """Return the line that says what still works, if there is one, and each problem.

    A line that ends with a colon is the heading of the lines after it. Each of these lines gets the
    heading in front if it begins with a number.
    """
    good = texts[0] if len(texts) > 1 and WORKS.search(texts[0]) else ""
    heading, found = "", []
    for text in texts[1:] if good else texts:
        if text.startswith("the active leases are "):
            good = good or text
        elif text.endswith(":"):
            heading = f"{text} " if text[:1].isdigit() else ""
        else:
            found.append(f"{heading}{text}")
    return good, found


def _split(text: str) -> tuple[str, str, str]:
    """Return the text, no evidence, and the remedy that the daemon has appended."""
    what, semicolon, remedy = text.rpartition("; ")
    is_remedy = semicolon and remedy.startswith((
        "raise ", "to make ", "a rule of ", "an accept rule", "--firewall", "a newer nft"))
    return (what, "", remedy) if is_remedy else (text, "", "")


def _from_daemon(name: str, looks_at: str, page: str, remedy: str) -> Check:
    def look(facts: Facts) -> list[Finding]:
        found = reported(facts, name)
        if found is None:
            raise Skip(NO_DAEMON if facts.expects_node else "no node daemon has run here")
        return [one if one.result is Result.OK or one.remedy else replace(one, remedy=remedy)
                for one in found]

    return check(name, looks_at, page)(look)


start = _from_daemon("start", "whether the daemon's start is complete", "node.md#health",
                     "see the log: journalctl -u udptun-node")
store = _from_daemon(
    "store", "whether the store of the leases answers, and whether its data are valid",
    "node.md#where-leases-come-from",
    "look at the store and at the network to it. Packets of known nodes still pass")
interface = _from_daemon(
    "interface", "the choice of the interface and of the published address",
    "node.md#which-interface-and-address-other-nodes-use",
    "give the node --iface, or restore the interface")


@check("lease", "this node's lease: held, not expired, not published by another machine",
       "node.md#which-interface-and-address-other-nodes-use")
def lease(facts: Facts) -> Iterator[Finding]:
    found = reported(facts, "lease")
    if found is not None:
        for one in found:
            yield one if one.result is Result.OK else replace(one, remedy=CONTESTED)
        return
    if facts.known is None:
        raise Skip(facts.known_error if facts.expects_node else "no node daemon has run here")
    if facts.known.lease is None:
        yield failed("this node had no lease when its daemon ran last",
                     remedy="see why in the log: journalctl -u udptun-node")
        return
    yield ok(f"{facts.known.lease.subnets}, as the daemon has saved it")


@check("host", "the overlay's devices: state, MTU, addresses, routes, sysctls",
       "node.md#health")
def host(facts: Facts) -> Iterator[Finding]:
    lines = reported_lines(facts, "host")
    if lines is not None:
        state, texts = lines
        # The check ``forwarding`` reports these settings itself.
        own = [text for text in _without_misrouted(texts) if not FORWARDING.match(text)]
        if state == "ok" or not own:
            yield ok("devices, addresses, routes and sysctls are as they should be")
        for text in own if state != "ok" else ():
            yield failed(text, remedy="the daemon tries to repair it; see its log")
        return
    from .devices import differences

    yield from differences(facts)


@check("routes", "routes and policy rules of other programs that divert packets to a peer",
       "node.md#health")
def routes(facts: Facts) -> Iterator[Finding]:
    lines = reported_lines(facts, "host")
    if lines is not None:
        for text in _misrouted(lines[1]):
            yield failed(text, remedy="remove this route or rule, or change its prefix")
        if lines[0] == "ok":
            yield ok("the kernel routes each peer through the overlay")
        return
    from .routing import misrouted

    yield from misrouted(facts)


def _without_misrouted(texts: list[str]) -> list[str]:
    cut = next((at for at, text in enumerate(texts) if MISROUTED.match(text)), len(texts))
    return texts[:cut]


def _misrouted(texts: list[str]) -> list[str]:
    return texts[len(_without_misrouted(texts)) + 1:]


@check("firewall", "rules of iptables, iptables-legacy and nftables that drop packets of pods or of"
       " the tunnel; udptun's own rules", "node.md#firewall", seconds=20)
def firewall(facts: Facts) -> Iterator[Finding]:
    found = reported(facts, "firewall")
    if found is not None:
        yield from found
        return
    from .filters import drops

    yield from drops(facts)


CHECKS = (start, store, lease, interface, host, routes, firewall)
