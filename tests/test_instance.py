"""Instance names: the default instance has the documented names; two instances share no name."""

import fcntl
import multiprocessing
import os
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from tests.own_netns import in_own_mount_namespace, in_own_netns, sh
from udptun.errors import FieldError
from udptun.instance import Instance, InstanceRunning


def names(instance: Instance) -> set[str]:
    return {
        instance.tun, instance.nft_table(4), instance.nft_table(6), instance.vxlan_device(1, 4),
        instance.vxlan_device(1, 6), str(instance.run_dir), str(instance.state_dir),
        str(instance.subnet_file), str(instance.control_socket()),
        instance.iptables_chain("FORWARD"), instance.iptables_chain("POSTROUTING"),
    }


def test_default_instance_has_the_documented_names():
    assert names(Instance()) == {
        "udptun0", "udptun-ipv4", "udptun-ipv6", "flannel.1", "flannel-v6.1", "/run/udptun",
        "/var/lib/udptun", "/run/flannel/subnet.env", "/run/udptun/udptun.sock",
        "UDPTUN-FORWARD", "UDPTUN-POSTRTG",
    }


def test_two_instances_share_no_name():
    assert len(names(Instance("blue"))) == 11
    assert not names(Instance("blue")) & names(Instance("green"))
    assert not names(Instance("blue")) & names(Instance())


BAD_NAMES = ["", "Blue", "a.b", "a/b", "123456789", "a b", "-a", "0a", "é", "a\n"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_invalid_instance_name_is_refused(name):
    with pytest.raises(FieldError, match=r"instance: .* expected 1 to 8"):
        Instance(name)


def test_flannels_name_is_refused():
    """An instance "flannel" would share subnet.env and VXLAN devices with the default instance."""
    with pytest.raises(FieldError, match="not flannel"):
        Instance("flannel")


def test_a_device_name_that_the_kernel_would_refuse():
    assert Instance("blue").vxlan_device(16777215, 4) == "blue.16777215"
    with pytest.raises(FieldError, match="VNI: 16777215"):
        Instance("abcdefgh").vxlan_device(16777215, 4)


def test_instance_can_be_locked_once_per_role(tmp_path: Path):
    with Instance("blue").locked("forward", tmp_path):
        with Instance("blue").locked("node", tmp_path):
            pass
        with (
            pytest.raises(InstanceRunning, match="udptun forward of the instance blue is already"),
            Instance("blue").locked("forward", tmp_path),
        ):
            pass
    with Instance("blue").locked("forward", tmp_path):
        [lock] = tmp_path.iterdir()
        assert lock.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == []


def test_whether_a_lock_is_free(tmp_path: Path):
    lock, other = (Instance("blue").lock("node", tmp_path) for _ in range(2))
    assert other.is_free()
    lock.acquire()
    assert not other.is_free()
    lock.release()
    assert other.is_free()
    lock.acquire()  # the question has not taken it
    lock.release()


@in_own_netns
@pytest.mark.parametrize("problem", ["bind,ro", "nr_inodes=2", "nr_inodes=3"])
def test_whether_a_lock_is_free_on_a_readonly_or_full_disk(tmp_path: Path, problem: str):
    """With two inodes, the disk has only the lock file and its directory."""
    in_own_mount_namespace()
    disk, view = tmp_path / "disk", tmp_path / "view"
    disk.mkdir()
    view.mkdir()
    sh(f"mount -t tmpfs -o mode=700 none {disk}", f"mount --bind {disk} {view}")
    lock, other = (Instance("blue").lock("node", path) for path in (disk, view))
    lock.acquire()
    sh(f"mount -o remount,{problem} {view}")
    assert not other.is_free()
    lock.release()
    assert other.is_free()
    assert Instance("blue").lock("node", view / "a" / "b").is_free()


def test_a_lock_on_a_removed_file_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The holder removes the file and ends between our open and our flock."""
    flock, holder_ends = fcntl.flock, [True]

    def flock_after_removal(fd: int, how: int) -> None:
        if holder_ends and how & fcntl.LOCK_NB:  # the file, not its directory
            holder_ends.clear()
            next(tmp_path.glob("blue.*")).unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with Instance("blue").locked("node", tmp_path):
        assert len(list(tmp_path.iterdir())) == 1
        with pytest.raises(InstanceRunning), Instance("blue").locked("node", tmp_path):
            pass


def hold(directory: Path, ready: Event) -> None:
    with Instance("blue").locked("node", directory):
        ready.set()
        multiprocessing.Event().wait()


def test_killed_process_releases_its_lock(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(InstanceRunning), Instance("blue").locked("node", tmp_path):
        pass
    process.kill()
    process.join(60)
    with Instance("blue").locked("node", tmp_path):
        pass


@pytest.mark.parametrize(
    ("device", "owner"),
    [("flannel.7", "udptun"), ("flannel-v6.7", "udptun"), ("blue.7", "blue"), ("blue-v6.7", "blue"),
     ("blue.8", None), ("Mine.7", None), ("vxlan7", None)],
)
def test_the_instance_of_a_vxlan_device(device, owner):
    found = Instance.of_vxlan_device(device, 7)
    assert (found and found.name) == owner


def test_lock_files_of_killed_processes_are_removed(tmp_path: Path):
    left = [tmp_path / f"blue.node.{inode}.lock" for inode in (1, 2)]
    others = [tmp_path / name for name in ("blue.forward.1.lock", "red.node.1.lock")]
    for path in (*left, *others):
        path.touch()
    held = tmp_path / "blue.node.3.lock"  # of a process in another network namespace
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with Instance("blue").locked("node", tmp_path):
            [own] = {*tmp_path.iterdir()} - {*others, held}
            with pytest.raises(InstanceRunning), Instance("blue").locked("node", tmp_path):
                pass
        assert {*tmp_path.iterdir()} == {*others, held}
    assert own.name.startswith("blue.node.")


def lock_and_release(directory: Path) -> None:
    with Instance("blue").locked("forward", directory):
        pass


def test_a_user_who_may_only_read_the_directory_cannot_delay_a_start(tmp_path: Path):
    handle = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        start = multiprocessing.get_context("spawn").Process(
            target=lock_and_release, args=(tmp_path,))
        start.start()
        start.join(60)
        start.kill()
        assert start.exitcode == 0
    finally:
        os.close(handle)
    assert list(tmp_path.iterdir()) == []
