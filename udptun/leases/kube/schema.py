"""Encodes and decodes flannel's leases in Node objects.

Owns: the mapping between a Lease and the fields and annotations of a Node. A Node can be tens of
kilobytes long, so only the fields declared here are decoded. No I/O; any thread.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from ...errors import FieldError
from ...model import parse_next_hop
from ...text import printable
from ..base import MAX_NAME, Attributes, Lease, Subnets

Patch = dict[str, Any]
T = TypeVar("T")


class Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str | None = None  # null in a bookmark
    annotations: dict[str, str] | None = None

    def __post_init__(self) -> None:
        self.name = printable(self.name, MAX_NAME)


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
    """Our own node, with its conditions."""

    status: NodeStatus = msgspec.field(default_factory=NodeStatus)

    @property
    def network_is_up(self) -> bool:
        """Return whether flannel's condition NetworkUnavailable=False is set."""
        up = ("NetworkUnavailable", "False", "FlannelIsUp")
        return any((c.type, c.status, c.reason) == up for c in self.status.conditions or ())


class Annotations:
    """flannel's annotations with one prefix, which ends in "/" or "-" (see ``KubeConfig``)."""

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

    def lease(
        self, node: Node, former: Attributes | None = None, faults: list[FieldError] | None = None
    ) -> Lease | None:
        """Return a node's lease, or None if flannel does not manage the node.

        former  the node's last known attributes; None: not known
        faults  gets an error for each annotation that concerns only one IP version and is invalid.
                Its value is then taken from ``former``

        Raises FieldError if the lease has no valid address, or if another annotation is invalid.
        """
        if node.annotations.get(self.managed) != "true":
            return None
        faults = [] if faults is None else faults
        before = former or Attributes()
        attributes = Attributes(
            public_ip=_valid(_v4, node, self.public_ip, before.public_ip, faults),
            public_ipv6=_valid(_v6, node, self.public_ipv6, before.public_ipv6, faults),
            backend_type=node.annotations.get(self.backend_type, ""),
            backend_data=_json(node, self.backend_data),
            backend_v6_data=_valid(
                _json, node, self.backend_v6_data, before.backend_v6_data, faults),
        )
        if attributes.public_ip is None and attributes.public_ipv6 is None:
            if faults:
                raise faults[0]
            raise FieldError(self.public_ip, None, "an address here or in public-ipv6")
        name = node.metadata.name
        return Lease(key=name, subnets=subnets(node), attributes=attributes, name=name,
                     since=_seconds(node.metadata.creation_timestamp))

    def published(
        self, node: Node, attributes: Attributes, known: dict[str, Any], faults: list[FieldError]
    ) -> Attributes:
        """Return ``attributes`` with the addresses of the annotations public-ip-overwrite and
        public-ipv6-overwrite.

        If ``attributes`` has no address of a family, the annotation of this family is ignored.
        ``known`` and ``faults`` are those of ``_last_valid``.
        """
        v4, v6 = attributes.public_ip, attributes.public_ipv6
        return replace(
            attributes,
            public_ip=v4 and (
                _last_valid(_v4, node, self.public_ip_overwrite, known, faults) or v4),
            public_ipv6=v6 and (
                _last_valid(_v6, node, self.public_ipv6_overwrite, known, faults) or v6),
        )

    def node_public(
        self, node: Node, known: dict[str, Any], faults: list[FieldError]
    ) -> tuple[ipaddress.IPv4Address | None, ipaddress.IPv6Address | None]:
        """Return the addresses that override ``--public-ip`` and ``--public-ipv6``.

        ``known`` and ``faults`` are those of ``_last_valid``.
        """
        return (_last_valid(_v4, node, self.node_public_ip, known, faults),
                _last_valid(_v6, node, self.node_public_ipv6, known, faults))

    def last_valid(self, memory: Mapping[str, str]) -> dict[str, Any]:
        """Return a ``known`` for ``published`` and ``node_public``.

        memory  its values as text, by name; those that are not valid are ignored
        """
        node, known = Node(Metadata(annotations={**memory})), dict[str, Any]()
        for name, parse in ((self.public_ip_overwrite, _v4), (self.public_ipv6_overwrite, _v6),
                            (self.node_public_ip, _v4), (self.node_public_ipv6, _v6)):
            _last_valid(parse, node, name, known, [])
        return known

    def patch(self, node: Node, published: Attributes) -> Patch | None:
        """Return the strategic-merge patch that publishes these attributes.

        Return None if the node already has them. As in flannel:
        - backend-type is always set.
        - backend-data is "null" for a backend without data, but absent for vxlan without IPv4.
        Annotations of a former backend are removed.
        """
        data, v6_data = published.backend_data, published.backend_v6_data
        omit_data = published.backend_type == "vxlan" and data is None
        wanted = {
            self.managed: "true",
            self.backend_type: published.backend_type,
            self.backend_data: None if omit_data else _encode(data),
            self.backend_v6_data: None if v6_data is None else _encode(v6_data),
            self.public_ip: published.public_ip and str(published.public_ip),
            self.public_ipv6: published.public_ipv6 and str(published.public_ipv6),
        }
        present = node.annotations
        differing = {name: value for name, value in wanted.items() if present.get(name) != value}
        return {"metadata": {"annotations": differing}} if differing else None


def subnets(node: Node) -> Subnets:
    """Return a node's podCIDRs. Host bits are masked, as in Go.

    Raises FieldError if the node has no podCIDR yet, if a podCIDR is invalid, or if there is more
    than one per family.
    """
    texts = node.spec.pod_cidrs or ([node.spec.pod_cidr] if node.spec.pod_cidr else [])
    if not texts:
        expected = "a prefix (does the controller manager have --cluster-cidr?)"
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
            raise FieldError("podCIDRs", texts, "at most one prefix per family")
    return Subnets(v4, v6)


def _seconds(timestamp: str | None) -> int:
    """Return a time of the API server in seconds; 0 if it is absent or invalid."""
    try:
        return int(datetime.fromisoformat(timestamp or "").timestamp())
    except (ValueError, OverflowError):
        return 0


def network_up_patch() -> Patch:
    """Return the patch that sets NetworkUnavailable=False. Then the scheduler assigns pods.

    The patch has flannel's reason, FlannelIsUp, because other software checks for this reason.
    """
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


def _valid(
    parse: Callable[[Node, str], T], node: Node, name: str, former: T, faults: list[FieldError]
) -> T:
    """Return the value of an annotation. If it is invalid, add the error to ``faults``, and return
    ``former``."""
    try:
        return parse(node, name)
    except FieldError as e:
        faults.append(e)
        return former


def _last_valid(
    parse: Callable[[Node, str], T | None], node: Node, name: str, known: dict[str, Any],
    faults: list[FieldError],
) -> T | None:
    """Return the value of an annotation of our node. If it is invalid, return its last valid value.

    known   the last valid values by name, which this call updates
    faults  gets the error if the annotation is invalid
    """
    known[name] = value = _valid(parse, node, name, known.get(name), faults)
    return value


def _json(node: Node, name: str) -> Any:
    value = node.annotations.get(name)
    try:
        return msgspec.json.decode(value) if value else None
    except (msgspec.DecodeError, RecursionError):
        raise FieldError(name, value, "JSON") from None


def _encode(value: Any) -> str:
    """Encode as Go's encoder does: without blanks, with the keys in the given order."""
    return msgspec.json.encode(value).decode()
