"""Authentication with a real etcd, in both directions: TLS, client certificates, users."""

import contextlib
import ipaddress

import pytest

from tests.leases.authority import Authority
from tests.leases.etcd_server import Etcd, needs_etcd
from tests.leases.observer import Observer
from tests.wait import until
from udptun.leases.base import Attributes, StoreDown, StoreRefused, Subnets
from udptun.leases.etcd.config import EtcdConfig
from udptun.leases.etcd.source import EtcdSource

pytestmark = needs_etcd

CONFIG = '{"Network": "10.5.0.0/16"}'
ME = Attributes(ipaddress.IPv4Address("192.0.2.1"))


@pytest.fixture
async def make():
    """Return a function that creates sources. Close the sources at the end."""
    async with contextlib.AsyncExitStack() as stack:
        def make(etcd, **options):
            source = EtcdSource(EtcdConfig((etcd.url,), **options))
            stack.push_async_callback(source.aclose)
            return source
        yield make


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def tls_etcd(tmp_path, authority):
    cert, key = authority.issue("server")
    server = Etcd(tmp_path, tls=("--cert-file", str(cert), "--key-file", str(key))).start()
    yield server
    server.kill()


@pytest.fixture
def mutual_etcd(tmp_path, authority):
    cert, key = authority.issue("server")
    server = Etcd(tmp_path, tls=(
        "--cert-file", str(cert), "--key-file", str(key),
        "--client-cert-auth", "--trusted-ca-file", str(authority.cafile),
    )).start()
    yield server
    server.kill()


@pytest.fixture
async def auth_etcd(tmp_path):
    server = Etcd(tmp_path).start()
    await server.put("config", CONFIG)
    await server.enable_auth()
    yield server
    server.kill()


async def test_tls(tls_etcd, authority, make):
    await tls_etcd.put("config", CONFIG)
    source = make(tls_etcd, cafile=str(authority.cafile))
    assert (await source.acquire(ME, Subnets())).subnets.v4
    observer = await Observer(source).ready()
    assert len(observer.leases) == 1
    await observer.close()


async def test_a_server_certificate_of_another_ca_is_rejected(tls_etcd, tmp_path, make):
    other = Authority(tmp_path, "other")
    for options in ({"cafile": str(other.cafile)}, {}):  # {}: the system's CAs
        with pytest.raises(StoreDown, match="etcd at"):
            await make(tls_etcd, **options).network()


async def test_plain_text_to_a_tls_port_fails(tls_etcd, make):
    tls_etcd.url = tls_etcd.url.replace("https", "http")
    with pytest.raises(StoreDown):
        await make(tls_etcd).network()


async def test_client_certificates(mutual_etcd, authority, make):
    await mutual_etcd.put("config", CONFIG)
    cert, key = authority.issue("node", "extendedKeyUsage=clientAuth")
    source = make(mutual_etcd, cafile=str(authority.cafile), certfile=str(cert), keyfile=str(key))
    assert (await source.acquire(ME, Subnets())).subnets.v4
    with pytest.raises(StoreDown):
        await make(mutual_etcd, cafile=str(authority.cafile)).network()


async def test_a_replaced_certificate_is_read_again(mutual_etcd, authority, tmp_path, make):
    """The server does not trust the CA of the first certificate. Then the file is replaced."""
    await mutual_etcd.put("config", CONFIG)
    (tmp_path / "other").mkdir()
    cert, key = Authority(tmp_path / "other").issue("node", "extendedKeyUsage=clientAuth")
    source = make(mutual_etcd, cafile=str(authority.cafile), certfile=str(cert), keyfile=str(key))
    with pytest.raises(StoreDown):
        await source.network()
    good_cert, good_key = authority.issue("node", "extendedKeyUsage=clientAuth")
    good_cert.replace(cert)
    good_key.replace(key)
    assert (await source.network()).network


async def test_a_missing_file_is_named(tls_etcd, make):
    with pytest.raises(StoreRefused, match="cannot read --etcd-cafile /nowhere"):
        await make(tls_etcd, cafile="/nowhere").network()


async def test_user_and_password(auth_etcd, make):
    source = make(auth_etcd, username="flannel", password="pass")
    lease = await source.acquire(ME, Subnets())
    observer = await Observer(source).ready()
    assert [*observer.leases] == [lease.key]
    await auth_etcd.put("subnets/10.5.200.0-24", '{"PublicIP":"192.0.2.9"}')
    await until(lambda: "10.5.200.0-24" in observer.leases, "the change")
    await observer.close()


@pytest.mark.parametrize(("options", "message"), [
    ({}, "user name is empty"),
    ({"username": "flannel", "password": "wrong"}, "invalid user ID or password"),
    ({"username": "nobody", "password": "pass"}, "invalid user ID or password"),
    ({"username": "flannel", "password": "pass", "prefix": "/elsewhere"}, "permission denied"),
])
async def test_the_reason_of_a_refusal_is_reported(auth_etcd, make, options, message):
    source = make(auth_etcd, **options)
    with pytest.raises(StoreRefused, match=message):
        await source.network()
    observer = Observer(source)
    await until(lambda: message in source.health.error, "the same error of the watch")
    assert not source.health.connected
    await observer.close()


async def test_a_user_name_is_ignored_without_authentication(tmp_path, make):
    etcd = Etcd(tmp_path).start()
    try:
        await etcd.put("config", CONFIG)
        source = make(etcd, username="flannel", password="pass")
        assert (await source.network()).network
        await etcd.enable_auth()  # from now on, requests need a user
        assert (await source.network()).network
    finally:
        etcd.kill()


async def test_an_invalidated_token_is_renewed(auth_etcd, make):
    source = make(auth_etcd, username="flannel", password="pass")
    await source.network()
    await auth_etcd.forget_tokens()
    assert (await source.network()).network


async def test_a_watch_renews_an_invalidated_token(auth_etcd, make):
    """No other request is sent, so the watch must detect the invalid token."""
    source = make(auth_etcd, username="flannel", password="pass")
    observer = await Observer(source).ready()
    await auth_etcd.forget_tokens()
    auth_etcd.kill()
    await until(lambda: not source.health.connected, "the outage")
    auth_etcd.start()
    await until(lambda: source.health.connected, "the watch")
    await auth_etcd.log_in()
    await auth_etcd.put("subnets/10.5.200.0-24", '{"PublicIP":"192.0.2.9"}')
    await until(lambda: "10.5.200.0-24" in observer.leases, "a change after the restart")
    assert source.health.relists_n == 0
    await observer.close()


async def test_a_token_older_than_a_change_of_roles_is_renewed(auth_etcd, make):
    source = make(auth_etcd, username="flannel", password="pass")
    await source.network()
    await auth_etcd.ask("auth/role/add", name="another")  # newer than each token
    assert (await source.network()).network


async def test_a_revoked_permission_removes_no_lease(auth_etcd, make):
    source = make(auth_etcd, username="flannel", password="pass")
    lease = await source.acquire(ME, Subnets())
    observer = await Observer(source).ready()
    await auth_etcd.ask("auth/user/revoke", name="flannel", role="flannel")
    auth_etcd.kill()
    auth_etcd.start()
    await until(lambda: "permission denied" in source.health.error, "the refusal")
    assert [*observer.leases] == [lease.key]
    await auth_etcd.log_in()
    await auth_etcd.ask("auth/user/grant", user="flannel", role="flannel")
    await until(lambda: source.health.connected, "the watch")
    await observer.close()
