"""Take off this host all that a daemon with the same configuration has made.

Owns the list of what a daemon makes. Refuses to touch the store: a lease is given back by running
out, or by whoever removes the node. What is gone already is no error. The caller's loop, once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from ..errors import UdptunError
from ..leases.cache import LeaseCache
from ..net.netlink import Netlink
from ..net.vxlan import Vxlan
from .ability import STATE_FILE, vxlan_name
from .config import NodeConfig
from .host.firewall import Firewall, FirewallRules
from .process.keeper import dismiss
from .process.launch import LOG_FILE

log = logging.getLogger(__name__)

SAVED_FILE = "leases.json"
LOCK_FILE = "lock"


class NotAllRemoved(UdptunError):
    """Something is left; says what, and why."""


async def clean_up(config: NodeConfig, netlink: Netlink) -> None:
    """Each thing is tried, also when another cannot be removed. Raises NotAllRemoved."""
    saved_file = config.state_dir / SAVED_FILE
    known = LeaseCache(saved_file).load(config.source.store_id)
    failed: list[str] = []

    @contextlib.contextmanager
    def trying() -> Iterator[None]:
        try:
            yield
        except (UdptunError, OSError) as exc:
            failed.append(str(exc))

    with trying():
        if await dismiss(config.control, config.forward_file):
            log.info("stopped the forwarder; %s went with it", config.tun)
    # A device of flannel's name that no lease of ours was published with is flannel's.
    if known is not None and known.lease is not None and \
            known.lease.attributes.backend_type == "vxlan":
        for version in (4, 6):
            with trying():
                await Vxlan(netlink).remove(vxlan_name(known.network.vni, version))
    with trying():
        if await Firewall(FirewallRules()).remove():
            log.info("removed the firewall rules")
    with trying():
        config.subnet_file.unlink(missing_ok=True)
    for name in (STATE_FILE, f"{STATE_FILE}.new", LOG_FILE, SAVED_FILE, f"{SAVED_FILE}.new",
                 LOCK_FILE):
        with trying():
            (config.state_dir / name).unlink(missing_ok=True)
    if failed:
        raise NotAllRemoved("; ".join(failed))
