"""subnet.env: the file is byte for byte the same as flannel's. tests/cni tests its reader."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import threading
from ipaddress import ip_network

import pytest

from udptun.leases.base import Subnets
from udptun.node.host.subnet_env import SubnetEnv, former_subnets

V4 = {"network": ip_network("10.42.0.0/16"), "subnet": ip_network("10.42.0.0/24")}
V6 = {"network6": ip_network("fc00::/48"), "subnet6": ip_network("fc00:0:0:1::/64")}
NONE = dict.fromkeys(("network", "subnet", "network6", "subnet6"))
DUAL = SubnetEnv(**V4, **V6, mtu=1450, ip_masq=False)
DUAL_TEXT = """\
FLANNEL_NETWORK=10.42.0.0/16
FLANNEL_SUBNET=10.42.0.1/24
FLANNEL_IPV6_NETWORK=fc00::/48
FLANNEL_IPV6_SUBNET=fc00:0:0:1::1/64
FLANNEL_MTU=1450
FLANNEL_IPMASQ=false
"""


@pytest.mark.parametrize(("env", "text"), [
    (SubnetEnv(**(NONE | V4), mtu=1472, ip_masq=True), """\
FLANNEL_NETWORK=10.42.0.0/16
FLANNEL_SUBNET=10.42.0.1/24
FLANNEL_MTU=1472
FLANNEL_IPMASQ=true
"""),
    (DUAL, DUAL_TEXT),
    (SubnetEnv(**(NONE | V6), mtu=1430, ip_masq=False), """\
FLANNEL_IPV6_NETWORK=fc00::/48
FLANNEL_IPV6_SUBNET=fc00:0:0:1::1/64
FLANNEL_MTU=1430
FLANNEL_IPMASQ=false
"""),
])
def test_written_as_flannel_does(tmp_path, env, text):
    path = tmp_path / "flannel" / "subnet.env"
    assert env.write(path)
    assert path.read_bytes() == text.encode()
    assert former_subnets(path) == Subnets(env.subnet, env.subnet6)


def test_the_mode_does_not_depend_on_the_umask_and_no_other_file_is_left(tmp_path):
    path = tmp_path / "subnet.env"
    before = os.umask(0o077)
    try:
        DUAL.write(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [*tmp_path.iterdir()] == [path]


def test_an_unchanged_file_is_not_written(tmp_path):
    """Programs that watch the file (the CNI plugin's installer, systemd) must get no event."""
    path = tmp_path / "subnet.env"
    assert DUAL.write(path)
    before = path.stat()
    assert not DUAL.write(path)
    assert path.stat().st_ino == before.st_ino
    path.chmod(0o600)
    assert DUAL.write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_readers_never_see_a_partial_file(tmp_path):
    path = tmp_path / "subnet.env"
    one, other = DUAL, SubnetEnv(**V4, **V6, mtu=1400, ip_masq=True)
    one.write(path)
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(100):
            other.write(path)
            one.write(path)
    finally:
        done.set()
        reader.join()
    assert seen <= {one.text(), other.text()}


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "subnet.env"
    path.write_text("before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        DUAL.write(path)
    assert path.read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]


def test_a_shell_can_source_the_file(tmp_path):
    DUAL.write(tmp_path / "subnet.env")
    script = f". {tmp_path}/subnet.env; echo $FLANNEL_SUBNET $FLANNEL_MTU"
    done = subprocess.run(("sh", "-c", script), capture_output=True, text=True, check=True)
    assert done.stdout == "10.42.0.1/24 1450\n"


def test_no_file(tmp_path):
    assert former_subnets(tmp_path / "none") == Subnets()


@pytest.mark.parametrize(("text", "want", "said"), [
    # Errors in other variables are ignored, because the subnet can still be requested.
    ("FLANNEL_SUBNET=10.42.0.1/24\nFLANNEL_MTU=x\n", Subnets(V4["subnet"]), ""),
    (DUAL_TEXT.replace("10.42.0.1", "10.42"), Subnets(None, V6["subnet6"]), "'10.42/24'"),
    (DUAL_TEXT.replace("1::1/64", "x"), Subnets(V4["subnet"]), "'fc00:0:0:x'"),
    ("\xff\0", Subnets(), ""),
])
def test_the_former_subnet_of_a_broken_file(tmp_path, caplog, text, want, said):
    path = tmp_path / "subnet.env"
    path.write_text(text, encoding="latin-1")
    with caplog.at_level(logging.WARNING):
        assert former_subnets(path) == want
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


def test_a_former_subnet_that_cannot_be_read(tmp_path, caplog):
    assert former_subnets(tmp_path) == Subnets()
    assert "Is a directory" in caplog.text
