"""Replacing a file: completely or not at all, and without leftover files. Locks of files."""

import errno
import multiprocessing
import os
import stat
import subprocess
import sys
import threading

import pytest

from udptun.files import FileLock, UntrustedFile, open_log, replace_file


def test_a_file_is_created_and_replaced(tmp_path):
    path = tmp_path / "table"
    replace_file(path, [b"one\n", b"two\n"])
    assert path.read_bytes() == b"one\ntwo\n"
    replace_file(path, (part for part in [b"three\n"]))
    assert path.read_bytes() == b"three\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_the_mode_does_not_depend_on_the_umask(tmp_path, mode):
    before = os.umask(0o077 if mode == 0o644 else 0)
    try:
        replace_file(tmp_path / "file", [b"x"], mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_without_a_mode_the_umask_applies(tmp_path):
    before = os.umask(0o077)
    try:
        replace_file(tmp_path / "file", [b"x"])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def parts_that_fail():
    yield b"half"
    raise KeyError("the rest")


def test_the_old_file_is_unchanged_when_a_part_fails(tmp_path):
    path = tmp_path / "file"
    replace_file(path, [b"old"])
    with pytest.raises(KeyError):
        replace_file(path, parts_that_fail())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_unchanged_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, [b"old"])

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, [b"new"])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    path = tmp_path / "file"
    synced = []

    def note(handle):
        synced.append((stat.S_ISDIR(os.fstat(handle).st_mode), path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    replace_file(path, [b"new"])
    assert synced == [(False, False), (True, True)]


def test_concurrent_writers_never_mix_their_content(tmp_path):
    path = tmp_path / "file"
    texts = [bytes([65 + i]) * 100_000 for i in range(4)]
    replace_file(path, [texts[0]])
    done = threading.Event()
    seen = set()

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    writers = [
        threading.Thread(target=lambda t=t: [replace_file(path, [t[:50_000], t[50_000:]])
                                             for _ in range(20)])
        for t in texts
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()
    assert seen <= set(texts)
    assert list(tmp_path.iterdir()) == [path]


def write_until_killed(path, ready):
    def parts():
        yield b"half"
        ready.set()
        multiprocessing.Event().wait()

    replace_file(path, parts())


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    path = tmp_path / "file"
    other = tmp_path / ".file.notes"
    other.write_bytes(b"of the user")
    context = multiprocessing.get_context("spawn")
    writers = []
    for _ in range(2):
        ready = context.Event()
        writers.append(context.Process(target=write_until_killed, args=(path, ready)))
        writers[-1].start()
        assert ready.wait(60)
    writers[0].kill()
    writers[0].join(60)
    replace_file(path, [b"new"])
    assert len([*tmp_path.iterdir()]) == 3  # the file of the living writer stays
    writers[1].kill()
    writers[1].join(60)
    replace_file(path, [b"newer"])
    assert {*tmp_path.iterdir()} == {path, other}
    assert path.read_bytes() == b"newer"


def test_a_new_file_is_never_readable_by_others(tmp_path):
    def modes():
        (fresh,) = (one for one in tmp_path.iterdir())
        yield oct(fresh.stat().st_mode & 0o077).encode()

    before = os.umask(0)
    try:
        replace_file(tmp_path / "file", modes(), 0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "file").read_bytes() == b"0o0"


def test_another_user_cannot_take_a_lock(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    tmp_path.chmod(0o755)
    before = os.umask(0)
    try:
        lock = FileLock.take(tmp_path / "lock")
    finally:
        os.umask(before)
    assert lock is not None
    attack = ("import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); "
              "os.open(sys.argv[1], os.O_RDONLY)")
    done = subprocess.run([sys.executable, "-c", attack, str(lock.path)], capture_output=True,
                          text=True, check=False)
    assert "PermissionError" in done.stderr
    lock.release()
    assert [*tmp_path.iterdir()] == []


# Log files


def link_to(path):
    path.with_name("target").write_bytes(b"kept")
    path.symlink_to(path.with_name("target"))


def give_away(path):
    if os.geteuid() != 0:
        pytest.skip("giving a file to another user needs root")
    path.touch()
    os.chown(path, 65534, -1)


def let_others_write(path):
    path.touch()
    path.chmod(0o666)


@pytest.mark.parametrize(("make", "text"), [
    (link_to, "is a symbolic link"), (os.mkfifo, "is not a regular file"),
    (give_away, "belongs to the user 65534"), (let_others_write, "has mode 0666")])
def test_a_log_that_another_user_may_have_made_is_refused(tmp_path, make, text):
    path = tmp_path / "log"
    make(path)
    with pytest.raises(UntrustedFile, match=f"{path} {text}: expected "):
        open_log(path)


@pytest.mark.parametrize("name", ["log", "/dev/null"])
def test_a_log_is_appended_to(tmp_path, name):
    path = tmp_path / name
    for _ in range(2):
        with os.fdopen(open_log(path), "ab") as file:
            file.write(b"x\n")
    if name == "log":
        assert path.read_bytes() == b"x\nx\n"
