"""Every backend in the list fulfils the contract, and no other module names a backend."""

from __future__ import annotations

import ast
import contextlib
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from tests.node.daemon_host import NETWORK, Node
from tests.own_netns import in_own_netns, ip_json
from udptun.leases.advert import Advert
from udptun.leases.base import Lease, Subnets
from udptun.leases.cache import LastKnown
from udptun.leases.file.config import FileConfig
from udptun.leases.netconf import CHECKED_TYPES
from udptun.model import Endpoint, Route
from udptun.net.netlink import Netlink
from udptun.node.backends import AUTO, BACKENDS, MODES
from udptun.node.backends.active import combine, create
from udptun.node.backends.base import Backend, LeaseData, Reach, Site
from udptun.node.host.interface import choose
from udptun.node.status.report import NodeReport

ROOT = Path(__file__).resolve().parents[3]
SUBNETS = Subnets(IPv4Network("10.244.1.0/24"))
PEER = IPv4Network("10.244.2.0/24")
every = pytest.mark.parametrize("name", BACKENDS)


@pytest.fixture
def node_of(tmp_path, monkeypatch):
    return lambda: Node(tmp_path, monkeypatch)


def network_state():
    """Return the names of the devices and the prefixes of the routes.

    Other data are left out, because they can change without an action of the test.
    """
    return ({link["ifname"] for link in ip_json("link show")},
            {route["dst"] for route in ip_json("route show")})


@in_own_netns
async def test_a_lease_cannot_make_the_firewall_block_another_service(node_of):
    """The rules against forged packets drop what other programs send to a guarded endpoint. A
    lease has any address and port, such as those of a name server."""
    node = node_of()
    declared = Advert(9285)
    with Netlink() as netlink:
        backend = create("udp", node.config, netlink, NodeReport("etcd", node.store.health))
        underlay = await choose(netlink, node.config.interface, True, False)
        for site, guarded in (
            (Site(NETWORK, underlay), {8285}), (Site(NETWORK, underlay, declared=declared),
                                                {8285, 9285}),
        ):
            await backend.prepare(site, 1400)
            paths = [Route(PEER, IPv4Address("192.0.2.53"), port)
                     for port in (53, 8472, 8285, 9285, 51820)]
            found = {backend.guarded_endpoint(path) for path in paths} - {None}
            assert {one.port for one in found} == guarded


@in_own_netns
async def test_all_nodes_of_a_hosts_file_are_guarded(node_of):
    """Only root can write the file. Nodes behind one NAT have ports of their own."""
    node = node_of()
    config = replace(node.config, source=FileConfig(Path("hosts.toml")))
    with Netlink() as netlink:
        backend = create("udp", config, netlink, NodeReport("file", node.store.health))
        underlay = await choose(netlink, config.interface, True, False)
        await backend.prepare(Site(NETWORK, underlay), 1400)
        path = Route(PEER, IPv4Address("192.0.2.53"), 9286)
        assert backend.guarded_endpoint(path) == Endpoint(path.via, 9286)


@every
@in_own_netns
async def test_a_backend_runs_all_calls_twice_and_removes_what_it_created(name, node_of, tmp_path):
    node = node_of()
    before, files = network_state(), {*tmp_path.rglob("*")}
    report = NodeReport("etcd", node.store.health)
    with Netlink() as netlink:
        backend = create(name, node.config, netlink, report)
        assert isinstance(backend, Backend)
        assert backend.name == name
        underlay = await choose(netlink, node.config.interface, True, False)
        site = Site(NETWORK, underlay, optional=True)
        mtu = underlay.mtu - backend.overhead(site)
        assert 0 < mtu < underlay.mtu
        for _ in range(2):
            if why := await backend.prepare(site, mtu):
                pytest.skip(f"not available here: {why}")
            data, reach = backend.lease_data(mtu), backend.reach()
            assert isinstance(data, LeaseData)
            assert isinstance(reach, Reach)
            assert reach.name == name
            assert reach == backend.reach()
            assert backend.lease_data(mtu) == data
            attributes = combine(underlay, [data])
            lease = Lease("own", SUBNETS, attributes)
            await backend.settle(lease, mtu)
            await backend.apply_all({})
            await backend.apply({})
            await backend.divert({PEER: True})
            await backend.divert({PEER: False})
            await backend.resync()
            assert backend.refused == {}
        errors = []

        @contextlib.contextmanager
        def attempt():
            try:
                yield
            except OSError as exc:
                errors.append(exc)

        await backend.cleanup(LastKnown("etcd", NETWORK, lease, (lease,)), attempt)
        assert errors == []
        left = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert left <= files
        assert network_state() == before
        await backend.retire(NETWORK, attributes)


@every
@in_own_netns
async def test_an_unused_backend_does_not_change_the_host(name, node_of):
    node = node_of()
    before = network_state()
    with Netlink() as netlink:
        backend = create(name, node.config, netlink, NodeReport("etcd", node.store.health))
        await backend.retire(NETWORK, None)
        await backend.cleanup(None, contextlib.nullcontext)
    assert network_state() == before


def test_the_modes_are_the_backends_and_auto():
    assert (AUTO, *BACKENDS) == MODES


@every
def test_a_backend_is_documented(name):
    (row,) = [line for line in (ROOT / "docs" / "node.md").read_text().splitlines()
              if line.startswith("| `--backend")]
    assert f"`{name}`" in row


def test_no_module_outside_the_package_names_a_backend():
    """No string in the node daemon, its command line or the package's shared modules is the name of
    a backend. Other packages may contain such strings, for the names of devices and for the
    network's configuration. In the rules of a firewall, "udp" is the protocol."""
    modules = [*(ROOT / "udptun" / "node").rglob("*.py"), ROOT / "udptun" / "cli" / "node.py"]
    outside = [path for path in modules if path.parent.name != "backends"
               or path.stem in ("base", "plan", "active")]
    outside = [path for path in outside if path.parent.name != "firewall"]
    assert len(outside) > 15
    named = [
        f"{path.relative_to(ROOT)}:{constant.lineno}" for path in outside
        for constant in ast.walk(ast.parse(path.read_text()))
        if isinstance(constant, ast.Constant) and constant.value in BACKENDS
    ]
    assert named == []


def test_the_options_of_every_backend_are_checked() -> None:
    assert set(CHECKED_TYPES) == set(MODES)
