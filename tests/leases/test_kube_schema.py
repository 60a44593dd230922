"""The conversion of Node objects to leases and back: encoding, decoding, and validation."""

import json
from ipaddress import IPv4Address, IPv6Address, ip_network

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udptun.errors import FieldError
from udptun.leases.base import Attributes, Lease, Subnets
from udptun.leases.kube.config import ANNOTATION_PREFIX
from udptun.leases.kube.schema import Annotations, FullNode, Metadata, Node, NodeSpec, subnets

ANNOTATIONS = Annotations(ANNOTATION_PREFIX)
KEYS = sorted(vars(ANNOTATIONS).values())
HOSTS = st.integers(0x01000000, 0xDFFFFFFF).map(IPv4Address)
HOSTS6 = st.integers(2 << 124, (4 << 124) - 1).map(IPv6Address)
NUMBERS = st.integers(-2**53, 2**53)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8,
)
ATTRIBUTES = st.builds(
    Attributes, HOSTS, st.none() | HOSTS6, st.sampled_from(["", "udp", "vxlan", "host-gw"]), JSON,
    JSON,
)


def a_node(annotations=None, **spec):
    return Node(Metadata(name="n1", annotations=annotations), NodeSpec(**spec))


def patched(node, patch):
    """Return the annotations of ``node`` after a merge patch."""
    there = {**node.annotations, **patch["metadata"]["annotations"]}
    return a_node({k: v for k, v in there.items() if v is not None}, pod_cidr=node.spec.pod_cidr)


def test_a_name_has_no_control_characters():
    node = msgspec.json.decode(b'{"metadata": {"name": "n1\\n\\u001b[31m"}}', type=Node)
    assert node.metadata.name == r"n1\n\x1b[31m"


@pytest.mark.parametrize(("created", "since"), [
    ('"2026-01-31T08:00:00Z"', 1769846400), ('"2026-01-31T08:00:01Z"', 1769846401),
    ("null", 0), ('"yesterday"', 0), ('""', 0),
])
def test_the_age_of_a_lease_is_that_of_its_node(created, since):
    text = f'{{"metadata": {{"name": "n1", "creationTimestamp": {created}}}}}'
    node = msgspec.json.decode(text, type=Node)
    node.spec.pod_cidr = "10.244.1.0/24"
    node.metadata.annotations = {ANNOTATIONS.managed: "true", ANNOTATIONS.public_ip: "192.0.2.1"}
    assert ANNOTATIONS.lease(node).since == since


@given(ATTRIBUTES, ATTRIBUTES)
def test_published_attributes_are_read_back(before, attributes):
    node = a_node({"other": "stays"}, pod_cidr="10.244.1.0/24")
    node = patched(node, ANNOTATIONS.patch(node, before))
    if (patch := ANNOTATIONS.patch(node, attributes)) is not None:
        node = patched(node, patch)
    assert ANNOTATIONS.patch(node, attributes) is None
    assert node.annotations["other"] == "stays"
    found = ANNOTATIONS.lease(node)
    assert found == Lease("n1", Subnets(ip_network("10.244.1.0/24")), attributes, "n1")


@given(
    st.dictionaries(st.sampled_from(KEYS), st.text() | st.sampled_from([
        "true", "null", "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1", "fe80::1%eth0", "[",
    ])),
    st.text() | st.sampled_from(["", "10.244.1.0/24", "10.244.1.1/24", "::/0", "10.0.0.0/33"]),
    st.none() | st.lists(st.sampled_from(["10.244.1.0/24", "fd00::/64", "x", ""]), max_size=3),
)
def test_an_invalid_node_raises_only_field_error(annotations, pod_cidr, pod_cidrs):
    node = a_node(annotations, pod_cidr=pod_cidr, pod_cidrs=pod_cidrs)
    try:
        lease = ANNOTATIONS.lease(node)
    except FieldError:
        return
    assert (lease is None) == (annotations.get(ANNOTATIONS.managed) != "true")


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ({"podCIDR": "10.244.1.0/24"}, Subnets(ip_network("10.244.1.0/24"))),
        ({"podCIDR": "10.244.1.9/24"}, Subnets(ip_network("10.244.1.0/24"))),  # masked, as Go does
        ({"podCIDR": "fd00::/64"}, Subnets(None, ip_network("fd00::/64"))),
        ({"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00::/64"]},
         Subnets(ip_network("10.244.1.0/24"), ip_network("fd00::/64"))),
        ({"podCIDR": "fd00::/64", "podCIDRs": ["fd00::/64", "10.244.1.0/24"]},
         Subnets(ip_network("10.244.1.0/24"), ip_network("fd00::/64"))),
        ({"podCIDR": "10.244.1.0/24", "podCIDRs": None}, Subnets(ip_network("10.244.1.0/24"))),
        ({}, None),
        ({"podCIDR": ""}, None),
        ({"podCIDRs": ["10.244.1.0/24", "10.244.2.0/24"]}, None),
        ({"podCIDRs": ["10.244.1.0/24", "fd00::/64", "10.244.2.0/24"]}, None),
        ({"podCIDR": "10.244.1.0/33"}, None),
    ],
)
def test_subnets_of_a_node(spec, want):
    text = json.dumps({"kind": "Node", "metadata": {"name": "n1"}, "spec": spec})
    node = msgspec.json.decode(text, type=Node)
    if want is None:
        with pytest.raises(FieldError, match="podCIDR"):
            subnets(node)
    else:
        assert subnets(node) == want


def test_the_annotations_of_flannels_backends():
    """flannel's annotations are decoded, and need no patch."""
    for kind, data, wanted in (
        ("", "null", None),
        ("vxlan", '{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}',
         {"VNI": 1, "VtepMAC": "12:c6:65:89:b4:e3"}),
        ("host-gw", "null", None),
        ("wireguard", '{"PublicKey":"kT8v/1z+Q="}', {"PublicKey": "kT8v/1z+Q="}),
        ("extension", '"a \\"b\\""', 'a "b"'),
    ):
        node = a_node({
            ANNOTATIONS.managed: "true", ANNOTATIONS.backend_type: kind,
            ANNOTATIONS.backend_data: data, ANNOTATIONS.public_ip: "192.0.2.1",
        }, pod_cidr="10.244.1.0/24")
        lease = ANNOTATIONS.lease(node)
        assert lease.attributes == Attributes(IPv4Address("192.0.2.1"), None, kind, wanted)
        assert ANNOTATIONS.patch(node, lease.attributes) is None


@pytest.mark.parametrize(
    ("conditions", "up"),
    [
        (None, False),
        ([], False),
        ([{"type": "Ready", "status": "True"}], False),
        ([{"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"}], False),
        ([{"type": "NetworkUnavailable", "status": "False", "reason": "RouteCreated"}], False),
        ([{"type": "NetworkUnavailable", "status": "False", "reason": "FlannelIsUp"}], True),
    ],
)
def test_network_is_up(conditions, up):
    text = json.dumps({"metadata": {"name": "n"}, "status": {"conditions": conditions}})
    assert msgspec.json.decode(text, type=FullNode).network_is_up is up
