"""Acts on the store and on files: the store, leases, the state directory, /run."""

import shutil
from random import Random

from ..world import World
from .act import Act, Scene, pick, pick_two


def _stop_store(world: World, rng: Random) -> Scene:
    world.store.stop()
    return Scene(f"{world.store.title} is killed", undo=world.store.start, lasts_seconds=8,
                 says=r"\[!\]store", touched=list(world.members))


def _stop_store_and_daemon(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    world.store.stop()
    member.daemon.kill()
    return Scene(f"{world.store.title} is killed, and the daemon of {member.host.name}",
                 undo=world.store.start, lasts_seconds=8, says=r"\[!\]store",
                 touched=list(world.members))


def _delete_lease(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    world.store.delete_lease(member)
    return Scene(f"the lease of {member.host.name} is deleted", [member], must_log=True)


def _clone(world: World, rng: Random) -> Scene:
    """A machine that was copied from a node publishes the node's lease with its own address."""
    member = pick(world, rng)
    world.store.publish_clone(member, str(member.host.interfaces[0].v4.network[222]))
    return Scene(f"a clone publishes the lease of {member.host.name} with its own address",
                 [member], must_log=True)


def _garbage(world: World, rng: Random) -> Scene:
    a, _ = pick_two(world, rng)
    world.store.add_garbage()
    return Scene("a program writes an invalid lease", undo=world.store.delete_garbage,
                 touched=[a], says=world.store.stray)


def _compact(world: World, rng: Random) -> Scene:
    world.store.compact()
    return Scene(f"the history of {world.store.title} is compacted")


def _remove(name: str, *parts: str, must_log: bool = True):
    def do(world: World, rng: Random) -> Scene:
        member = pick(world, rng)
        path = member.folder.joinpath(*parts)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return Scene(f"{member.host.name}: rm -r {name}", [member], must_log=must_log)

    return do


def _remove_state_and_restart(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    shutil.rmtree(member.folder / "state", ignore_errors=True)
    member.daemon.kill()
    return Scene(f"{member.host.name}: rm -r /var/lib/udptun, then the daemon restarts", [member],
                 must_log=True)


ACTS = [
    Act("store-stop", "the store is killed, and started again", _stop_store),
    Act("store-and-daemon", "the store and a daemon are killed", _stop_store_and_daemon),
    Act("store-compact", "the history of the store is compacted", _compact),
    Act("lease-delete", "a lease is deleted", _delete_lease),
    Act("lease-clone", "a clone of a node publishes its lease", _clone),
    Act("lease-garbage", "an invalid lease is written", _garbage),
    Act("state-delete", "the state directory is deleted", _remove("/var/lib/udptun", "state")),
    Act("state-delete-restart", "the state directory is deleted, and the daemon restarts",
        _remove_state_and_restart),
    Act("run-delete", "the directory in /run is deleted", _remove("/run/udptun", "run")),
    Act("subnet-env-delete", "subnet.env is deleted",
        _remove("/run/flannel/subnet.env", "subnet.env")),
]
