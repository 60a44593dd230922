"""The start of a forwarder's process."""

from __future__ import annotations

import pytest

from tests.own_netns import in_own_mount_namespace, in_own_netns, sh
from udptun.instance import Instance
from udptun.node.process.launch import spawn


@in_own_netns
@pytest.mark.parametrize("options", ["ro", "nr_inodes=1"])
def test_a_forwarder_starts_without_its_log_file(tmp_path, capfd, options):
    """The disk is read-only or full. The error shows that the forwarder has tried to listen."""
    in_own_mount_namespace()
    disk, file = tmp_path / "disk", tmp_path / "forward.json"
    disk.mkdir()
    control = tmp_path / "control.sock"
    file.write_text(f'{{"listen": ["192.0.2.77"], "tun": "launch0", "control": "{control}"}}')
    sh(f"mount -t tmpfs -o {options} none {disk}", "mount -t tmpfs none /run")  # for its lock
    child = spawn(file, disk / "made" / "forwarder.log", Instance("launch"))
    assert child.wait(60) == 1
    assert "192.0.2.77" in capfd.readouterr().err
