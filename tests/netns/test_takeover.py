"""A forwarder takes over from another one: no packet is lost, nothing is counted twice."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

import udptun
from tests.netns.netns_traffic import (
    SO_RCVBUFFORCE,
    assert_invariant,
    settled_packets,
    transfer_tcp,
)
from udptun.lab import Forwarder, LabError, pair, ping, wait_for
from udptun.lab.hosts import NETNS_DIR
from udptun.takeover import document
from udptun.takeover.channel import Channel, close_all, read_document
from udptun.takeover.kept import variable
from udptun.takeover.message import DESCRIPTORS, Done, Hello, Ready, State, Stopped, TakeOverError

RATE = 2000  # datagrams a second; low, so that a slow machine loses nothing


class Stream:
    """Numbered datagrams from one host to another, at RATE, while the context is open."""

    def __init__(self, source, target, address):
        self.sender = source.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.receiver = target.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
        self.receiver.bind((str(address), 0))
        self.receiver.settimeout(30)
        self.address = self.receiver.getsockname()
        self.sent = 0
        self.numbers = []  # of the datagrams that have arrived, in their order
        self.stop = threading.Event()
        self.complete = threading.Event()  # ``sent`` does not change any more
        self.threads = [threading.Thread(target=run) for run in (self._send, self._receive)]

    def _send(self):
        begin = time.monotonic()
        while not self.stop.is_set():
            while self.sent < RATE * (time.monotonic() - begin):
                self._send_one()
            time.sleep(0.0005)
        self._send_one(last=True)  # ends the wait of the receiver

    def _send_one(self, last=False):
        number, self.sent = self.sent, self.sent + 1
        if last:
            self.complete.set()
        self.sender.sendto(number.to_bytes(8, "big"), self.address)

    def _receive(self):
        with contextlib.suppress(TimeoutError):
            while not self.complete.is_set() or len(self.numbers) < self.sent:
                self.numbers.append(int.from_bytes(self.receiver.recv(64), "big"))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc):
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def assert_complete(self):
        missing = sorted(set(range(self.sent)) - set(self.numbers))
        assert not missing, f"{len(missing)} of {self.sent} are missing, from {missing[0]} on"
        assert self.numbers == sorted(self.numbers)
        assert len(self.numbers) == self.sent


def take_over(side, **changes):
    """Start another forwarder, which takes over. Return the old one, which has ended."""
    old = side.forwarder
    new = Forwarder.start(side.host, **side.options | {"extra": ["--take-over"], "wait": False}
                          | changes)
    wait_for(lambda: not old.process.alive or not new.process.alive, "the end of one forwarder")
    if not new.process.alive:
        raise LabError(new.process.text())
    assert old.process.wait() == 0, old.process.text()
    side.forwarder = new
    return old


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_no_packet_is_lost_and_none_is_counted_twice(lab, workers):
    tunnel = pair(lab, workers=workers)
    a, b = tunnel.sides
    a.forwarder.udptun("route", "add", "10.244.77.0/24", "via", str(b.outer), "mtu", "1300")
    assert ping(a.pod, b.pod_v4).received == 3
    before = a.forwarder.status()
    with Stream(a.pod, b.pod, b.pod_v4) as stream:
        wait_for(lambda: stream.sent > 100, "the stream")
        for side in (a, b, a):
            old = take_over(side)
            assert "has taken over" in old.process.text()
    stream.assert_complete()
    sent, received = settled_packets(a.forwarder), settled_packets(b.forwarder)
    for side in tunnel.sides:
        assert_invariant(side.forwarder)
    assert sent["encap"]["read"] >= stream.sent
    assert sent["encap"]["delivered"] == received["decap"]["read"]
    after = a.forwarder.status()
    assert after["generation"] == before["generation"]
    assert after["route_count"] == before["route_count"]
    peer, other = after["peers"][0], b.forwarder.status()["peers"][0]
    assert peer["encap"] == other["decap"]
    assert peer["last_seen_seconds"] > other["last_seen_seconds"]
    assert a.forwarder.control.exists()
    transfer_tcp(a.pod, b.pod, b.pod_v4)
    assert a.forwarder.stop() == 0
    assert not a.forwarder.control.exists()
    a.start()
    assert ping(a.pod, b.pod_v4).received == 3


class Client:
    """Speaks the protocol of a take-over with a side's forwarder, but starts no forwarder."""

    def __init__(self, side):
        self.path = side.forwarder.control.with_name("a.takeover.sock")
        self.namespace = (NETNS_DIR / side.host.namespace).stat().st_ino
        self.options = {}

    async def __aenter__(self):
        self.channel = await Channel.connect(self.path)
        return self

    async def __aexit__(self, *exc):
        self.channel.close()

    async def hello(self, **changes):
        await self.channel.send(Hello(
            **{"namespace": self.namespace, "newest": 9, "options": self.options} | changes))

    async def state(self):
        close_all(await self.channel.receive_descriptors())
        state, [fd] = await self.channel.receive(State)
        return document.load(document.StateDocument, read_document(fd, state.size))

    async def ready(self, batons_n=1):
        batons = [os.eventfd(0) for _ in range(batons_n)]
        await self.channel.send(Ready(), batons)
        return batons


async def stopped_at(side, last):
    """Begin a take-over, and break it off after the message ``last``."""
    async with Client(side) as client:
        if last == "connect":
            return
        await client.hello()
        having = await client.state()
        assert "10.244.2.0/24" in having.routes
        if last == "state":
            return
        [baton] = await client.ready()
        os.eventfd_read(baton)  # the worker has stopped
        os.close(baton)
        if last == "ready":
            return
        stopped, [fd] = await client.channel.receive(Stopped)
        counted = document.load(document.CountersDocument, read_document(fd, stopped.size))
        assert counted.packets["encap"]["read"] > 0


def test_a_take_over_that_breaks_off_has_no_effect(lab):
    """The other process ends after each of its messages. The forwarder continues."""
    tunnel = pair(lab)
    a, b = tunnel.sides
    with Stream(a.pod, b.pod, b.pod_v4) as stream:
        for number, last in enumerate(("connect", "state", "ready", "stopped")):
            wait_for(lambda sent=stream.sent: stream.sent > sent + 100, "the stream")
            asyncio.run(stopped_at(a, last))
            a.forwarder.udptun("route", "add", f"10.244.{100 + number}.0/24", "via", str(b.outer))
    stream.assert_complete()
    assert_invariant(a.forwarder)
    assert "Traceback" not in a.forwarder.process.text()
    take_over(a)
    assert ping(a.pod, b.pod_v4).received == 3
    assert a.forwarder.status()["route_count"] == 6


def test_a_take_over_that_hangs_has_no_effect(lab):
    """The other process hangs when only it could forward, and keeps the connection."""
    tunnel = pair(lab)
    a, b = tunnel.sides

    async def hang():
        async with Client(a) as client:
            await client.hello()
            await client.state()
            [baton] = await client.ready()
            await client.channel.receive(Stopped)
            os.close(baton)
            await client.channel.receive(Done)

    assert ping(a.pod, b.pod_v4).received == 3
    with pytest.raises(TakeOverError, match="no confirmation within"):
        asyncio.run(hang())
    assert ping(a.pod, b.pod_v4).received == 3
    take_over(a)
    assert ping(a.pod, b.pod_v4).received == 3


REFUSED = [
    ({"oldest": 7}, "versions 7 to 9"),
    ({"namespace": 1}, "another network namespace"),
    ({"options": {"network": ["10.0.0.0/8"]}}, "--network: .*10.244.0.0/16"),
    ({"options": {"workers": 3}}, "--workers: 3: the running forwarder has 1"),
]


def test_other_options_are_refused_and_the_forwarder_goes_on(lab):
    tunnel = pair(lab)
    a, b = tunnel.sides
    new = Forwarder.start(
        a.host, **a.options | {"extra": ["--take-over"], "workers": 2, "wait": False})
    assert new.process.wait() == 1
    assert "--workers: 2: the running forwarder has 1" in new.process.text()

    async def ask(change):
        async with Client(a) as client:
            await client.hello(**change)
            await client.channel.receive_descriptors()

    for change, reason in REFUSED:
        with pytest.raises(TakeOverError, match=reason):
            asyncio.run(ask(change))
    assert ping(a.pod, b.pod_v4).received == 3
    assert a.forwarder.get("/v1/healthz")


def test_without_a_running_forwarder_it_starts_as_usual(lab):
    tunnel = pair(lab, start=False)
    a, b = tunnel.sides
    a.start(extra=["--take-over"])
    b.start()
    assert ping(a.pod, b.pod_v4).received == 3
    assert "there is none to take over" in a.forwarder.process.text()


async def copies_of(side):
    async with Client(side) as client:
        await client.hello(want=DESCRIPTORS)
        return await client.channel.receive_descriptors()


@pytest.mark.parametrize("outer", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_kept_descriptors_outlive_a_killed_forwarder(lab, outer):
    """The next forwarder continues with the same device and sockets, also with what they hold."""
    tunnel = pair(lab, outer=outer, workers=2)
    a, b = tunnel.sides
    assert ping(a.pod, b.pod_v4).received == 3
    index = a.host.run(["cat", "/sys/class/net/udptun0/ifindex"]).stdout
    kept = asyncio.run(copies_of(a))
    assert sorted(name.partition(".")[0] for name in kept) == [
        "tun-0", "tun-1", f"udp-0-{outer}", f"udp-1-{outer}"]
    try:
        a.forwarder.process.kill()
        sender = a.pod.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver = b.pod.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind((str(b.pod_v4), 0))
        receiver.settimeout(60)
        for number in range(50):
            sender.sendto(bytes([number]), receiver.getsockname())
        a.start(pass_fds=tuple(kept.values()), env=variable(kept))
    finally:
        close_all(kept)
    assert [receiver.recv(9) for _ in range(50)] == [bytes([n]) for n in range(50)]
    assert a.host.run(["cat", "/sys/class/net/udptun0/ifindex"]).stdout == index
    assert "of the forwarder that has died" in a.forwarder.process.text()
    transfer_tcp(a.pod, b.pod, b.pod_v4)
    assert a.forwarder.stop() == 0
    a.start()
    assert ping(a.pod, b.pod_v4).received == 3


def test_kept_descriptors_that_do_not_fit_are_not_used(lab):
    """Other addresses: the kept device has the old ones. While the service manager has its copies,
    the names and ports are in use, so it is asked to close them."""
    tunnel = pair(lab)
    a, b = tunnel.sides
    manager = service_manager(lab)
    kept = asyncio.run(copies_of(a))
    try:
        a.forwarder.process.kill()
        new = Forwarder.start(a.host, **a.options | {
            "pass_fds": tuple(kept.values()), "addresses": ["10.244.1.9", a.v6], "wait": False,
            "env": variable(kept) | {"NOTIFY_SOCKET": manager.getsockname()}})
        removed = {manager.recv(4096).decode().split("FDNAME=")[1] for _ in kept}
        assert removed == kept.keys()
    finally:
        close_all(kept)
    text, barrier, _, _ = socket.recv_fds(manager, 4096, 1)
    assert text == b"BARRIER=1"
    os.close(barrier[0])
    new.wait_ready()
    assert "are not used: they are those of a forwarder with other options" in new.process.text()
    assert "10.244.1.0" not in a.host.run(["ip", "addr", "show", "udptun0"]).stdout
    assert ping(a.pod, b.pod_v4).received == 3


def service_manager(lab):
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    lab.sockets.append(manager)
    manager.bind(str(lab.folder / "notify"))
    manager.settimeout(60)
    return manager


def test_the_service_manager_is_notified_of_each_step(lab):
    """SIGUSR2 starts a forwarder that takes over. It becomes the main process of the service, and
    the service manager has copies of the descriptors."""
    manager = service_manager(lab)
    heard, kept = [], {}

    def listen():  # all the time, because the kernel queues only a few messages
        with contextlib.suppress(OSError):  # the end of the test
            while True:
                text, fds, _, _ = socket.recv_fds(manager, 4096, 1)
                key, _, name = text.decode().partition("\nFDNAME=")
                heard.append(key)
                if key == "FDSTORE=1":
                    kept[name.partition("\n")[0]] = fds[0]

    def hears(*wanted):
        wait_for(lambda: set(wanted) <= set(heard), f"{wanted} in {heard}")
        heard.clear()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    tunnel = pair(lab, start=False)
    a, b = tunnel.sides
    b.start()
    a.start(env={"NOTIFY_SOCKET": str(lab.folder / "notify"), "WATCHDOG_USEC": "500000"})
    hears("READY=1", "FDSTORE=1", "WATCHDOG=1")
    wait_for(lambda: len(kept) == 2, "both descriptors")
    old = a.forwarder.process
    with Stream(a.pod, b.pod, b.pod_v4) as stream:
        old.signal(signal.SIGUSR2)
        assert old.wait() == 0, old.text()
        pid = a.forwarder.status()["pid"]
        assert pid != old.pid
        hears(f"MAINPID={pid}", "READY=1", "WATCHDOG=1")
    stream.assert_complete()
    os.kill(pid, signal.SIGKILL)
    a.start(pass_fds=tuple(kept.values()), env=variable(kept))
    close_all(kept)
    assert "of the forwarder that has died" in a.forwarder.process.text()
    assert ping(a.pod, b.pod_v4).received == 3


@pytest.fixture
def later_version(tmp_path):
    """Return the environment in which a later version of udptun runs: it has a later version of the
    messages, and fields that this version does not have. It lacks fields that this version has."""
    shutil.copytree(Path(udptun.__file__).parent, tmp_path / "udptun")
    for name, old, new in (
        ("takeover/message.py", "\nVERSION = 1", "\nVERSION = 2"),
        ("takeover/message.py", "    program: str", "    later: int = 7\n    program: str"),
        ("takeover/document.py", "    routes: str", "    later: str = 'x'\n    routes: str"),
        ("takeover/document.py", "    probe_counts: dict[str, int] = field(default_factory=dict)\n",
         ""),
        ("forwarder/giving.py", ', probe_counts=parts.probes.counters()["probes"]', ""),
        ("forwarder/forwarder.py", "counts.probe_counts", "{}"),
        ("_version.py", "__version__ =", "__version__ = '99' ; was ="),
    ):
        path = tmp_path / "udptun" / name
        text = path.read_text()
        assert old in text, (name, old)
        path.write_text(text.replace(old, new))
    return {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}


def test_a_later_version_takes_over_and_back(lab, later_version):
    tunnel = pair(lab)
    a, b = tunnel.sides
    with Stream(a.pod, b.pod, b.pod_v4) as stream:
        wait_for(lambda: stream.sent > 100, "the stream")
        take_over(a, env=later_version)
        assert a.forwarder.status()["version"] == "99"
        take_over(a)
        assert a.forwarder.status()["version"] == udptun.__version__
    stream.assert_complete()
    assert settled_packets(a.forwarder)["encap"]["read"] >= stream.sent
    assert_invariant(a.forwarder)


def test_the_underlays_new_mtu_is_used_after_a_take_over(lab):
    tunnel = pair(lab)
    a, b = tunnel.sides
    assert ping(a.pod, b.pod_v4).received == 3
    for end in (tunnel.link.a, tunnel.link.b):
        end.set_mtu(1400)
    take_over(a)
    a.forwarder.wait_ready()
    assert a.forwarder.status()["device"]["mtu"] == 1400 - 28
    wait_for(lambda: a.host.run(["cat", "/sys/class/net/udptun0/mtu"]).stdout.strip() == "1372",
             "the MTU of the TUN")
    assert ping(a.pod, b.pod_v4).received == 3


def scrape(host):
    """Return the metrics of a forwarder with ``--metrics 9100``, by name and labels."""
    text = host.run(["curl", "-s", "--max-time", "30", "http://127.0.0.1:9100/metrics"]).stdout
    return {name: float(value) for line in text.splitlines() if not line.startswith("#")
            for name, value in [line.rsplit(" ", 1)]}


def test_the_metrics_and_their_socket_are_taken_over(lab):
    tunnel = pair(lab, extra=["--metrics", "9100"])
    a, b = tunnel.sides
    assert ping(a.pod, b.pod_v4, size=1000).received == 3
    sent = 'udptun_bytes_total{direction="encap"}'
    wait_for(lambda: scrape(a.host).get(sent, 0) >= 3000, "the metrics")
    for subnet in (b.node.subnet, b.node.subnet6):
        a.forwarder.udptun("route", "del", str(subnet))
    before = scrape(a.host)
    assert before[sent] >= 3000  # of a peer that has left
    take_over(a, extra=["--metrics", "9100", "--take-over"])
    after = scrape(a.host)
    assert after[sent] == before[sent]
    assert (before["udptun_takeovers_total"], after["udptun_takeovers_total"]) == (0, 1)
    cpu = 'udptun_worker_cpu_seconds_total{worker="0"}'
    assert after[cpu] >= before[cpu] > 0
