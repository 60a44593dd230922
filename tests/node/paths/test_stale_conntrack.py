"""BoundMeter at a node whose conntrack table has an entry from before its address was there.

Real nftables and conntrack, in two network namespaces that a veth pair connects. This thread is in
the namespace of the node. The peer's meter runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import socket
import threading
from ipaddress import ip_address, ip_network

import pytest

from tests.own_netns import CLONE_NEWNET, in_own_netns, sh
from tests.wait import until
from udptun.net.batch import Refusal, RouteSocket, attributes
from udptun.net.conntrack import NETLINK_NETFILTER, NFGENMSG, UdpFlow, _body, forget_flows
from udptun.node.backends.base import ProbeDevice
from udptun.node.host.firewall.keeper import Firewall
from udptun.node.host.firewall.rules import FirewallError, FirewallRules
from udptun.node.paths.bound import BoundMeter
from udptun.probe.message import VXLAN_PATH

MTU, PORT = 1450, 8285
NETWORK = {4: ip_network("10.244.0.0/16"), 6: ip_network("fd00:244::/48")}
PEER = {4: ip_network("10.244.1.0/24"), 6: ip_network("fd00:244:0:1::/64")}
OLD = {4: ip_network("10.244.2.0/24"), 6: ip_network("fd00:244:0:2::/64")}
NEW = {4: ip_network("10.244.3.0/24"), 6: ip_network("fd00:244:0:3::/64")}
OUT = {4: "192.0.2.1/24", 6: "2001:db8::1/64"}  # of the device to which the node forwards
GET = 1 << 8 | 1  # linux/netfilter/nfnetlink_conntrack.h: IPCTNL_MSG_CT_GET
CTA_STATUS, IPS_SRC_NAT = 3, 1 << 4
_libc = ctypes.CDLL(None, use_errno=True)


class Peer:
    """A thread with a meter in a network namespace of its own."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._up, self._go, self._end = (threading.Event() for _ in range(3))
        self.answered = False
        self.failure: BaseException | None = None
        self.tid = 0
        self._thread = threading.Thread(target=self._run, name="peer")

    def __enter__(self) -> Peer:
        self._thread.start()
        assert self._up.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._go.set()
        self._end.set()
        self._thread.join()

    def probe(self) -> None:
        """Probe the new address of the node from now on, as if the pair had traffic."""
        self._go.set()

    def _run(self) -> None:
        try:
            assert _libc.unshare(CLONE_NEWNET) == 0
            self.tid = threading.get_native_id()
            self._up.set()
            self._go.wait()
            if not self._end.is_set():
                asyncio.run(self._probe())
        except BaseException as error:
            self.failure = error
            self._up.set()

    async def _probe(self) -> None:
        with metered(PEER[self._version]) as meter:
            subnet = NEW[self._version]
            meter.add(subnet, PORT, MTU)
            while not self._end.is_set():
                meter.traffic([subnet])
                self.answered = self.answered or replied(meter, subnet)
                await asyncio.sleep(0.05)


@contextlib.contextmanager
def metered(own):
    device = ProbeDevice("overlay", 1, own.network_address, VXLAN_PATH)
    meter = BoundMeter(device, PORT, lambda _: None)
    meter.check()
    assert meter.error == ""
    try:
        yield meter
    finally:
        meter.close()


def replied(meter, subnet):
    """Whether the last answer was a reply to a probe. Echoes do not count."""
    state = meter.state(subnet)
    return state.last_answer is not None and str(subnet.network_address) not in meter._echoed


def look_up(flow):
    """Return the attributes of the flow's entry, or the kernel's refusal."""
    with RouteSocket(NETLINK_NETFILTER) as kernel:
        (found,) = kernel.ask(GET, [_body(flow)])
    return found if isinstance(found, Refusal) else attributes(found, NFGENMSG.size)


def is_masqueraded(flow):
    found = look_up(flow)
    return not isinstance(found, Refusal) and \
        int.from_bytes(found[CTA_STATUS]) & IPS_SRC_NAT != 0


async def use_subnet(firewall, version, subnet):
    networks = {"network": NETWORK[4], "subnet": subnet} if version == 4 else \
        {"network6": NETWORK[6], "subnet6": subnet}
    firewall.want = FirewallRules(**networks, masquerade=True)
    try:
        await firewall.sync()
    except FirewallError as error:
        pytest.skip(f"nftables cannot translate addresses here: {error}")


def connect(version, peer):
    """Set up both namespaces. The node has the address of its old subnet."""
    own, other, out = OLD[version].network_address, PEER[version].network_address, OUT[version]
    bits, nodad = own.max_prefixlen, "nodad" if version == 6 else ""
    inside = f"nsenter --net=/proc/{os.getpid()}/task/{peer.tid}/ns/net"
    forwarding = "net.ipv6.conf.all.forwarding" if version == 6 else "net.ipv4.ip_forward"
    sh(f"ip link add overlay type veth peer name overlay netns /proc/{os.getpid()}/task/{peer.tid}"
       "/ns/net",
       f"sysctl -qw {forwarding}=1",
       "ip link add out type veth peer name sink",
       "ip link set sink up", "ip link set out up", "ip link set overlay up",
       f"{inside} ip link set lo up", f"{inside} ip link set overlay up",
       f"ip addr add {own}/{bits} dev overlay {nodad}",
       f"{inside} ip addr add {other}/{bits} dev overlay {nodad}",
       f"ip addr add {out} dev out {nodad}",
       f"ip route add {PEER[version]} dev overlay src {own}",
       f"ip route add {NETWORK[version]} dev out",
       f"{inside} ip route add {NETWORK[version]} dev overlay src {other}",
       "ip link set overlay address 02:00:00:00:00:01",
       f"{inside} ip link set overlay address 02:00:00:00:00:02",
       f"ip neigh add {other} lladdr 02:00:00:00:00:02 dev overlay",
       f"{inside} ip neigh add {NEW[version].network_address} lladdr 02:00:00:00:00:01 dev overlay")


def require_conntrack():
    flow = UdpFlow(ip_address("192.0.2.1"), 1, ip_address("192.0.2.2"), 2)
    try:
        found = look_up(flow)
    except OSError as error:
        pytest.skip(f"this kernel has no ctnetlink: {error}")
    if found.number != errno.ENOENT:
        pytest.skip(f"this kernel has no ctnetlink: {found}")


@pytest.mark.parametrize("echoes", [True, False])
@pytest.mark.parametrize("version", [4, 6])
@in_own_netns
async def test_probes_are_answered_although_an_earlier_one_was_masqueraded(version, echoes):
    require_conntrack()
    firewall = Firewall(FirewallRules(), mode="nftables")
    await use_subnet(firewall, version, OLD[version])
    with Peer(version) as peer:
        connect(version, peer)
        if not echoes:  # then the path is lost, else the peer's kernel still answers
            name = "ipv6.icmp.echo_ignore_all" if version == 6 else "ipv4.icmp_echo_ignore_all"
            sh(f"nsenter --net=/proc/{os.getpid()}/task/{peer.tid}/ns/net sysctl -qw net.{name}=1",
               f"sysctl -qw net.{name}=1")
        own, other = NEW[version].network_address, PEER[version].network_address
        flow = UdpFlow(other, PORT, own, PORT)
        peer.probe()
        await until(lambda: is_masqueraded(flow), "the masqueraded probe")
        await use_subnet(firewall, version, NEW[version])
        nodad = "nodad" if version == 6 else ""
        sh(f"ip addr add {own}/{own.max_prefixlen} dev overlay {nodad}")
        with metered(NEW[version]) as meter:
            meter.add(PEER[version], PORT, MTU)

            def both_answered():
                meter.traffic([PEER[version]])
                return replied(meter, PEER[version]) and peer.answered

            await until(both_answered, "the answers of both ends")
        assert not is_masqueraded(flow)
    assert peer.failure is None


@in_own_netns
def test_only_the_entries_of_the_given_flows_are_deleted():
    require_conntrack()
    sh("nft add table ip t", "nft add chain ip t c { type filter hook output priority 0 ; }",
       "nft add rule ip t c ct state new accept")  # so that the kernel tracks connections here
    here = ip_address("127.0.0.1")
    flows = []
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                for _ in range(3)]
        for end in ends:
            end.bind((str(here), 0))
        for end in ends[1:]:
            end.sendto(b"", ends[0].getsockname())
            flows.append(
                UdpFlow(here, end.getsockname()[1], here, ends[0].getsockname()[1]))
    assert not any(isinstance(look_up(flow), Refusal) for flow in flows)
    forget_flows([flows[0].reverse(), flows[0]])
    assert look_up(flows[0]).number == errno.ENOENT
    assert not isinstance(look_up(flows[1]), Refusal)
    forget_flows([flows[0]])  # there is none: no error
