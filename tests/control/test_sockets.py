"""Socket files: the forwarder that gets a path, the file mode, the clients that may connect."""

import asyncio
import errno
import fcntl
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from udptun.control import sockets
from udptun.control.sockets import UnixListener, listen_unix
from udptun.errors import DeviceError
from udptun.files import FileLock

STREAM = socket.SOCK_STREAM


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "udptun.sock"


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def close(listener: UnixListener) -> None:
    listener.unlink()
    listener.sock.close()


async def test_modes_of_socket_and_new_directories_do_not_depend_on_umask(
    tmp_path: Path, umask: int
) -> None:
    path = tmp_path / "a" / "b" / "udptun.sock"
    listener = await listen_unix(path, STREAM)
    assert mode(path) == 0o660
    assert mode(tmp_path / "a" / "b") == mode(tmp_path / "a") == 0o750
    assert list(path.parent.iterdir()) == [path]
    close(listener)
    assert not path.exists()


async def test_mode_of_an_existing_directory_is_unchanged(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.parent.chmod(0o711)
    close(await listen_unix(path, STREAM))
    assert mode(path.parent) == 0o711


async def test_socket_mode_is_at_most_0660_from_the_bind_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    seen = []

    class Watched(socket.socket):
        def bind(self, address: str) -> None:  # type: ignore[override]
            super().bind(address)
            seen.append(mode(Path(address)))

    monkeypatch.setattr(sockets.socket, "socket", Watched)
    close(await listen_unix(path, STREAM))
    assert seen == [0o660 & ~umask]


async def test_stale_socket_is_replaced(path: Path) -> None:
    listener = await listen_unix(path, STREAM)
    listener.sock.close()  # the file still exists, as after kill -9
    fresh = await listen_unix(path, STREAM)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    close(fresh)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
async def test_socket_in_use_is_refused_and_unchanged(
    path: Path, kind: socket.SocketKind
) -> None:
    listener = await listen_unix(path, kind)
    inode = path.stat().st_ino
    with pytest.raises(DeviceError, match=r"udptun\.sock is in use") as caught:
        await listen_unix(path, STREAM)
    assert caught.value.errno == errno.EADDRINUSE
    assert path.stat().st_ino == inode
    close(listener)


async def test_socket_with_a_full_backlog_is_refused(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as live, socket.socket(socket.AF_UNIX) as waiting:
        live.bind(str(path))
        live.listen(0)
        waiting.connect(str(path))
        with pytest.raises(DeviceError, match="is in use"):
            await listen_unix(path, STREAM)


@pytest.mark.parametrize("what", ["file", "directory", "link to a file"])
async def test_file_that_is_not_a_socket_is_refused_and_unchanged(path: Path, what: str) -> None:
    path.parent.mkdir()
    if what == "file":
        path.write_text("content")
    elif what == "directory":
        path.mkdir()
    else:
        (path.parent / "other").write_text("content")
        path.symlink_to("other")
    with pytest.raises(DeviceError, match=r"udptun\.sock exists and is not a socket"):
        await listen_unix(path, STREAM)
    assert path.exists()


@pytest.mark.parametrize("name", ["x" * 120, "deep/" * 30 + "s"], ids=["name", "path"])
async def test_path_that_is_too_long_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DeviceError, match=r"cannot listen on .*too long"):
        await listen_unix(tmp_path / name, STREAM)


async def test_directory_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match=r"cannot listen on .*Not a directory"):
        await listen_unix(tmp_path / "file" / "udptun.sock", STREAM)


async def test_file_of_another_forwarder_is_not_removed(path: Path) -> None:
    listener = await listen_unix(path, STREAM)
    path.unlink()
    path.write_text("another file")
    close(listener)
    assert path.read_text() == "another file"


def test_one_of_eight_concurrent_listeners_gets_the_path(path: Path) -> None:
    path.parent.mkdir()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    got: list[UnixListener] = []
    refused: list[DeviceError] = []
    start = threading.Barrier(8)

    def contend() -> None:
        start.wait()
        try:
            got.append(asyncio.run(listen_unix(path, STREAM)))
        except DeviceError as exc:
            refused.append(exc)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert [exc.errno for exc in refused] == [errno.EADDRINUSE] * 7
    assert list(path.parent.iterdir()) == [path]
    close(got[0])


async def test_a_held_lock_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "LOCK_TRIES", 2)
    path.parent.mkdir()
    lock = FileLock.take(path.with_name(f".{path.name}.lock"))
    assert lock is not None
    with pytest.raises(DeviceError, match="is locked by another process"):
        await listen_unix(path, STREAM)
    lock.release()
    listener = await listen_unix(path, STREAM)
    assert [*path.parent.iterdir()] == [path]
    close(listener)


async def test_locks_of_other_users_have_no_effect(path: Path) -> None:
    """A user who can read the directory and the socket's file can lock the directory."""
    path.parent.mkdir()
    fd = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        close(await listen_unix(path, STREAM))
    finally:
        os.close(fd)


class Peer:
    """A fake connected socket. It has only the methods that may_connect uses."""

    def __init__(self, uid: int, gid: int, groups: tuple[int, ...] | None = ()) -> None:
        self._credentials = struct.pack("3i", 1, uid, gid)
        self._groups = groups

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        if option == socket.SO_PEERCRED:
            return self._credentials
        if self._groups is None:
            raise OSError(errno.ERANGE, "too many groups")
        return struct.pack(f"{len(self._groups)}I", *self._groups)


async def test_root_own_user_and_socket_group_may_connect(path: Path) -> None:
    listener = await listen_unix(path, STREAM)
    group = path.stat().st_gid
    other_group = group + 1
    allowed = {
        Peer(0, other_group): True,
        Peer(os.geteuid(), other_group): True,
        Peer(54321, group): True,
        Peer(54321, other_group, (7, group, 8)): True,
        Peer(54321, other_group): False,
        Peer(54321, other_group, (other_group, 7)): False,
        Peer(54321, other_group, None): False,
    }
    assert {p: listener.may_connect(p) for p in allowed} == allowed  # type: ignore[arg-type]
    close(listener)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give the socket to a group")
async def test_change_of_the_socket_group_applies_at_once(path: Path) -> None:
    listener = await listen_unix(path, STREAM)
    peer = Peer(54321, 12345)
    assert not listener.may_connect(peer)  # type: ignore[arg-type]
    os.chown(path, -1, 12345)
    assert listener.may_connect(peer)  # type: ignore[arg-type]
    close(listener)


BECOME_AND_CONNECT = """
import os, socket, sys
os.setgroups([int(g) for g in sys.argv[2:]]), os.setgid(54321), os.setuid(54321)
socket.socket(socket.AF_UNIX).connect(sys.argv[1])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change the user")
async def test_credentials_of_a_real_client() -> None:
    """A client gets access by a supplementary group, but not by a wider mode of the socket file."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory) / "udptun.sock"
        listener = await listen_unix(path, STREAM)
        os.chown(path, -1, 12345)
        path.chmod(0o666)
        seen = {}
        for groups in ((), ("54322",), ("12345",), ("54322", "12345")):
            argv = [sys.executable, "-S", "-c", BECOME_AND_CONNECT, str(path), *groups]
            subprocess.run(argv, check=True)
            peer, _ = listener.sock.accept()
            with peer:
                seen[groups] = listener.may_connect(peer)
        close(listener)
    assert seen == {(): False, ("54322",): False, ("12345",): True, ("54322", "12345"): True}
