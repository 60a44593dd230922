"""The Kubernetes source with an API server over HTTP.

Tests with ``cluster`` run with the small server. If a real server is given, they also run with it.
Tests with ``small`` run only with the small server, because they must control the server.
"""

import asyncio
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_network

import pytest

from tests.leases.kube_api import Refusal, expired, node
from tests.leases.kube_cluster import DUAL_STACK, NET_CONF, SERVERS, flannel, member, open_cluster
from tests.leases.observer import Observer, observing, running
from tests.wait import until
from udptun.errors import FieldError
from udptun.leases.base import (
    Attributes,
    Identity,
    StoreDown,
    StoreRefused,
    Subnets,
)
from udptun.leases.kube import source as kube_source

ME = Attributes(public_ip=IPv4Address("192.0.2.1"))
ME6 = Attributes(public_ip=IPv4Address("192.0.2.1"), public_ipv6=IPv6Address("2001:db8::1"))
UDP_DATA = {"udptun": {"port": 8285, "mtu": 1450}}
VXLAN_DATA = {"VNI": 1, "VtepMAC": "12:c6:65:89:b4:e3", **UDP_DATA}


@pytest.fixture(params=SERVERS)
async def cluster(request, tmp_path):
    async with open_cluster(request.param, tmp_path) as cluster:
        yield cluster


@pytest.fixture
async def small(tmp_path):
    async with open_cluster("small", tmp_path) as cluster:
        yield cluster


def watches(cluster):
    """Return the URLs of the watches that the small server has received."""
    return [url for _, url, _ in cluster.small.requests if "watch=" in url]


# Acquire


async def test_a_udp_node_publishes_what_flannel_does(cluster):
    await cluster.create(node("n1", "10.244.1.0/24"))
    source = cluster.source()
    lease = await source.acquire(ME, Subnets())
    assert lease.key == lease.name == cluster.name("n1")
    assert lease.subnets == Subnets(ip_network("10.244.1.0/24"))
    assert lease.attributes == ME
    assert not lease.reserved
    assert await cluster.annotations("n1") == {
        "kube-subnet-manager": "true", "backend-type": "", "backend-data": "null",
        "public-ip": "192.0.2.1",
    }
    assert source.health.lease == "held"
    assert source.health.lease_expires is None


async def test_a_vxlan_node_publishes_what_flannel_does_and_our_advert(cluster):
    await cluster.create(node("n1", "10.244.1.0/24"))
    data = {"VNI": 1, "VtepMAC": "12:c6:65:89:b4:e3"}
    await cluster.source().acquire(
        Attributes(IPv4Address("192.0.2.1"), None, "vxlan", data), Subnets())
    assert (await cluster.annotations("n1"))["backend-data"] == \
        '{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}'
    await cluster.source().acquire(
        Attributes(IPv4Address("192.0.2.1"), None, "vxlan", VXLAN_DATA), Subnets())
    there = await cluster.annotations("n1")
    assert there["backend-type"] == "vxlan"
    assert there["backend-data"] == (
        '{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3","udptun":{"port":8285,"mtu":1450}}')


async def test_dual_stack(cluster):
    await cluster.create(node("n1", "10.244.1.0/24", "fd00:10:0:1::/64"))
    data6 = {"VNI": 1, "VtepMAC": "0e:00:00:00:00:01"}
    attributes = Attributes(ME6.public_ip, ME6.public_ipv6, "vxlan", VXLAN_DATA, data6)
    lease = await cluster.source(net_conf=DUAL_STACK).acquire(attributes, Subnets())
    assert lease.subnets == Subnets(
        ip_network("10.244.1.0/24"), IPv6Network("fd00:10:0:1::/64"))
    there = await cluster.annotations("n1")
    assert there["public-ipv6"] == "2001:db8::1"
    assert there["backend-v6-data"] == '{"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}'
    async with observing(cluster.source(net_conf=DUAL_STACK), cluster.prefix) as observer:
        assert observer.leases == {lease.key: lease}


async def test_unchanged_attributes_are_not_written_again(small):
    await small.create(node("n1", "10.244.1.0/24"))
    source = small.source()
    await source.acquire(ME, Subnets())
    version = small.small.version
    await source.acquire(ME, Subnets())
    assert small.small.version == version
    assert [m for m, *_ in small.small.requests].count("PATCH") == 1


async def test_annotations_of_a_former_backend_are_removed(cluster):
    await cluster.create(node("n1", "10.244.1.0/24", annotations=flannel(
        public_ipv6="2001:db8::9", backend_v6_data="{}", backend_type="vxlan", other="stays")))
    await cluster.source().acquire(ME, Subnets())
    assert await cluster.annotations("n1") == {
        "kube-subnet-manager": "true", "backend-type": "", "backend-data": "null",
        "public-ip": "192.0.2.1", "other": "stays",
    }


async def test_an_operators_overwrite_takes_precedence(cluster):
    await cluster.create(node("n1", "10.244.1.0/24", annotations=flannel(
        public_ip_overwrite="198.51.100.7", public_ipv6_overwrite="2001:db8::7")))
    source = cluster.source()
    lease = await source.acquire(ME6, Subnets())
    assert lease.attributes.public_ip == IPv4Address("198.51.100.7")
    there = await cluster.annotations("n1")
    assert (there["public-ip"], there["public-ipv6"]) == ("198.51.100.7", "2001:db8::7")
    lease = await source.acquire(ME, Subnets())  # without IPv6, the IPv6 overwrite is ignored
    assert lease.attributes.public_ipv6 is None


async def test_node_public_ip_overrides_the_option(cluster):
    await cluster.create(node("n1", annotations=flannel(node_public_ip="198.51.100.8")))
    assert await cluster.source().identity() == Identity(
        IPv4Address("198.51.100.8"), overrides_options=True)


async def test_an_invalid_node_public_ip_does_not_drop_the_other_family(cluster, caplog):
    await cluster.create(node("n1", annotations=flannel(
        node_public_ip="here", node_public_ipv6="2001:db8::8")))
    source = cluster.source()
    for _ in range(2):
        assert await source.identity() == Identity(
            None, IPv6Address("2001:db8::8"), overrides_options=True)
    assert caplog.text.count("node-public-ip: 'here'") == 1


async def test_the_last_valid_annotation_of_our_node_stays(cluster):
    await cluster.create(node("n1", "10.244.1.0/24", annotations=flannel(
        node_public_ip="198.51.100.8", public_ip_overwrite="198.51.100.7")))
    source = cluster.source()
    for wrong in ("here", "2001:db8::1", "224.0.0.1", "198.51.100.7 "):
        assert (await source.identity()).public_ip == IPv4Address("198.51.100.8")
        lease = await source.acquire(ME, Subnets())
        assert lease.attributes.public_ip == IPv4Address("198.51.100.7")
        await cluster.annotate("n1", node_public_ip=wrong, public_ip_overwrite=wrong)
    await cluster.annotate("n1", node_public_ip=None, public_ip_overwrite=None)
    assert (await source.identity()).public_ip is None
    assert (await source.acquire(ME, Subnets())).attributes == ME


async def test_the_last_valid_annotation_stays_after_a_restart(cluster):
    await cluster.create(node("n1", "10.244.1.0/24", annotations=flannel(
        node_public_ip="198.51.100.8", public_ip_overwrite="198.51.100.7",
        public_ipv6_overwrite="2001:db8::7")))
    before = cluster.source()
    await before.identity()
    await before.acquire(ME6, Subnets())
    await cluster.annotate("n1", node_public_ip="here", public_ip_overwrite="there",
                           public_ipv6_overwrite="")
    source = cluster.source()
    source.recall(before.memory())
    assert (await source.identity()).public_ip == IPv4Address("198.51.100.8")
    lease = await source.acquire(ME6, Subnets())
    assert lease.attributes.public_ip == IPv4Address("198.51.100.7")
    assert lease.attributes.public_ipv6 == ME6.public_ipv6  # empty is valid: there is no overwrite
    await cluster.annotate("n1", node_public_ip=None, public_ip_overwrite=None)
    assert (await source.identity()).public_ip is None
    assert (await source.acquire(ME, Subnets())).attributes == ME
    assert source.memory() == {}


async def test_a_wrong_memory_is_ignored(cluster):
    await cluster.create(node("n1", "10.244.1.0/24", annotations=flannel(node_public_ip="here")))
    source = cluster.source()
    prefix = "flannel.alpha.coreos.com/"
    source.recall({f"{prefix}node-public-ip": "2001:db8::1", f"{prefix}public-ip-overwrite": "x",
                   "other": "192.0.2.1"})
    assert (await source.identity()).public_ip is None
    assert source.memory() == {}


async def test_another_prefix_of_annotations(cluster):
    await cluster.create(node("n1", "10.244.1.0/24"))
    source = cluster.source(annotation_prefix="example.org/net")
    lease = await source.acquire(ME, Subnets())
    assert (await cluster.get("n1"))["metadata"]["annotations"] == {
        "example.org/net-kube-subnet-manager": "true", "example.org/net-backend-type": "",
        "example.org/net-backend-data": "null", "example.org/net-public-ip": "192.0.2.1",
    }
    async with observing(source, cluster.prefix) as observer:
        assert observer.leases == {lease.key: lease}


@pytest.mark.parametrize(
    ("pod_cidrs", "net_conf", "message"),
    [
        ((), NET_CONF, "podCIDR"),
        (("192.168.1.0/24",), NET_CONF, "10.244.0.0/16"),
        (("10.0.0.0/8",), NET_CONF, "10.244.0.0/16"),
        (("fd00:10::/64",), NET_CONF, "Network"),
        (("10.244.1.0/24",), DUAL_STACK, "IPv6Network"),
        (("10.244.1.0/24", "fd00:99::/64"), DUAL_STACK, "fd00:10::/56"),
    ],
)
async def test_pod_cidrs_outside_the_network_are_refused_without_a_write(
    cluster, pod_cidrs, net_conf, message
):
    await cluster.create(node("n1", *pod_cidrs))
    with pytest.raises(StoreRefused, match=message):
        await cluster.source(net_conf=net_conf).acquire(ME, Subnets())
    assert await cluster.annotations("n1") == {}


async def test_an_ipv4_pod_cidr_is_ignored_if_ipv4_is_disabled(cluster):
    await cluster.create(node("n1", "10.1.0.0/24", "fd00:10:0:1::/64"))
    net_conf = {**DUAL_STACK, "EnableIPv4": False}
    del net_conf["Network"]
    lease = await cluster.source(net_conf=net_conf).acquire(ME6, Subnets())
    assert lease.subnets == Subnets(None, IPv6Network("fd00:10:0:1::/64"))


async def test_an_ipv6_pod_cidr_is_ignored_if_ipv6_is_disabled(cluster):
    """An IPv4-only network in a dual-stack cluster."""
    await cluster.create(node("n1", "10.244.1.0/24", "fd00:10:0:1::/64"))
    await cluster.create(member("n2", "192.0.2.2", "10.244.2.0/24", "fd00:10:0:2::/64"))
    source = cluster.source()
    lease = await source.acquire(ME, Subnets())
    assert lease.subnets == Subnets(ip_network("10.244.1.0/24"))
    async with observing(source, cluster.prefix) as observer, running(source.hold(lease)):
        await until(lambda: cluster.condition("n1"), "the condition")
        assert observer.public_ips() == {"n1": "192.0.2.1", "n2": "192.0.2.2"}


async def test_a_missing_node_is_named(cluster):
    with pytest.raises(StoreRefused, match=f"get node {cluster.name('n1')}.*404"):
        await cluster.source().acquire(ME, Subnets())


async def test_an_invalid_overwrite_is_ignored_and_logged(cluster, caplog):
    await cluster.create(node("n1", "10.244.1.0/24", annotations=flannel(
        public_ip_overwrite="here", public_ipv6_overwrite="2001:db8::7")))
    source = cluster.source()
    for _ in range(2):
        lease = await source.acquire(ME6, Subnets())
        assert lease.attributes.public_ip == ME6.public_ip
        assert lease.attributes.public_ipv6 == IPv6Address("2001:db8::7")
    assert caplog.text.count("public-ip-overwrite: 'here'") == 1


async def test_the_node_of_our_pod(small):
    await small.create(node("n1", "10.244.1.0/24"))
    small.small.pods["kube-udptun", "udptun-x7k"] = "n1"
    source = small.source(
        token="agent", node_name="", pod_name="udptun-x7k", pod_namespace="kube-udptun")
    assert (await source.acquire(ME, Subnets())).name == "n1"


async def test_a_missing_or_unscheduled_pod(small):
    small.small.pods["kube-udptun", "waits"] = ""
    for pod, error in (("none", StoreRefused), ("waits", StoreDown)):
        source = small.source(node_name="", pod_name=pod, pod_namespace="kube-udptun")
        with pytest.raises(error, match=f"pod kube-udptun/{pod}"):
            await source.acquire(ME, Subnets())


async def test_a_conflict_is_a_temporary_error(small):
    await small.create(node("n1", "10.244.1.0/24"))
    source = small.source(token="agent")
    conflict = Refusal(409, "Conflict", "the object has been modified")
    small.small.refuse_next = [None, conflict]  # accept the get, refuse the patch
    with pytest.raises(StoreDown, match=r"409.*modified"):
        await source.acquire(ME, Subnets())
    await source.acquire(ME, Subnets())


async def test_the_deployed_role_is_sufficient(small):
    """The role of the service account in deploy/ permits all requests of a source."""
    await small.create(node("n1", "10.244.1.0/24"))
    source = small.source(token="agent")
    lease = await source.acquire(ME, Subnets())
    async with observing(source) as observer, running(source.hold(lease)):
        await until(lambda: small.condition("n1"), "the condition")
        assert observer.public_ips() == {"n1": "192.0.2.1"}
    users = {user for *_, user in small.small.requests}
    assert "system:serviceaccount:kube-udptun:udptun" in users


@pytest.mark.parametrize("resource", ["nodes", "nodes/status"])
async def test_a_missing_permission_is_named(small, resource):
    await small.create(node("n1", "10.244.1.0/24"))
    rules = [{"apiGroups": [""], "resources": [r], "verbs": ["get", "list", "watch", "patch"]}
             for r in {"nodes", "nodes/status"} - {resource}]
    small.small.allow("less", "less", rules)
    with pytest.raises(StoreRefused, match=f'403.*resource "{resource}"'):
        await small.source(token="less").acquire(ME, Subnets())


async def test_a_narrow_role_is_logged_once_a_minute(small, caplog, monkeypatch):
    await small.create(member("n1", "192.0.2.1", "10.244.1.0/24"))
    rules = [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}]
    small.small.allow("less", "less", rules)
    lease = await small.source().acquire(ME, Subnets())
    source = small.source(token="less")
    lines = lambda: [one for one in caplog.messages if "too narrow" in one]  # noqa: E731
    observer = Observer(source)
    async with running(source.hold(lease)):
        await until(lambda: source.health.errors_n > 20, "many refused requests")
        assert len(lines()) == 2
        assert any('cannot list resource "nodes"' in one for one in lines())
        assert any('cannot patch resource "nodes/status"' in one for one in lines())
        assert not [one for one in caplog.messages if "403" in one and "too narrow" not in one]
        monkeypatch.setattr(kube_source, "REMIND_SECONDS", 0.5)
        await until(lambda: len(lines()) > 2, "the next line")
        small.small.allow("less", "less", None)
        await until(lambda: source.health.connected, "the recovery")
    await observer.close()


# The network


async def test_the_network_is_read_from_net_conf(small):
    network = await small.source().network()
    assert str(network.network) == "10.244.0.0/16"
    assert network.backend_type == "udp"


async def test_a_missing_or_invalid_net_conf(small):
    source = small.source()
    path = small.directory / "net-conf.json"
    path.unlink()
    with pytest.raises(StoreRefused, match=r"net-conf\.json"):
        await source.network()
    path.write_text('{"Network": "10.244.0.0"}')
    with pytest.raises(FieldError, match=r"net-conf\.json"):
        await source.network()


async def test_subnet_lengths_are_not_checked(small):
    """flannel checks subnet lengths only with etcd."""
    source = small.source(net_conf={**NET_CONF, "SubnetLen": 31})
    assert str((await source.network()).network) == "10.244.0.0/16"


# List and watch


async def test_nodes_are_added_changed_and_removed(cluster):
    await cluster.create(member("n1", "192.0.2.1", "10.244.1.0/24"))
    await cluster.create(member("n2", "192.0.2.2", "10.244.2.0/24"))
    async with observing(cluster.source(), cluster.prefix) as observer:
        assert observer.public_ips() == {"n1": "192.0.2.1", "n2": "192.0.2.2"}
        await cluster.create(member("n3", "192.0.2.3", "10.244.3.0/24"))
        await until(lambda: "n3" in observer.public_ips(), "n3")
        await cluster.annotate("n2", public_ip="192.0.2.22")
        await until(lambda: observer.public_ips()["n2"] == "192.0.2.22", "the address")
        await cluster.delete("n1")
        await until(lambda: "n1" not in observer.public_ips(), "the removal of n1")
        assert observer.public_ips() == {"n2": "192.0.2.22", "n3": "192.0.2.3"}
        assert len(observer.changes) == 3


async def test_nodes_without_flannel_have_no_leases(cluster):
    await cluster.create(node("bare", "10.244.1.0/24"))
    await cluster.create(member("off", "192.0.2.2", "10.244.2.0/24", kube_subnet_manager="false"))
    source = cluster.source()
    async with observing(source, cluster.prefix) as observer:
        assert observer.leases == {}
        assert not any(key.startswith(cluster.prefix or "bare") for key in source.health.skipped)
        await cluster.annotate("off", kube_subnet_manager="true")
        await until(lambda: observer.public_ips() == {"off": "192.0.2.2"}, "a lease")
        await cluster.annotate("off", kube_subnet_manager=None)
        await until(lambda: observer.public_ips() == {}, "the removal")


async def test_a_change_of_one_family(cluster):
    """We apply the change. flannel ignores an update if one of the families is unchanged."""
    both = {"public_ipv6": "2001:db8::2"}
    await cluster.create(member("n2", "192.0.2.2", "10.244.2.0/24", "fd00:10:0:2::/64", **both))
    async with observing(cluster.source(net_conf=DUAL_STACK), cluster.prefix) as observer:
        await cluster.annotate("n2", public_ipv6="2001:db8::22")
        await until(lambda: observer.changes, "one change")
        await cluster.annotate("n2", public_ip="192.0.2.22")
        await until(lambda: len(observer.changes) == 2, "the other")
        (lease,) = observer.leases.values()
        assert str(lease.attributes.public_ip) == "192.0.2.22"
        assert str(lease.attributes.public_ipv6) == "2001:db8::22"


async def test_a_node_created_again_with_another_subnet_is_a_change(cluster):
    """A podCIDR changes only if its Node object is created again. flannel ignores this change."""
    await cluster.create(member("n2", "192.0.2.2", "10.244.2.0/24"))
    async with observing(cluster.source(), cluster.prefix) as observer:
        await cluster.delete("n2")
        await cluster.create(member("n2", "192.0.2.2", "10.244.22.0/24"))
        key = cluster.name("n2")
        wanted = Subnets(ip_network("10.244.22.0/24"))
        await until(lambda: key in observer.leases and observer.leases[key].subnets == wanted,
                    "the subnet")


async def test_a_heartbeat_is_not_a_change(small):
    await small.create(member("n2", "192.0.2.2", "10.244.2.0/24"))
    async with observing(small.source()) as observer:
        for i in range(5):
            there = small.small.nodes["n2"]
            await small.small.put({**there, "status": {"images": [{"sizeBytes": i}]}})
        await small.create(member("n3", "192.0.2.3", "10.244.3.0/24"))
        await until(lambda: observer.changes, "n3")
        assert [c.key for c in observer.changes] == ["n3"]


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ({"public_ip": "here"}, "public-ip: 'here'"),
        ({"public_ip": "224.0.0.1"}, "public-ip"),
        ({"public_ip": "2001:db8::1"}, "public-ip"),
        ({"public_ip": ""}, "public-ip"),
        ({"backend_data": "{"}, "backend-data"),
        ({"backend_data": "[" * 2000}, "backend-data"),
    ],
)
async def test_an_invalid_node_keeps_its_previous_lease(
    cluster, annotations, message
):
    await cluster.create(member("n2", "192.0.2.2", "10.244.2.0/24"))
    await cluster.create(member("bad", "192.0.2.9", "10.244.9.0/24", **annotations))
    source = cluster.source()
    async with observing(source, cluster.prefix) as observer:
        assert observer.public_ips() == {"n2": "192.0.2.2"}
        assert message in source.health.skipped[cluster.name("bad")]
        await cluster.annotate("n2", **annotations)
        await until(lambda: cluster.name("n2") in source.health.skipped, "the error")
        await cluster.create(member("n3", "192.0.2.3", "10.244.3.0/24"))
        await until(lambda: "n3" in observer.public_ips(), "n3")
        assert observer.public_ips() == {"n2": "192.0.2.2", "n3": "192.0.2.3"}
        valid = dict.fromkeys(annotations) | {"public_ip": "192.0.2.22", "backend_data": "null"}
        await cluster.annotate("n2", **valid)
        await until(lambda: observer.public_ips()["n2"] == "192.0.2.22", "the valid n2")
        assert cluster.name("n2") not in source.health.skipped


@pytest.mark.parametrize(
    ("good", "bad", "wanted"),
    [
        ({}, {"public_ipv6": "192.0.2.2"}, ("192.0.2.2", None, None)),
        ({"public_ipv6": "2001:db8::2"}, {"public_ipv6": "here"},
         ("192.0.2.2", "2001:db8::2", None)),
        ({"public_ipv6": "2001:db8::2"}, {"public_ip": "here"},
         ("192.0.2.2", "2001:db8::2", None)),
        ({"public_ipv6": "2001:db8::2", "backend_v6_data": "7"}, {"backend_v6_data": "{"},
         ("192.0.2.2", "2001:db8::2", 7)),
    ],
)
async def test_an_invalid_annotation_of_one_family_keeps_the_rest(cluster, good, bad, wanted):
    await cluster.create(member("n2", "192.0.2.2", "10.244.2.0/24", **good))
    source = cluster.source()
    async with observing(source, cluster.prefix) as observer:
        await cluster.annotate("n2", **bad)
        await until(lambda: cluster.name("n2") in source.health.skipped, "the error")
        found = observer.leases[cluster.name("n2")].attributes
        public6 = found.public_ipv6 and str(found.public_ipv6)
        assert (str(found.public_ip), public6, found.backend_v6_data) == wanted
        await cluster.annotate("n2", backend_type="vxlan")  # a change of the rest
        await until(lambda: observer.leases[cluster.name("n2")].attributes.backend_type == "vxlan",
                    "the change")
        await cluster.annotate("n2", **{"public_ip": "192.0.2.2", **dict.fromkeys(bad), **good})
        await until(lambda: cluster.name("n2") not in source.health.skipped, "no error")


async def test_a_node_without_a_subnet_is_reported_until_it_has_one(cluster):
    await cluster.create(member("n2", "192.0.2.2"))
    source = cluster.source()
    async with observing(source, cluster.prefix) as observer:
        assert "podCIDR" in source.health.skipped[cluster.name("n2")]
        body = {"spec": {"podCIDR": "10.244.2.0/24", "podCIDRs": ["10.244.2.0/24"]}}
        await cluster.call("PATCH", f"/api/v1/nodes/{cluster.name('n2')}", body,
                           "application/merge-patch+json")
        await until(lambda: observer.public_ips() == {"n2": "192.0.2.2"}, "n2")
        assert cluster.name("n2") not in source.health.skipped


async def test_nodes_are_listed_in_pages(small):
    for i in range(7):
        await small.create(member(f"n{i}", f"192.0.2.{i + 1}", f"10.244.{i}.0/24"))
    async with observing(small.source(page=3)) as observer:
        assert len(observer.leases) == 7
    lists = [url for _, url, _ in small.small.requests if "limit=3" in url]
    assert len(lists) == 3


async def test_a_listing_that_takes_too_long_is_repeated_without_pages(small):
    for i in range(7):
        await small.create(member(f"n{i}", f"192.0.2.{i + 1}", f"10.244.{i}.0/24"))

    async def forget():
        await small.small.pass_over()
        small.small.compact()

    small.small.on_page = forget
    async with observing(small.source(page=3)) as observer:
        assert len(observer.leases) == 7


# Failures of a watch


@pytest.mark.parametrize("as_event", [True, False])
async def test_a_compacted_version_lists_again_and_yields_the_difference(small, as_event):
    small.small.gone_as_event = as_event
    for i in (1, 2, 3):
        await small.create(member(f"n{i}", f"192.0.2.{i}", f"10.244.{i}.0/24"))
    source = small.source()
    async with observing(source) as observer:
        await small.small.stop()
        await small.small.delete("n1")
        await small.small.annotate("n2", public_ip="192.0.2.22")
        await small.small.put(member("n4", "192.0.2.4", "10.244.4.0/24"))
        small.small.compact()
        await small.small.start()
        await until(lambda: observer.public_ips() == {
            "n2": "192.0.2.22", "n3": "192.0.2.3", "n4": "192.0.2.4"}, "the difference")
        assert len(observer.changes) == 3  # n3 is unchanged
        assert source.health.relists_n == 1


async def test_a_bookmark_avoids_a_listing(small):
    small.small.bookmark_seconds = 0.02
    await small.create(member("n1", "192.0.2.1", "10.244.1.0/24"))
    source = small.source()
    async with observing(source) as observer:
        await small.small.pass_over(100)
        version = small.small.version
        seen = source.health.last_contact
        await until(lambda: source.health.last_contact > seen, "a bookmark")
        small.small.compact()
        await small.small.cut_watches()
        await until(lambda: small.small.watches_n, "the next watch")
        await small.create(member("n2", "192.0.2.2", "10.244.2.0/24"))
        await until(lambda: "n2" in observer.public_ips(), "n2")
        assert source.health.relists_n == 0
        watches = [url for _, url, _ in small.small.requests if f"resourceVersion={version}" in url]
        assert watches


async def test_a_lost_connection_continues_from_its_version(small):
    await small.create(member("n1", "192.0.2.1", "10.244.1.0/24"))
    source = small.source()
    async with observing(source) as observer:
        for i in range(2, 7):
            await small.small.cut_watches()
            await small.create(member(f"n{i}", f"192.0.2.{i}", f"10.244.{i}.0/24"))
        await until(lambda: len(observer.leases) == 6, "all nodes")
        assert source.health.relists_n == 0
        lists = [url for _, url, _ in small.small.requests
                 if "watch" not in url and "limit" in url]
        assert len(lists) == 1


async def test_a_watch_that_ends_normally_is_continued(small):
    await small.create(member("n1", "192.0.2.1", "10.244.1.0/24"))
    source = small.source(watch_timeout=1)
    async with observing(source) as observer:
        await until(lambda: len(watches(small)) > 1, "a second watch")
        assert source.health.errors_n == 0
        await small.create(member("n2", "192.0.2.2", "10.244.2.0/24"))
        await until(lambda: "n2" in observer.public_ips(), "n2")


async def test_a_stopped_server_removes_no_lease(small):
    await small.create(member("n1", "192.0.2.1", "10.244.1.0/24"))
    source = small.source()
    async with observing(source) as observer:
        await small.small.stop()
        await until(lambda: not source.health.connected, "the error")
        assert "nodes" in source.health.error
        assert source.health.errors_n
        assert observer.public_ips() == {"n1": "192.0.2.1"}
        await small.small.put(member("n2", "192.0.2.2", "10.244.2.0/24"))
        await small.small.start()
        await until(lambda: "n2" in observer.public_ips(), "n2")
        await until(lambda: source.health.connected, "the recovery")
        assert source.health.error == ""
        assert source.health.relists_n == 0


async def test_a_server_that_is_down_at_the_start(small):
    await small.create(member("n1", "192.0.2.1", "10.244.1.0/24"))
    await small.small.stop()
    source = small.source()
    with pytest.raises(StoreDown):
        await source.acquire(ME, Subnets())
    observer = Observer(source)
    await until(lambda: source.health.errors_n > 2, "the error")
    assert observer.snapshots == 0
    await small.small.start()
    await until(lambda: observer.public_ips() == {"n1": "192.0.2.1"}, "the snapshot")
    await observer.close()


async def test_a_frozen_server_is_detected(small):
    await small.create(member("n1", "192.0.2.1", "10.244.1.0/24"))
    source = small.source(watch_silence=0.2, request_timeout=0.2)
    async with observing(source) as observer:
        small.small.answering.clear()
        await until(lambda: "does not respond" in source.health.error, "the error")
        assert not source.health.connected
        with pytest.raises(StoreDown, match="does not respond"):
            await source.acquire(ME, Subnets())
        small.small.answering.set()
        await small.create(member("n2", "192.0.2.2", "10.244.2.0/24"))
        await until(lambda: "n2" in observer.public_ips(), "n2")
        await until(lambda: source.health.connected, "the recovery")


async def test_a_quiet_watch_is_no_failure(small):
    """The real server sends no bookmark for minutes if nothing changes."""
    await small.create(member("n1", "192.0.2.1", "10.244.1.0/24"))
    source = small.source(watch_silence=0.1)
    async with observing(source) as observer:
        await until(lambda: len(watches(small)) > 2, "a third watch")
        assert source.health.errors_n == 0
        assert source.health.relists_n == 0
        await small.create(member("n2", "192.0.2.2", "10.244.2.0/24"))
        await until(lambda: "n2" in observer.public_ips(), "n2")


async def test_a_store_that_was_set_back_to_a_backup_is_listed_again(small):
    await small.create(member("n1", "192.0.2.1", "10.244.1.0/24"))
    backup = small.small.version
    await small.create(member("n2", "192.0.2.2", "10.244.2.0/24"))
    source = small.source(watch_silence=0.1)
    async with observing(source) as observer:
        assert len(observer.leases) == 2
        await small.small.set_back(backup)
        await until(lambda: observer.public_ips() == {"n1": "192.0.2.1"}, "the backup")
        assert source.health.relists_n == 1
        await small.create(member("n3", "192.0.2.3", "10.244.3.0/24"))
        await until(lambda: "n3" in observer.public_ips(), "n3")


@pytest.mark.parametrize("code", [429, 500, 503, 403, 410])
async def test_temporary_refusals_are_retried(small, code):
    await small.create(member("n1", "192.0.2.1", "10.244.1.0/24"))
    source = small.source(token="agent")
    async with observing(source) as observer:
        refusal = expired() if code == 410 else Refusal(code, "Reason", "not now")
        small.small.refuse_next = [refusal] * 3
        await small.small.cut_watches()
        await small.create(member("n2", "192.0.2.2", "10.244.2.0/24"))
        await until(lambda: "n2" in observer.public_ips(), "n2")


async def test_a_response_that_is_not_from_kubernetes(small):
    """A proxy, for example, can send such a response."""
    async def page(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\n<p>no</p>")
        writer.close()

    server = await asyncio.start_server(page, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        source = small.source(api_url=url)
        with pytest.raises(StoreDown, match="not from Kubernetes"):
            await source.acquire(ME, Subnets())


# Credentials


async def test_an_expired_token_is_read_again(small):
    await small.create(node("n1", "10.244.1.0/24"))
    source = small.source(token="agent")
    lease = await source.acquire(ME, Subnets())
    rules = small.small.users["agent"]
    async with observing(source) as observer:
        assert observer.public_ips() == {"n1": "192.0.2.1"}
        small.small.expire("agent")
        await small.small.cut_watches()
        await until(lambda: "401" in source.health.error, "the error")
        with pytest.raises(StoreRefused, match="401"):
            await source.acquire(ME, Subnets())
        small.small.allow("fresh", *rules)
        (small.directory / "token").write_text("fresh")
        await until(lambda: source.health.connected, "the recovery")
        assert await source.acquire(ME, Subnets()) == lease


async def test_a_missing_token_is_named(small):
    source = small.source()
    (small.directory / "token").unlink()
    with pytest.raises(StoreRefused, match="token"):
        await source.acquire(ME, Subnets())


# Hold


async def test_hold_publishes_that_the_network_is_up(cluster):
    await cluster.create(node("n1", "10.244.1.0/24", conditions=[
        {"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"}]))
    source = cluster.source()
    lease = await source.acquire(ME, Subnets())
    assert (await cluster.condition("n1"))["status"] == "True"  # hold publishes it

    async def up():
        condition = await cluster.condition("n1")
        return condition["status"] == "False" and condition

    async with running(source.hold(lease)):
        condition = await until(up, "the condition")
        assert condition["reason"] == "FlannelIsUp"
        assert condition["lastTransitionTime"].endswith("Z")


async def test_the_network_condition_is_not_written_if_disabled(small):
    await small.create(node("n1", "10.244.1.0/24"))
    source = small.source(set_node_network_unavailable=False)
    lease = await source.acquire(ME, Subnets())
    async with running(source.hold(lease)):
        gets = lambda: [u for m, u, _ in small.small.requests if u.endswith("/nodes/n1")]  # noqa: E731
        await until(lambda: len(gets()) > 1, "a second check")
        assert await small.condition("n1") is None


async def test_removed_annotations_are_restored(cluster, caplog):
    await cluster.create(node("n1", "10.244.1.0/24"))
    source = cluster.source()
    lease = await source.acquire(ME, Subnets())
    whole = await cluster.annotations("n1")
    async with observing(source, cluster.prefix), running(source.hold(lease)):
        await cluster.annotate("n1", kube_subnet_manager=None, public_ip="203.0.113.1")

        async def restored():
            return await cluster.annotations("n1") == whole

        await until(restored, "the annotations")
        await until(lambda: "they are restored" in caplog.text, "a log line")


async def test_a_clone_that_publishes_our_node_is_reported_and_overwritten_once(small):
    """Two machines have one node name. Neither may restore its annotations all the time."""
    await small.create(node("n1", "10.244.1.0/24"))
    source = small.source()
    lease = await source.acquire(ME, Subnets())
    async with observing(source, small.prefix), running(source.hold(lease)):
        async def ours():
            return (await small.annotations("n1"))["public-ip"] == "192.0.2.1"

        await small.annotate("n1", public_ip="192.0.2.66")
        await until(ours, "our address")
        assert source.health.contested == (
            "another machine publishes its address 192.0.2.66 in the annotations of our Node "
            "object n1; ours is 192.0.2.1")
        await small.annotate("n1", public_ip="192.0.2.66")
        await until(lambda: source._contest.delay > 0, "the second write to be seen")
        assert not await ours()
        assert source.health.lease == "held"


async def test_a_later_overwrite_is_published(cluster):
    """flannel reads public-ip-overwrite only at its start. We also publish a later change."""
    await cluster.create(node("n1", "10.244.1.0/24"))
    source = cluster.source()
    lease = await source.acquire(ME, Subnets())
    async with observing(source, cluster.prefix) as observer, running(source.hold(lease)):
        await cluster.annotate("n1", public_ip_overwrite="198.51.100.7")
        await until(lambda: observer.public_ips() == {"n1": "198.51.100.7"}, "the address")
        await cluster.annotate("n1", public_ip_overwrite=None)
        await until(lambda: observer.public_ips() == {"n1": "192.0.2.1"}, "our own address")


async def test_a_node_that_registers_again_is_published_again(cluster):
    await cluster.create(node("n1", "10.244.1.0/24"))
    source = cluster.source()
    lease = await source.acquire(ME, Subnets())
    async with observing(source, cluster.prefix) as observer, running(source.hold(lease)):
        await until(lambda: cluster.condition("n1"), "the condition")
        await cluster.delete("n1")
        await until(lambda: source.health.lease == "lost", "the loss")
        assert "404" in source.health.lease_error
        await cluster.create(node("n1", "10.244.1.0/24"))
        await until(lambda: source.health.lease == "held", "the lease")
        await until(lambda: cluster.condition("n1"), "the condition")
        await until(lambda: observer.public_ips() == {"n1": "192.0.2.1"}, "the lease of n1")


async def test_a_changed_pod_cidr_is_a_lost_lease(cluster):
    await cluster.create(node("n1", "10.244.1.0/24"))
    source = cluster.source()
    lease = await source.acquire(ME, Subnets())
    async with observing(source, cluster.prefix), running(source.hold(lease)):
        await cluster.delete("n1")
        await cluster.create(member("n1", "192.0.2.1", "10.244.9.0/24"))
        await until(lambda: "10.244.9.0/24" in source.health.lease_error, "the loss")
        assert source.health.lease == "lost"
    lease = await source.acquire(ME, lease.subnets)
    assert lease.subnets == Subnets(ip_network("10.244.9.0/24"))
    assert source.health.lease == "held"


async def test_another_pod_cidr_is_published(cluster):
    """A Node that is deleted and created again has no annotations: no node routes its subnet."""
    await cluster.create(node("n1", "10.244.1.0/24"))
    source = cluster.source()
    lease = await source.acquire(ME, Subnets())
    async with observing(source, cluster.prefix) as observer, running(source.hold(lease)):
        await until(lambda: cluster.condition("n1"), "the condition")
        await cluster.delete("n1")
        await cluster.create(node("n1", "10.244.9.0/24"))
        await until(lambda: [one.subnets for one in observer.leases.values()] == [
            Subnets(ip_network("10.244.9.0/24"))], "the lease of n1")
        assert source.health.lease == "lost"  # until the host is set up for the new podCIDR
        assert await cluster.condition("n1") is None


async def test_an_outage_loses_no_lease(small):
    await small.create(node("n1", "10.244.1.0/24"))
    source = small.source()
    lease = await source.acquire(ME, Subnets())
    async with running(source.hold(lease)):
        await until(lambda: small.condition("n1"), "the condition")
    await small.small.stop()
    async with running(source.hold(lease)):
        await until(lambda: source.health.errors_n > 3, "failures")
        assert source.health.lease == "held"
        small.small.nodes["n1"]["metadata"]["annotations"].clear()
        await small.small.start()

        async def restored():
            return (await small.annotations("n1")).get("public-ip") == "192.0.2.1"

        await until(restored, "the annotations")


async def test_hold_repeats_a_refused_patch(small):
    await small.create(node("n1", "10.244.1.0/24"))
    source = small.source(token="agent")
    lease = await source.acquire(ME, Subnets())
    conflict = Refusal(409, "Conflict", "the object has been modified")
    small.small.refuse_next = [None, conflict]  # accept the get, refuse the condition's patch
    async with running(source.hold(lease)):
        await until(lambda: small.condition("n1"), "the condition")


async def test_hold_publishes_a_cached_lease(small):
    """acquire is not called. This happens if the API server is down at the start."""
    await small.create(node("n1", "10.244.1.0/24"))
    lease = await small.source().acquire(ME, Subnets())
    await small.small.annotate("n1", public_ip=None)
    async with running(small.source().hold(lease)):
        async def restored():
            return (await small.annotations("n1")).get("public-ip") == "192.0.2.1"

        await until(restored, "the annotations")


async def test_hold_ends_when_cancelled_during_a_change(small):
    """With Python 3.11's asyncio.wait_for, the cancellation would be lost, and the daemon would
    never end."""
    await small.create(node("n1", "10.244.1.0/24"))
    source = small.source()
    lease = await source.acquire(ME, Subnets())
    task = asyncio.create_task(source.hold(lease))
    await until(lambda: small.condition("n1"), "the condition")
    await until(lambda: source._own_changed._waiters, "hold to wait")
    source._own_changed.set()
    task.cancel()
    await asyncio.wait({task}, timeout=60)
    assert task.cancelled()
