"""The contract of a lease source, tested with every source in the list.

Each source has a class in ``STORES``: a store that the test can change, stop and start.
"""

import contextlib
import subprocess
import sys
import tomllib
from ipaddress import IPv4Address, IPv4Network

import pytest

from tests.leases.etcd_server import Etcd, needs_etcd
from tests.leases.kube_api import node
from tests.leases.kube_cluster import member, open_cluster
from tests.leases.observer import Observer, running
from tests.wait import until
from udptun.leases import sources
from udptun.leases.base import (
    Attributes,
    Identity,
    Lease,
    LeaseSource,
    StoreDown,
    Subnets,
)
from udptun.leases.etcd.config import EtcdConfig
from udptun.leases.file.config import FileConfig
from udptun.leases.kube.config import KubeConfig
from udptun.leases.netconf import NetConfig
from udptun.leases.sources import SOURCES, NotInstalled, make_source

OWN_IP = IPv4Address("192.0.2.1")
OWN = Attributes(OWN_IP)


class FileStore:
    """A hosts file. ``stop`` renames the file."""

    def __init__(self, folder):
        self._path, self._peers = folder / "hosts.toml", set()
        self.config = FileConfig(self._path, "n1")
        self.other_config = FileConfig(folder / "other.toml")
        self._write()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, folder):
        yield cls(folder)

    async def add_peer(self, i):
        self._peers.add(i)
        self._write()

    async def remove_peer(self, i):
        self._peers.remove(i)
        self._write()

    async def stop(self):
        self._path.rename(self._path.with_suffix(".stopped"))

    async def start(self):
        self._path.with_suffix(".stopped").rename(self._path)

    def _write(self):
        fresh = self._path.with_suffix(".new")
        fresh.write_text('network = "10.244.0.0/16"\n' + "".join(
            f'[[nodes]]\nname = "n{i}"\npublic = "192.0.2.{i}"\nsubnets = "10.244.{i}.0/24"\n'
            for i in (1, *sorted(self._peers))
        ))
        fresh.replace(self._path)


class EtcdStore:
    """One real etcd member."""

    def __init__(self, server):
        self._server = server
        self.config = EtcdConfig((server.url,))
        self.other_config = EtcdConfig((server.url,), prefix="/other")

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, folder):
        server = Etcd(folder).start()
        try:
            await server.put("config", '{"Network": "10.244.0.0/16", "SubnetLen": 24}')
            yield cls(server)
        finally:
            server.kill()

    async def add_peer(self, i):
        await self._server.put(f"subnets/10.244.{i}.0-24", f'{{"PublicIP": "192.0.2.{i}"}}')

    async def remove_peer(self, i):
        await self._server.delete(f"subnets/10.244.{i}.0-24")

    async def stop(self):
        self._server.kill()

    async def start(self):
        self._server.start()


class KubernetesStore:
    """The small API server, with our node."""

    def __init__(self, cluster):
        self._cluster = cluster
        self.config = cluster.config()
        self.other_config = KubeConfig(node_name="another")

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, folder):
        async with open_cluster("small", folder) as cluster:
            await cluster.create(node("n1", "10.244.1.0/24"))
            yield cls(cluster)

    async def add_peer(self, i):
        await self._cluster.create(member(f"n{i}", f"192.0.2.{i}", f"10.244.{i}.0/24"))

    async def remove_peer(self, i):
        await self._cluster.delete(f"n{i}")

    async def stop(self):
        await self._cluster.small.stop()

    async def start(self):
        await self._cluster.small.start()


STORES = {"file": FileStore, "etcd": EtcdStore, "kubernetes": KubernetesStore}


def test_every_source_is_checked_here():
    assert STORES.keys() == {entry.kind for entry in SOURCES}
    assert len(STORES) == len(SOURCES)


@pytest.fixture(params=[
    pytest.param(kind, marks=[needs_etcd] if kind == "etcd" else []) for kind in STORES
])
async def store(request, tmp_path):
    async with STORES[request.param].open(tmp_path) as store:
        assert store.config.kind == request.param
        yield store


async def local_addresses():
    return [OWN_IP]


@pytest.fixture
async def make(store):
    """Open sources of the store. Close each source twice, to test that the second close does
    nothing."""
    made = []

    def make():
        made.append(make_source(store.config, local_addresses))
        return made[-1]

    yield make
    for source in made:
        await source.aclose()
        await source.aclose()


async def test_the_configuration_identifies_the_store(store):
    """store_id is known before the first request. Leases that were cached from another store have
    another store_id and are not used."""
    assert store.config.store_id.startswith(store.config.kind)
    assert store.config.store_id != store.other_config.store_id
    assert isinstance(store.config.no_node_data, str)
    assert hash(store.config) == hash(store.config)


async def test_a_source_starts_without_a_request(store, make):
    await store.stop()
    source = make()
    assert isinstance(source, LeaseSource)
    health = source.health
    assert (health.connected, health.lease, health.errors_n) == (False, "none", 0)
    assert health.last_contact is None and not health.skipped
    await store.start()


async def test_network(make):
    network = await make().network()
    assert isinstance(network, NetConfig)
    assert network.network == IPv4Network("10.244.0.0/16")


async def test_cached_identity_has_the_same_families_and_advert(make):
    source = make()
    identity = await source.identity()
    assert isinstance(identity, Identity)
    cached = source.cached_identity(await source.acquire(OWN, Subnets()))
    assert (cached.families, cached.advert) == (identity.families, identity.advert)


async def test_acquire_may_be_repeated(make):
    source = make()
    lease = await source.acquire(OWN, Subnets(IPv4Network("10.244.1.0/24")))
    assert isinstance(lease, Lease)
    assert lease.subnets == Subnets(IPv4Network("10.244.1.0/24"))
    assert lease.attributes.public_ip == OWN_IP
    assert source.health.lease == "held"
    assert await source.acquire(OWN, lease.subnets) == lease


async def test_calls_raise_store_down_while_the_store_is_down(store, make):
    await store.stop()
    source = make()
    with pytest.raises(StoreDown, match=r"."):
        await source.acquire(OWN, Subnets())
    if type(source).identity is not LeaseSource.identity:  # the inherited method sends no request
        with pytest.raises(StoreDown, match=r"."):
            await source.identity()
    await store.start()
    assert await source.acquire(OWN, Subnets())


async def test_one_snapshot_then_changes(store, make):
    await store.add_peer(2)
    source = make()
    own = await source.acquire(OWN, Subnets())
    observer = await Observer(source).ready()
    peer_key = next(key for key in observer.leases if key != own.key)
    assert observer.leases[own.key].subnets == own.subnets
    assert observer.leases[peer_key].attributes.public_ip == IPv4Address("192.0.2.2")
    await store.add_peer(3)
    await until(lambda: len(observer.leases) == 3, "the new peer")
    await store.remove_peer(2)
    await until(lambda: peer_key not in observer.leases, "the removal of the peer")
    assert observer.snapshots == 1
    assert [(c.old is None, c.new is None) for c in observer.changes] == [
        (True, False), (False, True)]
    await observer.close()


async def test_an_outage_removes_no_lease_and_ends_by_itself(store, make):
    await store.add_peer(2)
    source = make()
    lease = await source.acquire(OWN, Subnets())
    observer = await Observer(source).ready()
    async with running(source.hold(lease)):
        known = dict(observer.leases)
        await store.stop()
        await until(lambda: not source.health.connected, "the report of the outage")
        assert source.health.error
        assert source.health.errors_n > 0
        assert (observer.leases, observer.batches) == (known, [])
        await store.start()
        await until(lambda: source.health.connected, "the end of the outage")
        assert source.health.error == ""
        await store.add_peer(3)
        await until(lambda: len(observer.leases) == 3, "a change after the outage")
        assert source.health.lease == "held"
    await observer.close()


async def test_hold_runs_until_cancelled(make):
    source = make()
    lease = await source.acquire(OWN, Subnets())
    async with running(source.hold(lease)) as task:
        source.reload()
        await until(lambda: source.health.lease == "held", "the lease")
    assert task.cancelled()


# The list


def test_the_command_line_can_import_every_configuration():
    """The modules import neither asyncio nor a client library, because these are slow to import."""
    modules = [config.__module__ for config in (EtcdConfig, FileConfig, KubeConfig)]
    result = subprocess.run(
        [sys.executable, "-c", f"import udptun.leases.sources, {', '.join(modules)}\n"
         "import sys\nprint(*sys.modules)"],
        check=True, capture_output=True, text=True, timeout=60,
    )
    assert not set(result.stdout.split()) & {
        "asyncio", "grpc", "google", "aiohttp", "yaml", "msgspec"}


async def test_a_missing_package_is_named_with_the_extra_that_installs_it(monkeypatch):
    def missing(name, package):
        raise ModuleNotFoundError("No module named 'grpc'", name="grpc")

    monkeypatch.setattr(sources, "import_module", missing)
    with pytest.raises(NotInstalled, match=r"^No module named 'grpc': pip install 'udptun\[etcd"):
        make_source(EtcdConfig(), local_addresses)


def test_every_extra_is_in_pyproject(pytestconfig):
    project = tomllib.loads((pytestconfig.rootpath / "pyproject.toml").read_text())["project"]
    extras = {entry.extra for entry in SOURCES if entry.extra}
    assert extras <= project["optional-dependencies"].keys()
