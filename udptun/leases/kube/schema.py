"""Flannel's leases in Node objects: which fields, which annotations, read and written.

Owns the mapping, both ways; pure. Knows nothing of HTTP. Of a Node, which may be tens of kilobytes
long, only the fields named here are ever decoded. Any thread.
"""

from __future__ import annotations

import ipaddress
import time
from dataclasses import replace
from typing import Any

import msgspec

from ...errors import FieldError
from ...model import parse_next_hop
from ..base import Attributes, Lease, Subnets

Patch = dict[str, Any]


class Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    uid: str = ""
    resource_version: str = ""
    annotations: dict[str, str] | None = None


class NodeSpec(msgspec.Struct):
    pod_cidr: str = msgspec.field(default="", name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")


class Node(msgspec.Struct):
    metadata: Metadata
    spec: NodeSpec = msgspec.field(default_factory=NodeSpec)

    @property
    def annotations(self) -> dict[str, str]:
        return self.metadata.annotations or {}


class Condition(msgspec.Struct):
    type: str
    status: str = ""
    reason: str = ""


class NodeStatus(msgspec.Struct):
    conditions: list[Condition] | None = None


class FullNode(Node):
    """Our own: its conditions are looked at too."""

    status: NodeStatus = msgspec.field(default_factory=NodeStatus)

    @property
    def network_is_up(self) -> bool:
        """Whether the node says that its network is there, as flannel says it."""
        up = ("NetworkUnavailable", "False", "FlannelIsUp")
        return any((c.type, c.status, c.reason) == up for c in self.status.conditions or ())


class Annotations:
    """Flannel's annotations under one prefix, which ends in "/" or "-" (see ``KubeConfig``)."""

    def __init__(self, prefix: str) -> None:
        self.managed = f"{prefix}kube-subnet-manager"
        self.backend_type = f"{prefix}backend-type"
        self.backend_data = f"{prefix}backend-data"
        self.backend_v6_data = f"{prefix}backend-v6-data"
        self.public_ip = f"{prefix}public-ip"
        self.public_ipv6 = f"{prefix}public-ipv6"
        self.public_ip_overwrite = f"{prefix}public-ip-overwrite"
        self.public_ipv6_overwrite = f"{prefix}public-ipv6-overwrite"
        self.node_public_ip = f"{prefix}node-public-ip"
        self.node_public_ipv6 = f"{prefix}node-public-ipv6"

    def lease(self, node: Node) -> Lease | None:
        """What a node says of itself; None if it takes no part. FieldError: it cannot be used."""
        if node.annotations.get(self.managed) != "true":
            return None
        attributes = Attributes(
            public_ip=_v4(node, self.public_ip),
            public_ipv6=_v6(node, self.public_ipv6),
            backend_type=node.annotations.get(self.backend_type, ""),
            backend_data=_json(node, self.backend_data),
            backend_v6_data=_json(node, self.backend_v6_data),
        )
        if attributes.public_ip is None and attributes.public_ipv6 is None:
            raise FieldError(self.public_ip, None, "an address, or one in public-ipv6")
        name = node.metadata.name
        return Lease(key=name, subnets=subnets(node), attributes=attributes, name=name)

    def published(self, node: Node, attributes: Attributes) -> Attributes:
        """``attributes`` as they are to be published: an operator's overwrite goes first, in a
        family that has an address. FieldError: what the operator wrote is none."""
        v4, v6 = attributes.public_ip, attributes.public_ipv6
        return replace(
            attributes,
            public_ip=v4 and (_v4(node, self.public_ip_overwrite) or v4),
            public_ipv6=v6 and (_v6(node, self.public_ipv6_overwrite) or v6),
        )

    def node_public(
        self, node: Node
    ) -> tuple[ipaddress.IPv4Address | None, ipaddress.IPv6Address | None]:
        """The addresses that stand for ``--public-ip`` and ``--public-ipv6`` on this node."""
        return _v4(node, self.node_public_ip), _v6(node, self.node_public_ipv6)

    def patch(self, node: Node, published: Attributes) -> Patch | None:
        """The strategic-merge patch that makes a node say ``published``, or None: it does.

        As flannel writes them: backend-type always; backend-data "null" for a backend without
        data, except that vxlan without IPv4 has none. What a former backend left is taken away.
        """
        data, v6_data = published.backend_data, published.backend_v6_data
        unsaid = published.backend_type == "vxlan" and data is None
        wanted = {
            self.managed: "true",
            self.backend_type: published.backend_type,
            self.backend_data: None if unsaid else _encode(data),
            self.backend_v6_data: None if v6_data is None else _encode(v6_data),
            self.public_ip: published.public_ip and str(published.public_ip),
            self.public_ipv6: published.public_ipv6 and str(published.public_ipv6),
        }
        there = node.annotations
        differing = {name: value for name, value in wanted.items() if there.get(name) != value}
        return {"metadata": {"annotations": differing}} if differing else None


def subnets(node: Node) -> Subnets:
    """A node's podCIDRs, host bits masked as Go does. FieldError: none yet, or not one a family."""
    texts = node.spec.pod_cidrs or ([node.spec.pod_cidr] if node.spec.pod_cidr else [])
    if not texts:
        expected = "a prefix: has the cluster a range of pod addresses (--cluster-cidr)?"
        raise FieldError("podCIDR", None, expected)
    v4: ipaddress.IPv4Network | None = None
    v6: ipaddress.IPv6Network | None = None
    for text in texts:
        try:
            network = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise FieldError("podCIDR", text, "a prefix such as 10.244.2.0/24") from None
        if isinstance(network, ipaddress.IPv4Network) and v4 is None:
            v4 = network
        elif isinstance(network, ipaddress.IPv6Network) and v6 is None:
            v6 = network
        else:
            raise FieldError("podCIDRs", texts, "one prefix a family at most")
    return Subnets(v4, v6)


def network_up_patch() -> Patch:
    """NetworkUnavailable=False: the scheduler may send pods. The reason is what others look for."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"status": {"conditions": [{
        "type": "NetworkUnavailable", "status": "False", "reason": "FlannelIsUp",
        "message": "udptun is running on this node",
        "lastHeartbeatTime": now, "lastTransitionTime": now,
    }]}}


def _v4(node: Node, name: str) -> ipaddress.IPv4Address | None:
    value = node.annotations.get(name)
    address = parse_next_hop(name, value) if value else None
    if isinstance(address, ipaddress.IPv6Address):
        raise FieldError(name, value, "an IPv4 address")
    return address


def _v6(node: Node, name: str) -> ipaddress.IPv6Address | None:
    value = node.annotations.get(name)
    address = parse_next_hop(name, value) if value else None
    if isinstance(address, ipaddress.IPv4Address):
        raise FieldError(name, value, "an IPv6 address")
    return address


def _json(node: Node, name: str) -> Any:
    value = node.annotations.get(name)
    try:
        return msgspec.json.decode(value) if value else None
    except (msgspec.DecodeError, RecursionError):
        raise FieldError(name, value, "JSON") from None


def _encode(value: Any) -> str:
    """Compact, in the order given, as Go's encoder writes it."""
    return msgspec.json.encode(value).decode()
