"""An observer of a lease source for the tests. It applies the updates as the node daemon does."""

import asyncio
import contextlib

from tests.wait import until
from udptun.leases.base import Changes, Snapshot


class Observer:
    """Reads the updates of a source in a separate task, and checks that each change can be applied.

    prefix     only leases with this prefix of the key are recorded, so that several tests can share
               one cluster
    leases     the present state: {key: lease}
    batches    the changes of each update after the snapshot, in order
    snapshots  number of snapshots
    """

    def __init__(self, source, prefix=""):
        self.source, self.prefix = source, prefix
        self.leases, self.batches, self.snapshots = {}, [], 0
        self.task = asyncio.create_task(self._run())

    @property
    def changes(self):
        return [change for batch in self.batches for change in batch]

    def public_ips(self):
        """Return {key without the prefix: public address}."""
        return {key.removeprefix(self.prefix): str(lease.attributes.public_ip)
                for key, lease in self.leases.items()}

    async def ready(self):
        await until(lambda: self.snapshots, "the snapshot")
        await until(lambda: self.source.health.connected, "the watch")
        return self

    async def close(self):
        """Stop the observer. ``close`` may be called again."""
        assert self.task.cancelled() or not self.task.done(), self.task
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    async def _run(self):
        async with contextlib.aclosing(self.source.updates()) as updates:
            async for update in updates:
                if isinstance(update, Snapshot):
                    self.snapshots += 1
                    self.leases = {lease.key: lease for lease in update.leases
                                   if lease.key.startswith(self.prefix)}
                    continue
                assert isinstance(update, Changes)
                assert update.changes
                batch = tuple(change for change in update.changes
                              if change.key.startswith(self.prefix))
                if batch:
                    self.batches.append(batch)
                for change in batch:
                    assert self.leases.get(change.key) == change.old
                    if change.new is None:
                        del self.leases[change.key]
                    else:
                        self.leases[change.key] = change.new


@contextlib.asynccontextmanager
async def observing(source, prefix=""):
    """Yield an Observer that has the snapshot. Fail if the Observer gets a second snapshot."""
    observer = await Observer(source, prefix).ready()
    try:
        yield observer
    finally:
        await observer.close()
    assert observer.snapshots == 1


@contextlib.asynccontextmanager
async def running(coroutine):
    """Run a coroutine during a ``with`` block. Fail if the coroutine ends by itself."""
    task = asyncio.create_task(coroutine)
    try:
        yield task
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
