"""A standby process of the forwarder: when it begins, and when it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from udptun.takeover import standby

FORWARD = [sys.executable, "-m", "udptun", "forward"]


@pytest.fixture
def waiting(tmp_path):
    """Return a loaded standby process, our end of its socket, and its options file."""
    ours, theirs = standby.waiting_pair()
    options = tmp_path / "forward.json"
    options.write_text('{"tun": "before"}')
    with ours, theirs:
        process = subprocess.Popen(
            [*FORWARD, "--standby", str(theirs.fileno()), "--wait-for", str(options)],
            pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)
        theirs.close()
        try:
            standby.wait_loaded(ours)
            yield process, ours, options
        finally:
            process.kill()
            process.communicate()


def test_it_ends_when_its_starter_ends(waiting):
    process, ours, _ = waiting
    assert process.poll() is None
    ours.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


def test_it_reads_the_options_when_it_begins(waiting):
    process, ours, options = waiting
    options.write_text('{"tun": "later", "listen": ["0.0.0.0"]}')
    standby.begin(ours, {})
    assert process.wait(60) == 2
    assert "--listen: '0.0.0.0:8285' is not valid" in process.stderr.read()


def test_it_has_loaded_what_runs_before_the_first_packet(waiting):
    """If an import is added to this path, the standby process must load it in advance. pyroute2 and
    aiohttp come later, and need much memory."""
    process, *_ = waiting
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "/uvloop/" in maps
    assert "/udptun/_core" in maps
    assert "/aiohttp/" not in maps


def test_the_descriptors_arrive_by_name():
    ours, theirs = standby.waiting_pair()
    read, write = os.pipe()
    with ours, theirs:
        standby.begin(ours, {"tun-0.x": read, "other": read, "udp-0-4.x": write})
        got = standby.wait(theirs)
        assert list(got) == ["tun-0.x", "udp-0-4.x"]
        assert not any(os.get_inheritable(fd) for fd in got.values())
        for fd in (read, write):
            os.close(fd)
        os.write(got["udp-0-4.x"], b"!")
        assert os.read(got["tun-0.x"], 9) == b"!"
        standby.begin(ours, {})
        assert standby.wait(theirs) == {}
        ours.close()
        assert standby.wait(theirs) is None
    for fd in got.values():
        os.close(fd)
