"""Remove from this host everything that a daemon with the same configuration created.

Owns: the list of things that a daemon creates, except the things that its backends create. Does not
change the store: a lease there expires, or is deleted together with the node. A thing that does not
exist any more is not an error. Runs once, on the caller's loop.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from ..errors import UdptunError
from ..files import remove_replaced
from ..leases.base import SourceHealth
from ..leases.cache import CACHE_FILE, LeaseCache
from ..net.netlink import Netlink
from .backends.active import ActiveBackends
from .config import NodeConfig
from .host.firewall.keeper import Firewall
from .host.firewall.rules import FirewallRules
from .status.report import NodeReport

log = logging.getLogger(__name__)

LOCK_FILE = "lock"  # in the state directory


class NotAllRemoved(UdptunError):
    """Some things could not be removed. The text has the reasons."""


async def clean_up(config: NodeConfig, netlink: Netlink) -> None:
    """Remove everything. If a removal fails, continue with the other things.

    Raises NotAllRemoved at the end if a removal has failed.
    """
    known = LeaseCache(config.state_dir / CACHE_FILE).load(config.source.store_id)
    failed: list[str] = []

    @contextlib.contextmanager
    def attempt() -> Iterator[None]:
        try:
            yield
        except (UdptunError, OSError) as exc:
            failed.append(str(exc))

    for backend in ActiveBackends(config, netlink, NodeReport("", SourceHealth())):
        await backend.cleanup(known, attempt)
    with attempt():
        if await Firewall(FirewallRules(), config.instance).remove():
            log.info("removed the firewall rules")
    if not config.leaves_to_flannel:
        with attempt():
            config.subnet_file.unlink(missing_ok=True)
    with attempt():
        remove_replaced(config.state_dir / CACHE_FILE)
    for name in (f"{CACHE_FILE}.bad", LOCK_FILE):
        with attempt():
            (config.state_dir / name).unlink(missing_ok=True)
    if failed:
        raise NotAllRemoved("; ".join(failed))


def remove_empty_directories(config: NodeConfig) -> None:
    """Remove the directories of our files that are empty now. Call this without locks in them."""
    files = (config.subnet_file, config.forward_file, config.control)
    for directory in {config.state_dir, *(path.parent for path in files)}:
        with contextlib.suppress(OSError):  # another instance uses it, or it is a mount point
            directory.rmdir()
