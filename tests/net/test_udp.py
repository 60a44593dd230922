"""The socket options of the UDP socket, as the kernel reports them."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from ipaddress import ip_address

import pytest

from tests.own_netns import in_own_netns, sh
from udptun.device.offload import OffloadRequest
from udptun.errors import DeviceError
from udptun.model import Endpoint, Mark
from udptun.net import udp as module
from udptun.net.udp import UdpSocket, keeps_marks, kernel_release, open_udp

AUTO = OffloadRequest()
LOCAL = {4: Endpoint(ip_address("127.0.0.1"), 0), 6: Endpoint(ip_address("::1"), 0)}


def opened(endpoint=LOCAL[4], request=AUTO, reuse_port=False):
    return contextlib.closing(open_udp(endpoint, request, reuse_port))


def bound(udp):
    """Return the endpoint of a socket that was bound to port 0, with the port from the kernel."""
    return Endpoint(udp.endpoint.address, udp.socket.getsockname()[1])


@contextlib.contextmanager
def refused(number, *words):
    with pytest.raises(DeviceError) as caught:
        yield
    assert caught.value.errno == number
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="a mark needs CAP_NET_ADMIN")
def test_the_mark_is_set_and_removed():
    def mark():
        return udp.socket.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)

    with contextlib.closing(open_udp(LOCAL[4], AUTO, False, Mark(0x1000, 0xF000))) as udp:
        assert mark() == 0x1000
        udp.set_mark(Mark(7, 7))
        assert mark() == 7
        udp.set_mark(None)
        assert mark() == 0


@pytest.mark.parametrize("version", [4, 6])
def test_the_dscp_is_set_and_the_class_of_datagrams_is_received(version):
    level = socket.IPPROTO_IP if version == 4 else socket.IPPROTO_IPV6
    name = socket.IP_TOS if version == 4 else socket.IPV6_TCLASS
    with contextlib.closing(open_udp(LOCAL[version], AUTO, False, dscp=46)) as udp:
        for dscp, expected in ((46, 46 << 2), (None, 0), (7, 7 << 2)):
            udp.set_dscp(dscp)
            assert udp.socket.getsockopt(level, name) == expected
            udp.socket.sendto(b"x", udp.socket.getsockname())
            _, control, _, _ = udp.socket.recvmsg(64, 64)
            assert [(kind, value[0]) for _, kind, value in control] == [(name, expected)]


@pytest.mark.parametrize(("release", "keeps"), [
    ("6.9.0", True), ("6.9.0-rc7", True), ("6.18.5-cloud", True), ("7.0", True), ("10.1.2", True),
    ("6.8.10", True), ("6.8.9", False), ("6.7.99", False), ("6.6.31", True), ("6.6.30", False),
    ("6.1.0-21-amd64", False), ("6.1.91", True), ("5.15.159", True), ("5.15.0-105-generic", False),
    ("5.14.0-427.el9.x86_64", False), ("5.10.217", True), ("5.10", False), ("5.4.300", False),
    ("", False), ("linux", False), ("6", False),
])
def test_which_kernels_report_each_mark(release, keeps):
    assert keeps_marks(release) is keeps


@pytest.mark.parametrize(("release", "version", "signature", "expected"), [
    ("6.1.0-56-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-11-16)", None, "6.1.192"),
    ("6.12.117+deb12-amd64", "#1 SMP Debian 6.12.117-1~deb12u1 (2026-11-14)", None, "6.12.117"),
    ("5.15.0-105-generic", "#115-Ubuntu SMP", "Ubuntu 5.15.0-105.115-generic 5.15.148\n",
     "5.15.148"),
    ("5.15.0-105-generic", "#115-Ubuntu SMP", "", "5.15.0-105-generic"),
    ("6.18.44", "#1 SMP PREEMPT_DYNAMIC @0", None, "6.18.44"),
])
def test_the_release_on_which_a_distribution_bases_its_kernel(
        monkeypatch, tmp_path, release, version, signature, expected):
    system = os.uname_result(("Linux", "host", release, version, "x86_64"))
    file = tmp_path / "version_signature"
    if signature is not None:
        file.write_text(signature)
    monkeypatch.setattr(os, "uname", lambda: system)
    monkeypatch.setattr(module, "VERSION_SIGNATURE", file)
    assert kernel_release() == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_mark_without_the_capability_is_refused():
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        try:
            open_udp(LOCAL[4], AUTO, False, Mark(7, 7))
        except DeviceError as error:
            os._exit(error.errno == errno.EPERM and "--mark needs CAP_NET_ADMIN" in str(error))
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


@pytest.mark.parametrize("version", [4, 6])
def test_socket_options(version):
    with opened(LOCAL[version]) as udp:
        option = udp.socket.getsockopt
        assert udp.family == (socket.AF_INET if version == 4 else socket.AF_INET6)
        assert not os.get_inheritable(udp.fd)
        assert not os.get_blocking(udp.fd)
        if version == 4:
            assert option(socket.IPPROTO_IP, module.IP_MTU_DISCOVER) == module.PMTUDISC_PROBE
            assert option(socket.IPPROTO_IP, module.IP_RECVERR) == 1
        else:
            assert option(socket.IPPROTO_IPV6, module.IPV6_MTU_DISCOVER) == module.PMTUDISC_PROBE
            assert option(socket.IPPROTO_IPV6, module.IPV6_DONTFRAG) == 1
            assert option(socket.IPPROTO_IPV6, module.IPV6_RECVERR) == 1
            assert option(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
        assert option(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0
        assert udp.rcvbuf == option(socket.SOL_SOCKET, socket.SO_RCVBUF) > 0
        assert udp.sndbuf == option(socket.SOL_SOCKET, socket.SO_SNDBUF) > 0
        if os.geteuid() == 0:
            assert (udp.rcvbuf, udp.sndbuf) == (2 * module.RCVBUF, 2 * module.SNDBUF)


def test_offloads():
    with opened() as udp:
        assert (udp.features, udp.off) == ({"udp-gso", "udp-gro"}, {})
        assert udp.socket.getsockopt(socket.IPPROTO_UDP, module.UDP_GRO) == 1
        assert udp.socket.getsockopt(socket.IPPROTO_UDP, module.UDP_SEGMENT) == 0


def test_offloads_not_requested():
    with opened(request=OffloadRequest.parse("auto,-udp-gro")) as udp:
        assert (udp.features, udp.off) == ({"udp-gso"}, {"udp-gro": "asked"})
        assert udp.socket.getsockopt(socket.IPPROTO_UDP, module.UDP_GRO) == 0


def test_kernel_without_udp_segment(monkeypatch, caplog):
    # No kernel has option 9999. An old kernel refuses UDP_SEGMENT in the same way.
    monkeypatch.setattr(module, "UDP_SEGMENT", 9999)
    with opened() as udp:
        assert udp.features == {"udp-gro"}
        assert udp.off == {"udp-gso": "kernel refuses UDP_SEGMENT: ENOPROTOOPT"}
    assert udp.off["udp-gso"] in caplog.text


def test_buffers_without_cap_net_admin(monkeypatch):
    """Without CAP_NET_ADMIN, rmem_max and wmem_max limit the buffer sizes."""

    class Socket(socket.socket):
        def setsockopt(self, level, option, value):
            if option in (module.SO_RCVBUFFORCE, module.SO_SNDBUFFORCE):
                raise PermissionError(errno.EPERM, "")
            super().setsockopt(level, option, value)

    monkeypatch.setattr(module.socket, "socket", Socket)
    with opened() as udp:
        assert 0 < udp.rcvbuf <= 2 * module.RCVBUF
        assert 0 < udp.sndbuf <= 2 * module.SNDBUF


def test_endpoint_in_use_is_refused():
    with opened() as udp, refused(errno.EADDRINUSE, str(bound(udp)), "another process"):
        open_udp(bound(udp), AUTO, False)


def test_only_sockets_with_reuse_port_share_an_endpoint():
    with opened(reuse_port=True) as first, opened(bound(first), reuse_port=True) as second:
        assert first.fd != second.fd
        with refused(errno.EADDRINUSE):
            open_udp(bound(first), AUTO, False)


@pytest.mark.parametrize("version", [4, 6])
def test_a_socket_of_a_process_that_has_died_is_used_again(version):
    with opened(LOCAL[version]) as udp, contextlib.closing(
            UdpSocket.reuse(os.dup(udp.fd), bound(udp), AUTO)) as again:
        assert again.features == udp.features
        assert again.socket.getsockname() == udp.socket.getsockname()


def test_address_of_no_interface_is_refused():
    with refused(errno.EADDRNOTAVAIL, "192.0.2.1:8285", "no interface has this address"):
        open_udp(Endpoint(ip_address("192.0.2.1")), AUTO, False)


def test_host_without_ipv6(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EAFNOSUPPORT, "")

    monkeypatch.setattr(module.socket, "socket", refuse)
    with refused(errno.EAFNOSUPPORT, "[::1]:0", "no IPv6"):
        open_udp(LOCAL[6], AUTO, False)


@in_own_netns
def test_datagram_above_the_link_mtu_is_refused():
    """The kernel does not fragment the datagram. The error queue of the socket has the MTU."""
    sh("ip link set lo mtu 1400")
    with opened() as udp, opened() as other:
        to = other.socket.getsockname()
        assert udp.socket.sendto(bytes(1372), to) == 1372
        with pytest.raises(OSError) as caught:
            udp.socket.sendto(bytes(1373), to)
        assert caught.value.errno == errno.EMSGSIZE
        _, controls, flags, _ = udp.socket.recvmsg(2000, 512, socket.MSG_ERRQUEUE)
        assert flags & socket.MSG_ERRQUEUE
        number, _, _, _, _, mtu = struct.unpack_from("IBBBBI", controls[0][2])
        assert (number, mtu) == (errno.EMSGSIZE, 1400)
