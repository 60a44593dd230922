"""Checks of files: subnet.env, the state directory, the disk, the clock."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ...errors import FieldError
from ...spans import span
from ...text import counted
from ..check import Finding, Result, Skip, check, failed, ok, warning
from ..facts import Facts

FREE_BYTES = 1 << 20
STEP_SECONDS = 60.0
ANCIENT = 1_700_000_000  # Unix time of the first version; a clock before it was never set


@check("subnet-env", "subnet.env, which the CNI plugin reads: it exists and has our subnet",
       "node.md#host-configuration")
def subnet_env(facts: Facts) -> Iterator[Finding]:
    from .daemon import reported

    if not facts.expects_node:
        raise Skip("no node daemon has run here")
    told = reported(facts, "subnet-env") or []
    yield from (one for one in told if one.result is not Result.OK)
    path, remedy = facts.subnet_file, "restart the node daemon: it writes the file"
    try:
        found = facts.subnet_env
    except FieldError as exc:
        yield failed(f"{path} is not valid: {exc}", remedy=remedy)
        return
    except FileNotFoundError:
        if told and all(one.result is Result.OK for one in told) and not path.parent.exists():
            raise Skip(f"{path.parent} is in the container of the daemon only") from None
        yield failed(f"{path} does not exist: no pod can be attached", remedy=remedy)
        return
    wanted = _subnets(facts)
    have = {str(one) for one in found.subnets}
    if wanted is not None and not have <= wanted:
        yield failed(f"{path} has the subnet {', '.join(sorted(have))}, and this node's lease"
                     f" {', '.join(sorted(wanted))}", remedy=remedy)
    mtu = None if facts.node.answer is None else facts.node.answer["mtu"]
    if mtu and found.mtu != mtu:
        yield warning(f"{path} has the MTU {found.mtu}, and the overlay {mtu}", remedy=remedy)
    yield ok(f"{path}: {', '.join(sorted(have))}, MTU {found.mtu}")


def _subnets(facts: Facts) -> set[str] | None:
    if facts.node.answer is not None:
        return set(facts.node.answer["subnets"]) or None
    if facts.known is None or facts.known.lease is None:
        return None
    return {str(one) for one in facts.known.lease.subnets}


@check("state-files", "the state directory and /run: they exist, and can be written",
       "node.md#what-it-creates-on-the-host")
def state_files(facts: Facts) -> Iterator[Finding]:
    wanted = []
    if facts.expects_node or facts.spec is not None:
        wanted.append(facts.state_dir)
    if facts.expects_node or facts.expects_forwarder:
        wanted.append(facts.control.parent)
    if not wanted:
        raise Skip("nothing of udptun runs here")
    for path in wanted:
        if not path.is_dir():
            yield failed(f"the directory {path} does not exist",
                         remedy="restart the daemon: it makes the directory")
            continue
        found = os.statvfs(path)
        if found.f_flag & os.ST_RDONLY:
            yield failed(f"{path} is on a read-only file system: the state is not saved",
                         remedy="see why in the kernel's log: dmesg")
        elif found.f_bavail * found.f_frsize < FREE_BYTES:
            free = found.f_bavail * found.f_frsize
            yield failed(f"the file system of {path} is full: the state is not saved",
                         f"{counted(free, 'byte')} free", f"run: df {path}")
        elif found.f_files and not found.f_favail:
            yield failed(f"the file system of {path} has no free inodes: the state is not saved",
                         remedy=f"run: df -i {path}")
    if facts.known is None and facts.node.answer is not None and facts.is_root:
        yield warning(f"the leases are not saved: {facts.known_error}",
                      remedy="the daemon saves them again within 10 s; else see its log")


@check("clock", "the clock of this host: it was set, and did not jump", "node.md#measured-paths")
def clock(facts: Facts) -> Iterator[Finding]:
    import time

    if time.time() < ANCIENT:
        yield failed("the clock of this host was never set", time.strftime("%F %T %Z"),
                     "start NTP: certificates and tokens are not valid at this time")
        return
    if facts.node.answer is None:
        raise Skip("the node daemon does not answer, so a jump of the clock is not known")
    step = facts.node.answer.get("clock_step_seconds", 0.0)
    if abs(step) >= STEP_SECONDS:
        way = "forward" if step > 0 else "back"
        yield warning(f"the clock was set {way} by {span(abs(step))} since the daemon's start:"
                      " times in events and leases are wrong", f"clock_step_seconds is {step}",
                      "look at NTP (timedatectl, chronyc tracking); then restart the daemon")
    else:
        yield ok("it did not jump since the daemon's start")


@check("forwarder-log", "errors at the end of the forwarder's log", "operations.md#logs-and-events")
def forwarder_log(facts: Facts) -> Iterator[Finding]:
    from ...node.process.launch import log_tail

    if facts.forwarder.answer is not None:
        raise Skip("the forwarder answers")
    if not facts.expects_forwarder or facts.spec is None:
        raise Skip("no forwarder was started by a daemon")
    path, tail = facts.forwarder_log, log_tail(facts.forwarder_log)
    if "error" in tail.lower():
        yield warning(f"the log of the forwarder ends with an error: {tail}", str(path),
                      f"run: tail {path}")


CHECKS = (subnet_env, state_files, clock, forwarder_log)
