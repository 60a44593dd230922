"""Reach peers through the kernel's VXLAN device, as flannel does it.

Owns the device (``flannel.<VNI>``) and, for each peer, what makes the kernel encapsulate: a
permanent neighbour (base address of the subnet -> MAC), a forwarding entry (MAC -> endpoint) and a
route (subnet via its base address through the device). Refuses to know leases and to choose which
peer goes this way. Threading rule: call from any asyncio loop, one call at a time for a device;
the work is done in the thread of the ``Netlink`` that is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import DeviceError, FieldError
from ..model import IPAddress, IPNetwork
from .netlink import Netlink

OVERHEAD = {4: 50, 6: 70}  # bytes around the inner packet, by the IP version of the underlay


@dataclass(frozen=True, slots=True)
class VxlanConfig:
    """What a VXLAN device shall be like.

    port            UDP port; 0 is the kernel's own, 8472
    underlay_index  number of the interface that the datagrams leave through
    local           this host's address there; its version is that of the device
    mtu             of the device, so of inner packets, bytes: underlay's less OVERHEAD
    mac             "aa:bb:.." to be known by; None: the present device's, else one at random
    """

    name: str
    vni: int
    port: int
    underlay_index: int
    local: IPAddress
    mtu: int
    learning: bool = False
    gbp: bool = False
    mac: str | None = None


@dataclass(frozen=True, slots=True)
class VxlanDevice:
    """A device that is there. version: of the underlay, and of the subnets it carries."""

    name: str
    index: int
    mac: str
    mtu: int
    version: int


@dataclass(frozen=True, slots=True)
class VxlanPeer:
    """A subnet behind a peer. FieldError: ``mac`` is not one host's.

    mac     of the peer's device, "aa:bb:cc:dd:ee:ff" (VtepMAC of its lease)
    direct  route straight to ``endpoint`` if it is on the link, encapsulate only if it is not
    """

    subnet: IPNetwork
    mac: str
    endpoint: IPAddress
    direct: bool = False


@dataclass(frozen=True, slots=True)
class PeerFailure:
    """A peer that is not reached by this device, and why. No route to it is left there."""

    peer: VxlanPeer
    error: DeviceError | FieldError


class Vxlan:
    """VXLAN devices of this network namespace, and their peers."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink

    async def probe(self, like: VxlanConfig | None = None) -> str | None:
        """Whether the kernel makes a VXLAN device here: None, or a sentence that says why not.

        Makes one on another VNI, sets it up and removes it. ``like``: of the same port, GBP and
        IP version, which matters where a device shares its port.
        """
        raise NotImplementedError

    async def ensure(
        self, config: VxlanConfig, addresses: Iterable[IPAddress] | None = None
    ) -> VxlanDevice:
        """The device is there, up, and as told. One that fits is adopted, with its peers and its
        MAC; one that does not is made anew, with the same MAC, since peers know it.

        addresses  become its only ones, each as a host address; None: not known yet, those it has
                   stay (link-local ones always do)
        DeviceError
        """
        raise NotImplementedError

    async def sync(
        self, device: VxlanDevice, peers: Iterable[VxlanPeer]
    ) -> tuple[PeerFailure, ...]:
        """Make these the peers of the device: reads what is there, applies the difference. A peer
        that the kernel refuses is returned; all others are in force. DeviceError: none may be."""
        raise NotImplementedError

    async def change(
        self, device: VxlanDevice, put: Iterable[VxlanPeer] = (), remove: Iterable[IPNetwork] = (),
    ) -> tuple[PeerFailure, ...]:
        """Remove the peers of some subnets, add or change others, after ``sync``. As ``sync``."""
        raise NotImplementedError

    async def remove(self, name: str) -> None:
        """Remove the device with all that goes through it, and the routes straight to its peers.
        Nothing happens if there is none. DeviceError: it is not a VXLAN device."""
        raise NotImplementedError
