"""net-conf.json: valid, invalid and default values of each field, as in flannel."""

import json
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udptun.errors import FieldError
from udptun.leases.netconf import NetConfig


def parse(check_subnets=True, **fields):
    return NetConfig.parse(json.dumps(fields), check_subnets=check_subnets)


def parse6(**fields):
    return parse(EnableIPv4=False, EnableIPv6=True, **fields)


def test_the_usual_configuration():
    text = '{"Network": "10.244.0.0/16", "EnableNFTables": false, "Backend": {"Type": "vxlan"}}'
    config = NetConfig.parse(text)
    assert config.network == IPv4Network("10.244.0.0/16")
    assert config.network6 is None
    assert config.networks == (config.network,)
    assert config.subnet_len == 24
    assert config.subnet_min == IPv4Address("10.244.1.0")
    assert config.subnet_max == IPv4Address("10.244.255.0")
    assert (config.subnet6_len, config.subnet6_min, config.subnet6_max) == (0, None, None)
    assert not config.nftables
    assert config.backend_type == "vxlan"
    assert config.text == text


def test_both_families():
    config = parse(Network="10.5.0.0/16", EnableIPv6=True, IPv6Network="fc00::/48")
    assert config.network6 == IPv6Network("fc00::/48")
    assert config.networks == (config.network, config.network6)
    assert config.subnet6_len == 64
    assert config.subnet6_min == IPv6Address("fc00:0:0:1::")
    assert config.subnet6_max == IPv6Address("fc00:0:0:ffff::")


def test_ipv6_alone():
    config = parse6(IPv6Network="fc00::/48")
    assert config.network is config.subnet_min is None
    assert config.networks == (IPv6Network("fc00::/48"),)


@pytest.mark.parametrize(
    ("network", "length", "first", "last"),
    [
        ("10.0.0.0/8", 24, "10.0.1.0", "10.255.255.0"),
        ("10.1.0.0/22", 24, "10.1.1.0", "10.1.3.0"),
        ("10.1.0.0/23", 25, "10.1.0.128", "10.1.1.128"),
        ("10.1.0.0/24", 26, "10.1.0.64", "10.1.0.192"),
        ("10.1.0.0/28", 30, "10.1.0.4", "10.1.0.12"),
    ],
)
def test_default_subnets(network, length, first, last):
    config = parse(Network=network)
    assert config.subnet_len == length
    assert config.subnet_min == IPv4Address(first)
    assert config.subnet_max == IPv4Address(last)


@pytest.mark.parametrize(
    ("network", "length", "first", "last"),
    [
        ("fc00::/62", 64, "fc00:0:0:1::", "fc00:0:0:3::"),
        ("fc00::/63", 65, "fc00::8000:0:0:0", "fc00:0:0:1:8000::"),
        ("fc00::/124", 126, "fc00::4", "fc00::c"),
    ],
)
def test_default_ipv6_subnets(network, length, first, last):
    config = parse6(IPv6Network=network)
    assert config.subnet6_len == length
    assert config.subnet6_min == IPv6Address(first)
    assert config.subnet6_max == IPv6Address(last)


def test_configured_subnets():
    config = parse(Network="10.0.0.0/8", SubnetLen=20, SubnetMin="10.10.0.0", SubnetMax="10.99.0.0")
    assert config.subnet_len == 20
    assert config.subnet_min == IPv4Address("10.10.0.0")
    assert config.subnet_max == IPv4Address("10.99.0.0")
    config = parse6(IPv6Network="fc00::/16", IPv6SubnetLen=32, IPv6SubnetMin="fc00:5::",
                    IPv6SubnetMax="fc00:9::")
    assert config.subnet6_len == 32
    assert config.subnet6_min == IPv6Address("fc00:5::")
    assert config.subnet6_max == IPv6Address("fc00:9::")


def test_host_bits_of_a_network_are_masked():
    assert parse(Network="10.5.7.9/16").network == IPv4Network("10.5.0.0/16")


@pytest.mark.parametrize("value", [0, None])
def test_zero_and_null_mean_absent_as_in_go(value):
    empty = {"SubnetLen": value, "SubnetMin": value or "0.0.0.0", "SubnetMax": value or ""}
    absent = parse(Network="10.5.0.0/16")
    config = parse(Network="10.5.0.0/16", EnableIPv4=None, EnableIPv6=None, **empty)
    assert config.subnet_len == absent.subnet_len
    assert config.subnet_min == absent.subnet_min
    assert config.subnet_max == absent.subnet_max


def test_names_in_any_case_the_last_of_two_wins_and_unknown_ones_are_ignored():
    config = NetConfig.parse(
        '{"NETWORK": "10.1.0.0/16", "network": "10.2.0.0/16", "subnetlen": 26, "Comment": [1, {}],'
        ' "backend": {"TYPE": "UDP", "pOrT": 9000, "note": 1}}'
    )
    assert config.network == IPv4Network("10.2.0.0/16")
    assert config.subnet_len == 26
    assert (config.backend_type, config.udp_port) == ("udp", 9000)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "Network"),
        ({"Network": ""}, "Network"),
        ({"Network": None}, "Network"),
        ({"Network": 10}, "Network"),
        ({"Network": "10.5.0.0"}, "Network"),
        ({"Network": "10.5.0.0/255.255.0.0"}, "Network"),
        ({"Network": "10.5.0.0/33"}, "Network"),
        ({"Network": "fc00::/48"}, "Network"),
        ({"Network": "10.5.0.0/29"}, "Network"),
        ({"Network": "10.5.0.0/29", "SubnetLen": 30}, "Network"),
        ({"Network": "10.5.0.0/16", "SubnetLen": 31}, "SubnetLen"),
        ({"Network": "10.5.0.0/16", "SubnetLen": 17}, "SubnetLen"),
        ({"Network": "10.5.0.0/16", "SubnetLen": -1}, "SubnetLen"),
        ({"Network": "10.5.0.0/16", "SubnetLen": 24.5}, "SubnetLen"),
        ({"Network": "10.5.0.0/16", "SubnetLen": "24"}, "SubnetLen"),
        ({"Network": "10.5.0.0/16", "SubnetLen": True}, "SubnetLen"),
        ({"Network": "10.5.0.0/16", "SubnetLen": False}, "SubnetLen"),
        ({"Network": "10.5.0.0/16", "SubnetMin": "10.6.0.0"}, "SubnetMin"),
        ({"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.128"}, "SubnetMin"),
        ({"Network": "10.5.0.0/16", "SubnetMin": "ten"}, "SubnetMin"),
        ({"Network": "10.5.0.0/16", "SubnetMin": 5}, "SubnetMin"),
        ({"Network": "10.5.0.0/16", "SubnetMax": "10.4.0.0"}, "SubnetMax"),
        ({"Network": "10.5.0.0/16", "SubnetMax": "10.5.9.1"}, "SubnetMax"),
        ({"Network": "10.5.0.0/16", "SubnetMin": "10.5.9.0", "SubnetMax": "10.5.8.0"}, "SubnetMax"),
        ({"Network": "10.5.0.0/16", "EnableIPv4": "true"}, "EnableIPv4"),
        ({"Network": "10.5.0.0/16", "EnableNFTables": 1}, "EnableNFTables"),
        ({"Network": "10.5.0.0/16", "EnableIPv4": False}, "EnableIPv4"),
        ({"Network": "10.5.0.0/16", "EnableIPv6": True}, "IPv6Network"),
        ({"Network": "10.5.0.0/16", "Backend": "udp"}, "Backend"),
        ({"Network": "10.5.0.0/16", "Backend": {"Type": 1}}, "Backend.Type"),
        ({"Network": "10.5.0.0/16", "Backend": {"Type": "udp", "Port": 65536}}, "Backend.Port"),
        ({"Network": "10.5.0.0/16", "Backend": {"Type": "udp", "Port": "1"}}, "Backend.Port"),
        ({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": 1 << 24}}, "Backend.VNI"),
        ({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "MTU": 60}}, "Backend.MTU"),
        ({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "GBP": 1}}, "Backend.GBP"),
        ({"Network": "10.5.0.0/16", "Backend": {"Type": "auto", "Learning": ""}},
         "Backend.Learning"),
        ({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "DirectRouting": "no"}},
         "Backend.DirectRouting"),
    ],
)
def test_an_invalid_field_is_named(fields, field):
    with pytest.raises(FieldError) as caught:
        NetConfig.parse(json.dumps(fields), where="/coreos.com/network/config")
    assert caught.value.field == field
    assert caught.value.where == "/coreos.com/network/config"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "IPv6Network"),
        ({"IPv6Network": "10.5.0.0/16"}, "IPv6Network"),
        ({"IPv6Network": "fe80::%1/64"}, "IPv6Network"),
        ({"IPv6Network": "fc00::/125"}, "IPv6Network"),
        ({"IPv6Network": "fc00::/48", "IPv6SubnetLen": 127}, "IPv6SubnetLen"),
        ({"IPv6Network": "fc00::/48", "IPv6SubnetLen": 49}, "IPv6SubnetLen"),
        ({"IPv6Network": "fc00::/48", "IPv6SubnetMin": "fd00::"}, "IPv6SubnetMin"),
        ({"IPv6Network": "fc00::/48", "IPv6SubnetMin": "fc00::1:0%eth0"}, "IPv6SubnetMin"),
        ({"IPv6Network": "fc00::/48", "IPv6SubnetMax": "fc00::1"}, "IPv6SubnetMax"),
    ],
)
def test_an_invalid_ipv6_field_is_named(fields, field):
    with pytest.raises(FieldError) as caught:
        parse6(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize("check_subnets", [True, False])
@pytest.mark.parametrize(("network", "low"), [
    ("0.0.0.0/0", 8), ("0.0.0.0/1", 8), ("10.0.0.0/7", 8),
    ("::/0", 16), ("2000::/3", 16), ("2a00::/15", 16), ("fc00::/7", 8),
])
def test_a_network_with_a_large_part_of_all_addresses_is_refused(network, low, check_subnets):
    """The firewall accepts all packets of the network."""
    v6 = ":" in network
    with pytest.raises(FieldError, match=f"{network}.*a prefix length of at least {low}") as caught:
        parse(check_subnets, EnableIPv4=not v6, EnableIPv6=v6, Network=network, IPv6Network=network)
    assert caught.value.field == ("IPv6Network" if v6 else "Network")


@pytest.mark.parametrize("network", [
    "127.0.0.0/8", "127.5.0.0/16", "169.254.0.0/16", "169.254.9.0/24", "224.0.0.0/8",
    "239.1.0.0/16", "0.0.0.0/8", "0.5.0.0/16", "255.0.0.0/8", "::/16", "fe80::/16",
    "fe80:1::/64", "ff05::/16", "ff00::/16", "::ffff:10.0.0.0/104",
])
@pytest.mark.parametrize("check_subnets", [True, False])
def test_a_network_with_reserved_addresses_is_refused(network, check_subnets):
    v6 = ":" in network
    fields = {"EnableIPv4": not v6, "EnableIPv6": v6, "IPv6Network" if v6 else "Network": network}
    with pytest.raises(FieldError, match="expected a network without addresses of"):
        NetConfig.parse(json.dumps(fields), check_subnets=check_subnets)


def test_the_largest_networks():
    assert parse(Network="10.0.0.0/8").network == IPv4Network("10.0.0.0/8")
    assert parse6(IPv6Network="fd00::/8").network6 == IPv6Network("fd00::/8")
    assert parse6(IPv6Network="2a01::/16").network6 == IPv6Network("2a01::/16")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"Network": NaN}', "[" * 100000, '{"a": ' + "9" * 5000 + "}"]
)
def test_text_that_is_not_a_json_object_is_refused(text):
    with pytest.raises(FieldError, match=r"etcd.*the configuration"):
        NetConfig.parse(text, where="etcd")


@pytest.mark.parametrize("depth", [300, 600, 900, 960, 990])
@pytest.mark.parametrize("field", ["Network", "Backend", "Comment"])
def test_deep_nesting_is_refused(field, depth):
    nested = "[" * depth + "]" * depth
    with pytest.raises(FieldError):
        NetConfig.parse(f'{{"{field}": {nested}}}')


def test_a_syntax_error_names_the_line():
    with pytest.raises(FieldError, match=r"net-conf.json, line 3: .*'\"Backend\"'"):
        NetConfig.parse('{\n  "Network": "10.5.0.0/16"\n  "Backend"\n}', where="net-conf.json")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda item: st.lists(item) | st.dictionaries(st.text(), item),
                    max_leaves=5))
def test_any_value_of_any_field_is_valid_or_a_field_error(value):
    for name in ("EnableIPv4", "EnableIPv6", "Network", "SubnetLen", "SubnetMin", "Backend"):
        with suppress(FieldError):
            parse(**{"Network": "10.5.0.0/16", "IPv6Network": "fc00::/48", name: value})


def test_subnet_rules_are_not_checked_if_the_store_assigns_subnets():
    """With Kubernetes, flannel does not read the subnet rules. So an invalid rule is accepted."""
    config = parse(check_subnets=False, Network="10.5.0.0/29", SubnetLen=99, SubnetMin="nowhere")
    assert config.network == IPv4Network("10.5.0.0/29")
    assert (config.subnet_len, config.subnet_min, config.subnet_max) == (0, None, None)
    assert not config.subnets_checked
    assert parse(Network="10.5.0.0/16").subnets_checked


@pytest.mark.parametrize(
    ("backend", "kind", "udp_port", "vxlan_port"),
    [
        ({}, "udp", 8285, 0),  # flannel's code does this; its documentation differs
        ({"Backend": {}}, "", 8285, 0),
        ({"Backend": None}, "", 8285, 0),
        ({"Backend": {"Type": "udp"}}, "udp", 8285, 0),
        ({"Backend": {"Type": "UDP", "Port": 9000}}, "udp", 9000, 0),
        ({"Backend": {"Type": "VXLAN"}}, "vxlan", 8285, 0),
        ({"Backend": {"Type": "vxlan", "Port": 4789}}, "vxlan", 8285, 4789),
        ({"Backend": {"Type": "auto", "Port": 9000}}, "auto", 9000, 0),
        ({"Backend": {"Type": "host-gw", "Port": "odd"}}, "host-gw", 8285, 0),
    ],
)
def test_the_port_belongs_to_the_backend_type(backend, kind, udp_port, vxlan_port):
    config = parse(Network="10.5.0.0/16", **backend)
    assert config.backend_type == kind
    assert (config.udp_port, config.vxlan_port) == (udp_port, vxlan_port)


def test_options_of_vxlan():
    config = parse(Network="10.5.0.0/16", Backend={"Type": "vxlan"})
    assert (config.vni, config.mtu) == (1, None)
    assert not (config.direct_routing or config.learning or config.gbp)
    config = parse(Network="10.5.0.0/16", Backend={
        "Type": "vxlan", "VNI": 4096, "MTU": 9000, "DirectRouting": True, "Learning": True,
        "GBP": True, "MacPrefix": "0E-2A",
    })
    assert (config.vni, config.mtu) == (4096, 9000)
    assert config.direct_routing and config.learning and config.gbp
    assert config.backend["macprefix"] == "0E-2A"


@pytest.mark.parametrize(("backend", "vni"), [({}, 1), ({"VNI": None}, 1), ({"VNI": 0}, 0),
                                            ({"VNI": 7}, 7), ({"vni": 0}, 0)])
def test_an_absent_vni_and_vni_0_differ(backend, vni):
    text = json.dumps({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", **backend}})
    assert NetConfig.parse(text).vni == vni
