"""flannel's keys and values: the encoding, byte for byte as flannel's Go code, and the decoding."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udptun.errors import FieldError
from udptun.leases.base import Attributes, Subnets
from udptun.leases.etcd import schema

V4, V6 = ipaddress.IPv4Address("192.0.2.1"), ipaddress.IPv6Address("2001:db8::1")


def subnets(v4, v6=None):
    return Subnets(ipaddress.IPv4Network(v4), None if v6 is None else ipaddress.IPv6Network(v6))


@pytest.mark.parametrize(("key", "value"), [
    ("10.5.52.0-24", subnets("10.5.52.0/24")),
    ("10.5.52.0-24&fc00:0:0:1::-64", subnets("10.5.52.0/24", "fc00:0:0:1::/64")),
    ("10.5.52.0-24&fc00::-64", subnets("10.5.52.0/24", "fc00::/64")),
    # RFC 5952, as in Go: shorten the longest run of zeros. If two runs have the same length,
    # shorten the first one. Never shorten a single 0.
    ("10.5.0.0-16&fc00:0:1:0:1::-80", subnets("10.5.0.0/16", "fc00:0:1:0:1::/80")),
    ("10.5.0.0-16&fc00::1:0:0:1:0-112", subnets("10.5.0.0/16", "fc00:0:0:1:0:0:1:0/112")),
])
def test_keys(key, value):
    assert schema.write_key(value) == key
    assert schema.read_key(key) == value


@pytest.mark.parametrize("key", [
    "", "config", "10.5.52.0", "10.5.52.0/24", "10.5.52.0-", "10.5.52-24", "10.5.52.0-33",
    "10.5.52.0-32", "0.0.0.0-0", "10.5.52.1-24", "10.5.52.0-24&", "10.5.52.0-24&fc00::",
    "10.5.52.0-24&fc00::1-64", "10.5.52.0-24&::-0", "10.5.52.0-24&fc00::-128", "fc00::-64",
    "010.5.52.0-24", "10.5.52.0-24\n", " 10.5.52.0-24", "x/10.5.52.0-24", "10.5.52.0-२",
])
def test_an_invalid_key_is_named(key):
    with pytest.raises(FieldError, match=r"^key: .*10\.5\.52\.0-24"):
        schema.read_key(key)


def test_prefixes_of_keys():
    assert schema.config_key("/coreos.com/network") == b"/coreos.com/network/config"
    assert schema.subnets_prefix("/coreos.com/network") == b"/coreos.com/network/subnets/"


@pytest.mark.parametrize(("attributes", "value"), [
    (Attributes(V4), '{"PublicIP":"192.0.2.1","PublicIPv6":null}'),
    (Attributes(V4, V6), '{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1"}'),
    (Attributes(None, V6), '{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1"}'),
    (Attributes(V4, None, "vxlan", {"VNI": 1, "VtepMAC": "aa:bb:cc:dd:ee:ff"}),
     '{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan",'
     '"BackendData":{"VNI":1,"VtepMAC":"aa:bb:cc:dd:ee:ff"}}'),
    (Attributes(V4, None, "", {"udptun": {"port": 8285, "mtu": 1450}}),
     '{"PublicIP":"192.0.2.1","PublicIPv6":null,'
     '"BackendData":{"udptun":{"port":8285,"mtu":1450}}}'),
    (Attributes(V4, None, "", {}, 0),
     '{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendData":{},"BackendV6Data":0}'),
    # Besides JSON's own escapes, Go's encoder escapes only <, >, & and two line separators.
    (Attributes(V4, None, "extension", "a<b>&\u2028\u2029 \"é\\"),
     '{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"extension",'
     '"BackendData":"a\\u003cb\\u003e\\u0026\\u2028\\u2029 \\"é\\\\"}'),
])
def test_values(attributes, value):
    assert schema.write_value(attributes) == value.encode()
    assert schema.read_value(value.encode()) == attributes


@pytest.mark.parametrize(("value", "attributes"), [
    ('{"publicip":"192.0.2.1","NEW":[1],"backendTYPE":"udp"}', Attributes(V4, None, "udp")),
    (' {"PublicIP" : "192.0.2.1", "PublicIPv6": null, "BackendType": null}\n', Attributes(V4)),
    ('{"PublicIP":"192.0.2.9","PublicIP":"192.0.2.1"}', Attributes(V4)),
    ('{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1"}', Attributes(None, V6)),
])
def test_values_are_decoded_as_in_go(value, attributes):
    assert schema.read_value(value.encode()) == attributes


@pytest.mark.parametrize(("value", "field"), [
    (b"", "value"), (b"null", "value"), (b"[]", "value"), (b'{"PublicIP":"192.0.2.1"', "value"),
    (b'{"PublicIP":"192.0.2.1"}}', "value"), (b"\xff", "value"), (b"[" * 100_000, "value"),
    (b'{"PublicIP":"192.0.2.1","x":NaN}', "value"), (b"1" * 5000, "value"),
    (b"{}", "PublicIP"), (b'{"PublicIP":"0.0.0.0"}', "PublicIP"), (b'{"PublicIP":1}', "PublicIP"),
    (b'{"PublicIP":["192.0.2.1"]}', "PublicIP"), (b'{"PublicIP":"2001:db8::1"}', "PublicIP"),
    (b'{"PublicIP":"224.0.0.1"}', "PublicIP"), (b'{"PublicIP":"192.0.2.1/24"}', "PublicIP"),
    (b'{"PublicIP":"192.0.2.1","PublicIPv6":"192.0.2.1"}', "PublicIPv6"),
    (b'{"PublicIP":"192.0.2.1","BackendType":7}', "BackendType"),
])
def test_an_invalid_value_is_named_and_truncated(value, field):
    with pytest.raises(FieldError) as caught:
        schema.read_value(value)
    assert caught.value.field == field and len(str(caught.value)) < 300


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_an_error(value):
    try:
        attributes = schema.read_value(value)
    except FieldError:
        return
    assert schema.read_value(schema.write_value(attributes)) == attributes


@given(st.ip_addresses(v=4), st.ip_addresses(v=6), st.integers(1, 31), st.integers(1, 127))
def test_a_written_key_is_read_back(v4, v6, length4, length6):
    value = Subnets(ipaddress.IPv4Network((v4, length4), strict=False),
                    ipaddress.IPv6Network((v6, length6), strict=False))
    assert schema.read_key(schema.write_key(value)) == value
