"""kubeconfig files: which fields have an effect, and which are refused by their name."""

import base64
from pathlib import Path

import pytest
import yaml

from udptun.errors import FieldError
from udptun.leases.kube.kubeconfig import Access, Plugin, parse

SERVER = "https://192.0.2.1:6443"
HERE = Path("/etc/kube/config")
EXEC = {"apiVersion": "client.authentication.k8s.io/v1", "command": "get-token",
        "interactiveMode": "Never"}


def content(cluster=(), user=(), **top):
    return {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "k", "cluster": {"server": SERVER, **dict(cluster)}}],
        "users": [{"name": "u", "user": dict(user)}],
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}], **top,
    }


def parsed(cluster=(), user=(), **top):
    return parse(yaml.safe_dump(content(cluster, user, **top)).encode(), HERE)


def test_the_fields_of_a_cluster():
    assert parsed({
        "certificate-authority": "ca.pem", "tls-server-name": "api.example.org",
        "proxy-url": "http://192.0.2.9:3128", "disable-compression": True,
    }) == Access(
        SERVER, ca=Path("/etc/kube/ca.pem"), tls_server_name="api.example.org",
        proxy_url="http://192.0.2.9:3128", compression=False)
    assert parsed({"insecure-skip-tls-verify": True}) == Access(SERVER, insecure=True)


def test_the_fields_of_a_user():
    assert parsed(user={
        "client-certificate": "pki/me.pem", "client-key": "/var/me.key", "tokenFile": "token",
    }) == Access(SERVER, certificate=Path("/etc/kube/pki/me.pem"), key=Path("/var/me.key"),
                 token_file=Path("/etc/kube/token"))
    assert parsed(user={"username": "me", "password": "pw"}) == Access(
        SERVER, username="me", password="pw")
    assert parsed(user={"token": "t", "tokenFile": "/t"}) == Access(
        SERVER, token="t", token_file=Path("/t"))


def test_data_takes_precedence_over_a_file():
    data = base64.b64encode(b"PEM").decode()
    access = parsed({"certificate-authority": "ca.pem", "certificate-authority-data": data},
                    {"client-certificate-data": data, "client-key-data": data})
    assert (access.ca, access.certificate, access.key) == (b"PEM",) * 3


def test_impersonation():
    access = parsed(user={
        "token": "t", "as": "jane", "as-uid": "42", "as-groups": ["a", "b"],
        "as-user-extra": {"Scopes/x": ["read", "write"]},
    })
    assert access.impersonation == (
        ("Impersonate-User", "jane"), ("Impersonate-Uid", "42"),
        ("Impersonate-Group", "a"), ("Impersonate-Group", "b"),
        ("Impersonate-Extra-scopes%2Fx", "read"), ("Impersonate-Extra-scopes%2Fx", "write"))


@pytest.mark.parametrize(("command", "program"), [
    ("get-token", "get-token"), ("./bin/get", "/etc/kube/bin/get"), ("/bin/get", "/bin/get"),
])
def test_a_plugin(command, program):
    access = parsed(user={"exec": {
        **EXEC, "command": command, "args": ["-a"], "env": [{"name": "A", "value": "b"}],
        "installHint": "install it"}})
    assert access.plugin == Plugin(EXEC["apiVersion"], (program, "-a"), {"A": "b"}, "install it")


def test_a_plugin_of_v1beta1_and_the_data_about_the_cluster():
    extension = {"name": "client.authentication.k8s.io/exec", "extension": {"audience": "x"}}
    plugin = parsed(
        {"certificate-authority": "ca.pem", "extensions": [extension]},
        {"exec": {"apiVersion": "client.authentication.k8s.io/v1beta1", "command": "get-token",
                  "provideClusterInfo": True}}).plugin
    assert plugin.cluster["server"] == SERVER
    assert plugin.cluster["certificate-authority-data"] == Path("/etc/kube/ca.pem")
    assert plugin.cluster["config"] == {"audience": "x"}


def test_the_current_context_counts_and_other_contexts_are_not_checked():
    others = content()
    others["clusters"].append({"name": "k2", "cluster": {"server": "https://192.0.2.2"}})
    others["users"].append({"name": "u2", "user": {"token": "two"}})
    others["users"].append({"name": "u3", "user": {"auth-provider": {"name": "gcp"}}})
    others["contexts"].append({"name": "c2", "context": {
        "cluster": "k2", "user": "u2", "namespace": "n"}})
    others["contexts"].append({"name": "c3", "context": {"cluster": "k2"}})
    for current, access in (("c", Access(SERVER)),
                            ("c2", Access("https://192.0.2.2", token="two")),
                            ("c3", Access("https://192.0.2.2"))):
        others["current-context"] = current
        assert parse(yaml.safe_dump(others).encode(), HERE) == access


def test_fields_that_do_not_concern_a_connection():
    extensions = [{"name": "context_info", "extension": {"provider": "minikube"}}]
    assert parsed({"extensions": extensions}, {"extensions": extensions}, preferences={},
                  extensions=extensions) == Access(SERVER)


def test_a_server_that_an_option_gives():
    text = yaml.safe_dump(content({"server": None})).encode()
    assert parse(text, HERE, "https://192.0.2.7") == Access("https://192.0.2.7")


@pytest.mark.parametrize(("field", "cluster", "user"), [
    ("clusters[k].server", {"server": None}, {}),
    ("clusters[k].server", {"server": "192.0.2.1:6443"}, {}),
    ("clusters[k].proxy-url", {"proxy-url": "socks5://192.0.2.9:1080"}, {}),
    ("clusters[k].certificate-authority-data", {"certificate-authority-data": "?"}, {}),
    ("clusters[k].insecure-skip-tls-verify",
     {"insecure-skip-tls-verify": True, "certificate-authority": "/ca"}, {}),
    ("clusters[k].insecure-skip-tls-verify", {"insecure-skip-tls-verify": "yes"}, {}),
    ("clusters[k].certificate-authorityx", {"certificate-authorityx": "/ca"}, {}),
    ("users[u].client-key", {}, {"client-certificate": "/c"}),
    ("users[u].client-certificate", {}, {"client-key": "/k"}),
    ("users[u].token", {}, {"token": 12345}),
    ("users[u].tokenfile", {}, {"tokenfile": "/t"}),
    ("users[u].auth-provider", {}, {"auth-provider": {"name": "gcp"}}),
    ("users[u].username", {}, {"username": "me", "token": "t"}),
    ("users[u].as", {}, {"as-groups": ["g"]}),
    ("users[u].as-groups", {}, {"as": "jane", "as-groups": "g"}),
    ("users[u].as-user-extra.x", {}, {"as": "jane", "as-user-extra": {"x": "1"}}),
    ("users[u].exec", {}, {"exec": EXEC, "token": "t"}),
    ("users[u].exec", {}, {"exec": "get-token"}),
    ("users[u].exec.command", {}, {"exec": {**EXEC, "command": ""}}),
    ("users[u].exec.apiVersion", {},
     {"exec": {**EXEC, "apiVersion": "client.authentication.k8s.io/v1alpha1"}}),
    ("users[u].exec.interactiveMode", {}, {"exec": {**EXEC, "interactiveMode": "Always"}}),
    ("users[u].exec.interactiveMode", {}, {"exec": {**EXEC, "interactiveMode": None}}),
    ("users[u].exec.args", {}, {"exec": {**EXEC, "args": "x"}}),
    ("users[u].exec.stdin", {}, {"exec": {**EXEC, "stdin": True}}),
    ("users[u].exec.env.x", {}, {"exec": {**EXEC, "env": [{"name": "A", "x": "b"}]}}),
])
def test_a_field_without_effect_is_refused(field, cluster, user):
    with pytest.raises(FieldError) as caught:
        parsed(cluster, user)
    assert caught.value.field == field


@pytest.mark.parametrize(("field", "top"), [
    ("apiVersion", {"apiVersion": "v2"}), ("kind", {"kind": "Pod"}),
    ("current-context", {"current-context": ""}), ("current-context", {"current-context": "x"}),
    ("contexts[c].cluster", {"clusters": []}), ("contexts[c].user", {"users": []}),
    ("clusters", {"clusters": "k"}), ("users", {"users": [{"user": {}}]}),
    ("contexts", {"contexts": [{"name": "c", "context": {}}] * 2}), ("context", {"context": "c"}),
    ("clusters[k]", {"clusters": [{"name": "k", "cluster": "x"}]}),
    ("contexts[c].user-name", {"contexts": [{"name": "c", "context": {
        "cluster": "k", "user-name": "u"}}]}),
])
def test_a_wrong_structure_is_named(field, top):
    with pytest.raises(FieldError) as caught:
        parsed(**top)
    assert caught.value.field == field


@pytest.mark.parametrize("text", [
    b"users: [{name: u, user: {token: 'hunter2", b"\xff\xfe\x00", b"a: &a [*a]", b"[" * 5000,
    b"!!python/object/apply:os.system [ls]", b"- a",
])
def test_text_that_is_no_kubeconfig(text):
    with pytest.raises(FieldError) as caught:
        parse(text, HERE)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("user", [
    {"token": ["hunter2"]}, {"password": {"hunter2": 1}}, {"client-key-data": ["hunter2"]},
    {"exec": {**EXEC, "env": [{"name": "A", "value": ["hunter2"]}]}},
])
def test_no_secret_is_in_a_message(user):
    with pytest.raises(FieldError) as caught:
        parsed(user=user)
    assert "hunter2" not in str(caught.value)
