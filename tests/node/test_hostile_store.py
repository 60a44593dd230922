"""Hostile values of every kind of store, on their way to the log, /readyz, the status and metrics.

The stores, the sources and the readers are real. The values have line ends, escape sequences, and
characters that change the direction of writing; some are 100 kB long.
"""

import asyncio
import contextlib
import json
import logging
from ipaddress import IPv4Address, IPv4Network

import pytest

from tests.leases.etcd_server import Etcd, needs_etcd
from tests.leases.kube_cluster import member, open_cluster
from tests.leases.observer import Observer, running
from tests.node.node_reports import ready
from tests.wait import until
from udptun.cli.logs import TextFormatter
from udptun.cli.node_status import node_block, peer_block
from udptun.leases.base import Attributes, StoreDown, StoreRefused, Subnets
from udptun.leases.etcd.config import EtcdConfig
from udptun.leases.file.config import FileConfig
from udptun.leases.kube.config import KubeConfig
from udptun.leases.sources import make_source
from udptun.node.backends.plan import LocalNode, Plan
from udptun.node.backends.udp import UdpReach
from udptun.node.status.metrics import Metrics
from udptun.node.status.readiness import judge
from udptun.node.status.report import PeersReport
from udptun.node.status.socket import node_json

EVIL = "x\n[+]store: forged\x1b[2J\x1b]0;title\x07\u202e\u200b\x85y"
LONG = EVIL + "A" * 100_000
LINE_MAX = 4200
ALL_TEXT_MAX = 40_000


async def local_addresses():
    return [IPv4Address("192.0.2.1")]


def texts_of(value):
    """Yield all strings of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from texts_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner)


async def assert_harmless(source, caplog, leases=()):
    """Check everything that an operator sees. Return it as one text."""
    report = ready()
    report.source = source.health
    local = LocalNode(
        "n0", Subnets(IPv4Network("10.244.0.0/24")), (IPv4Network("10.244.0.0/16"),),
        (IPv4Address("192.0.2.1"),), (UdpReach(8285, (4,)),))
    report.peers = PeersReport(unreachable=Plan(local, leases).unreachable)
    report.event("path_changed", peer="n2", subnet="10.244.2.0/24", path="udp",
                 reason=source.health.error)
    status = json.loads(b"".join([piece async for piece in node_json(report)]))
    formatter = TextFormatter("%(levelname)s %(name)s: %(message)s")
    parts = [
        *map(str, judge(report)), *texts_of(status), node_block(status),
        *map(peer_block, status["peers"]),
        Metrics(report).render().decode(), *map(formatter.format, caplog.records),
    ]
    for line in "\n".join(parts).split("\n"):
        assert line.isprintable() and len(line) <= LINE_MAX, line[:2 * LINE_MAX]
        assert not line.startswith("[+]store: forged")
    assert sum(map(len, parts)) < ALL_TEXT_MAX
    return "\n".join(parts)


@contextlib.asynccontextmanager
async def opened(config):
    source = make_source(config, local_addresses)
    try:
        yield source
    finally:
        await source.aclose()


NODE = '[[nodes]]\nname = {name}\npublic = {public}\nsubnets = "10.244.1.0/24"\n{more}'
HOSTS = {
    "name": 'network = "10.244.0.0/16"\n' + NODE.replace("{name}", "EVIL"),
    "public": 'network = "10.244.0.0/16"\n' + NODE.replace("{public}", "EVIL"),
    "network": "network = EVIL\n" + NODE,
    "unknown key": 'network = "10.244.0.0/16"\nEVIL = 1\n' + NODE,
    "unknown key of a node": 'network = "10.244.0.0/16"\n' + NODE.replace("{more}", "EVIL = EVIL"),
    "syntax": 'network = "10.244.0.0/16"\nEVIL EVIL\n' + NODE,
}


@pytest.mark.parametrize("text", [EVIL, LONG])
@pytest.mark.parametrize("case", HOSTS)
async def test_a_hosts_file(tmp_path, caplog, case, text):
    content = HOSTS[case]
    for name, value in {"{name}": '"n1"', "{public}": '"192.0.2.1"', "{more}": ""}.items():
        content = content.replace(name, value)
    quoted = json.dumps(text).replace("\\u007f", "\x7f")
    (tmp_path / "hosts.toml").write_text(content.replace("EVIL", quoted))
    async with opened(FileConfig(tmp_path / "hosts.toml")) as source:
        with pytest.raises((StoreRefused, ValueError)) as raised:
            await source.network()
        assert str(raised.value).isprintable()
        assert "is not valid" in await assert_harmless(source, caplog)


@needs_etcd
async def test_etcd(tmp_path, caplog):
    server = Etcd(tmp_path).start()
    try:
        await server.put("config", '{"Network": "10.244.0.0/16", "SubnetLen": 24}')
        values = {
            "subnets/10.244.9.0-24": json.dumps({"PublicIP": "192.0.2.9", "BackendType": LONG}),
            "subnets/10.244.8.0-24": json.dumps({"PublicIP": EVIL}),
            "subnets/10.244.7.0-24": json.dumps({"PublicIP": LONG}),
            "subnets/10.244.6.0-24": LONG,
            "subnets/10.244.5.0-24": json.dumps({"PublicIP": ["[" * 50_000]}),
            **{f"subnets/{EVIL}{n}": "{}" for n in range(300)},
            f"subnets/{EVIL}{'A' * 10_000}": "{}",
        }
        await server.put_many(values)
        async with opened(EtcdConfig((server.url,))) as source:
            observer = await Observer(source).ready()
            try:
                await server.put(f"subnets/later{EVIL}", LONG)
                await until(lambda: len(source.health.skipped) == 306, "the entries")
                text = await assert_harmless(source, caplog, observer.leases.values())
                assert "306 cannot be used" in text and "so are 304 more entries" in text
                assert len([r for r in caplog.records if "invalid" in r.getMessage()]) == 1
                assert "backend is x\\n[+]store" in text
                await server.put("config", LONG)
                with pytest.raises(ValueError, match="not valid") as raised:
                    await source.network()
                assert str(raised.value).isprintable() and len(str(raised.value)) < LINE_MAX
            finally:
                await observer.close()
    finally:
        server.kill()


async def test_kubernetes(tmp_path, caplog):
    async with open_cluster("small", tmp_path) as cluster:
        await cluster.create(member("n1", EVIL, "10.244.1.0/24"))
        await cluster.create(member("n2", LONG, "10.244.2.0/24"))
        await cluster.create(member("n3", "192.0.2.3", "10.244.3.0/24", backend_data=LONG))
        await cluster.create(member("n4", "192.0.2.4", "10.244.4.0/24", backend_type=LONG))
        async with opened(cluster.config()) as source:
            observer = await Observer(source).ready()
            try:
                text = await assert_harmless(source, caplog, observer.leases.values())
            finally:
                await observer.close()
        assert "3 cannot be used" in text and "so are 2 more entries" in text
        assert "backend is x\\n[+]store" in text


def answer(status, body):
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


NODE_LIST = {"metadata": {"resourceVersion": "1"}, "items": [
    {"metadata": {"name": LONG, "annotations": {
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/public-ip": EVIL}}, "spec": {"podCIDR": "10.244.9.0/24"}}]}


@pytest.mark.parametrize("response", [
    answer("403 Forbidden", json.dumps({"code": 403, "message": LONG}).encode()),
    answer("500 Error", LONG.encode()),
    answer("200 OK", json.dumps({"metadata": LONG}).encode()),
    answer("200 OK", json.dumps(NODE_LIST).encode()),
    b"HTTP/1.1 200 " + LONG.encode() + b"\r\n\r\n",
    LONG.encode() + b"\r\n\r\n",
], ids=["refusal", "text", "type", "name", "status line", "no HTTP"])
async def test_a_hostile_api_server(tmp_path, caplog, response):
    caplog.set_level(logging.INFO)

    async def serve(reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(response)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    config = KubeConfig(api_url=f"http://127.0.0.1:{port}", node_name="n1")
    async with server, opened(config) as source:
        async def read():
            async for _ in source.updates():
                pass

        async with running(read()):
            health = source.health
            await until(lambda: health.errors_n > 1 or health.skipped, "failures")
            await assert_harmless(source, caplog)
        with pytest.raises((StoreDown, StoreRefused)) as raised:
            await source.acquire(Attributes(IPv4Address("192.0.2.1")), Subnets())
        assert str(raised.value).isprintable() and len(str(raised.value)) < LINE_MAX
