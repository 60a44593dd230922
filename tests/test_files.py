"""Replacing a file: completely or not at all, and without leftover files."""

import errno
import os
import stat
import threading

import pytest

from udptun.files import replace_file


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
