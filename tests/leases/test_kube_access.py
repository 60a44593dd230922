"""Access to the API server: the order in which flannel's options are used, TLS, and all kinds of
credentials."""

import asyncio
import base64
import contextlib
import json
import ssl
import subprocess
from ipaddress import IPv4Address
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from tests.leases.authority import Authority
from tests.leases.kube_api import ADMIN, KubeApi, node, server_tls
from tests.leases.kube_cluster import NET_CONF, deployed_rules
from udptun._version import __version__
from udptun.errors import FieldError
from udptun.leases.base import Attributes, StoreDown, StoreRefused, Subnets
from udptun.leases.kube import credentials, plugin
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


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path


async def test_a_credential_plugin(api, certificates, tmp_path, acquire):
    """Its token is used until the server refuses it."""
    (tmp_path / "plugin-token").write_text("agent")
    script(tmp_path / "plugin", """
echo "$KUBERNETES_EXEC_INFO" >> $LOG
printf '{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",'
printf '"status": {"token": "%s"}}' "$(cat $TOKEN)"
""")
    path = kubeconfig(
        tmp_path / "kubeconfig", api.url, {"certificate-authority": str(certificates / "ca.pem")},
        {"exec": {
            "apiVersion": "client.authentication.k8s.io/v1", "command": "./plugin",
            "interactiveMode": "IfAvailable", "provideClusterInfo": True,
            "env": [{"name": "TOKEN", "value": str(tmp_path / "plugin-token")},
                    {"name": "LOG", "value": str(tmp_path / "log")}]}})
    calls = lambda: (tmp_path / "log").read_text().splitlines()  # noqa: E731
    source = KubeSource(KubeConfig(node_name="n1", kubeconfig_file=path,
                                   net_config_path=tmp_path / "net-conf.json"))
    try:
        await source.acquire(ME, Subnets())
        await source.acquire(ME, Subnets())
        assert len(calls()) == 1
        spec = json.loads(calls()[0])["spec"]
        assert (spec["interactive"], spec["cluster"]["server"]) == (False, api.url)
        assert "BEGIN CERT" in base64.b64decode(
            spec["cluster"]["certificate-authority-data"]).decode()
        rules = api.users.pop("agent")
        api.users["fresh"] = rules
        (tmp_path / "plugin-token").write_text("fresh")
        await source.acquire(ME, Subnets())
        assert len(calls()) == 2
    finally:
        await source.aclose()


async def test_a_plugin_that_issues_a_certificate_runs_again_after_it_has_expired(
    api, certificates, tmp_path, acquire
):
    script(tmp_path / "plugin", f"""
echo call >> {tmp_path}/log
cat {tmp_path}/output
""")
    output = {
        "apiVersion": "client.authentication.k8s.io/v1beta1", "kind": "ExecCredential",
        "status": {"clientCertificateData": (certificates / "admin.pem").read_text(),
                   "clientKeyData": (certificates / "admin.key").read_text(),
                   "expirationTimestamp": "2020-01-01T00:00:00Z"}}
    (tmp_path / "output").write_text(json.dumps(output))
    path = kubeconfig(
        tmp_path / "kubeconfig", api.url, {"certificate-authority": str(certificates / "ca.pem")},
        {"exec": {"apiVersion": "client.authentication.k8s.io/v1beta1",
                  "command": str(tmp_path / "plugin")}})
    await acquire(kubeconfig_file=path)
    assert {user for *_, user in api.requests} == {"admin"}
    assert len((tmp_path / "log").read_text().splitlines()) == len(api.requests)


@pytest.mark.parametrize(("text", "message"), [
    (None, "does not start: No such file or directory.*get it from example.org"),
    ("echo no login >&2; exit 3", "ended with 3: no login"),
    ("echo hunter2", "printed no ExecCredential"),
    ("""echo '{"apiVersion": "v1", "kind": "ExecCredential", "status": {"token": "t"}}'""",
     "printed v1 ExecCredential: expected client.authentication.k8s.io/v1"),
    ("""echo '{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
      "status": {"clientKeyData": "k"}}'""", "neither a token nor a certificate"),
    ("exec sleep 600", "did not end within 0.2 s"),
])
async def test_a_plugin_that_fails_is_named(tmp_path, acquire, monkeypatch, text, message):
    if text and "sleep" in text:
        monkeypatch.setattr(plugin, "SECONDS", 0.2)
    if text is not None:
        script(tmp_path / "plugin", text)
    path = kubeconfig(tmp_path / "kubeconfig", "https://127.0.0.1:1", user={"exec": {
        "apiVersion": "client.authentication.k8s.io/v1", "command": "./plugin",
        "interactiveMode": "Never", "installHint": "get it from example.org"}})
    with pytest.raises(StoreRefused, match=message) as caught:
        await acquire(kubeconfig_file=path)
    assert "hunter2" not in str(caught.value)


async def test_the_name_in_the_servers_certificate(certificates, tmp_path, acquire):
    authority = Authority(tmp_path)
    authority.issue("named", "subjectAltName=DNS:api.example.org")
    ca = {"certificate-authority": str(tmp_path / "ca.pem")}
    tls = server_tls(tmp_path / "named.pem", tmp_path / "named.key")
    async with KubeApi(tls) as api:
        await api.put(node("n1", "10.244.1.0/24"))
        path = tmp_path / "kubeconfig"
        with pytest.raises(StoreDown, match="IP address mismatch"):
            await acquire(kubeconfig_file=kubeconfig(path, api.url, ca, {"token": ADMIN}))
        named = {**ca, "tls-server-name": "api.example.org"}
        await acquire(kubeconfig_file=kubeconfig(path, api.url, named, {"token": ADMIN}))


async def test_a_certificate_is_not_checked_if_the_kubeconfig_says_so(api, tmp_path, acquire):
    path = kubeconfig(tmp_path / "kubeconfig", api.url, {"insecure-skip-tls-verify": True},
                      {"token": ADMIN})
    await acquire(kubeconfig_file=path)


async def test_impersonation_reaches_the_server(api, certificates, tmp_path, acquire):
    path = kubeconfig(
        tmp_path / "kubeconfig", api.url, {"certificate-authority": str(certificates / "ca.pem")},
        {"token": ADMIN, "as": "jane", "as-groups": ["a", "b"]})
    await acquire(kubeconfig_file=path)
    assert {headers["Impersonate-User"] for headers in api.headers} == {"jane"}
    assert {tuple(headers.getall("Impersonate-Group")) for headers in api.headers} == {("a", "b")}


async def test_the_user_agent(api, certificates, tmp_path, acquire):
    path = kubeconfig(
        tmp_path / "kubeconfig", api.url, {"certificate-authority": str(certificates / "ca.pem")},
        {"token": ADMIN})
    await acquire(kubeconfig_file=path)
    assert {headers["User-Agent"] for headers in api.headers} == {f"udptun/{__version__}"}


class Proxy:
    """An HTTP proxy that opens tunnels (CONNECT)."""

    def __init__(self, answer=b"HTTP/1.1 200 OK"):
        self.targets, self._answer = [], answer

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.targets.append(request.split()[1])
        writer.write(self._answer + b"\r\n\r\n")
        if b" 200 " in self._answer:
            host, _, port = self.targets[-1].rpartition(":")
            to_server = await asyncio.open_connection(host, int(port))
            await asyncio.gather(self._copy(reader, to_server[1]), self._copy(to_server[0], writer))
        else:
            writer.close()

    async def _copy(self, reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()


@pytest.mark.parametrize("given", ["proxy-url", "HTTPS_PROXY"])
async def test_a_proxy(api, certificates, tmp_path, acquire, monkeypatch, given):
    cluster = {"certificate-authority": str(certificates / "ca.pem")}
    async with Proxy() as proxy:
        if given == "proxy-url":
            cluster["proxy-url"] = proxy.url
        else:
            monkeypatch.setattr(credentials, "_environment_proxy", lambda url: proxy.url)
        path = kubeconfig(tmp_path / "kubeconfig", api.url, cluster, {"token": ADMIN})
        await acquire(kubeconfig_file=path)
        assert set(proxy.targets) == {f"127.0.0.1:{api.port}"}


async def test_a_proxy_that_refuses(api, certificates, tmp_path, acquire):
    async with Proxy(b"HTTP/1.1 403 Not you") as proxy:
        url = proxy.url.replace("//", "//me:hunter2@")
        path = kubeconfig(tmp_path / "kubeconfig", api.url, {"proxy-url": url}, {"token": ADMIN})
        with pytest.raises(StoreDown, match="the proxy returned 403: Not you") as caught:
            await acquire(kubeconfig_file=path)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("host", "bypassed"), [
    ("192.0.2.1", True), ("198.51.100.1", False), ("api.example.org", True),
    ("example.com", False), ("127.0.0.1", True), ("localhost", True), ("[::1]", True),
    ("[2001:db8::5]", True),
])
def test_the_proxy_of_the_environment(monkeypatch, host, bypassed):
    monkeypatch.setenv("HTTPS_PROXY", "http://192.0.2.9:3128")
    monkeypatch.setenv("NO_PROXY", "192.0.2.0/24, 2001:db8::/64,.example.org")
    proxy = credentials._environment_proxy(urlsplit(f"https://{host}:6443"))
    assert proxy == ("" if bypassed else "http://192.0.2.9:3128")
    monkeypatch.setenv("HTTPS_PROXY", "socks5://192.0.2.9:1080")
    if not bypassed:
        with pytest.raises(FieldError, match="HTTPS_PROXY"):
            credentials._environment_proxy(urlsplit(f"https://{host}:6443"))


async def test_a_user_in_the_url(acquire):
    async with KubeApi() as plain:
        plain.allow("me:pass word", "me", None)
        await plain.put(node("n1", "10.244.1.0/24"))
        url = plain.url.replace("//", "//me:pass%20word@")
        await acquire(api_url=url)
        assert {user for *_, user in plain.requests} == {"me"}


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


def test_a_home_directory_is_expanded_in_all_uses_of_the_kubeconfig(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = KubeConfig(node_name="n", kubeconfig_file=Path("~/config"))
    assert config.kubeconfig_file == config.files[0] == tmp_path / "config"


async def test_a_ca_without_key_usage_is_accepted(api, certificates, tmp_path):
    """Python 3.13 would refuse it: ssl.create_default_context() sets VERIFY_X509_STRICT."""
    text = subprocess.run(["openssl", "x509", "-noout", "-text", "-in", certificates / "ca.pem"],
                          check=True, capture_output=True, text=True).stdout
    assert "Key Usage" not in text
    path = kubeconfig(
        tmp_path / "kubeconfig", api.url, {"certificate-authority": str(certificates / "ca.pem")})
    found = await credentials.Reader(KubeConfig(node_name="n1", kubeconfig_file=path)).read()
    assert not found.tls.verify_flags & ssl.VERIFY_X509_STRICT
