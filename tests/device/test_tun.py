"""Opening real TUN devices, and refusals by the kernel."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.own_netns import in_own_netns, ip_json, sh
from udptun.device import tun as module
from udptun.device.offload import Capabilities, OffloadRequest
from udptun.device.tun import VNET_HDR, VNET_LEN, Tun
from udptun.errors import DeviceError, FieldError

AUTO, OFF = OffloadRequest(), OffloadRequest(frozenset())
NAME = "utE0"


def opened(queues=1, request=AUTO, name=NAME):
    return contextlib.closing(Tun.open(name, queues, request))


@contextlib.contextmanager
def refused(number, *words):
    with pytest.raises(DeviceError) as caught:
        yield
    assert caught.value.errno == number
    assert all(word in str(caught.value) for word in words), str(caught.value)


@in_own_netns
def test_all_offloads():
    with opened() as tun:
        assert (tun.name, len(tun.fds), tun.vnet_hdr, tun.off) == (NAME, 1, True, {})
        assert tun.features == {"tun-gso", "tun-uso"}
        (link,) = ip_json(f"-s link show {NAME}")
        assert link["linkinfo"]["info_data"]["vnet_hdr"]
        assert not link["linkinfo"]["info_data"]["pi"]
        assert "UP" not in link["flags"]
        assert link["stats64"]["rx"]["packets"] == 0  # the kernel delivered no probe
    assert ip_json("link show type tun") == []
    assert tun.fds == ()
    tun.close()


@in_own_netns
def test_descriptors_are_non_blocking_and_not_inherited():
    with opened(queues=3) as tun:
        assert len(set(tun.fds)) == 3
        assert not any(os.get_inheritable(fd) or os.get_blocking(fd) for fd in tun.fds)
        (link,) = ip_json(f"link show {NAME}")
        assert link["linkinfo"]["info_data"]["multi_queue"]
        assert link["linkinfo"]["info_data"]["numqueues"] == 3


@in_own_netns
def test_no_vnet_hdr_without_tun_gso():
    for text in ("off", "auto,-tun-gso"):
        with opened(request=OffloadRequest.parse(text)) as tun:
            assert (tun.vnet_hdr, tun.features) == (False, frozenset())
            assert tun.off == {"tun-gso": "asked", "tun-uso": "needs tun-gso"}
            assert not ip_json(f"link show {NAME}")[0]["linkinfo"]["info_data"]["vnet_hdr"]


@in_own_netns
def test_tun_gso_without_tun_uso():
    with opened(request=OffloadRequest.parse("auto,-tun-uso")) as tun:
        assert (tun.vnet_hdr, tun.features, tun.off) == (
            True, {"tun-gso"}, {"tun-uso": "asked"},
        )


@in_own_netns
def test_kernel_replaces_the_pattern_in_a_name():
    with opened(name="utE%d") as first, opened(name="utE%d") as second:
        assert (first.name, second.name) == ("utE0", "utE1")


HOLDER = f"""
import sys
from udptun.device.offload import OffloadRequest
from udptun.device.tun import Tun
tun = Tun.open({NAME!r}, 1, OffloadRequest.parse("auto"))
print("open", flush=True)
sys.stdin.read()
"""


@in_own_netns
def test_name_in_use_by_a_process_is_refused_with_its_command_line():
    with subprocess.Popen([sys.executable, "-c", HOLDER, "--instance", "red"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"open\n"
        with refused(errno.EBUSY, NAME, f"in use by process {holder.pid}: {sys.executable}"):
            Tun.open(NAME, 1, AUTO)
        holder.stdin.close()


@in_own_netns
@pytest.mark.parametrize("queues", [1, 2])
def test_name_in_use_is_refused(queues):
    with opened(queues), refused(errno.EBUSY, NAME, "in use by another process"):
        Tun.open(NAME, queues, AUTO)
    with opened(queues):  # the failed call left no device
        pass


ATTACH = """
import os, sys
from udptun.device import tun
os.setgroups([])
os.setresuid(1000, 1000, 1000)
fd = int(sys.argv[1])
try:
    tun._set_iff(fd, sys.argv[2], tun.IFF_TUN | tun.IFF_NO_PI | tun.IFF_MULTI_QUEUE
                 | (tun.IFF_VNET_HDR if sys.argv[3] == "vnet" else 0))
except OSError as error:
    print(error.errno)
else:
    print("attached")
"""


@in_own_netns
@pytest.mark.parametrize("request_", [AUTO, OFF])
def test_another_user_cannot_add_a_queue(request_):
    """On most hosts every user can open /dev/net/tun."""
    with opened(2, request_) as tun:
        fd = os.open("/dev/net/tun", os.O_RDWR)
        try:
            done = subprocess.run(
                [sys.executable, "-c", ATTACH, str(fd), NAME, "vnet" if tun.vnet_hdr else "plain"],
                capture_output=True, text=True, check=True, pass_fds=[fd])
        finally:
            os.close(fd)
        assert done.stdout == f"{errno.EPERM}\n"


@in_own_netns
def test_name_of_another_type_of_device_is_refused():
    with refused(errno.EINVAL, "opening the TUN device lo", "another type"):
        Tun.open("lo", 1, AUTO)


@in_own_netns
@pytest.mark.parametrize(("queues", "kind"), [(1, ""), (2, " multi_queue")])
def test_persistent_device_is_opened_and_stays(queues, kind):
    sh(f"ip tuntap add {NAME} mode tun{kind}")
    with opened(queues) as tun:
        assert tun.vnet_hdr
    with opened(queues, OFF) as tun:
        assert not tun.vnet_hdr
    assert ip_json("link show type tun") != []


@in_own_netns
def test_device_that_is_up_is_not_probed():
    sh(f"ip tuntap add {NAME} mode tun", f"ip link set {NAME} up")
    with opened() as tun:
        assert tun.features == {"tun-gso", "tun-uso"}
        received = ip_json(f"-s link show {NAME}")[0]["stats64"]["rx"]
        assert (received["packets"], received["dropped"], received["errors"]) == (0, 0, 0)


@in_own_netns
def test_kernel_checks_the_format_of_a_write_before_the_device():
    """The write probe needs this: EINVAL for an unknown format, EIO for a device that is down.
    """
    with opened() as tun:
        for version, gso_type, expected in (
            (4, module.GSO_TCPV4, errno.EIO), (6, module.GSO_TCPV6, errno.EIO),
            (4, module.GSO_UDP_L4, errno.EIO), (6, module.GSO_UDP_L4, errno.EIO),
            (4, 0x77, errno.EINVAL),
        ):
            with pytest.raises(OSError) as caught:
                os.write(tun.fds[0], module._probe_frame(version, gso_type))
            assert caught.value.errno == expected, (version, gso_type)


@in_own_netns
@pytest.mark.parametrize(
    ("refuse", "features", "off"),
    [
        (module.USO, {"tun-gso"}, {"tun-uso": "kernel refuses TUNSETOFFLOAD USO: EINVAL"}),
        (module.TUN_F_TSO_ECN | module.USO, {"tun-gso"},
         {"tun-uso": "kernel refuses TUNSETOFFLOAD USO: EINVAL"}),
        (module.TUN_F_CSUM, set(),
         {"tun-gso": "kernel refuses TUNSETOFFLOAD TSO: EINVAL", "tun-uso": "needs tun-gso"}),
    ],
)
def test_kernel_without_some_offloads(monkeypatch, caplog, refuse, features, off):
    real = module._set_offload
    monkeypatch.setattr(
        module, "_set_offload", lambda fd, bits: "EINVAL" if bits & refuse else real(fd, bits)
    )
    with opened() as tun:
        assert (tun.features, tun.off, tun.vnet_hdr) == (features, off, bool(features))
        assert ip_json(f"link show {NAME}")[0]["linkinfo"]["info_data"]["vnet_hdr"] == tun.vnet_hdr
    assert all(cause in caplog.text for cause in off.values() if cause.startswith("kernel"))


@in_own_netns
@pytest.mark.parametrize(
    ("gso_type", "off"),
    [
        (module.GSO_UDP_L4, {"udp-merge": "kernel refuses USO4 writes: EINVAL"}),
        (module.GSO_TCPV6, {"tcp-merge": "kernel refuses TSO6 writes: EINVAL"}),
    ],
)
def test_refused_write_turns_off_its_merge(monkeypatch, gso_type, off):
    def write(fd, frame):
        raise OSError(errno.EINVAL if frame[1] == gso_type else errno.EIO, "")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        tun = Tun.open(NAME, 1, AUTO)
    with contextlib.closing(tun):
        assert (tun.features, tun.off) == ({"tun-gso", "tun-uso"}, off)
        assert off.items() <= Capabilities.combine(AUTO, [tun]).off.items()


@pytest.mark.parametrize("name", ["", "x" * 16, "é" * 8, "a b", "a/b", "a:b", ".", "..", "a\0"])
def test_invalid_name_is_refused(name):
    with pytest.raises(FieldError) as caught:
        Tun.open(name, 1, AUTO)
    assert caught.value.field == "tun"


def test_missing_device_node(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "DEVICE", str(tmp_path / "tun"))
    with refused(errno.ENOENT, str(tmp_path / "tun"), "modprobe tun"):
        Tun.open(NAME, 1, AUTO)


def test_missing_capability(monkeypatch, tmp_path):
    node = tmp_path / "tun"
    node.touch()
    monkeypatch.setattr(module, "DEVICE", str(node))

    def ioctl(*_):
        raise PermissionError(errno.EPERM, "")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with refused(errno.EPERM, NAME, "CAP_NET_ADMIN"):
        Tun.open(NAME, 1, AUTO)


def test_the_core_uses_the_same_vnet_header():
    headers = Path(__file__).parents[2] / "src_ext" / "wire" / "headers.pxd"
    assert f"    VNET_LEN = {VNET_LEN}\n" in headers.read_text()
    assert VNET_HDR.size == VNET_LEN
