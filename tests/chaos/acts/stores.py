"""Acts on the store and on files: etcd, leases, the state directory, /run."""

import json
import shutil
from random import Random

from udptun.lab.cluster import PREFIX

from ..world import World
from .act import Act, Scene, pick, pick_two


def _stop_store(world: World, rng: Random) -> Scene:
    world.etcd.stop()
    return Scene("etcd is killed", undo=world.etcd.start, stands=8, says=r"\[!\]store",
                 touched=list(world.members))


def _stop_store_and_daemon(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    world.etcd.stop()
    member.daemon.kill()
    return Scene(f"etcd is killed, and the daemon of {member.host.name}", undo=world.etcd.start,
                 stands=8, says=r"\[!\]store", touched=list(world.members))


def _delete_lease(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    world.etcd.revoke(member.subnet)
    return Scene(f"the lease of {member.host.name} is deleted", [member], traced=True)


def _clone(world: World, rng: Random) -> Scene:
    """A machine that was copied from a node publishes the node's lease with its own address."""
    member = pick(world, rng)
    key = world.key(member)
    lease = world.etcd.leases()[key]
    lease["PublicIP"] = str(member.host.interfaces[0].v4.network[222])
    world.etcd.put(f"{PREFIX}/subnets/{key}", json.dumps(lease))
    return Scene(f"a clone publishes the lease of {member.host.name} with its own address",
                 [member], traced=True)


def _garbage(world: World, rng: Random) -> Scene:
    a, _ = pick_two(world, rng)
    key = f"{PREFIX}/subnets/10.244.250.0-24"
    world.etcd.put(key, "{not json")
    return Scene("a program writes a lease that is not JSON", undo=lambda: world.etcd.delete(key),
                 touched=[a], says="10.244.250.0-24")


def _compact(world: World, rng: Random) -> Scene:
    world.etcd.compact()
    return Scene("etcd is compacted")


def _remove(name: str, *parts: str, traced: bool = True):
    def do(world: World, rng: Random) -> Scene:
        member = pick(world, rng)
        path = member.folder.joinpath(*parts)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return Scene(f"{member.host.name}: rm -r {name}", [member], traced=traced)

    return do


def _remove_state_and_restart(world: World, rng: Random) -> Scene:
    member = pick(world, rng)
    shutil.rmtree(member.folder / "state", ignore_errors=True)
    member.daemon.kill()
    return Scene(f"{member.host.name}: rm -r /var/lib/udptun, then the daemon restarts", [member],
                 traced=True)


ACTS = [
    Act("store-stop", "etcd is killed, and started again", _stop_store),
    Act("store-and-daemon", "etcd and a daemon are killed", _stop_store_and_daemon),
    Act("store-compact", "etcd is compacted", _compact),
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
