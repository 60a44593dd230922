"""Leases in Kubernetes: podCIDRs are the subnets, annotations have the other attributes.

Owns: the data that this node publishes, and the list and watch of all nodes. The cluster assigns
the subnets, so this source does not select subnets. Leases do not expire. ``api`` has the HTTP
requests, and ``schema`` has the format of the annotations. Asyncio, one loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager

from ...errors import FieldError
from ...model import IPAddress, IPNetwork
from ...wait import wait_at_most
from ..backoff import Backoff
from ..base import (
    Attributes,
    Change,
    Changes,
    Identity,
    Lease,
    LeaseBook,
    LeaseSource,
    LocalAddresses,
    Snapshot,
    SourceHealth,
    StoreDown,
    StoreNotReady,
    StoreRefused,
    Subnets,
)
from ..contest import Contest
from ..netconf import NetConfig
from .api import Api, Event, Forbidden, Gone
from .config import KubeConfig
from .schema import Annotations, FullNode, Node, network_up_patch
from .schema import subnets as pod_subnets

log = logging.getLogger(__name__)

REMIND_SECONDS = 60.0  # between two log lines about the same missing permission


def open_source(config: KubeConfig, _: LocalAddresses) -> KubeSource:
    return KubeSource(config)


class KubeSource(LeaseSource):
    """A LeaseSource over the nodes of a Kubernetes cluster.

    ``hold`` publishes NetworkUnavailable=False. Then the scheduler assigns pods to the node, so
    call ``hold`` only after the host is configured.
    """

    def __init__(self, config: KubeConfig) -> None:
        self.health = SourceHealth()
        self._config = config
        self._annotations = Annotations(config.annotation_prefix)
        self._client: Api | None = None
        self._node_name = config.node_name
        self._attributes: Attributes | None = None  # the attributes given to the last ``acquire``
        self._own: Node | None = None  # our node, as last reported by the watch
        self._own_changed = asyncio.Event()
        self._contest = Contest(self.health)
        self._published: set[IPAddress] = set()  # the addresses that we have published
        # The last valid values of the annotations that set an address: {name: address}.
        self._set_by_others: dict[str, IPAddress | None] = {}
        self._faults: set[str] = set()  # the invalid annotations of our node that are logged
        self._forbidden: dict[str, float] = {}  # {a text of the log: when it was logged last}
        self._publishes_n = 0

    async def network(self) -> NetConfig:
        path = self._config.net_config_path
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise StoreRefused(f"the network's configuration cannot be read: {path}: {e}") from e
        return NetConfig.parse(text, check_subnets=False, where=str(path))

    async def identity(self) -> Identity:
        """Read this node's annotations node-public-ip and node-public-ipv6.

        They override --public-ip and --public-ipv6, as in flannel. An invalid annotation is
        ignored: its last valid value stays. Raises StoreDown, StoreRefused.
        """
        node = await self._api.node(await self._name())
        faults: list[FieldError] = []
        public_ip, public_ipv6 = self._annotations.node_public(node, self._set_by_others, faults)
        self._report_faults(node, faults)
        return Identity(public_ip, public_ipv6, overrides_options=True)

    def memory(self) -> Mapping[str, str]:
        """Return the last valid values of the annotations that set an address."""
        return {name: str(address) for name, address in self._set_by_others.items()
                if address is not None}

    def recall(self, memory: Mapping[str, str]) -> None:
        self._set_by_others = self._annotations.last_valid(memory)

    async def acquire(self, attributes: Attributes, former: Subnets) -> Lease:
        """Publish our lease and return it.

        If an annotation public-ip-overwrite or public-ipv6-overwrite is set, the lease has the
        address in the annotation.
        """
        node = await self._api.node(await self._name())
        with _refused(node):
            subnets = _within(await self.network(), node)
        published = self._overwritten(node, attributes)
        await self._publish(node, published)
        self._attributes = attributes
        self.health.lease, self.health.lease_error = "held", ""
        self.health.lease_renewed = time.time()
        name = node.metadata.name
        return Lease(key=name, subnets=subnets, attributes=published, name=name)

    async def hold(self, lease: Lease) -> None:
        """Publish NetworkUnavailable=False. Restore our annotations when they are changed."""
        backoff = Backoff(self._config.retry_min, self._config.retry_max)
        announced = ""  # the uid of the Node object for which the condition was published
        while True:
            self._own_changed.clear()
            try:
                node = await self._api.node(lease.key)
                announced = await self._restore(node, lease, announced)
            except StoreDown as e:  # our lease is not lost, because it does not expire
                log.debug("cannot read our node: %s", e)
                self.health.errors_n += 1
                await asyncio.sleep(backoff.next())
                continue
            except StoreRefused as e:
                self.health.errors_n += 1
                self._lost(lease, e)
                await asyncio.sleep(backoff.next())
                continue
            backoff.reset()
            await wait_at_most(
                self._own_changed, min(self._config.resync, self._contest.delay or math.inf))

    async def updates(self) -> AsyncIterator[Snapshot | Changes]:
        book = LeaseBook()
        backoff = Backoff(self._config.retry_min, self._config.retry_max)
        version, snapshot_sent = "", False
        while True:
            try:
                if not version:
                    changes, version = await self._list(book)
                    if not snapshot_sent:
                        snapshot_sent = True
                        yield Snapshot(tuple(book.leases.values()))
                    elif changes:
                        yield Changes(changes)
                async with aclosing(self._api.watch(version)) as batches:
                    async for events in batches:
                        self._set_connected()
                        if not events:
                            continue
                        backoff.reset()
                        version = events[-1].object.metadata.resource_version
                        if changes := self._apply(book, events):
                            yield Changes(changes)
            except Gone as e:
                version = ""
                self.health.relists_n += 1
                log.info("listing the nodes again: %s", e)
            except (StoreDown, StoreRefused) as e:
                self._set_disconnected(e)
            await asyncio.sleep(backoff.next())

    def hosts(self) -> tuple[str, ...]:
        """Return the API server's host; nothing if it is the address of a service.

        A pod that uses its service account sends requests to the address of a service, which the
        host translates.
        """
        config = self._config
        given = config.api_url or config.kubeconfig_file is not None
        return self._client.hosts if given and self._client is not None else ()

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    @property
    def _api(self) -> Api:
        if self._client is None:
            self._client = Api(self._config)
        return self._client

    async def _name(self) -> str:
        if not self._node_name:
            pod, namespace = self._config.pod_name, self._config.pod_namespace
            self._node_name = await self._api.pod_node_name(namespace, pod)
            if not self._node_name:
                raise StoreDown(f"pod {namespace}/{pod} is not assigned to a node")
        return self._node_name

    # Our node

    async def _publish(self, node: Node, published: Attributes) -> bool:
        """Return whether the node's annotations had to be changed."""
        if patch := self._annotations.patch(node, published):
            await self._api.patch_status(node.metadata.name, patch)
        self._publishes_n += bool(patch)
        self._published |= {*_addresses(published)}
        return bool(patch)

    async def _restore(self, node: FullNode, lease: Lease, announced: str) -> str:
        """Publish the annotations and the condition that our Node object lacks.

        Raises StoreRefused if the podCIDRs have changed, for example because the Node object was
        deleted and created again. Then only the annotations are published.

        announced  the uid of the Node object for which the condition was published; "" at first

        Return the new value of ``announced``.
        """
        with _refused(node):
            subnets = _within(await self.network(), node)
        published = self._overwritten(node, self._attributes or lease.attributes)
        if subnets != lease.subnets:
            # Our entry in ``updates`` makes the daemon set up the host, and hold the new lease.
            # Only then may the scheduler assign pods, so the condition is not published here.
            if self._may_publish(node, lease, published):
                await self._publish(node, published)
            raise StoreRefused(f"the podCIDRs of node {lease.key} have changed from "
                               f"{lease.subnets} to {subnets}")
        if self._may_publish(node, lease, published) and await self._publish(node, published):
            log.warning("another program had changed the annotations of our node %s; they are "
                        "restored", lease.key)
        uid = node.metadata.uid
        # The condition is published once per Node object, as in flannel. Afterwards, a cloud
        # controller may manage the condition.
        if self._config.set_node_network_unavailable and announced != uid:
            if not node.network_is_up:
                await self._api.patch_status(lease.key, network_up_patch())
            announced = uid
        self.health.lease, self.health.lease_error = "held", ""
        self.health.lease_renewed = time.time()
        return announced

    def _may_publish(self, node: Node, lease: Lease, published: Attributes) -> bool:
        """Return whether our annotations may be restored now. The answer is False for some time
        after another machine has changed them repeatedly."""
        try:
            there = self._annotations.lease(node)
        except FieldError:
            there = None
        known = self._published | {*_addresses(lease.attributes)}
        others = [] if there is None else \
            [one for one in _addresses(there.attributes) if one not in known]
        if not others:
            self._contest.end_if_quiet()
            return True
        ours = " and ".join(map(str, _addresses(published)))
        text = f"another machine publishes its address {others[0]} in the annotations of our Node" \
            f" object {lease.key}; ours is {ours}"
        if not self.health.contested:
            log.error("%s", text)
        return self._contest.may_write((self._publishes_n, *others), text)

    def _overwritten(self, node: Node, attributes: Attributes) -> Attributes:
        """Return the attributes to publish."""
        faults: list[FieldError] = []
        published = self._annotations.published(node, attributes, self._set_by_others, faults)
        self._report_faults(node, faults)
        return published

    def _report_faults(self, node: Node, faults: list[FieldError]) -> None:
        """Log each invalid annotation of our node once."""
        for fault in faults:
            if (text := str(fault)) not in self._faults:
                log.error("node %s: %s; the annotation is ignored", node.metadata.name, text)
                self._faults.add(text)

    def _lost(self, lease: Lease, error: StoreRefused) -> None:
        reason = str(error)
        if isinstance(error, Forbidden):
            self._remind(reason)
        elif self.health.lease_error != reason:
            log.warning("our lease %s is lost: %s", lease.subnets, reason)
        self.health.lease, self.health.lease_error = "lost", reason

    def _remind(self, reason: str) -> None:
        """Log a request that our role does not permit, once a minute."""
        now = time.monotonic()
        if now >= self._forbidden.get(reason, -math.inf) + REMIND_SECONDS:
            log.error("the role of this node in Kubernetes (RBAC) is too narrow: %s", reason)
            self._forbidden[reason] = now

    # All nodes

    async def _list(self, book: LeaseBook) -> tuple[tuple[Change, ...], str]:
        try:
            leases, version = await self._listed(book, self._config.page)
        except Gone:  # the listing in pages took too long: list all nodes in one page
            leases, version = await self._listed(book, None)
        for name in self.health.skipped.keys() - leases.keys():
            del self.health.skipped[name]
        self.health.skipped.log(log)
        return book.replace(lease for lease in leases.values() if lease is not None), version

    async def _listed(
        self, book: LeaseBook, page: int | None
    ) -> tuple[dict[str, Lease | None], str]:
        leases: dict[str, Lease | None] = {}
        version = ""
        async with aclosing(self._api.nodes(page)) as pages:
            async for nodes, page_version in pages:
                version = page_version
                for node in nodes:
                    leases[node.metadata.name] = self._read(book, node)
                self.health.last_contact = time.monotonic()
        if self._node_name not in leases:
            self._set_own(None)
        return leases, version

    def _apply(self, book: LeaseBook, events: list[Event]) -> tuple[Change, ...]:
        changes = [self._apply_one(book, event) for event in events]
        self.health.skipped.log(log)
        return tuple(change for change in changes if change is not None)

    def _apply_one(self, book: LeaseBook, event: Event) -> Change | None:
        name = event.object.metadata.name
        if event.type == "DELETED":
            self.health.skipped.pop(name, None)
            if name == self._node_name:
                self._set_own(None)
            return book.remove(name)
        if event.type not in ("ADDED", "MODIFIED"):
            return None
        lease = self._read(book, event.object)
        return book.remove(name) if lease is None else book.put(lease)

    def _read(self, book: LeaseBook, node: Node) -> Lease | None:
        """Return a node's lease; None if the node has no lease.

        If the lease is invalid, return the node's previous lease.
        """
        name, skipped = node.metadata.name, self.health.skipped
        if name == self._node_name:
            self._set_own(node)
        former, faults = book.leases.get(name), list[FieldError]()
        try:
            lease = self._annotations.lease(
                node, None if former is None else former.attributes, faults)
        except FieldError as e:
            skipped.add(name, str(e), f"node {name} has an invalid lease: {e}")
            return former
        if faults:
            text = "; ".join(map(str, faults))
            skipped.add(name, text, f"a part of the lease of node {name} is invalid: {text}")
        else:
            skipped.pop(name, None)
        return lease

    def _set_own(self, node: Node | None) -> None:
        """Record our own node. Wake ``hold`` if the node's spec, uid or annotations have changed.

        node  None: our node does not exist any more
        """
        former, self._own = self._own, node
        if former is None or node is None:
            same = former is node
        else:
            same = (former.spec == node.spec and former.metadata.uid == node.metadata.uid
                    and former.annotations == node.annotations)
        if not same:
            self._own_changed.set()

    def _set_connected(self) -> None:
        health = self.health
        if health.error:
            log.info("the API server responds again")
        health.connected, health.error, health.last_contact = True, "", time.monotonic()

    def _set_disconnected(self, error: StoreDown | StoreRefused) -> None:
        health, reason = self.health, str(error)
        if isinstance(error, Forbidden):
            self._remind(reason)
        elif health.error != reason:
            log.warning("the API server: %s; the known leases stay active", reason)
        health.connected, health.error = False, reason
        health.errors_n += 1


def _addresses(attributes: Attributes) -> tuple[IPAddress, ...]:
    both = (attributes.public_ip, attributes.public_ipv6)
    return tuple(address for address in both if address is not None)


@contextmanager
def _refused(node: Node) -> Iterator[None]:
    """Turn FieldError into StoreNotReady.

    An operator, or the controller manager, must change our node or the network's configuration.
    """
    try:
        yield
    except FieldError as e:
        raise StoreNotReady(f"node {node.metadata.name}: {e}") from e


def _within(network: NetConfig, node: Node) -> Subnets:
    """Return our subnets, one in each enabled network.

    Raises FieldError if a subnet is missing, or is not within its network.
    """
    both = pod_subnets(node)
    # The podCIDR of a disabled IP version is ignored, as in flannel.
    subnets = Subnets(None if network.network is None else both.v4,
                      None if network.network6 is None else both.v6)
    for name, whole, subnet in (
        ("Network", network.network, subnets.v4), ("IPv6Network", network.network6, subnets.v6)
    ):
        if whole is not None and subnet is None:
            raise FieldError("podCIDRs", node.spec.pod_cidrs, f"one within {name} {whole}")
        if whole is not None and subnet is not None and not _contains(whole, subnet):
            raise FieldError("podCIDR", str(subnet), f"a prefix within {name} ({whole})")
    return subnets


def _contains(network: IPNetwork, subnet: IPNetwork) -> bool:
    return (network.version == subnet.version and network.prefixlen <= subnet.prefixlen
            and subnet.network_address in network)
