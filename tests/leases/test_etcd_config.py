"""The configuration of the etcd source: flanneld's options and their validation."""

import subprocess
import sys

import pytest

from udptun.errors import FieldError
from udptun.leases.etcd.config import EtcdConfig


def test_defaults_are_flannels():
    config = EtcdConfig()
    assert config.endpoints == ("http://127.0.0.1:4001", "http://127.0.0.1:2379")
    assert config.root == "/coreos.com/network"
    assert (config.renew_margin, config.ttl_seconds) == (3600, 86400)


@pytest.mark.parametrize(("url", "address", "secure"), [
    ("http://192.0.2.1:2379", "192.0.2.1:2379", False),
    ("https://etcd.example:4001/", "etcd.example:4001", True),
    ("http://[2001:db8::1]:2379", "[2001:db8::1]:2379", False),
    ("http://etcd.example", "etcd.example:2379", False),
    ("192.0.2.1:2379", "192.0.2.1:2379", False),
    (" http://192.0.2.1:2379 ", "192.0.2.1:2379", False),
])
def test_endpoints(url, address, secure):
    assert EtcdConfig((url,)).targets == ((address, secure),)


def test_an_endpoint_without_a_scheme_is_https_if_certificates_are_given():
    assert EtcdConfig(("192.0.2.1",), cafile="ca.pem").targets[0].secure
    assert not EtcdConfig(("http://192.0.2.1",), cafile="ca.pem").targets[0].secure


@pytest.mark.parametrize(("options", "field"), [
    ({"endpoints": ()}, "etcd-endpoints"),
    ({"endpoints": ("",)}, "etcd-endpoints"),
    ({"endpoints": ("unix:///x",)}, "etcd-endpoints"),
    ({"endpoints": ("http://",)}, "etcd-endpoints"),
    ({"endpoints": ("http://a:b",)}, "etcd-endpoints"),
    ({"endpoints": ("http://a:99999",)}, "etcd-endpoints"),
    ({"endpoints": ("http://[::1",)}, "etcd-endpoints"),
    ({"endpoints": ("http://user:pw@a:2379",)}, "etcd-endpoints"),
    ({"endpoints": ("http://a:2379/v3",)}, "etcd-endpoints"),
    ({"endpoints": ("http://a", "https://b")}, "etcd-endpoints"),
    ({"prefix": "/"}, "etcd-prefix"),
    ({"keyfile": "k"}, "etcd-certfile"),
    ({"certfile": "c"}, "etcd-keyfile"),
    ({"password": "p"}, "etcd-username"),
    ({"renew_margin_minutes": 0}, "subnet-lease-renew-margin"),
    ({"renew_margin_minutes": 1440}, "subnet-lease-renew-margin"),
    ({"ttl_seconds": 3600}, "subnet-lease-renew-margin"),
])
def test_an_invalid_option_is_named(options, field):
    with pytest.raises(FieldError) as caught:
        EtcdConfig(**options)
    assert caught.value.field == field


@pytest.mark.parametrize(("prefix", "root"), [
    ("/a/b", "/a/b"), ("/a//b/", "/a/b"), ("a/b", "a/b"), ("//a", "/a"),
])
def test_the_prefix_is_cleaned_up_as_in_go(prefix, root):
    assert EtcdConfig(prefix=prefix).root == root


def test_repr_omits_the_password():
    assert "hidden" not in repr(EtcdConfig(username="me", password="hidden"))


def test_the_configuration_imports_no_large_module():
    script = "import udptun.leases.etcd.config, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True,
                            text=True).stdout.split()
    assert not {"grpc", "google.protobuf", "asyncio"} & {*loaded}
