"""The lease source of a Kubernetes cluster: podCIDRs are the subnets, annotations say the rest.

Owns what this node publishes, and the list-and-watch that tells of the others. The subnet is the
cluster's to give: nothing is chosen and nothing expires here. Asyncio, one loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager

from ...errors import FieldError
from ...model import IPNetwork
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
    StoreRefused,
    Subnets,
)
from ..netconf import NetConfig
from ..wait import wait_at_most
from .api import Api, Event, Gone
from .config import KubeConfig
from .schema import Annotations, FullNode, Node, network_up_patch
from .schema import subnets as pod_subnets

log = logging.getLogger(__name__)


def open_source(config: KubeConfig, _: LocalAddresses) -> KubeSource:
    return KubeSource(config)


class KubeSource(LeaseSource):
    """A LeaseSource (see ``base``) on the nodes of a Kubernetes cluster.

    ``hold`` says NetworkUnavailable=False, upon which the scheduler sends pods: it is for a host
    that is set up.
    """

    def __init__(self, config: KubeConfig) -> None:
        self.health = SourceHealth()
        self._config = config
        self._annotations = Annotations(config.annotation_prefix)
        self._client: Api | None = None
        self._node_name = config.node_name
        self._asked: Attributes | None = None  # what acquire was given last
        self._own: Node | None = None  # our node, as the watch saw it last
        self._own_changed = asyncio.Event()

    async def network(self) -> NetConfig:
        path = self._config.net_config_path
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise StoreRefused(f"the network's configuration cannot be read: {path}: {e}") from e
        return NetConfig.parse(text, check_subnets=False, where=str(path))

    async def identity(self) -> Identity:
        """Read this node's annotations node-public-ip and node-public-ipv6; flannel lets them
        override --public-ip and --public-ipv6. StoreDown, StoreRefused."""
        node = await self._api.node(await self._name())
        try:
            public_ip, public_ipv6 = self._annotations.node_public(node)
        except FieldError as e:  # the node is still usable with the address of its interface
            log.error("node %s: %s; the annotations of its public addresses are ignored",
                      node.metadata.name, e)
            return Identity()
        return Identity(public_ip, public_ipv6, overrides_options=True)

    async def acquire(self, attributes: Attributes, former: Subnets) -> Lease:
        """As published: with the address of public-ip-overwrite, if an operator has set that."""
        node = await self._api.node(await self._name())
        with _refused(node):
            subnets = _within(await self.network(), node)
            published = self._annotations.published(node, attributes)
        await self._publish(node, published)
        self._asked = attributes
        self.health.lease, self.health.lease_error = "held", ""
        name = node.metadata.name
        return Lease(key=name, subnets=subnets, attributes=published, name=name)

    async def hold(self, lease: Lease) -> None:
        """Say that the network is there; mend what others do to our annotations."""
        pauses = Backoff(self._config.retry_min, self._config.retry_max)
        announced = ""  # the uid of the node object that was told
        while True:
            self._own_changed.clear()
            try:
                node = await self._api.node(lease.key)
                announced = await self._mend(node, lease, announced)
            except StoreDown as e:  # nothing is lost: a lease here does not expire
                log.debug("cannot look at our node: %s", e)
                self.health.errors_n += 1
                await asyncio.sleep(pauses.next())
                continue
            except StoreRefused as e:
                self.health.errors_n += 1
                self._lost(lease, str(e))
                await asyncio.sleep(pauses.next())
                continue
            pauses.reset()
            await wait_at_most(self._own_changed, self._config.resync)

    async def updates(self) -> AsyncIterator[Snapshot | Changes]:
        book = LeaseBook()
        pauses = Backoff(self._config.retry_min, self._config.retry_max)
        version, snapshot_due = "", True
        while True:
            try:
                if not version:
                    changes, version = await self._list(book)
                    if snapshot_due:
                        snapshot_due = False
                        yield Snapshot(tuple(book.leases.values()))
                    elif changes:
                        yield Changes(changes)
                async with aclosing(self._api.watch(version)) as batches:
                    async for events in batches:
                        self._in_order()
                        if not events:
                            continue
                        pauses.reset()
                        version = events[-1].object.metadata.resource_version
                        if changes := self._apply(book, events):
                            yield Changes(changes)
            except Gone as e:
                version = ""
                self.health.relists_n += 1
                log.info("listing the nodes again: %s", e)
            except (StoreDown, StoreRefused) as e:
                self._out_of_order(str(e))
            await asyncio.sleep(pauses.next())

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
                raise StoreDown(f"pod {namespace}/{pod} is on no node")
        return self._node_name

    # this node

    async def _publish(self, node: Node, published: Attributes) -> None:
        if patch := self._annotations.patch(node, published):
            await self._api.patch_status(node.metadata.name, patch)

    async def _mend(self, node: FullNode, lease: Lease, announced: str) -> str:
        """Make our node say what it should; returns the uid of the node that has been told."""
        with _refused(node):
            subnets = _within(await self.network(), node)
            published = self._annotations.published(node, self._asked or lease.attributes)
        if subnets != lease.subnets:
            raise StoreRefused(f"node {lease.key} has got other podCIDRs: {subnets}, "
                               f"no longer {lease.subnets}")
        await self._publish(node, published)
        uid = node.metadata.uid
        # Once for each node object, as flannel: a cloud's controller may have its own view later.
        if self._config.set_node_network_unavailable and announced != uid:
            if not node.network_is_up:
                await self._api.patch_status(lease.key, network_up_patch())
            announced = uid
        self.health.lease, self.health.lease_error = "held", ""
        return announced

    def _lost(self, lease: Lease, why: str) -> None:
        if self.health.lease_error != why:
            log.warning("the lease of %s is not in order: %s", lease.subnets, why)
        self.health.lease, self.health.lease_error = "lost", why

    # all nodes

    async def _list(self, book: LeaseBook) -> tuple[tuple[Change, ...], str]:
        try:
            leases, version = await self._listed(book, self._config.page)
        except Gone:  # it took too long: all at once, then
            leases, version = await self._listed(book, None)
        for name in self.health.skipped.keys() - leases.keys():
            del self.health.skipped[name]
        return book.replace(lease for lease in leases.values() if lease is not None), version

    async def _listed(
        self, book: LeaseBook, page: int | None
    ) -> tuple[dict[str, Lease | None], str]:
        leases: dict[str, Lease | None] = {}
        version = ""
        async with aclosing(self._api.nodes(page)) as pages:
            async for nodes, of in pages:
                version = of
                for node in nodes:
                    leases[node.metadata.name] = self._read(book, node)
                self.health.last_contact = time.monotonic()
        if self._node_name not in leases:
            self._see(None)
        return leases, version

    def _apply(self, book: LeaseBook, events: list[Event]) -> tuple[Change, ...]:
        changes = (self._applied(book, event) for event in events)
        return tuple(change for change in changes if change is not None)

    def _applied(self, book: LeaseBook, event: Event) -> Change | None:
        name = event.object.metadata.name
        if event.type == "DELETED":
            self.health.skipped.pop(name, None)
            if name == self._node_name:
                self._see(None)
            return book.remove(name)
        if event.type not in ("ADDED", "MODIFIED"):
            return None
        lease = self._read(book, event.object)
        return book.remove(name) if lease is None else book.put(lease)

    def _read(self, book: LeaseBook, node: Node) -> Lease | None:
        """A node's lease, or the last one that could be used; None: it has none."""
        name, skipped = node.metadata.name, self.health.skipped
        if name == self._node_name:
            self._see(node)
        try:
            lease = self._annotations.lease(node)
        except FieldError as e:
            if skipped.get(name) != str(e):
                log.warning("node %s cannot be used as it is: %s", name, e)
            skipped[name] = str(e)
            return book.leases.get(name)
        skipped.pop(name, None)
        return lease

    def _see(self, node: Node | None) -> None:
        """Our own node: ``hold`` looks at it when more than its version is new."""
        was, self._own = self._own, node
        if was is None or node is None:
            same = was is node
        else:
            same = (was.spec == node.spec and was.metadata.uid == node.metadata.uid
                    and was.annotations == node.annotations)
        if not same:
            self._own_changed.set()

    def _in_order(self) -> None:
        health = self.health
        if health.error:
            log.info("the API server answers again")
        health.connected, health.error, health.last_contact = True, "", time.monotonic()

    def _out_of_order(self, why: str) -> None:
        health = self.health
        if health.error != why:
            log.warning("the known leases stay in force: %s", why)
        health.connected, health.error = False, why
        health.errors_n += 1


@contextmanager
def _refused(node: Node) -> Iterator[None]:
    """What is wrong with our own node, or with the network it is in, an operator must mend."""
    try:
        yield
    except FieldError as e:
        raise StoreRefused(f"node {node.metadata.name}: {e}") from e


def _within(network: NetConfig, node: Node) -> Subnets:
    """Our subnets: one in each network there is. FieldError."""
    subnets = pod_subnets(node)
    if network.network is None:  # IPv4 is off in this overlay: flannel takes no notice then either
        subnets = Subnets(None, subnets.v6)
    for name, of, subnet in (
        ("Network", network.network, subnets.v4), ("IPv6Network", network.network6, subnets.v6)
    ):
        if of is not None and subnet is None:
            raise FieldError("podCIDRs", node.spec.pod_cidrs, f"one within {name} {of}")
        if subnet is not None and (of is None or not _contains(of, subnet)):
            raise FieldError("podCIDR", str(subnet), f"a prefix within {name} ({of})")
    return subnets


def _contains(network: IPNetwork, subnet: IPNetwork) -> bool:
    return (network.version == subnet.version and network.prefixlen <= subnet.prefixlen
            and subnet.network_address in network)
