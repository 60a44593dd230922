"""The etcd source: one client, one watcher of all leases, one keeper of our own lease.

Owns: the creation of these three objects, and the health of the source. Asyncio, one loop.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Sequence

from ..base import (
    Attributes,
    Changes,
    Lease,
    LeaseSource,
    LocalAddresses,
    Snapshot,
    SourceHealth,
    Subnets,
)
from ..netconf import NetConfig
from .client import Client
from .config import EtcdConfig
from .keeper import LeaseKeeper
from .watch import LeaseWatcher


def open_source(config: EtcdConfig, _: LocalAddresses) -> EtcdSource:
    return EtcdSource(config)


class EtcdSource(LeaseSource):
    """A LeaseSource over flannel's keys in etcd.

    draw  called with the base addresses of the free subnets; returns one of them
    """

    def __init__(
        self, config: EtcdConfig, draw: Callable[[Sequence[int]], int] = random.choice
    ) -> None:
        self.health = SourceHealth(error="not contacted yet")
        self._config = config
        self._client = Client(config, self._count_failure)
        self._keeper = LeaseKeeper(self._client, config, self.health, draw)

    async def network(self) -> NetConfig:
        return await self._keeper.network()

    async def acquire(self, attributes: Attributes, former: Subnets) -> Lease:
        return await self._keeper.acquire(attributes, former)

    async def hold(self, lease: Lease) -> None:
        await self._keeper.hold(lease)

    def updates(self) -> AsyncGenerator[Snapshot | Changes, None]:
        return LeaseWatcher(
            self._client, self._config.root, self.health, self._config.ttl_seconds,
            self._keeper.key_changed, self._set_state,
        ).updates()

    def hosts(self) -> tuple[str, ...]:
        return tuple(target.host for target in self._config.targets)

    async def aclose(self) -> None:
        await self._client.aclose()

    def _count_failure(self) -> None:
        self.health.errors_n += 1

    def _set_state(self, error: str) -> None:
        self.health.connected, self.health.error = not error, error
