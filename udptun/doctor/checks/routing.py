"""Checks of routes: those that take packets from the overlay, and what flannel has left."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from ..check import Finding, Skip, check, failed, ok, warning
from ..facts import Facts

ENDPOINTS_N = 500  # peers whose endpoint is looked up


def misrouted(facts: Facts) -> Iterator[Finding]:
    """Ask the kernel for the route to each peer, as the daemon does."""
    from ...net.netlink import Netlink
    from ...node.host.misrouted import Misrouted

    known = facts.known
    if known is None or known.lease is None:
        yield from _looped(facts)
        return
    own = known.lease
    devices = {facts.links[name].index for name in facts.devices if name in facts.links}
    peers = [lease for lease in known.leases if lease.key != own.key]
    with Netlink() as netlink:
        look = Misrouted(netlink)
        asyncio.run(look.look(peers, tuple(own.subnets), devices, known.network.networks,
                              direct=known.network.direct_routing, everyone=True))
    for key, why in sorted(look.found.items()):
        yield failed(f"{key}: {why}", remedy="remove this route or rule, or change its prefix;"
                     " if the device is gone, see the check host")
    if not look.found:
        yield ok(f"peers that the kernel routes through the overlay: {len(peers)}")


def _looped(facts: Facts) -> Iterator[Finding]:
    """On a host without a node daemon: the endpoints that the host routes into the TUN."""
    from ...model import Endpoint
    from ...net.kernel_path import kernel_path

    if facts.forwarder.answer is None:
        raise Skip("the peers are not known")
    looked = 0
    for peer in facts.forwarder.answer["peers"][:ENDPOINTS_N]:
        endpoint = Endpoint.parse(peer["endpoint"])
        path = kernel_path(endpoint.address)
        looked += 1
        if path.error:
            yield failed(f"there is no route to the peer {endpoint.address}: {path.error}",
                         remedy=f"run: ip route get {endpoint.address}")
        elif path.device == facts.tun:
            yield failed(f"the host routes the peer's address {endpoint.address} into {facts.tun}"
                         " itself", remedy=f"run: ip route get {endpoint.address}")
    yield ok(f"peers whose endpoint the kernel routes through the underlay: {looked}")


@check("leftovers", "devices and rules that a former flannel has left",
       "node.md#leftovers-of-flannel", seconds=15)
def leftovers(facts: Facts) -> Iterator[Finding]:
    from ...node.host.leftovers import names_there, why_keep

    if not facts.expects_node:
        raise Skip("no node daemon has run here")
    for link in facts.links.values():
        is_ours = link.name in facts.vxlan_devices
        if link.name.startswith(("flannel.", "flannel-v6.")) and not is_ours and \
                facts.instance.is_default:
            why = why_keep()
            yield warning(f"{link.name} of a former flannel is still there, and may have routes",
                          why, f"run: ip link delete {link.name}")
    if not facts.is_root:
        raise Skip("the rules of the firewall can only be read by root")
    for name in sorted(asyncio.run(names_there())):
        yield warning(f"the firewall chain or table {name} of a former flannel is still there:"
                      " flannel's rules can masquerade packets between pods", why_keep(),
                      "restart the node daemon without --keep-flannel, or remove it")


CHECKS = (leftovers,)
