"""Checks of udptun's own programs: do they run, answer, and have what they need?"""

from __future__ import annotations

from collections.abc import Iterator

from ...privileges import Capability
from ..check import Finding, Result, Skip, check, failed, ok, warning
from ..facts import Asked, Facts
from ..processes import Process, capabilities, named, open_files
from .daemon import reported

FILES_SHARE = 0.8
UNITS = {"node": "udptun-node", "forward": "udptun-forwarder"}


@check("node-daemon", "whether the node daemon runs and answers on its socket", "node.md")
def node_daemon(facts: Facts) -> Iterator[Finding]:
    if facts.node.answer is not None:
        yield ok(f"version {facts.node.answer['version']} answers on {facts.node_socket}")
        return
    if facts.node.denied:
        raise Skip(f"{facts.node_socket} may not be used by this user: run as root")
    if not facts.expects_node:
        if not facts.expects_forwarder:
            yield failed(
                f"no program of the instance {facts.instance.name} runs on this host, and none has"
                " left its state", facts.node.error or facts.known_error,
                "start `udptun node` or `udptun forward`, or select another --instance")
            return
        raise Skip("no node daemon has run here: this host has only a forwarder")
    yield _silent("node daemon", facts.running("node"), facts.node, "node",
                  "Routes and devices stay, but they do not follow the leases.")


@check("forwarder", "whether the forwarder runs, answers, and has all routes",
       "node.md#the-forwarder")
def forwarder(facts: Facts) -> Iterator[Finding]:
    if facts.forwarder.answer is not None:
        answer, wrong = facts.forwarder.answer, [
            one for one in reported(facts, "forwarder") or () if one.result is not Result.OK]
        for one in wrong:
            yield failed(f"the forwarder does not have what the daemon wants: {one.text}",
                         f"routes: {answer['route_count']}",
                         "see the logs of the daemon and of the forwarder")
        if wrong:
            return
        yield ok(f"version {answer['version']} answers; routes: {answer['route_count']}")
        return
    if facts.forwarder.denied:
        raise Skip(f"{facts.control} may not be used by this user: run as root")
    if not facts.expects_forwarder:
        raise Skip("this node does not need a forwarder" if facts.expects_node else
                   "no forwarder answers, and it is not known whether this host needs one")
    unit = "node" if facts.expects_node else "forward"
    yield _silent("forwarder", [one for one in facts.running("forward") if not one.standby]
                  or [one for one in facts.running("forward") if one.is_stopped],
                  facts.forwarder, unit, "No packet passes by UDP.")


def _silent(
    what: str, running: list[Process], asked: Asked, unit: str, effect: str
) -> Finding:
    for one in running:
        if one.is_stopped:
            return failed(f"the {what} is stopped by a signal. {effect}",
                          f"process {one.pid} has the state {one.state}",
                          f"run: kill -CONT {one.pid}")
    restart = f"run: systemctl restart {UNITS[unit]}"
    state = f"process {running[0].pid} has the state {running[0].state}" if running else ""
    if asked.failed:
        return failed(f"the {what} runs, but answers with an error: {asked.error}", state,
                      f"see its log; {restart}")
    if running:
        return failed(f"the {what} runs but does not answer", f"{state}; {asked.error}", restart)
    return failed(f"the {what} does not run. {effect}", asked.error, restart)


@check("versions", "whether the daemon, the forwarder and this command have the same version",
       "operations.md#upgrade-and-restart")
def versions(facts: Facts) -> Iterator[Finding]:
    from ..._version import __version__

    found = {name: asked.answer["version"] for name, asked in (
        ("node daemon", facts.node), ("forwarder", facts.forwarder)) if asked.answer is not None}
    if not found:
        raise Skip("neither the daemon nor the forwarder answers")
    for name, version in found.items():
        if version != __version__:
            yield warning(f"the {name} runs version {version}, and {__version__} is installed",
                          remedy="restart it, or let the new version take over (SIGUSR2)")


@check("duplicates", "a second daemon or forwarder of this instance; flanneld on the same host",
       "node.md#several-overlays-on-one-host")
def duplicates(facts: Facts) -> Iterator[Finding]:
    if not facts.is_root:
        raise Skip("the network namespaces of other users' processes can only be read by root")
    daemons = facts.running("node")
    if sum(not one.is_stopped for one in daemons) > 1:
        pids = ", ".join(str(one.pid) for one in daemons)
        yield warning(f"{len(daemons)} node daemons of this instance run: processes {pids}",
                      remedy="one of them may be handing over; otherwise stop one")
    here = named("flanneld")
    if here and facts.expects_node:
        from ...node.host.leftovers import why_keep

        if (why := why_keep()).startswith("flanneld"):
            yield warning(f"{why}, beside udptun: both set up the same devices and files",
                          f"process {here[0][0]}", "stop flanneld on this host")


@check("capabilities", "the capabilities of the daemon and of the forwarder",
       "operations.md#requirements")
def has_capabilities(facts: Facts) -> Iterator[Finding]:
    running = [one for one in facts.processes if not one.standby and one.state != "Z"]
    if not running:
        raise Skip("neither the daemon nor the forwarder runs")
    for one in running:
        mask = capabilities(one.pid)
        if mask is None:
            continue
        evidence = f"process {one.pid}: CapEff {mask:016x}"
        who = "node daemon" if one.role == "node" else "forwarder"
        remedy = "see CapabilityBoundingSet= of the unit, or securityContext of the pod"
        if not mask >> Capability.NET_ADMIN & 1:
            yield failed(f"the {who} does not have CAP_NET_ADMIN: it cannot set up devices",
                         evidence, remedy)
        elif one.role == "node" and not mask >> Capability.NET_RAW & 1:
            yield warning("the node daemon does not have CAP_NET_RAW: it cannot measure peers that"
                          " answer no probes", evidence, remedy)


@check("open-files", "the open files of the daemon and of the forwarder, and their limit",
       "operations.md#requirements")
def files(facts: Facts) -> Iterator[Finding]:
    seen = 0
    for one in facts.processes:
        if (found := open_files(one.pid)) is None:
            continue
        seen += 1
        count, limit = found
        if count > FILES_SHARE * limit:
            who = "node daemon" if one.role == "node" else "forwarder"
            yield warning(f"the {who} has {count} of at most {limit} open files",
                          f"process {one.pid}", "raise LimitNOFILE= of the unit")
    if not seen:
        raise Skip("no process of udptun can be looked at: run as root" if facts.processes else
                   "neither the daemon nor the forwarder runs")


CHECKS = (node_daemon, forwarder, versions, duplicates, has_capabilities, files)
