"""Netlink with the real kernel. ip(8) and /proc confirm the results."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import queue
import select
import socket
import struct
import threading
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import uvloop

from tests.own_netns import in_own_netns, ip_json, sh
from udptun.device.offload import OffloadRequest
from udptun.device.tun import Tun
from udptun.errors import DeviceError, FieldError
from udptun.net.batch import RouteSocket
from udptun.net.changes import ANYTHING, Change, Kind
from udptun.net.local import underlay_mtu
from udptun.net.netlink import Netlink
from udptun.net.underlay import route_to
from udptun.net.vxlan_entries import EntrySocket

NAME = "utE0"
OWN4, OWN6 = ip_address("10.244.1.0"), ip_address("fd00:1::")
NET4, NET6 = ip_network("10.244.0.0/16"), ip_network("fd00::/16")
MTU = 1400


def opened(name=NAME, text="off"):
    return contextlib.closing(Tun.open(name, 1, OffloadRequest.parse(text)))


@contextlib.contextmanager
def refused(number, *words):
    with pytest.raises(DeviceError) as caught:
        yield
    assert caught.value.errno == number
    assert all(word in str(caught.value) for word in words), str(caught.value)


def addresses_of(name):
    return {(item["local"], item["prefixlen"]) for item in
            ip_json(f"address show dev {name}")[0]["addr_info"]}


def routes_of(name):
    return {(route["dst"], route.get("scope", "global")) for version in (4, 6) for route in
            ip_json(f"-{version} route show dev {name}")}


@in_own_netns
async def test_configure():
    with opened(text="auto") as tun, Netlink() as netlink:
        await netlink.configure_tun(
            tun.name, MTU, [OWN4, OWN6], [NET4, NET6], gso_max_segs=44, gso_max_size=65000
        )
        (link,) = ip_json(f"link show {NAME}")
        assert {"UP", "LOWER_UP"} <= set(link["flags"])
        assert (link["mtu"], link["txqlen"]) == (MTU, 5000)
        assert (link["gso_max_segs"], link["gso_max_size"]) == (44, 65000)
        assert link["inet6_addr_gen_mode"] == "none"
        assert addresses_of(NAME) == {(str(OWN4), 32), (str(OWN6), 128)}
        assert routes_of(NAME) == {(str(NET4), "global"), (str(NET6), "global")}
        # A second configuration, as after a reload, gives no error and no duplicate address.
        await netlink.configure_tun(tun.name, MTU, [OWN4, OWN6], [NET4, NET6])
        assert addresses_of(NAME) == {(str(OWN4), 32), (str(OWN6), 128)}


@in_own_netns
async def test_accept_local_is_set_on_the_tun_only():
    with opened("utE0.5") as tun, opened("utE1"), Netlink() as netlink:
        await netlink.configure_tun(tun.name, MTU, [OWN4], [NET4])
        conf = Path("/proc/sys/net/ipv4/conf")
        accepting = {path.name for path in conf.iterdir()
                     if (path / "accept_local").read_text().strip() == "1"}
        assert accepting == {"utE0.5"}


@in_own_netns
async def test_kernel_sends_no_packets_of_its_own():
    """The kernel sends no router solicitations and no MLD reports to the TUN."""
    with opened() as tun, Netlink() as netlink:
        await netlink.configure_tun(tun.name, MTU, [OWN4, OWN6], [NET4, NET6])
        # A kernel that sends them sends the first ones within one second (RFC 4861, RFC 3810).
        assert select.select([tun.fds[0]], [], [], 1.5)[0] == []


def icmp_port_unreachable(own, quoted):
    """Build an ICMP error for a packet that was read from the TUN.

    own     the TUN's address: the source and the destination of the ICMP error
    quoted  the packet that the ICMP error reports
    """
    def checksum(data):
        total = sum(struct.unpack(f"!{len(data) // 2}H", data))
        total = (total >> 16) + (total & 0xFFFF)
        return ~(total + (total >> 16)) & 0xFFFF

    body = struct.pack("!BBHI", 3, 3, 0, 0) + quoted[:28]
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 0, 0, 64, 1, 0,
                       own.packed, own.packed)
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


@in_own_netns
@pytest.mark.parametrize("rp_filter", [0, 1, 2])
@pytest.mark.parametrize("accept", [True, False])
async def test_icmp_from_our_own_address_arrives(rp_filter, accept):
    """The kernel accepts the packet only if accept_local is 1, with any rp_filter of the host.

    The address is on a second device too, as with --backend auto. With rp_filter 1 on the TUN the
    kernel would drop the packet, because it looks up the other device."""
    for name in ("all", "default"):
        Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text(str(rp_filter))
    sh("ip link add utEv type veth peer name utEw", f"ip address add {OWN4}/32 dev utEv",
       "ip link set utEv up")
    with opened() as tun, Netlink() as netlink:
        await netlink.configure_tun(tun.name, MTU, [OWN4], [NET4])
        assert Path(f"/proc/sys/net/ipv4/conf/{NAME}/rp_filter").read_text() == "2\n"
        if not accept:
            Path(f"/proc/sys/net/ipv4/conf/{NAME}/accept_local").write_text("0")
        with open(tun.fds[0], "r+b", buffering=0, closefd=False) as device, \
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            asker.connect(("10.244.2.9", 9))
            asker.send(bytes(2))
            packet = device.read(MTU)
            device.write(icmp_port_unreachable(OWN4, packet))
            asker.setblocking(False)
            with pytest.raises(ConnectionRefusedError if accept else BlockingIOError):
                asker.recv(1)


@in_own_netns
async def test_ipv6_disabled_on_the_host():
    for name in ("all", "default"):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
    with opened() as tun, Netlink() as netlink:
        await netlink.configure_tun(tun.name, MTU, [OWN4], [NET4])
        assert addresses_of(NAME) == {(str(OWN4), 32)}
        # An IPv6 address in the configuration enables IPv6 on this device only.
        await netlink.configure_tun(tun.name, MTU, [OWN4, OWN6], [NET4, NET6])
        assert addresses_of(NAME) == {(str(OWN4), 32), (str(OWN6), 128)}
        assert Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text() == "1\n"


@in_own_netns
async def test_small_mtu():
    with opened() as tun, Netlink() as netlink:
        await netlink.configure_tun(tun.name, 1000, [OWN4], [NET4])
        assert ip_json(f"link show {NAME}")[0]["mtu"] == 1000
        with pytest.raises(FieldError) as caught:
            await netlink.configure_tun(tun.name, 1279, [OWN4, OWN6], [NET4])
        assert caught.value.field == "mtu"


@in_own_netns
def test_underlay_mtu():
    sh("ip link add utEa type veth peer name utEb", "ip link set utEa mtu 1450",
       "ip address add 192.0.2.1 peer 192.0.2.9/32 dev utEa",
       "ip address add 2001:db8::1/64 dev utEa nodad")
    assert underlay_mtu(ip_address("192.0.2.1")) == ("utEa", 1450)
    assert underlay_mtu(ip_address("2001:db8::1")) == ("utEa", 1450)
    for address in ("192.0.2.9", "192.0.2.2", "0.0.0.0"):  # the first is the peer's address
        with refused(errno.EADDRNOTAVAIL, address):
            underlay_mtu(ip_address(address))


@in_own_netns
def test_the_mtu_of_the_loopback_device_is_not_that_of_the_underlay():
    """Routers announce the address."""
    sh("ip link add utEa type veth peer name utEb", "ip link set utEa mtu 1450 up",
       "ip link set utEb up", "ip address add 203.0.113.1/24 dev utEa",
       "ip address add 198.51.100.7/32 dev lo", "ip address add 2001:db8::7/128 dev lo nodad")
    assert underlay_mtu(ip_address("198.51.100.7")) == ("lo", 65536)  # no packet can leave
    sh("ip route add default via 203.0.113.2", "ip -6 route add default dev utEa")
    assert underlay_mtu(ip_address("198.51.100.7")) == ("utEa", 1450)
    assert underlay_mtu(ip_address("2001:db8::7")) == ("utEa", 1450)
    assert underlay_mtu(ip_address("127.0.0.1")) == ("lo", 65536)
    assert underlay_mtu(ip_address("203.0.113.1")) == ("utEa", 1450)


@in_own_netns
async def test_concurrent_calls_from_asyncio_and_uvloop():
    sh("ip address add 192.0.2.1/24 dev lo", "ip address add 2001:db8::1/128 dev lo nodad")
    expected = {ip_address(text) for text in ("127.0.0.1", "::1", "192.0.2.1", "2001:db8::1")}

    async def call():
        return await asyncio.gather(*(netlink.local_addresses() for _ in range(10)))

    with Netlink() as netlink:
        assert await netlink.local_addresses() == expected
        results = []

        def other_loop():  # runs in a thread: this thread already has a loop
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                results.extend(runner.run(call()))

        thread = threading.Thread(target=other_loop)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert results == [expected] * 10


@in_own_netns
def test_watch_addresses():
    results = queue.SimpleQueue()
    local = {ip_address("127.0.0.1"), ip_address("::1")}
    new = ip_address("192.0.2.1")
    with Netlink() as netlink:
        netlink.watch_addresses(lambda found: results.put((found, threading.current_thread().name)))
        assert results.get(timeout=60) == (local, "netlink")
        sh(f"ip address add {new}/24 dev lo")
        assert results.get(timeout=60)[0] == local | {new}
        sh(f"ip address del {new}/24 dev lo")
        assert results.get(timeout=60)[0] == local
    assert results.empty()


@in_own_netns
def test_watcher_gets_the_final_state_after_lost_messages(caplog):
    """Many address changes overflow the netlink socket (ENOBUFS)."""
    last = queue.SimpleQueue()
    gate = threading.Event()
    first = threading.Event()
    caplog.set_level("INFO")

    def callback(found):
        first.set()
        assert gate.wait(timeout=60)  # until then, the netlink thread does not read
        last.put(found)

    with Netlink() as netlink:
        netlink.watch_addresses(callback)
        assert first.wait(timeout=60)
        netlink._watch.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        sh(*(f"ip address add 192.0.2.{i}/32 dev lo" for i in range(1, 100)))
        gate.set()
        while len(last.get(timeout=60)) != 2 + 99:
            pass
    assert "lost" in caplog.text  # the socket did overflow
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@in_own_netns
def test_failing_watcher_does_not_stop_the_others(caplog):
    results = queue.SimpleQueue()

    def fail(_):
        raise RuntimeError("utE")

    with Netlink() as netlink:
        netlink.watch_addresses(fail)
        netlink.watch_addresses(results.put)
        assert results.get(timeout=60)
        sh("ip address add 192.0.2.1/24 dev lo")
        while ip_address("192.0.2.1") not in results.get(timeout=60):
            pass
    assert "RuntimeError: utE" in caplog.text


@in_own_netns
async def test_errors_name_the_operation():
    sh("ip link add utEa type veth peer name utEb", "ip address add 192.0.2.1/24 dev utEa",
       "ip link set utEa up", "ip route add 198.51.100.0/24 dev utEa")
    with opened() as tun, Netlink() as netlink:
        with refused(errno.ENODEV, "utE9"):
            await netlink.configure_tun("utE9", MTU, [], [])
        with refused(errno.EINVAL, NAME, "MTU 70000", "greater than"):
            await netlink.configure_tun(NAME, 70000, [], [])
        with refused(errno.EEXIST, "198.51.100.0/24", NAME, "through utEa"):
            await netlink.configure_tun(NAME, MTU, [], [ip_network("198.51.100.0/24")])
        assert tun.fds


@in_own_netns
async def test_refused_gso_limits_are_logged_and_no_error(caplog):
    with opened(), Netlink() as netlink:
        await netlink.configure_tun(NAME, MTU, [OWN4], [NET4], gso_max_segs=1 << 20)
        assert "UP" in ip_json(f"link show {NAME}")[0]["flags"]
    assert "gso_max_segs 1048576" in caplog.text


async def test_a_thread_that_begins_later():
    netlink = Netlink(begin=False)
    call = asyncio.create_task(netlink.local_addresses())
    await asyncio.sleep(0)
    netlink.begin()
    netlink.begin()
    assert ip_address("127.0.0.1") in await call
    netlink.close()
    never = Netlink(begin=False)
    never.close()
    assert not never._thread.is_alive()


async def test_close():
    netlink = Netlink()
    netlink.close()  # while the thread still imports pyroute2
    netlink.close()
    with refused(errno.EBADF, "already closed"):
        await netlink.local_addresses()
    with refused(errno.EBADF):
        netlink.watch_addresses(print)
    assert not netlink._thread.is_alive()


async def test_close_ends_pending_calls():
    netlink = Netlink()
    gate = threading.Event()
    netlink._loop.call_soon_threadsafe(gate.wait, 60)  # no call can finish before close()
    address = ip_address("127.0.0.1")
    calls = [asyncio.create_task(route_to(netlink, address)) for _ in range(10)]
    await asyncio.sleep(0)  # the loop runs once and submits all calls
    closer = threading.Thread(target=netlink.close)
    closer.start()
    while not netlink._closing:
        await asyncio.sleep(0)
    with netlink._gate:  # close() holds this lock until the stop request is submitted
        gate.set()
    done = await asyncio.gather(*calls, return_exceptions=True)
    closer.join()
    assert {getattr(item, "errno", None) for item in done} == {errno.ECANCELED}


async def test_cancelling_a_call_leaves_the_socket_usable():
    with Netlink() as netlink:
        assert await netlink.local_addresses()
        for _ in range(20):  # each time, the call is cancelled at another point
            call = asyncio.create_task(netlink.local_addresses())
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await netlink.local_addresses()


async def test_failure_to_open_the_netlink_socket(monkeypatch):
    import pyroute2

    def refuse(**_):
        raise OSError(errno.EMFILE, "")

    monkeypatch.setattr(pyroute2, "AsyncIPRoute", refuse)
    with Netlink() as netlink, refused(errno.EMFILE, "opening netlink"):
        await netlink.local_addresses()


@in_own_netns
def test_watch_changes():
    """The callback runs when the watch begins, after each kind of change, and after lost messages.

    It does not run for the routes and neighbours that this process sets.
    """
    calls = queue.SimpleQueue()
    sh("ip link add name utEa type veth peer name utEb", "ip link set utEa up")

    def wait_for(wanted):
        while wanted not in calls.get(timeout=60):
            pass

    with Netlink() as netlink:
        netlink.watch_changes(calls.put)
        assert calls.get(timeout=60) == {ANYTHING}
        index = socket.if_nametoindex("utEa")
        packed = ip_address("192.0.2.0").packed, 24
        for command, change in (
            ("ip link set utEa txqueuelen 99", Change(Kind.LINK, index)),
            ("ip address add 198.51.100.1/32 dev utEa",
             Change(Kind.ADDRESS, index, address=ip_address("198.51.100.1").packed)),
            ("ip route add 192.0.2.0/24 dev utEa", Change(Kind.ROUTE, index, packed)),
            ("ip neighbour add 192.0.2.7 lladdr 02:00:00:00:00:01 dev utEa",
             Change(Kind.NEIGHBOUR, index)),
            ("ip -6 rule add to fd00::/16 lookup 77", Change(Kind.RULE)),
            ("sysctl -qw net.ipv4.conf.utEa.rp_filter=1", Change(Kind.SETTING, index)),
            ("sysctl -qw net.ipv4.conf.all.rp_filter=1", Change(Kind.SETTING)),
            ("ip route del 192.0.2.0/24", Change(Kind.ROUTE, index, packed)),
        ):
            sh(command)
            wait_for(change)

        async def neighbour(_):
            with RouteSocket() as own:
                assert EntrySocket(own, index, 4).put_neighbours(
                    [(ip_address("192.0.2.8").packed, bytes((2, 0, 0, 0, 0, 2)))]) == [None]

        asyncio.run(netlink.work("setting a neighbour", neighbour))
        sh("ip link set utEa txqueuelen 98")
        seen = calls.get(timeout=60)
        assert Change(Kind.LINK, index) in seen
        assert Change(Kind.NEIGHBOUR, index) not in seen

        gate = threading.Event()
        netlink._loop.call_soon_threadsafe(gate.wait, 60)
        netlink._watch.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        sh(*(f"ip address add 192.0.2.{i}/32 dev lo" for i in range(1, 100)))
        gate.set()
        wait_for(ANYTHING)
