"""A node daemon for tests. The host is real, in a network namespace. The test controls the store
and the forwarder."""

from __future__ import annotations

import asyncio
import contextlib
import json
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network

from tests.own_netns import sh
from tests.wait import until
from udptun.instance import Instance
from udptun.leases.base import Attributes, Lease, LeaseSource, Snapshot, SourceHealth, Subnets
from udptun.leases.etcd.config import EtcdConfig
from udptun.leases.netconf import NetConfig
from udptun.net.netlink import Netlink
from udptun.node import daemon as module
from udptun.node.config import InterfaceOptions, NodeConfig
from udptun.node.daemon import Daemon
from udptun.node.locks import Locks
from udptun.node.process.launch import ForwarderSpec

NETWORK = NetConfig.parse('{"Network": "10.244.0.0/16"}')
OURS = Subnets(IPv4Network("10.244.1.0/24"))


def peer(n, via=None):
    return Lease(f"10.244.{n}.0-24", Subnets(IPv4Network(f"10.244.{n}.0/24")),
                 Attributes(IPv4Address(f"192.0.2.{via or n}")))


class Store(LeaseSource):
    """A LeaseSource that returns or raises the answers that the test sets."""

    def __init__(self):
        self.health = SourceHealth()
        self.network_answer = NETWORK
        self.acquire_answer = OURS
        self.published = []
        self.formers = []
        self.acquired = None
        self.networks_n = 0
        self.held = None
        self.closed = False
        self.news = asyncio.Queue()

    async def network(self):
        self.networks_n += 1
        return _answer(self.network_answer)

    async def acquire(self, attributes, former):
        subnets = _answer(self.acquire_answer)
        self.published.append(attributes)
        self.formers.append(former)
        self.acquired = Lease(str(subnets.v4), subnets, attributes)
        return self.acquired

    async def hold(self, lease):
        self.held = lease
        await asyncio.Event().wait()

    async def updates(self):
        while True:
            yield await self.news.get()

    def send(self, *leases):
        own = [self.acquired] if self.acquired else []
        self.news.put_nowait(Snapshot((*leases, *own)))

    def fail(self, error):
        self.network_answer = self.acquire_answer = error

    def recover(self):
        self.network_answer, self.acquire_answer = NETWORK, OURS

    async def aclose(self):
        self.closed = True


def _answer(answer):
    if isinstance(answer, Exception):
        raise answer
    return answer


def underlay():
    """Create one interface with one address."""
    sh("ip link add under0 mtu 1500 type veth peer name wire", "ip link set wire up",
       "ip addr add 192.0.2.1/24 dev under0", "ip link set under0 up")


def use_folder(folder, monkeypatch):
    """Make every instance use directories in ``folder``."""
    for name in ("run", "state"):
        monkeypatch.setattr(
            Instance, f"{name}_dir", property(lambda self, name=name: folder / name / self.name))


class Node:
    """A daemon, its host and its store. The test can change ``config`` between two runs."""

    def __init__(self, tmp_path, monkeypatch):
        self.store = Store()
        self.folder = tmp_path
        self.config = NodeConfig(
            source=EtcdConfig(), interface=InterfaceOptions(names=("under0",)),
            subnet_file=tmp_path / "subnet.env", control=tmp_path / "run" / "udptun.sock",
            state_dir=tmp_path / "state", forwarder="external", iptables_forward_rules=False,
            address_grace=0, mark=None,  # the forwarder of the tests has no mark
        )
        self.monkeypatch = monkeypatch
        self.serve_store()
        monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
        use_folder(tmp_path, monkeypatch)
        underlay()

    def serve_store(self):
        """Let the next daemon use this node's store."""
        self.monkeypatch.setattr(module, "make_source", lambda *_: self.store)

    @contextlib.asynccontextmanager
    async def running(self):
        with Locks(self.config) as locks, Netlink() as netlink:
            self.serve_store()
            daemon = Daemon(self.config, netlink, locks)
            task = asyncio.create_task(daemon.run())
            device = asyncio.create_task(make_device(self.config.forward_file, netlink))
            try:
                yield daemon
            finally:
                device.cancel()
                daemon.stop("the test")
                await task
        self.store.closed = False

    def ready(self, daemon):
        return until(lambda: not daemon.report.waiting, f"ready: {daemon.report.waiting}")

    @property
    def forward_file(self):
        return json.loads((self.folder / "run" / "forward.json").read_text())

    async def fill_cache(self, *leases):
        """Run once with these leases in the store, so that they are cached."""
        async with self.running() as daemon:
            await until(lambda: self.store.published, "the lease")
            self.store.send(*leases)
            await self.ready(daemon)
        self.store = Store()


async def make_device(forward_file, netlink):
    """Do what a forwarder does with the daemon's file: configure its device, here a veth."""
    last = None
    while True:
        with contextlib.suppress(FileNotFoundError):
            spec = ForwarderSpec.read(forward_file)
            if spec != last:
                if last is None and spec.tun not in sh("ip -o link show"):
                    sh(f"ip link add {spec.tun} type veth peer name {spec.tun}-far",
                       f"ip link set {spec.tun}-far up")
                await netlink.configure_tun(
                    spec.tun, spec.mtu, map(ip_address, spec.addresses),
                    map(ip_network, spec.networks))
                last = spec
        await asyncio.sleep(0.02)


def routes_to(*leases):
    """Return the table that the forwarder has to have for these leases."""
    return {str(lease.subnets.v4): str(lease.attributes.public_ip) for lease in leases}


def table(served):
    return {str(dst): str(route.via) for dst, route in served.forwarder.table.items()}
