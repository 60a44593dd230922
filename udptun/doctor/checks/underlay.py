"""Checks of the network below the tunnel: the interface, its address, the port."""

from __future__ import annotations

from collections.abc import Iterator

from ...leases.advert import read
from ...model import IPAddress
from ...net.arp import other_owners
from ...net.links import Link
from ..check import Finding, Skip, check, failed, ok, warning
from ..facts import Facts
from ..processes import owners_of_socket, sockets_of


@check("underlay", "the interface that carries the tunnel: it exists, is up, has a link",
       "node.md#which-interface-and-address-other-nodes-use")
def underlay(facts: Facts) -> Iterator[Finding]:
    link = facts.underlay
    if link is None:
        if not facts.underlay_addresses:
            raise Skip("it is not known which interface carries the tunnel")
        return  # ``underlay-address`` reports it
    if not link.up:
        yield failed(f"{link.name}, which carries the tunnel, is down",
                     remedy=f"run: ip link set {link.name} up")
    elif not link.carrier:
        yield failed(f"{link.name}, which carries the tunnel, has no link",
                     "carrier 0", "look at the cable, the switch or the virtual machine's network")
    else:
        yield ok(f"{link.name} is up, MTU {link.mtu}")


@check("underlay-address",
       "whether this host, and no other, has the addresses that the tunnel uses",
       "troubleshoot.md#no-interface-has-this-address")
def address(facts: Facts) -> Iterator[Finding]:
    wanted = facts.underlay_addresses
    if not wanted:
        raise Skip("the addresses of the tunnel are not known")
    have = {one.address: (link, one) for link in facts.links.values() for one in link.addresses}
    for one in wanted:
        if one not in have:
            yield failed(f"no interface has the address {one}, which the tunnel uses",
                         remedy="restore the address, or restart the daemon: it chooses an "
                                "address again")
            continue
        link, found = have[one]
        if found.duplicate:
            yield failed(f"another host has the address {one} of {link.name}, too",
                         "the kernel's duplicate address detection", "change one of the addresses")
        elif found.tentative:
            yield warning(f"the kernel has not accepted the address {one} of {link.name} yet",
                          "it is tentative")
        elif macs := _other_owners(facts, link, one):
            yield failed(f"another host has the address {one} of {link.name}, too",
                         f"ARP replies for the address come from {', '.join(sorted(macs))}",
                         "change one of the addresses")
        else:
            yield ok(f"{link.name} has {one}")


def _other_owners(facts: Facts, link: Link, address: IPAddress) -> set[str]:
    if address.version == 6 or not facts.is_root or not (link.up and link.carrier):
        return set()  # for IPv6, the kernel itself detects duplicate addresses
    # A host answers on each of its interfaces for all of its addresses.
    return other_owners(link.name, address) - {one.mac for one in facts.links.values()}


@check("duplicate-peers", "nodes that publish the same address and port",
       "node.md#which-interface-and-address-other-nodes-use")
def duplicate_peers(facts: Facts) -> Iterator[Finding]:
    if facts.known is None:
        raise Skip("the leases are not known")
    own = facts.known.lease.key if facts.known.lease is not None else None
    public: dict[str, list[str]] = {}
    for lease in facts.known.leases:
        attributes = lease.attributes
        advert = read(attributes.backend_data)
        if attributes.public_ip is not None:
            where = f"{attributes.public_ip}{f' port {advert.port}' if advert else ''}"
            public.setdefault(where, []).append(lease.key)
    for where, keys in public.items():
        if len(keys) > 1:
            whose = " and this node" if own in keys else ""
            names = ", ".join(key for key in keys if key != own)
            yield failed(f"{names}{whose} publish the same address {where}",
                         remedy="give each node an address of its own, or delete the lease of the"
                         " machine that is gone")


@check("port", "whether the forwarder, and no other program, listens on the UDP port",
       "troubleshoot.md#another-process-listens-there")
def port(facts: Facts) -> Iterator[Finding]:
    if not facts.listen:
        raise Skip("this host does not listen on UDP, or its port is not known")
    assert facts.first is not None
    pids = {one.pid for one in facts.processes}  # the daemon keeps copies of the sockets
    ours = {inode for pid in pids for inode in sockets_of(pid)}
    for endpoint in facts.listen:
        at = [one for one in facts.first.sockets if one.port == endpoint.port and
              (one.address == endpoint.address or one.address.is_unspecified)]
        if not at:
            yield failed(f"no program listens on UDP {endpoint}",
                         remedy="start the forwarder: see the check forwarder")
            continue
        for inode in {one.inode for one in at} - ours:
            owners = owners_of_socket(inode)  # looks at all processes
            if owners and not owners.keys() & pids:
                names = ", ".join(f"{name} (process {pid})" for pid, name in owners.items())
                yield failed(f"another program has the UDP port {endpoint.port}: {names}",
                             f"its socket is bound to {at[0].address}",
                             "stop it, or give udptun another port")
        if facts.forwarder.answer is not None:
            yield ok(f"the forwarder listens on {endpoint}")


CHECKS = (underlay, address, duplicate_peers, port)
