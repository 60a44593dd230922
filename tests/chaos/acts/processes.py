"""Acts on processes: killed, stopped, signalled, upgraded; clocks; pods."""

import os
import signal
from collections.abc import Iterable
from random import Random

from ..world import World
from .act import Act, Scene, isolates, pick

SLEEP_SECONDS = 20.0


def send_signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _kill_daemon(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    member.daemon.kill()
    return Scene(f"{member.host.name}: kill -9 of the daemon", [member], must_log=True)


def _kill_forwarder(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    pids = world.forwarder_pids(member)
    send_signal(pids, signal.SIGKILL)
    return Scene(f"{member.host.name}: kill -9 of the forwarder", [member], must_log=bool(pids))


def _kill_both(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    send_signal(world.pids(member), signal.SIGKILL)
    member.daemon.kill()
    return Scene(f"{member.host.name}: kill -9 of daemon and forwarder", [member], must_log=True)


def _stop(pids: list[int]):
    """Stop the processes. Return a function that continues them."""
    send_signal(pids, signal.SIGSTOP)
    return lambda: send_signal(pids, signal.SIGCONT)


def _stop_daemon(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    resume = _stop([member.daemon.pid])
    return Scene(f"{member.host.name}: SIGSTOP of the daemon", [member], undo=resume,
                 lasts_seconds=8)


def _stop_forwarder(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    resume = _stop(world.forwarder_pids(member))
    name = member.host.name
    by_vxlan = {other.host.name for other in world.others(member)
                if "flannel.1" in world.devices(other)} \
        if "flannel.1" in world.devices(member) else set()
    cut = {pair for pair in isolates(world, member) if not set(pair) - {name} & by_vxlan}
    return Scene(f"{name}: SIGSTOP of the forwarder", [member], cut, resume)


def _suspend(world: World, rng: Random) -> Scene:
    """The machine sleeps for 20 s: its processes stop, and its link is down."""
    member = pick(world, rng)
    resume = _stop(world.pids(member))
    end = member.host.interfaces[0]
    member.host.ip(f"link set {end.name} down")

    def wake_up() -> None:
        member.host.ip(f"link set {end.name} up",
                       f"address replace {end.v6} dev {end.name} nodad")
        world.add_default_route(member)
        resume()

    return Scene(f"{member.host.name}: suspended for {SLEEP_SECONDS:g} s", [member],
                 isolates(world, member), wake_up, lasts_seconds=SLEEP_SECONDS)


def _hang_up(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    member.daemon.signal(signal.SIGHUP)
    send_signal(world.forwarder_pids(member), signal.SIGHUP)
    return Scene(f"{member.host.name}: SIGHUP to daemon and forwarder", [member], must_log=True)


def _upgrade(world: World, rng: Random) -> Scene:
    """A package is upgraded in place: the service manager restarts both processes."""
    member = pick(world, rng)
    member.daemon.signal(signal.SIGTERM)
    send_signal(world.forwarder_pids(member), signal.SIGTERM)
    return Scene(f"{member.host.name}: daemon and forwarder are restarted by the package manager",
                 [member], must_log=True)


def _restart_all(world: World, rng: Random) -> Scene:
    for member in world.members:
        member.daemon.signal(signal.SIGTERM)
    # Five daemons start at the same time on few cores, which takes longer.
    return Scene("all daemons are restarted at once", list(world.members), must_log=True,
                 extra_seconds=15)


def _clock(seconds: int):
    def do(world: World, rng: Random) -> Scene:
        member = pick(world, rng)
        world.set_clock(member, seconds)
        return Scene(f"{member.host.name}: the clock jumps by {seconds} s", [member],
                     undo=lambda: world.set_clock(member, 0), lasts_seconds=5)

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
    Act("restart-all", "the daemons of all nodes are restarted at once", _restart_all),
    Act("clock-forward", "the wall clock jumps two days ahead", _clock(2 * 86400)),
    Act("clock-back", "the wall clock jumps two days back", _clock(-2 * 86400)),
    Act("pod-restart", "a pod is replaced by a new one", _restart_pod),
]
