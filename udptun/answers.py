"""The answers of a forwarder and a node daemon as typed objects.

An answer is the JSON object of docs/control.md: a ``dict``. Its keys can also be read as
attributes, and objects inside it are typed in the same way: ``status.peers[0].probe.rtt_us``. A
field that a later version has added can be read too. docs/openapi.yaml has the same fields
(tested). A leaf. Threading: any thread.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal


class Answer(dict[str, Any]):
    """A JSON object. ``_types`` has the types of the objects that it contains, by key."""

    _types: ClassVar[dict[str, type[Answer]]] = {}
    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError:
            fields = ", ".join(self)
            raise AttributeError(
                f"{type(self).__name__} has no field {name!r}: it has {fields}") from None
        kind = self._types.get(name)
        if kind is None or value is None:
            return value
        if isinstance(value, list):
            return [kind(one) for one in value]
        return kind(value)


class Device(Answer):
    name: str
    mtu: int
    addresses: list[str]
    networks: list[str]
    subnets: list[str]
    listen: list[str]


class Accelerate(Answer):
    """The express path. ``reason`` says why it is not active."""

    mode: Literal["auto", "off"]
    active: bool
    reason: str | None
    generation: int
    kernel_generation: int | None
    receives: bool | None
    devices: list[str]
    packets: dict[str, int]


class Capabilities(Answer):
    found: list[str]
    in_use: list[str]
    off: dict[str, str]


class Worker(Answer):
    index: int
    turns: int
    loop_returns: int
    queued: int
    icmp_sent: int
    icmp_suppressed: int
    own_sockets: int
    own_sockets_given: int
    probes_lost: int
    icmp_floods: int
    ecn_marked: int
    ecn_unexpected: int
    cpu_seconds: float | None
    syscalls: dict[str, int]


class Counts(Answer):
    read: int
    generated: int
    delivered: int
    consumed: int
    dropped: int
    queued: int


class Packets(Answer):
    encap: Counts
    decap: Counts
    _types: ClassVar = {"encap": Counts, "decap": Counts}


class Traffic(Answer):
    packets: int
    bytes: int


class PeerError(Answer):
    errno: str
    origin: Literal["icmp", "icmp6", "send", "local"]
    type: int | None
    code: int | None
    reporter: str | None
    seconds_ago: float
    text: str


class PathState(Answer):
    """The measured state of the path to a peer."""

    state: Literal["reachable", "unreachable", "unknown"]
    since: str
    reason: str
    rtt_us: int | None
    loss: float | None
    last_answer: str | None
    largest_size: int | None
    full_size_passes: bool | None


class Peer(Answer):
    endpoint: str
    subnets: list[str]
    encap: Traffic
    decap: Traffic
    path_mtu: int
    path_mtu_source: Literal["device", "probe", "icmp"]
    path_mtu_seconds: float | None
    last_seen_seconds: float | None
    errors: int
    last_error: PeerError | None
    probe: PathState | None
    express: dict[str, Any]
    _types: ClassVar = {
        "encap": Traffic, "decap": Traffic, "last_error": PeerError, "probe": PathState,
    }


class Status(Answer):
    """The state of a forwarder."""

    version: str
    build: str
    pid: int
    uptime_seconds: float
    generation: int
    route_count: int
    source_check: Literal["strict", "peer", "off"]
    admit: Literal["any", "own"]
    mark: str | None
    dscp: str
    accelerate: Accelerate
    device: Device
    capabilities: Capabilities
    workers: list[Worker]
    packets: Packets
    peers: list[Peer]
    _types: ClassVar = {
        "accelerate": Accelerate, "device": Device, "capabilities": Capabilities,
        "workers": Worker, "packets": Packets, "peers": Peer,
    }


class ProbeAnswer(Answer):
    """The result of one probe. ``error`` is there only if the peer has not answered."""

    answered: bool
    rtt_us: int | None
    size: int
    heard_seconds: float | None
    peer_heard_seconds: float | None
    from_peer: bool | None
    to_peer: bool | None
    error: str


class DroppedPacket(Answer):
    id: str
    time: str
    packets: int
    length: int
    endpoint: str | None
    src: str | None
    dst: str | None
    protocol: str | int | None
    src_port: int | None
    dst_port: int | None


class RefusedSender(Answer):
    address: str
    port: int
    packets: int
    last_seen_seconds: float


class Drop(Answer):
    """The packets that were dropped for one reason, in one direction.

    Only ``unknown_peer`` and ``source_port`` have ``sources``.
    """

    reason: str
    direction: Literal["encap", "decap"]
    packets: int
    last: list[DroppedPacket]
    sources: list[RefusedSender]
    _types: ClassVar = {"last": DroppedPacket, "sources": RefusedSender}


class Trace(Answer):
    """What the forwarder does with a packet. ``route`` is the JSON form of a Route."""

    address: str
    verdict: Literal["forward", "drop"]
    reason: str | None
    route: dict[str, Any] | None
    peer: str | None
    mtu: int | None


class Check(Answer):
    name: str
    state: Literal["ok", "degraded", "failed"]
    text: list[str]


class Problem(Answer):
    """One thing that is wrong. The check that has found it has the state."""

    check: str
    text: str
    remedy: str
    since: str | None
    peer: str
    setting: str


class DeviceCount(Answer):
    """What the kernel has counted for a device of the overlay, in one direction."""

    path: str
    device: str
    direction: Literal["encap", "decap"]
    packets: int
    bytes: int
    errors: int
    dropped: int


class NodePeer(Answer):
    key: str
    subnet: str
    state: Literal["reachable", "limited", "unreachable", "unknown"]
    since: str
    reason: str
    path: str
    path_since: str
    path_reason: str
    preferred: str
    return_seconds: float | None
    return_at: str | None
    paths: dict[str, dict[str, Any]]


class Node(Answer):
    """The state of a node daemon."""

    version: str
    started: str
    clock_step_seconds: float
    store: str
    files: dict[str, str]
    ready: bool
    waiting: str
    key: str | None
    subnets: list[str]
    interface: str | None
    public: list[str]
    backend: str
    unavailable: dict[str, str]
    mtu: int
    checks: list[Check]
    problems: list[Problem]
    no_path: dict[str, str]
    refused: dict[str, str]
    events: list[dict[str, Any]]
    devices: list[DeviceCount]
    peers: list[NodePeer]
    _types: ClassVar = {"checks": Check, "problems": Problem, "devices": DeviceCount,
                        "peers": NodePeer}
