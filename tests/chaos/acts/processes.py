"""Acts on processes: killed, stopped, signalled, upgraded; clocks; pods."""

import os
import signal
from collections.abc import Iterable
from random import Random

from udptun.lab.cluster import Member

from ..world import World
from .act import Act, Scene, isolates, pick

SLEEP_SECONDS = 20.0


def _kill(world: World, member: Member, numbers: Iterable[int], what: int) -> None:
    for pid in numbers:
        try:
            os.kill(pid, what)
        except ProcessLookupError:
            continue


def _kill_daemon(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    member.daemon.kill()
    return Scene(f"{member.host.name}: kill -9 of the daemon", [member], traced=True)


def _kill_forwarder(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    pids = world.forwarder_pids(member)
    _kill(world, member, pids, signal.SIGKILL)
    return Scene(f"{member.host.name}: kill -9 of the forwarder", [member], traced=bool(pids))


def _kill_both(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    _kill(world, member, world.pids(member), signal.SIGKILL)
    member.daemon.kill()
    return Scene(f"{member.host.name}: kill -9 of daemon and forwarder", [member], traced=True)


def _freeze(world: World, member: Member, pids: list[int]):
    _kill(world, member, pids, signal.SIGSTOP)
    return lambda: _kill(world, member, pids, signal.SIGCONT)


def _stop_daemon(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    thaw = _freeze(world, member, [member.daemon.pid])
    return Scene(f"{member.host.name}: SIGSTOP of the daemon", [member], undo=thaw, stands=8)


def _stop_forwarder(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    thaw = _freeze(world, member, world.forwarder_pids(member))
    name = member.host.name
    by_vxlan = {other.host.name for other in world.others(member)
                if "flannel.1" in world.devices(other)} \
        if "flannel.1" in world.devices(member) else set()
    cut = {pair for pair in isolates(world, member) if not set(pair) - {name} & by_vxlan}
    return Scene(f"{name}: SIGSTOP of the forwarder", [member], cut, thaw)


def _suspend(world: World, rng: Random) -> Scene:
    """The machine sleeps for 20 s: its processes stop, and its link is down."""
    member = pick(world, rng)
    thaw = _freeze(world, member, world.pids(member))
    end = member.host.interfaces[0]
    member.host.ip(f"link set {end.name} down")

    def resume() -> None:
        member.host.ip(f"link set {end.name} up",
                       f"address replace {end.v6} dev {end.name} nodad")
        world.add_default_route(member)
        thaw()

    return Scene(f"{member.host.name}: suspended for {SLEEP_SECONDS:g} s", [member],
                 isolates(world, member), resume, stands=SLEEP_SECONDS)


def _hang_up(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    member.daemon.signal(signal.SIGHUP)
    _kill(world, member, world.forwarder_pids(member), signal.SIGHUP)
    return Scene(f"{member.host.name}: SIGHUP to daemon and forwarder", [member], traced=True)


def _upgrade(world: World, rng: Random) -> Scene:
    """A package is upgraded in place: the service manager restarts both processes."""
    member = pick(world, rng)
    member.daemon.signal(signal.SIGTERM)
    _kill(world, member, world.forwarder_pids(member), signal.SIGTERM)
    return Scene(f"{member.host.name}: daemon and forwarder are restarted by the package manager",
                 [member], traced=True)


def _rolling_upgrade(world: World, rng: Random) -> Scene:
    for member in world.members:
        member.daemon.signal(signal.SIGTERM)
    # Five starts at once on few cores.
    return Scene("all daemons are restarted at once", list(world.members), traced=True, late=15)


def _clock(seconds: int):
    def do(world: World, rng: Random) -> Scene:
        member = pick(world, rng)
        world.set_clock(member, seconds)
        return Scene(f"{member.host.name}: the clock jumps by {seconds} s", [member],
                     undo=lambda: world.set_clock(member, 0), stands=5)

    return do


def _restart_pod(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    world.mesh.stop()
    member.remove_pod()
    member.add_pod()
    world.mesh.restart(world.members)
    return Scene(f"{member.host.name}: its pod is replaced", [member])


ACTS = [
    Act("kill-daemon", "kill -9 of the daemon; the service manager restarts it", _kill_daemon),
    Act("kill-forwarder", "kill -9 of the forwarder", _kill_forwarder),
    Act("kill-both", "kill -9 of daemon and forwarder", _kill_both),
    Act("stop-daemon", "SIGSTOP of the daemon for some seconds", _stop_daemon),
    Act("stop-forwarder", "SIGSTOP of the forwarder for some seconds", _stop_forwarder),
    Act("suspend", "a node sleeps for 20 s", _suspend),
    Act("sighup", "SIGHUP to daemon and forwarder", _hang_up),
    Act("upgrade", "daemon and forwarder are restarted in place", _upgrade),
    Act("restart-all", "the daemons of all nodes are restarted at once", _rolling_upgrade),
    Act("clock-forward", "the wall clock jumps two days ahead", _clock(2 * 86400)),
    Act("clock-back", "the wall clock jumps two days back", _clock(-2 * 86400)),
    Act("pod-restart", "a pod is replaced by a new one", _restart_pod),
]
