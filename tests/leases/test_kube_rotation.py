"""Certificates, CAs and tokens of the API server and of the client are replaced while we run.

No lease may be lost, and no restart may be needed. ``server`` is the small API server; if the
binary of a real one is given, the tests also run with it.
"""

import asyncio
import contextlib
import logging
import os
import shutil

import pytest
import yaml

from tests.leases import kube_real
from tests.leases.authority import Authority
from tests.leases.kube_api import ADMIN, KubeApi, node, server_tls
from tests.leases.kube_cluster import Cluster, member
from tests.leases.observer import observing
from tests.leases.test_kube_source import ME
from tests.wait import until
from udptun.leases.base import StoreDown, StoreRefused, Subnets
from udptun.leases.kube.source import KubeSource

ADMINS = "/O=system:masters/CN=client"


class Small:
    """The small server, with certificates that a test can replace."""

    token = ADMIN

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, folder):
        server = cls()
        server.authority = Authority(folder)
        server._tls = server_tls(*server.authority.issue("server"), server.authority.cafile)
        async with KubeApi(server._tls) as server.api:
            server.url = server.api.url
            yield server

    async def restart(self, authority=None):
        """Restart the server, with a certificate of another CA that is also the CA of clients."""
        await self.api.stop()
        if authority is not None:
            self.api._tls = server_tls(*authority.issue("server"), authority.cafile)
        await self.api.start()


class Real:
    """A real kube-apiserver of this test alone."""

    token = kube_real.ADMIN

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, folder):
        server = cls()
        server.api = kube_real.RealApi(folder)
        server.authority, server.url = server.api.authority, server.api.url
        try:
            server.api.start()
            yield server
        finally:
            server.api.stop()

    async def restart(self, authority=None):
        self.api.stop_server()
        if authority is not None:
            for path in (*authority.issue("server"), authority.cafile):
                shutil.copy(path, self.api.folder / path.name)
        self.api.start_server()


SERVERS = {"small": Small, "real": Real}


@pytest.fixture(params=["small", *kube_real.OWN_REAL])
async def server(request, tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    async with SERVERS[request.param].open(folder) as server:
        yield server


@pytest.fixture
async def cluster(server, tmp_path):
    """Return an administrator, with our node and a peer."""
    folder = tmp_path / "client"
    folder.mkdir()
    cluster = Cluster(server.url, server.token, folder, small=server.api)
    await cluster.create(node("n1", "10.244.1.0/24"))
    await cluster.create(member("n2", "192.0.2.2", "10.244.2.0/24"))
    yield cluster
    await cluster.aclose()


def kubeconfig(cluster, **user):
    """Write a kubeconfig with the CA in ca.pem. Return a source that uses it."""
    config = cluster.config()
    content = yaml.safe_load(config.kubeconfig_file.read_text())
    content["clusters"][0]["cluster"] = {
        "server": cluster.url, "certificate-authority": "ca.pem"}
    content["users"][0]["user"] = user
    config.kubeconfig_file.write_text(yaml.safe_dump(content))
    source = KubeSource(config)
    cluster._sources.append(source)
    return source


def put(cluster, *files, as_name=None):
    """Replace files of the client, as a program that renews certificates does."""
    for file in files:
        fresh = cluster.directory / f"{file.name}.new"
        shutil.copy(file, fresh)
        fresh.replace(cluster.directory / (as_name or file.name))


CERTIFICATE = {"client-certificate": "client.pem", "client-key": "client.key"}


async def test_all_certificates_rotate(server, cluster, tmp_path):
    put(cluster, server.authority.cafile, *server.authority.issue("client", "", ADMINS))
    source = kubeconfig(cluster, **CERTIFICATE)
    await source.acquire(ME, Subnets())
    async with observing(source) as observer:
        assert observer.public_ips() == {"n1": "192.0.2.1", "n2": "192.0.2.2"}
        (tmp_path / "another").mkdir()
        another = Authority(tmp_path / "another")
        await server.restart(another)
        await until(lambda: "CERTIFICATE_VERIFY_FAILED" in source.health.error, "the error")
        put(cluster, another.cafile)
        await until(lambda: "CERTIFICATE_VERIFY_FAILED" not in source.health.error, "the new CA")
        put(cluster, *another.issue("client", "", ADMINS))
        await until(lambda: source.health.connected, "the recovery")
        await cluster.create(member("n3", "192.0.2.3", "10.244.3.0/24"))
        await until(lambda: "n3" in observer.public_ips(), "n3")
        assert [change.key for change in observer.changes] == ["n3"]  # so no lease was lost
        await source.acquire(ME, Subnets())


async def test_a_client_certificate_expires(server, cluster):
    """The watch that runs goes on. The next request uses the new certificate."""
    put(cluster, server.authority.cafile,
        *server.authority.issue("client", "", ADMINS, seconds=15))
    source = kubeconfig(cluster, **CERTIFICATE)
    await source.acquire(ME, Subnets())
    async with observing(source) as observer:
        async def expired():
            await asyncio.sleep(0.1)  # do not load the server with requests
            try:
                await source.acquire(ME, Subnets())
            except (StoreDown, StoreRefused) as error:
                return str(error)

        assert "n1" in await until(expired, "the end of the certificate")
        put(cluster, *server.authority.issue("client", "", ADMINS))
        await source.acquire(ME, Subnets())
        await cluster.create(member("n3", "192.0.2.3", "10.244.3.0/24"))
        await until(lambda: "n3" in observer.public_ips(), "n3")
        assert [change.key for change in observer.changes] == ["n3"]


async def test_a_certificate_and_its_key_are_not_replaced_at_the_same_time(
    server, cluster, caplog
):
    caplog.set_level(logging.INFO)
    put(cluster, server.authority.cafile, *server.authority.issue("client", "", ADMINS))
    source = kubeconfig(cluster, **CERTIFICATE)
    await source.acquire(ME, Subnets())
    certificate, key = server.authority.issue("client", "", ADMINS)
    put(cluster, certificate)
    for _ in range(3):
        await source.acquire(ME, Subnets())
    assert caplog.text.count("the former credentials stay in use") == 1
    put(cluster, key)
    await source.acquire(ME, Subnets())
    assert caplog.text.count("the credentials for the Kubernetes API have changed") == 1


def rewrite(path, content):
    """Replace the content of a file so that no attribute of the file shows it."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


async def test_a_refused_token_is_read_again(server, cluster):
    put(cluster, server.authority.cafile)
    source = kubeconfig(cluster, tokenFile="token")
    (cluster.directory / "token").write_text("x" * len(server.token))
    with pytest.raises(StoreRefused, match="401"):
        await source.acquire(ME, Subnets())
    rewrite(cluster.directory / "token", server.token.encode())
    await source.acquire(ME, Subnets())


async def test_the_ca_is_read_again_after_a_failure_of_tls(server, cluster, tmp_path):
    (tmp_path / "another").mkdir()
    wrong, right = (authority.cafile.read_bytes()
                    for authority in (Authority(tmp_path / "another"), server.authority))
    size = max(len(wrong), len(right))
    (cluster.directory / "ca.pem").write_bytes(wrong.ljust(size, b"\n"))
    (cluster.directory / "token").write_text(server.token)
    source = kubeconfig(cluster, tokenFile="token")
    with pytest.raises(StoreDown, match="CERTIFICATE_VERIFY_FAILED"):
        await source.acquire(ME, Subnets())
    rewrite(cluster.directory / "ca.pem", right.ljust(size, b"\n"))
    await source.acquire(ME, Subnets())


async def test_a_kubeconfig_is_read_again(server, cluster):
    put(cluster, server.authority.cafile)
    source = kubeconfig(cluster, token="x")
    with pytest.raises(StoreRefused, match="401"):
        await source.acquire(ME, Subnets())
    kubeconfig(cluster, token=server.token)
    await source.acquire(ME, Subnets())
