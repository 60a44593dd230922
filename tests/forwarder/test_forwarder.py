"""The whole forwarder on a real TUN, through its Python API."""

import asyncio
import contextlib
import errno
import functools
import os
import random
import shutil
import socket
import threading
from pathlib import Path

import pytest

from tests.own_netns import in_own_mount_namespace, in_own_netns, ip_json, sh
from tests.wait import until
from udptun import ControlClient, Endpoint, Forwarder, ForwarderConfig, Route
from udptun.errors import DeviceError, FieldError, UdptunError
from udptun.forwarder import forwarder as module
from udptun.forwarder.routes import HandedOver
from udptun.model import parse_address, parse_prefix
from udptun.net.changes import ANYTHING, Change, Kind
from udptun.takeover.channel import Channel, close_all
from udptun.takeover.message import DESCRIPTORS, Hello

HERE = "192.0.2.1"


def config(**changes):
    sh(f"ip addr replace {HERE}/32 dev lo")
    options = {
        "listen": (Endpoint.parse(HERE),),
        "addresses": (parse_address("address", "10.244.1.0"),),
        "networks": (parse_prefix("network", "10.244.0.0/16"),),
    }
    return ForwarderConfig(**options | changes)


def has_route(path):
    return path.exists() and "10.244.2.0/24 via" in path.read_text()


def many_routes(n, via="192.0.2.9"):
    return "\n".join(
        f"10.{i >> 8 & 255}.{i & 255}.0/24 via {via} port {1024 + i % 3000}" for i in range(n)
    ).encode()


@in_own_netns
async def test_a_change_is_completed_when_its_caller_is_cancelled():
    rng = random.Random(3)
    async with Forwarder(config()) as forwarder:
        bodies = [many_routes(5000, f"192.0.2.{n}") for n in range(9, 13)]
        for i in range(40):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.uniform(0.0005, 0.008)):
                    await forwarder.replace_routes_text(bodies[i % 4])
            await forwarder.put_route(Route.make("10.0.0.0/8", f"192.0.2.{20 + i}"))
        await forwarder.replace_routes_text(bodies[0])
        status = await forwarder.status()
        assert status["route_count"] == 5000
        assert len(status["peers"]) == 3000
        assert {peer["endpoint"].split(":")[0] for peer in status["peers"]} == {"192.0.2.9"}


@in_own_netns
async def test_a_route_to_our_own_subnet_is_reported_once(caplog):
    async with Forwarder(config()) as forwarder:
        with forwarder.subscribe() as events:
            await forwarder.add_route(Route.make("10.244.0.0/16", "192.0.2.9"))  # a gateway
            await forwarder.add_route(Route.make("10.244.1.0/24", "192.0.2.9"))
            await forwarder.add_route(Route.make("10.244.2.0/24", "192.0.2.9"))
            async for event in events:
                if event["type"] == "error":
                    break
    assert "10.244.1.0/24 via 192.0.2.9" in event["message"]
    assert caplog.text.count("is to this host's own subnet") == 1


@in_own_netns
async def test_a_route_to_a_part_of_our_own_subnet_is_reported(caplog):
    own = (parse_prefix("subnet", "10.244.1.0/24"), parse_prefix("subnet", "fd00:1::/64"))
    others = [Route.make(dst, "192.0.2.9") for dst in (
        "10.244.0.0/16", "10.244.0.128/25", "10.244.2.0/24", "fd00:0:ffff::/48", "fd00:2::/64")]
    wrong = [Route.make(dst, "192.0.2.9") for dst in (
        "10.244.1.0/25", "10.244.1.7/32", "10.244.1.255/32", "fd00:1::7/128")]
    async with Forwarder(config(subnets=own)) as forwarder:
        await forwarder.replace_routes(others)
        assert "own subnet" not in caplog.text
        await forwarder.replace_routes([*others, *wrong])
        await forwarder.add_route(Route.make("10.244.9.0/24", "192.0.2.9"))
    for route in wrong:
        assert caplog.text.count(f"the route {route} is to this host's own subnet") == 1
    assert caplog.text.count("own subnet") == len(wrong)


@in_own_netns
async def test_reload_of_an_emptied_route_file_keeps_the_routes(tmp_path):
    file = tmp_path / "routes"
    file.write_text("10.244.2.0/24 via 192.0.2.9\n")
    async with Forwarder(config(routes_file=file)) as forwarder:
        for text in ("", "# 10.244.2.0/24 via 192.0.2.9\n"):
            file.write_text(text)
            with pytest.raises(UdptunError, match=f"no route in {file}.*--allow-empty"):
                await forwarder.reload()
            assert forwarder.route_count == 1
        file.write_text("10.244.3.0/24 via 192.0.2.9\n")
        assert (await forwarder.reload()).added == 1


@in_own_netns
async def test_a_device_that_was_down_before_the_watch_began_is_configured_again(monkeypatch):
    """The forwarder gets no link message about this change, and reads the state of the device."""
    import pyroute2

    subscribe = threading.Event()
    open_socket = pyroute2.IPRSocket

    def open_late():
        assert subscribe.wait(timeout=60)
        return open_socket()

    monkeypatch.setattr(pyroute2, "IPRSocket", open_late)
    try:
        async with Forwarder(config()) as forwarder:
            with forwarder.subscribe() as events:
                sh("ip link set udptun0 down", "ip link set udptun0 up")
                subscribe.set()
                async with asyncio.timeout(60):
                    event = await anext(events)
                assert event["type"] == "repaired"
                assert "10.244.0.0/16" in event["message"]
            async with asyncio.timeout(60):
                while not ip_json("route show 10.244.0.0/16"):
                    await asyncio.sleep(0.01)
    finally:
        subscribe.set()


@in_own_netns
async def test_an_endpoint_in_use_is_refused():
    async with Forwarder(config(workers=2)):
        with pytest.raises(DeviceError, match="another process listens there") as caught:
            await Forwarder(config(workers=2, tun="udptun1")).start()
        assert caught.value.errno == errno.EADDRINUSE


@in_own_netns
async def test_an_occupied_control_socket_is_refused_before_the_host_is_changed(tmp_path):
    path = tmp_path / "control.sock"
    async with Forwarder(config(control=path)):
        before = ip_json("link")
        with pytest.raises(DeviceError, match="in use") as caught:
            await Forwarder(
                config(control=path, tun="udptun1", listen=(Endpoint.parse(f"{HERE}:9"),))
            ).start()
        assert caught.value.errno == errno.EADDRINUSE
        # each created device increases the interface index
        sh("ip link add probe type bridge")
        [probe] = [link for link in ip_json("link") if link["ifname"] == "probe"]
        assert probe["ifindex"] == max(link["ifindex"] for link in before) + 1


@in_own_netns
async def test_a_stopped_forwarder_refuses_routes():
    forwarder = Forwarder(config())
    route = Route.make("10.244.2.0/24", "192.0.2.2")
    with pytest.raises(UdptunError, match="not running"):
        await forwarder.add_route(route)
    async with forwarder:
        await forwarder.add_route(route)
    with pytest.raises(UdptunError, match="not running"):
        await forwarder.replace_routes([])


@in_own_netns
async def test_a_full_or_readonly_disk_does_not_stop_the_network(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("udptun.forwarder.state.RETRY_SECONDS", 0.1)
    in_own_mount_namespace()
    full, readonly = tmp_path / "full", tmp_path / "readonly"
    full.mkdir()
    readonly.mkdir()
    sh(f"mount -t tmpfs -o size=4k none {full}", f"mount -t tmpfs -o size=1m none {readonly}")
    (full / "filler").write_bytes(bytes(4096))
    repairs = {
        full / "routes": (full / "filler").unlink,
        readonly / "routes": lambda: sh(f"mount -o remount,rw {readonly}"),
    }
    (readonly / "routes").write_text("10.244.3.0/24 via 192.0.2.3\n")  # and is still read
    sh(f"mount -o remount,ro {readonly}")
    for kept, repair in repairs.items():
        caplog.clear()
        async with Forwarder(config(state_file=kept)) as forwarder:
            await forwarder.put_route(Route.make("10.244.2.0/24", "192.0.2.2"))
            assert forwarder.route_count == 1 + (kept.parent == readonly)
            assert f"cannot write the route table to {kept}: " in caplog.text
            repair()
            await until(functools.partial(has_route, kept))


@in_own_netns
async def test_a_readonly_run_directory_does_not_stop_the_network(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("udptun.forwarder.forwarder.SOCKET_SECONDS", 0.1)
    in_own_mount_namespace()
    control, takeover, flannel = (tmp_path / name for name in ("control", "takeover", "flannel"))
    sockets = control, takeover, flannel
    sh(f"mount --bind {tmp_path} {tmp_path}", f"mount -o remount,bind,ro {tmp_path}")
    async with Forwarder(
        config(control=control, takeover=takeover, flannel_control=flannel)
    ) as forwarder:
        for missing in ("nobody can control this forwarder yet", "flannel cannot set routes yet",
                        "no other forwarder can take over from this one yet"):
            assert missing in caplog.text
        sh(f"mount -o remount,bind,rw {tmp_path}")
        await until(control.exists)
        assert takeover.exists() and flannel.exists()  # a node daemon connects to them now
        await until(lambda: f"the socket {control} is there now" in caplog.text)
        events = [*forwarder.events.recent]
        assert [event["type"] for event in events] == ["error"] * 3 + ["repaired"] * 3
        with ControlClient(str(control)) as client:
            assert await asyncio.to_thread(client.status)
        channel = await Channel.connect(takeover)
        await channel.send(Hello(want=DESCRIPTORS))
        close_all(await channel.receive_descriptors())
        channel.close()
    assert not any(path.exists() for path in sockets)


@in_own_netns
async def test_two_forwarders_with_one_state_file(tmp_path):
    kept = tmp_path / "made" / "routes"
    async with Forwarder(config(state_file=kept)) as forwarder:
        await forwarder.put_route(Route.make("10.244.2.0/24", "192.0.2.2"))
        with pytest.raises(DeviceError, match=f"another forwarder uses the state file {kept}"):
            await Forwarder(config(state_file=kept, tun="other0")).start()
    async with Forwarder(config(state_file=kept)) as forwarder:  # the lock is released
        assert forwarder.route_count == 1


@in_own_netns
async def test_a_removed_state_file_is_written_again(tmp_path):
    kept = tmp_path / "made" / "routes"
    text = "\n10.244.2.0/24 via 192.0.2.2 port 8285\n"
    async with Forwarder(config(state_file=kept)) as forwarder:
        await forwarder.put_route(Route.make("10.244.2.0/24", "192.0.2.2"))
        await until(lambda: text in kept.read_text())
        shutil.rmtree(kept.parent)
        await until(kept.exists)
        assert text in kept.read_text()
        kept.unlink()
        await forwarder.delete_route(parse_prefix("dst", "10.244.2.0/24"))
    assert text not in kept.read_text()


@in_own_netns
async def test_a_saved_route_without_a_listener_of_its_version_does_not_stop_the_start(
    tmp_path, caplog
):
    """For example, the host had IPv6 when the routes were saved."""
    kept = tmp_path / "routes"
    sh("ip addr add 2001:db8::1/128 dev lo nodad")
    both = (Endpoint.parse(HERE), Endpoint.parse("[2001:db8::1]:8285"))
    async with Forwarder(config(state_file=kept, listen=both)) as forwarder:
        await forwarder.put_route(Route.make("10.244.2.0/24", "192.0.2.2"))
        await forwarder.put_route(Route.make("10.244.3.0/24", "2001:db8::3"))
    async with Forwarder(config(state_file=kept)) as forwarder:
        assert forwarder.route_count == 1
        await until(lambda: has_route(kept) and "10.244.3.0" not in kept.read_text())
    assert "1 route of" in caplog.text and "10.244.3.0/24 via 2001:db8::3" in caplog.text


@in_own_netns
async def test_the_error_for_an_unreachable_next_hop_names_the_file(tmp_path):
    routes = tmp_path / "routes"
    routes.write_text("10.244.2.0/24 via 2001:db8::2\n")
    with pytest.raises(FieldError, match=rf"{routes}: route 10.244.2.0/24: via: "):
        await Forwarder(config(routes_file=routes)).start()


@in_own_netns
async def test_the_mtu_of_a_trace_is_at_most_the_devices():
    async with Forwarder(config(mtu=1300)) as forwarder:
        await forwarder.put_route(Route.make("10.244.2.0/24", "192.0.2.2"))
        assert forwarder.trace(parse_address("address", "10.244.2.9"))["mtu"] == 1300


@in_own_netns
async def test_the_worker_thread_is_scheduled_as_batch():
    async with Forwarder(config()):
        tasks = {int(task.name) for task in Path("/proc/self/task").iterdir()}
        batch = [task for task in tasks if os.sched_getscheduler(task) == os.SCHED_BATCH]
    assert len(batch) == 1


# Changes while packets pass


def sockets_n(address):
    """Return how many UDP sockets of this namespace have this local address."""
    return sh(f"ss -Huan src {address}").count("\n")


@in_own_netns
async def test_a_move_that_the_kernel_refuses_changes_nothing(monkeypatch):
    """The second worker cannot watch its new socket: the kernel refuses the descriptor."""
    sh("ip addr add 192.0.2.7/32 dev lo")
    new = Endpoint.parse("192.0.2.7")
    open_udp = module.open_udp

    def unwatchable(*arguments, reuse_port, **options):
        opened = open_udp(*arguments, reuse_port=reuse_port, **options)
        if reuse_port:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, opened.fd)
            os.close(null)
        return opened

    async with Forwarder(config(workers=2)) as forwarder:
        await forwarder.change_device(mtu=1300)
        with monkeypatch.context() as patch:
            patch.setattr(module, "open_udp", unwatchable)
            for _ in range(2):
                with pytest.raises(DeviceError, match=r"192\.0\.2\.7:8285.*EPERM") as caught:
                    await forwarder.change_device(listen=[new])
                assert caught.value.errno == errno.EPERM
        assert (await forwarder.status())["device"]["listen"] == [f"{HERE}:8285"]
        assert sockets_n("192.0.2.7") == 0
        await all_workers_receive(forwarder, HERE)
        assert (await forwarder.change_device(listen=[new]))["listen"] == ["192.0.2.7:8285"]
        assert sockets_n("192.0.2.7") > 0
        await all_workers_receive(forwarder, "192.0.2.7")


async def all_workers_receive(forwarder, address):
    """Send from many ports. The kernel spreads them over the workers."""
    def received():
        return forwarder.counters()["packets"]["decap"]["read"]

    before = received()
    for _ in range(64):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"\x45", (address, 8285))
    await until(lambda: received() == before + 64, "the datagrams")


@in_own_netns
async def test_the_mtu_follows_the_address_and_the_interface(monkeypatch):
    """The kernel is asked in another thread, because many interfaces take long."""
    threads = set()
    underlay_mtu = module.underlay_mtu

    def watched(address):
        threads.add(threading.current_thread())
        return underlay_mtu(address)

    sh("ip link add other type veth peer name far", "ip link set far up",
       "ip link set other up mtu 1400")
    async with Forwarder(config()) as forwarder:
        monkeypatch.setattr(module, "underlay_mtu", watched)
        sh(f"ip addr del {HERE}/32 dev lo", f"ip addr add {HERE}/32 dev other")
        await until(lambda: forwarder.mtu == 1372, "the MTU of the interface with the address")
        sh("ip link set other mtu 1300")
        await until(lambda: forwarder.mtu == 1272, "the new MTU")
    assert threads and threading.current_thread() not in threads


@in_own_netns
async def test_changes_of_other_interfaces_do_not_concern_the_underlay():
    async with Forwarder(config()) as forwarder:
        lo = socket.if_nametoindex("lo")
        here, elsewhere = (socket.inet_aton(one) for one in (HERE, "10.244.1.1"))
        for change, concerns in (
            (Change(Kind.LINK, lo), True), (Change(Kind.LINK, lo + 7), False),
            (Change(Kind.ADDRESS, lo + 7, address=here), True),
            (Change(Kind.ADDRESS, lo, address=elsewhere), False),
            (Change(Kind.ROUTE, lo), False), (ANYTHING, True),
        ):
            assert forwarder._concerns_underlay(change) is concerns, change


@in_own_netns
async def test_a_forwarder_that_has_handed_over_says_so():
    async with Forwarder(config()) as forwarder:
        forwarder._routes.hand_over()
        with pytest.raises(HandedOver):
            await forwarder.add_route(Route.make("10.244.2.0/24", "192.0.2.9"))
