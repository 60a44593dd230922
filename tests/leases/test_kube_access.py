"""Access to the API server: the order in which flannel's options are used, TLS, and all kinds of
credentials."""

import asyncio
import json
from ipaddress import IPv4Address

import pytest
import yaml

from tests.leases.authority import Authority
from tests.leases.kube_api import ADMIN, KubeApi, node, server_tls
from tests.leases.kube_cluster import NET_CONF, deployed_rules
from udptun.errors import FieldError
from udptun.leases.base import Attributes, StoreDown, StoreRefused, Subnets
from udptun.leases.kube.config import KubeConfig
from udptun.leases.kube.source import KubeSource

ME = Attributes(public_ip=IPv4Address("192.0.2.1"))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Return the folder with ca.pem, a server's certificate, and the certificate of the client
    "admin"."""
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    for name in ("server", "admin"):
        authority.issue(name)
    return authority.folder


@pytest.fixture
async def api(certificates):
    tls = server_tls(
        certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
    async with KubeApi(tls) as api:
        api.allow("agent", "system:serviceaccount:kube-udptun:udptun", deployed_rules())
        await api.put(node("n1", "10.244.1.0/24"))
        yield api


@pytest.fixture
def account(tmp_path, certificates):
    """Return the directory of a service account, with the files that the kubelet mounts."""
    directory = tmp_path / "serviceaccount"
    directory.mkdir()
    (directory / "token").write_text("agent")
    (directory / "namespace").write_text("kube-udptun")
    (directory / "ca.crt").write_bytes((certificates / "ca.pem").read_bytes())
    return directory


@pytest.fixture
async def acquire(tmp_path):
    """Acquire a lease with this configuration, and close the source."""
    net_conf = tmp_path / "net-conf.json"
    net_conf.write_text(json.dumps(NET_CONF))

    async def acquire(**options):
        options = {"service_account": tmp_path / "none", **options}
        source = KubeSource(KubeConfig(node_name="n1", net_config_path=net_conf, **options))
        try:
            return await source.acquire(ME, Subnets())
        finally:
            await source.aclose()

    return acquire


def kubeconfig(path, server, cluster=(), user=()):
    path.write_text(yaml.safe_dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": server, **dict(cluster)}}],
        "users": [{"name": "u", "user": dict(user)}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }))
    return path


async def test_a_pod_uses_its_service_account(api, account, acquire, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    assert (await acquire(service_account=account)).name == "n1"
    assert {user for *_, user in api.requests} == {"system:serviceaccount:kube-udptun:udptun"}


async def test_a_client_certificate(api, certificates, tmp_path, acquire):
    path = kubeconfig(
        tmp_path / "kubeconfig", api.url,
        {"certificate-authority": str(certificates / "ca.pem")},
        {"client-certificate": str(certificates / "admin.pem"),
         "client-key": str(certificates / "admin.key")},
    )
    await acquire(kubeconfig_file=path)
    assert {user for *_, user in api.requests} == {"admin"}


async def test_a_server_certificate_of_another_ca_is_rejected(api, tmp_path, acquire):
    path = kubeconfig(tmp_path / "kubeconfig", api.url, user={"token": ADMIN})
    with pytest.raises(StoreDown, match="CERTIFICATE_VERIFY_FAILED"):
        await acquire(kubeconfig_file=path)
    assert api.requests == []


async def test_the_url_takes_precedence_over_the_kubeconfigs(api, certificates, tmp_path, acquire):
    path = kubeconfig(
        tmp_path / "kubeconfig", "https://192.0.2.1:6443",
        {"certificate-authority": str(certificates / "ca.pem")}, {"token": ADMIN})
    assert (await acquire(kubeconfig_file=path, api_url=api.url)).name == "n1"


async def test_an_https_url_is_used_with_the_pods_credentials(api, account, acquire):
    assert (await acquire(service_account=account, api_url=api.url)).name == "n1"


async def test_no_token_is_sent_without_tls(account, acquire):
    async with KubeApi() as plain:
        plain.allow("agent", "agent", None)
        with pytest.raises(StoreRefused, match="system:anonymous"):
            await acquire(service_account=account, api_url=plain.url)


@pytest.mark.parametrize("text", ["", "{", "- a", "clusters: 1", "current-context: x"])
async def test_an_invalid_kubeconfig_is_named(tmp_path, acquire, text):
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(StoreRefused, match="kubeconfig"):
        await acquire(kubeconfig_file=path)


async def test_missing_credentials_are_reported(tmp_path, acquire):
    with pytest.raises(StoreRefused, match=str(tmp_path / "none")):
        await acquire()
    with pytest.raises(StoreRefused, match="absent"):
        await acquire(kubeconfig_file=tmp_path / "absent")


async def test_a_source_without_credentials_retries(api, account, tmp_path, monkeypatch):
    """The token may be mounted after the start of the source."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    account.rename(tmp_path / "later")
    source = KubeSource(KubeConfig(node_name="n1", service_account=account, retry_max=0.05))
    news = source.updates()
    snapshot = asyncio.ensure_future(anext(news))
    try:
        async with asyncio.timeout(60):
            while not source.health.errors_n:
                await asyncio.sleep(0.01)
            assert str(account) in source.health.error
            (tmp_path / "later").rename(account)
            assert (await snapshot).leases == ()
    finally:
        snapshot.cancel()
        await asyncio.gather(snapshot, return_exceptions=True)
        await news.aclose()
        await source.aclose()


# The configuration


def test_the_prefix_is_completed_as_in_flannel():
    for given, whole in (
        ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/"),
        ("flannel.alpha.coreos.com/", "flannel.alpha.coreos.com/"),
        ("example.org/net", "example.org/net-"),
        ("example.org/net-", "example.org/net-"),
    ):
        assert KubeConfig(node_name="n", annotation_prefix=given).annotation_prefix == whole


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("kube-annotation-prefix", {"annotation_prefix": "a/b/c"}),
        ("kube-annotation-prefix", {"annotation_prefix": "org"}),
        ("kube-annotation-prefix", {"annotation_prefix": "Example.org"}),
        ("kube-annotation-prefix", {"annotation_prefix": ""}),
        ("kube-api-url", {"api_url": "127.0.0.1:6443"}),
        ("kube-api-url", {"api_url": "unix:///run/api"}),
        ("NODE_NAME", {"node_name": ""}),
        ("NODE_NAME", {"node_name": "", "pod_name": "p"}),
        ("NODE_NAME", {"node_name": "", "pod_namespace": "n"}),
    ],
)
def test_an_invalid_option_is_named(field, options):
    with pytest.raises(FieldError) as caught:
        KubeConfig(**{"node_name": "n", **options})
    assert caught.value.field == field
