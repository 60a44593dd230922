"""Checks of what rises now: drops, full buffers, CPU. They compare two samples."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ...drops import DROP_REASONS
from ..check import Finding, Skip, check, failed, ok, warning
from ..facts import Facts, Sample

BETWEEN_SECONDS = 1.5
STEAL, WORKER = 0.1, 0.9  # shares of the CPU time
MEANINGS = {reason.name: reason.meaning for reason in DROP_REASONS}
# Reasons that are normal in small numbers: path MTU discovery, traceroute, restarts.
QUIET = {"too_big", "ttl_exceeded", "closed"}


def samples(facts: Facts) -> tuple[Sample, Sample]:
    """Return the first sample, and one that is at least BETWEEN_SECONDS later."""
    first = facts.first
    assert first is not None
    if facts.last is None:
        time.sleep(max(first.at + BETWEEN_SECONDS - time.monotonic(), 0.0))
        facts.last = facts.sample()
    return first, facts.last


@check("drops", "the reasons for which the forwarder drops packets now",
       "operations.md#read-the-drop-counters")
def drops(facts: Facts) -> Iterator[Finding]:
    first, last = samples(facts)
    if first.drops is None or last.drops is None:
        raise Skip("no forwarder answers")
    before = {(one["reason"], one["direction"]): one["packets"] for one in first.drops}
    seconds, rises = last.at - first.at, 0
    for one in last.drops:
        rise = one["packets"] - before.get((one["reason"], one["direction"]), 0)
        rises += rise
        if rise <= 0 or (one["reason"] in QUIET and rise < 10 * seconds):
            continue
        yield warning(
            f"packets are dropped now, {one['direction']}, {one['reason']}:"
            f" {MEANINGS[one['reason']]}",
            f"{rise} within {seconds:.1f} s, {one['packets']} since the start{_senders(one)}",
            "run: udptun drops --last")
    total = sum(one["packets"] for one in last.drops)
    yield ok(f"dropped within {seconds:.1f} s: {rises}; since the start: {total}")


def _senders(drop: dict[str, object]) -> str:
    sources = drop.get("sources")
    if not isinstance(sources, list) or not sources:
        return ""
    return f"; from {', '.join(str(one['address']) for one in sources[:3])}"


@check("buffers", "full receive buffers: packets that the kernel drops before the forwarder",
       "operations.md#read-the-drop-counters")
def buffers(facts: Facts) -> Iterator[Finding]:
    first, last = samples(facts)
    ports = {endpoint.port for endpoint in facts.listen}
    if not ports:
        raise Skip("this host does not listen on UDP, or its port is not known")
    before = {one.inode: one.drops for one in first.sockets}
    since_start = rise = 0
    for one in last.sockets:
        if one.port in ports:
            since_start += one.drops
            rise += one.drops - before.get(one.inode, one.drops)
    if rise > 0:
        yield failed("the receive buffer of the forwarder's socket is full: the kernel drops"
                     " datagrams", f"{rise} within {last.at - first.at:.1f} s,"
                     f" {since_start} since the start",
                     "give the forwarder more CPU time or --workers, and raise net.core.rmem_max")
        return
    yield ok(f"no datagram is dropped now; {since_start} since the start")


@check("cpu", "a worker of the forwarder that uses a whole core; CPU time that the hypervisor"
       " takes", "operations.md#workers-and-cpu-cores")
def cpu(facts: Facts) -> Iterator[Finding]:
    first, last = samples(facts)
    seconds = last.at - first.at
    stolen, total = (after - before for before, after in zip(first.cpu, last.cpu, strict=True))
    if total > 0 and stolen > STEAL * total:
        yield warning(f"the hypervisor takes {stolen / total:.0%} of the CPU time of this machine",
                      f"steal in /proc/stat, within {seconds:.1f} s",
                      "move the machine, or give it CPUs of its own")
    for (number, thread), used in last.threads.items():
        share = (used - first.threads.get((number, thread), used)) / seconds
        if share > WORKER:
            yield warning(f"the forwarder's thread {thread} uses {share:.0%} of a core: it limits"
                          " the throughput", f"thread {number}, within {seconds:.1f} s",
                          "give the forwarder more --workers")


CHECKS = (drops, buffers, cpu)
