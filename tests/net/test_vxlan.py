"""VXLAN devices and their peers on the real kernel. ip(8) and bridge(8) confirm the results."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import re
import select
import socket
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from tests.own_netns import in_own_netns, ip_json, sh
from udptun.errors import DeviceError, FieldError
from udptun.net import batch
from udptun.net import vxlan as module
from udptun.net.batch import Refusal
from udptun.net.netlink import Netlink
from udptun.net.vxlan import OVERHEAD, PeerFailure, VniInUse, Vxlan, VxlanConfig, VxlanPeer

NAME, MTU = "flannel.1", 1400
LOCAL = {4: ip_address("192.0.2.1"), 6: ip_address("2001:db8::1")}
BASE = {4: ip_address("10.5.0.0"), 6: ip_address("fd05::")}
MACS = [f"02:00:00:00:00:{number:02x}" for number in range(1, 10)]
both = pytest.mark.parametrize("version", [4, 6])


def underlay(mtu=1500):
    """Create a link with 192.0.2.0/24 and 2001:db8::/64; return the interface index of utEa."""
    sh("ip link add utEa type veth peer name utEb", f"ip link set utEa mtu {mtu} up",
       "ip link set utEb up", "ip address add 192.0.2.1/24 dev utEa",
       "ip address add 2001:db8::1/64 dev utEa nodad")
    return socket.if_nametoindex("utEa")


def config(version=4, **what):
    index = socket.if_nametoindex("utEa")
    return replace(VxlanConfig(NAME, 1, 0, index, LOCAL[version], MTU), **what)


def subnet(number, version=4):
    if version == 4:
        return ip_network(f"10.5.{number}.0/24")
    return ip_network(f"fd05:0:0:{number:x}::/64")


def peer(number, version=4, at=None, mac=None, direct=False):
    """Return peer ``number``. Its endpoint is ``at``; by default, it is an address on the link."""
    at = at or (f"192.0.2.{100 + number}" if version == 4 else f"2001:db8::{100 + number}")
    return VxlanPeer(subnet(number, version), mac or MACS[number - 1], ip_address(at), direct)


@contextlib.asynccontextmanager
async def opened(version=4, **what):
    with Netlink() as netlink:
        vxlan = Vxlan(netlink)
        yield vxlan, await vxlan.ensure(config(version, **what), [BASE[version]])


@contextlib.contextmanager
def refused(number, *words):
    with pytest.raises(DeviceError) as caught:
        yield caught
    assert caught.value.errno == number
    assert all(word in str(caught.value) for word in words), str(caught.value)


def links():
    return {link["ifname"] for link in ip_json("link show")}


def link_info():
    (link,) = ip_json(f"link show {NAME}")
    return link


def routes(version=4):
    """Return {prefix: (next hop, device, onlink)} of all routes with a next hop."""
    return {
        route["dst"]: (route["gateway"], route["dev"], "onlink" in route["flags"])
        for route in ip_json(f"-{version} route show") if "gateway" in route
    }


def neighbours(version=4):
    return {item["dst"]: item["lladdr"] for item in
            ip_json(f"-{version} neigh show dev {NAME} nud permanent")}


def forwarding():
    return {item["mac"]: item["dst"] for item in json.loads(sh(f"bridge -j fdb show dev {NAME}"))}


def assert_active(*peers, version=4):
    """Assert that these peers have entries and routes through the device, and no other peer has."""
    assert routes(version) == {
        str(item.subnet): (str(item.subnet.network_address), NAME, True) for item in peers}
    assert neighbours(version) == {
        str(item.subnet.network_address): item.mac for item in peers}
    assert forwarding() == {item.mac: str(item.endpoint) for item in peers}


# -- probing --------------------------------------------------------------------------------------


@in_own_netns
async def test_probe():
    before = links()
    with Netlink() as netlink:
        assert await Vxlan(netlink).probe() is None
    assert links() == before


@both
@in_own_netns
async def test_probe_while_a_device_uses_the_port(version):
    """Two devices can share a UDP port only if both have the same settings, such as GBP."""
    underlay()
    async with opened(version, gbp=True) as (vxlan, _):
        assert await vxlan.probe(config(version, gbp=True)) is None
        assert "in use" in await vxlan.probe(config(version))
    assert links() == {"lo", "utEa", "utEb", NAME}


@in_own_netns
async def test_failed_probe_returns_the_kernels_error(monkeypatch):
    before = links()
    with Netlink() as netlink, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as busy:
        busy.bind(("0.0.0.0", 8472))
        assert "in use" in await Vxlan(netlink).probe()
        monkeypatch.setattr(module, "KIND", "vxlanX")  # as with a kernel without vxlan
        assert "Unknown device type" in await Vxlan(netlink).probe()
    assert links() == before


@in_own_netns
async def test_probe_after_one_that_was_killed():
    sh(f"ip link add {module.PROBE_NAME} type vxlan id {module.PROBE_VNI} dstport 8472")
    with Netlink() as netlink:
        assert await Vxlan(netlink).probe() is None
    assert links() == {"lo"}


@in_own_netns
async def test_probes_of_two_instances_at_once():
    """Both probes use the same name and VNI. No probe fails because of the other probe."""
    with Netlink() as netlink, Netlink() as other:
        for _ in range(20):
            probes = [Vxlan(one).probe() for one in (netlink, other)]
            assert await asyncio.gather(*probes) == [None, None]
    assert links() == {"lo"}


@in_own_netns
async def test_probe_leaves_the_routes_of_peers():
    """udptun finds its routes that bypass the device by their protocol number. The removal of the
    probe's device must not remove these routes."""
    underlay()
    async with opened() as (vxlan, device):
        await vxlan.sync(device, [peer(1, direct=True)])
        before = routes()
        sh(f"ip link add {module.PROBE_NAME} type vxlan id {module.PROBE_VNI} dstport 8472")
        assert await vxlan.probe(config()) is None
        assert routes() == before


# -- the device -----------------------------------------------------------------------------------


@both
@in_own_netns
async def test_new_device_has_flannels_settings(version):
    underlay()
    async with opened(version) as (_, device):
        link = link_info()
        data = link["linkinfo"]["info_data"]
        assert link["linkinfo"]["info_kind"] == "vxlan"
        assert (data["id"], data["port"], data["link"]) == (1, 8472, "utEa")
        assert data["local" if version == 4 else "local6"] == str(LOCAL[version])
        assert not data["learning"]
        assert "gbp" not in data
        assert not {"l2miss", "l3miss", "proxy", "external", "group"} & {
            name for name, value in data.items() if value}
        assert {"UP", "LOWER_UP"} <= set(link["flags"])
        assert (device.name, device.index, device.mac, device.mtu, device.version) == (
            NAME, link["ifindex"], link["address"], MTU, version)
        assert int(device.mac[:2], 16) & 3 == 2  # unicast, locally administered
        assert [(item["local"], item["prefixlen"]) for item in
                ip_json(f"address show {NAME}")[0]["addr_info"]] == [
            (str(BASE[version]), BASE[version].max_prefixlen)]
        assert Path(f"/proc/sys/net/ipv6/conf/{NAME}/accept_ra").read_text() == "0\n"


@both
@in_own_netns
async def test_device_with_the_right_settings_is_adopted(version):
    """The device keeps its peers, also if a new process adopts the device."""
    underlay()
    async with opened(version) as (vxlan, device):
        await vxlan.sync(device, [peer(1, version)])
    with Netlink() as netlink:
        assert await Vxlan(netlink).ensure(config(version)) == device
        assert_active(peer(1, version), version=version)
        assert await Vxlan(netlink).ensure(config(version), [BASE[version]]) == device
        assert_active(peer(1, version), version=version)


@both
@in_own_netns
async def test_ensure_replaces_the_addresses(version):
    underlay()
    async with opened(version) as (vxlan, _):
        await vxlan.ensure(config(version), [BASE[version] + 256])
        assert [item["local"] for item in ip_json(f"address show {NAME}")[0]["addr_info"]] == [
            str(BASE[version] + 256)]
        await vxlan.ensure(config(version))
        assert [item["local"] for item in ip_json(f"address show {NAME}")[0]["addr_info"]] == [
            str(BASE[version] + 256)]


@in_own_netns
async def test_ensure_brings_a_device_up_again():
    underlay()
    async with opened() as (vxlan, device):
        await vxlan.sync(device, [peer(1)])
        sh(f"ip link set {NAME} down")  # the kernel removes the routes and neighbours
        assert await vxlan.ensure(config()) == device
        assert await vxlan.sync(device, [peer(1)]) == ()
        assert_active(peer(1))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"vni": 2}, "VNI is 1, expected 2"),
        ({"port": 4789}, "port is 8472, expected 4789"),
        ({"learning": True}, "learning is 0, expected 1"),
        ({"gbp": True}, "GBP is not set, expected True"),
        ({"local": ip_address("192.0.2.2")}, "local address is 192.0.2.1, expected 192.0.2.2"),
        ({"local": LOCAL[6]}, "local address"),
        ({"underlay_index": 1}, "underlay interface"),
    ],
)
@in_own_netns
async def test_device_with_other_settings_is_replaced(what, words, caplog):
    underlay()
    async with opened() as (vxlan, device):
        again = await vxlan.ensure(config(**what))
        assert again.index != device.index
        assert again.mac == device.mac == link_info()["address"]
        assert words in caplog.text
        caplog.clear()
        assert await vxlan.ensure(config(**what)) == again
        assert not caplog.text


@in_own_netns
async def test_device_with_a_forbidden_option_is_replaced():
    """One example is l2miss. With l2miss, not only the FDB entries decide where packets go."""
    underlay()
    sh(f"ip link add {NAME} type vxlan id 1 dev utEa local 192.0.2.1 dstport 8472 nolearning "
       "l2miss")
    index = socket.if_nametoindex(NAME)
    async with opened() as (_, device):
        assert device.index != index


@in_own_netns
async def test_device_of_flanneld_is_adopted():
    """The device keeps its link-local address, because flanneld may use the device again."""
    underlay()
    sh(f"ip link add {NAME} type vxlan id 1 dev utEa local 192.0.2.1 dstport 8472 nolearning",
       f"ip link set {NAME} up", f"ip address add 10.9.9.0/32 dev {NAME}")
    index = socket.if_nametoindex(NAME)
    async with opened() as (_, device):
        assert device.index == index
        assert [item["scope"] for item in ip_json(f"address show {NAME}")[0]["addr_info"]] == [
            "global", "link"]
        assert str(BASE[4]) == ip_json(f"address show {NAME}")[0]["addr_info"][0]["local"]


@in_own_netns
async def test_mtu_and_mac_change_without_a_new_device():
    underlay()
    async with opened() as (vxlan, device):
        again = await vxlan.ensure(config(mtu=1300, mac=MACS[0].upper()))
        assert again == replace(device, mtu=1300, mac=MACS[0])
        assert (link_info()["mtu"], link_info()["address"]) == (1300, MACS[0])


@both
@in_own_netns
async def test_mtu_is_limited_by_the_underlay(version):
    underlay()
    async with opened(version, mtu=1500 - OVERHEAD[version]) as (vxlan, device):
        assert device.mtu == link_info()["mtu"] == 1500 - OVERHEAD[version]
        for _ in range(2):  # first a new device, then an adopted device
            with refused(errno.EINVAL, NAME, "MTU"):
                await vxlan.ensure(config(version, mtu=1501 - OVERHEAD[version]))
        await vxlan.remove(NAME)
        with refused(errno.EINVAL, NAME, "MTU"):
            await vxlan.ensure(config(version, mtu=1501 - OVERHEAD[version]))
        assert NAME not in links()  # ensure removes a new device whose MTU is refused


@in_own_netns
async def test_invalid_mtu_and_mac_are_refused():
    underlay()
    with Netlink() as netlink:
        for what in ({"version": 6, "mtu": 1279}, {"mac": "01:00:00:00:00:01"}):
            with pytest.raises(FieldError):
                await Vxlan(netlink).ensure(config(**what))
    assert NAME not in links()


@in_own_netns
async def test_conflicting_devices_are_not_removed():
    underlay()
    with Netlink() as netlink:
        vxlan = Vxlan(netlink)
        sh("ip link add other type vxlan id 1 dstport 8472")
        with refused(errno.EEXIST, NAME, "other has VNI 1 and port 8472") as caught:
            await vxlan.ensure(config())
        assert isinstance(caught.value, VniInUse)
        assert caught.value.holder == "other"
        sh("ip link del other", f"ip link add {NAME} type veth peer name utEc")
        with refused(errno.EEXIST, NAME, "not a VXLAN device"):
            await vxlan.ensure(config())
        with refused(errno.EEXIST, NAME, "not a VXLAN device"):
            await vxlan.remove(NAME)
        assert {NAME, "utEc"} < links()


@in_own_netns
async def test_ensure_on_a_port_in_use_leaves_no_device():
    underlay()
    with Netlink() as netlink, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as busy:
        busy.bind(("0.0.0.0", 8472))
        with refused(errno.EADDRINUSE, NAME):
            await Vxlan(netlink).ensure(config())
    assert NAME not in links()


@both
@in_own_netns
async def test_remove(version):
    underlay()
    sh(f"ip -{version} route add {subnet(9, version)} via {peer(9, version).endpoint}")
    async with opened(version) as (vxlan, device):
        await vxlan.sync(device, [peer(1, version), peer(2, version, direct=True)])
        assert len(routes(version)) == 3
        await vxlan.remove(NAME)
        assert NAME not in links()
        assert set(routes(version)) == {str(subnet(9, version))}  # another program's route
        await vxlan.remove(NAME)
        with refused(errno.ENODEV, NAME):
            await vxlan.sync(device, [peer(1, version)])


# -- peers ----------------------------------------------------------------------------------------


@both
@in_own_netns
async def test_sync_replaces_all_peers(version):
    underlay()
    async with opened(version) as (vxlan, device):
        one, two, three = (peer(number, version) for number in (1, 2, 3))
        assert await vxlan.sync(device, [one, two]) == ()
        assert_active(one, two, version=version)
        moved = replace(two, endpoint=one.endpoint + 50)
        renewed = replace(three, mac=MACS[7])
        assert await vxlan.sync(device, [moved, three]) == ()
        assert_active(moved, three, version=version)
        assert await vxlan.sync(device, [moved, renewed]) == ()
        assert_active(moved, renewed, version=version)
        assert await vxlan.sync(device, []) == ()
        assert_active(version=version)


@both
@in_own_netns
async def test_sync_sends_only_the_difference(version, monkeypatch):
    sent = []
    send = batch.RouteSocket.send
    monkeypatch.setattr(batch.RouteSocket, "send",
                        lambda self, requests: sent.extend(requests) or send(self, requests))
    underlay()
    peers = [peer(number, version) for number in range(1, 9)]
    async with opened(version) as (vxlan, device):
        await vxlan.sync(device, peers)
        assert len(sent) == 8 * (3 if version == 4 else 4)
        sent.clear()
        await vxlan.sync(device, peers)
        assert not sent
        # sync restores the entries that another program removed or changed, and sends no others.
        sh(f"ip -{version} route del {subnet(1, version)}",
           f"ip -{version} neigh del {subnet(2, version).network_address} dev {NAME}",
           f"bridge fdb replace {MACS[2]} dev {NAME} dst {LOCAL[version] + 9}")
        await vxlan.sync(device, peers)
        assert len(sent) == 3
        assert_active(*peers, version=version)


@both
@in_own_netns
async def test_entries_of_other_programs_are_unchanged(version):
    underlay()
    via = peer(9, version).endpoint
    foreign = [
        f"ip -{version} route add {subnet(7, version)} via {via}",
        f"ip -{version} route add {subnet(8, version)} via {via} table 100",
        f"ip -{version} route add {subnet(1, version)} dev {NAME} metric 5000 onlink "
        f"via {subnet(1, version).network_address}",
        f"ip -{version} neigh add {subnet(9, version).network_address} lladdr {MACS[8]} dev utEa",
        f"bridge fdb append 00:00:00:00:00:00 dev {NAME} dst {via}",
    ]
    async with opened(version) as (vxlan, device):
        sh(*foreign)
        await vxlan.sync(device, [peer(1, version)])
        assert len(ip_json(f"-{version} route show {subnet(1, version)}")) == 2
        await vxlan.sync(device, [])
        await vxlan.change(device, [peer(2, version)], [subnet(7, version), subnet(8, version)])
    assert set(routes(version)) == {str(subnet(number, version)) for number in (1, 2, 7)}
    assert ip_json(f"-{version} route show table 100")
    assert ip_json(f"-{version} neigh show dev utEa nud permanent")
    assert forwarding() == {
        "00:00:00:00:00:00": str(via), MACS[1]: str(peer(2, version).endpoint)}


@both
@in_own_netns
async def test_change(version):
    underlay()
    async with opened(version) as (vxlan, device):
        one, two, three = (peer(number, version) for number in (1, 2, 3))
        await vxlan.sync(device, [one])
        assert await vxlan.change(device, [two, three]) == ()
        assert_active(one, two, three, version=version)
        moved = replace(two, endpoint=one.endpoint + 50, mac=MACS[7])
        assert await vxlan.change(device, [moved], [three.subnet]) == ()
        assert_active(one, moved, version=version)
        assert await vxlan.change(device, [], [three.subnet]) == ()  # already removed
        assert_active(one, moved, version=version)


@both
@in_own_netns
async def test_change_after_a_restart(version):
    underlay()
    async with opened(version) as (vxlan, device):
        await vxlan.sync(device, [peer(1, version), peer(2, version)])
    with Netlink() as netlink:
        assert await Vxlan(netlink).change(device, [], [subnet(1, version)]) == ()
    assert_active(peer(2, version), version=version)


@in_own_netns
async def test_fdb_entry_stays_while_a_subnet_uses_its_mac():
    """A node that gets a new subnet has the old subnet and the new subnet for some time."""
    underlay()
    async with opened() as (vxlan, device):
        old, new = peer(1), replace(peer(1), subnet=subnet(2))
        await vxlan.sync(device, [old])
        await vxlan.change(device, [new])
        await vxlan.change(device, [], [old.subnet])
        assert_active(new)
        await vxlan.change(device, [old], [new.subnet])
        assert_active(old)


@both
@in_own_netns
async def test_direct_routes(version):
    """Packets to direct peers on the link are not encapsulated; packets to all other peers are. A
    peer can change between the two modes."""
    underlay()
    near = peer(1, version, direct=True)
    far = peer(2, version, at="198.51.100.2" if version == 4 else "2001:db8:1::2", direct=True)
    straight = {str(near.subnet): (str(near.endpoint), "utEa", False)}
    through = {str(far.subnet): (str(far.subnet.network_address), NAME, True)}
    async with opened(version) as (vxlan, device):
        sh(f"ip -{version} route add default via {LOCAL[version] + 1}")
        for _ in range(2):
            assert await vxlan.sync(device, [near, far]) == ()
            default = routes(version).pop("default")
            assert routes(version) == {**straight, **through, "default": default}
            assert list(forwarding()) == [far.mac]
            assert [vxlan.encapsulates(one) for one in (near, far)] == [False, True]
        # The host gets a route to the peer's address.
        sh(f"ip -{version} route add {far.endpoint} dev utEa")
        assert await vxlan.sync(device, [near, far]) == ()
        assert not vxlan.encapsulates(far)
        sh(f"ip -{version} route del {far.endpoint} dev utEa")
        assert await vxlan.change(device, [far]) == ()
        assert vxlan.encapsulates(far)
        # The answer stays while a peer has no route. An unknown peer is not known to be direct.
        for one, answer in ((near, False), (far, True), (peer(3, version, direct=True), True)):
            await vxlan.change(device, [replace(one, routed=False)])
            assert vxlan.encapsulates(one) is answer
        await vxlan.change(device, [], [near.subnet, subnet(3, version)])
        assert vxlan.encapsulates(near)
        sh(f"ip -{version} route del default")
        assert await vxlan.change(device, [replace(near, direct=False)], [far.subnet]) == ()
        assert_active(replace(near, direct=False), version=version)
        assert vxlan.encapsulates(replace(near, direct=False))
        assert await vxlan.change(device, [near]) == ()
        assert (routes(version), neighbours(version), forwarding()) == (straight, {}, {})
        assert not vxlan.encapsulates(near)
    # A new process removes the routes of the former process.
    with Netlink() as netlink:
        assert await Vxlan(netlink).sync(device, []) == ()
    assert routes(version) == {}


@both
@in_own_netns
async def test_devices_of_two_networks_leave_each_others_routes(version):
    """Two instances run on one host. The routes of both have the same protocol number."""
    underlay()
    networks = (ip_network("10.5.0.0/16"), ip_network("10.6.0.0/16")) if version == 4 else (
        ip_network("fd05::/32"), ip_network("fd06::/32"))
    with Netlink() as netlink:
        ours, theirs = Vxlan(netlink), Vxlan(netlink)
        device = await ours.ensure(config(version, network=networks[0]))
        other = await theirs.ensure(
            config(version, name="blue.2", vni=2, network=networks[1]))
        far = ip_network("10.6.1.0/24" if version == 4 else "fd06:0:0:1::/64")
        peers = [replace(peer(3, version, direct=True), subnet=far)]
        assert await theirs.sync(other, peers) == ()
        assert await ours.sync(device, [peer(1, version), peer(2, version, direct=True)]) == ()
        assert len(routes(version)) == 3
        assert await ours.sync(device, []) == ()
        assert set(routes(version)) == {str(far)}
        await ours.remove(NAME, networks[0])
        assert set(routes(version)) == {str(far)}
        await theirs.remove("blue.2", networks[1])
        assert routes(version) == {}


@in_own_netns
async def test_encapsulated_packet():
    """A VXLAN datagram (RFC 7348) goes to the endpoint. The inner frame has the peer's MAC."""
    underlay()
    mac = bytes.fromhex("020000000099")
    with contextlib.closing(socket.socket(
        socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)  # ETH_P_IP
    )) as wire, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        wire.bind(("utEb", 0x0800))
        async with opened() as (vxlan, device):
            target = peer(1, mac=mac.hex(":"))
            sh(f"ip neigh add {target.endpoint} lladdr 02:aa:aa:aa:aa:aa dev utEa")
            assert await vxlan.sync(device, [target]) == ()
            sender.sendto(b"inside", ("10.5.1.7", 9))
            assert select.select([wire], [], [], 10)[0]
            outer = wire.recv(2000)[14:]
        udp, inner = outer[20:28], outer[36:]
        assert (outer[12:16], outer[16:20]) == (LOCAL[4].packed, target.endpoint.packed)
        assert int.from_bytes(udp[2:4]) == 8472
        assert outer[28:36] == bytes([8, 0, 0, 0, 0, 0, 1, 0])  # a valid VNI: 1
        assert inner[:6] == mac
        assert inner[14 + 12 : 14 + 20] == BASE[4].packed + bytes([10, 5, 1, 7])
        assert inner.endswith(b"inside")


@both
@in_own_netns
async def test_peer_routes_with_a_route_of_the_whole_network(version):
    """If a TUN carries the other peers, it has a route for the whole network. This route can be
    added before or after the VXLAN peers."""
    underlay()
    network = f"{BASE[version]}/{16 if version == 4 else 32}"
    async with opened(version) as (vxlan, device):
        await vxlan.sync(device, [peer(1, version)])
        sh(f"ip -{version} route add {network} dev utEa")
        assert await vxlan.change(device, [replace(peer(1, version), mac=MACS[5])]) == ()
        assert await vxlan.sync(device, [peer(1, version), peer(2, version)]) == ()
        assert_active(peer(1, version), peer(2, version), version=version)
        await vxlan.sync(device, [])
        assert not ip_json(f"-{version} route show dev {NAME} proto 85")


@both
@pytest.mark.parametrize("direct", [False, True])
@in_own_netns
async def test_a_peer_that_is_not_routed_is_reached_by_a_bound_socket(version, direct):
    """All other packets to the peer follow the route of the whole network."""
    underlay()
    length = 16 if version == 4 else 32
    network = ip_network(f"{BASE[version]}/{length}")
    sh("ip tuntap add tun0 mode tun", "ip link set tun0 up",
       f"ip -{version} route add {network} dev tun0")
    target = peer(1, version, direct=direct)
    at = str(target.subnet.network_address)
    async with opened(version, network=network, other_paths=True) as (vxlan, device):
        assert await vxlan.sync(device, [target]) == ()
        routed = "utEa" if direct else NAME
        assert device_to(at, version) == routed
        assert await vxlan.change(device, [replace(target, routed=False)]) == ()
        assert (device_to(at, version), routes(version)) == ("tun0", {})
        assert neighbours(version) == {at: target.mac}
        assert forwarding() == {target.mac: str(target.endpoint)}
        before = sent_packets()
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, NAME.encode())
            bound.sendto(b"probe", (at, 8285))
        assert sent_packets() == before + 1
        assert await vxlan.unrouted(device, [target, peer(2, version)]) == [target.subnet]
        # The next look at the kernel's entries keeps them, and the route comes back.
        assert await vxlan.sync(device, [replace(target, routed=False)]) == ()
        assert (device_to(at, version), routes(version)) == ("tun0", {})
        assert await vxlan.sync(device, [target]) == ()
        assert await vxlan.unrouted(device, [target]) == []
        assert device_to(at, version) == routed
        if version == 4:
            assert Path("/proc/sys/net/ipv4/conf", NAME, "rp_filter").read_text() == "2\n"
        await vxlan.remove(NAME, network)
    assert device_to(at, version) == "tun0"


@in_own_netns
async def test_ages_are_the_times_of_the_last_packets():
    underlay()
    async with opened() as (vxlan, device):
        assert await vxlan.sync(device, [peer(1), peer(2)]) == ()
        macs = [bytes.fromhex(mac.replace(":", "")) for mac in MACS[:2]]
        await until_async(lambda: aged(vxlan, device, macs))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"inside", ("10.5.1.7", 9))
        ages = await vxlan.ages(device)
        assert [*ages] == macs or [*reversed(ages)] == macs
        assert ages[macs[0]] < ages[macs[1]]


@in_own_netns
async def test_ages_are_read_only_if_other_programs_have_sent():
    underlay()
    async with opened() as (vxlan, device):
        assert await vxlan.sync(device, [peer(1), peer(2)]) == ()
        mac = bytes.fromhex(MACS[0].replace(":", ""))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"before", ("10.5.1.7", 9))
            assert mac in await vxlan.ages(device, own_n=lambda: 0)
            sender.sendto(b"own", ("10.5.1.7", 9))
            sender.sendto(b"own", ("10.5.2.7", 9))
            assert await vxlan.ages(device, own_n=lambda: 2) == {}
            sender.sendto(b"own", ("10.5.1.7", 9))
            sender.sendto(b"of another program", ("10.5.1.7", 9))
            assert mac in await vxlan.ages(device, own_n=lambda: 3)
            assert await vxlan.ages(device, own_n=lambda: 3) == {}
            # The device counts what it could not send too.
            sh("ip link set utEa down")
            with contextlib.suppress(OSError):
                sender.sendto(b"of another program", ("10.5.1.7", 9))
            assert mac in await vxlan.ages(device, own_n=lambda: 3)


@in_own_netns
async def test_a_packet_of_the_caller_between_two_reads_is_not_of_another_program():
    underlay()
    async with opened() as (vxlan, device):
        assert await vxlan.sync(device, [peer(1)]) == ()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sent = []

            def own_n():
                """Another thread has sent a packet in the meantime, and has counted it or not."""
                if len(sent) < 6:
                    sender.sendto(b"own", ("10.5.1.7", 9))
                    sent.append(1)
                    return None if len(sent) % 3 == 0 else len(sent) - 1
                return len(sent)

            await vxlan.ages(device, own_n=lambda: 0)
            assert await vxlan.ages(device, own_n=own_n) == {}


async def aged(vxlan, device, macs):
    ages = await vxlan.ages(device)
    return all(ages[mac] > 0.3 for mac in macs)


async def until_async(condition):
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.05)


def device_to(address, version):
    (route,) = ip_json(f"-{version} route get {address}")
    return route["dev"]


def sent_packets():
    (link,) = ip_json(f"-s link show {NAME}")
    return link["stats64"]["tx"]["packets"]


# -- refusals -------------------------------------------------------------------------------------


def errors_of(failures: tuple[PeerFailure, ...]):
    return {failure.peer.subnet: str(failure.error) for failure in failures}


@in_own_netns
async def test_refused_peers_do_not_affect_the_others():
    """The other peers are applied. The position of a refused peer in the batch does not matter."""
    underlay()
    peers = [
        VxlanPeer(ip_network((0x0A060000 + 256 * i, 24)), f"02:00:00:01:{i >> 8:02x}:{i & 255:02x}",
                  ip_address("192.0.2.9"))
        for i in range(3 * batch.CHUNK_N)
    ]
    at = (0, batch.CHUNK_N - 1, batch.CHUNK_N, 3 * batch.CHUNK_N - 1)
    for number, i in enumerate(at):  # the kernel refuses a local address as next hop
        peers[i] = replace(peers[i], subnet=ip_network(f"127.0.{number}.0/24"))
    async with opened() as (vxlan, device):
        for attempt in (vxlan.sync(device, peers), vxlan.change(device, peers)):
            failures = await attempt
            assert [failure.peer for failure in failures] == [peers[i] for i in at]
            assert {failure.error.errno for failure in failures} == {errno.EINVAL}
            assert set(routes()) == {
                str(item.subnet) for i, item in enumerate(peers) if i not in at}
        assert re.search(r"reaching 127\.0\.0\.0/24 at 192\.0\.2\.9 through flannel\.1: "
                         r"Invalid argument", str(failures[0].error))


@in_own_netns
async def test_route_of_a_directly_connected_network_is_not_replaced():
    underlay()
    own = replace(peer(1), subnet=ip_network("192.0.2.0/24"))
    async with opened() as (vxlan, device):
        for failures in (await vxlan.sync(device, [own, peer(2)]),
                         await vxlan.change(device, [own, replace(peer(3), direct=True)]),
                         await vxlan.change(device, [replace(own, direct=True)])):
            assert set(errors_of(failures)) == {own.subnet}
            assert "directly connected to the subnet on utEa" in errors_of(failures)[own.subnet]
    assert [route["dev"] for route in ip_json("route show 192.0.2.0/24")] == ["utEa"]
    assert set(routes()) == {str(subnet(2)), str(subnet(3))}


@both
@in_own_netns
async def test_route_of_another_program_to_a_peer_is_replaced(version):
    """A former flanneld can leave a route to the peer's subnet. If udptun kept this route, the peer
    would be unreachable. flannel also replaces such routes."""
    underlay()
    sh(f"ip -{version} route add {subnet(1, version)} via {LOCAL[version] + 8}")
    async with opened(version) as (vxlan, device):
        assert await vxlan.sync(device, [peer(1, version)]) == ()
        assert_active(peer(1, version), version=version)


@in_own_netns
async def test_second_peer_with_the_same_mac_is_refused():
    underlay()
    async with opened() as (vxlan, device):
        same_mac = replace(peer(2), mac=peer(1).mac)
        await vxlan.sync(device, [peer(2), peer(3)])
        failures = await vxlan.change(device, [peer(1), same_mac, peer(4, version=6)])
        assert "VtepMAC" in errors_of(failures)[same_mac.subnet]
        assert str(peer(1).endpoint) in errors_of(failures)[same_mac.subnet]
        assert "IPv4" in errors_of(failures)[subnet(4, 6)]
        assert_active(peer(1), peer(3))  # the former entries of subnet 2 are removed


@both
@in_own_netns
async def test_a_later_peer_cannot_take_the_mac_of_another_peer(version):
    """Otherwise the packets to the first peer would go to the later one."""
    underlay()
    first, thief = peer(1, version), replace(peer(2, version), mac=MACS[0].upper())
    async with opened(version) as (vxlan, device):
        await vxlan.sync(device, [first])
        failures = await vxlan.change(device, [thief])
        assert str(first.endpoint) in errors_of(failures)[thief.subnet]
        assert_active(first, version=version)
        moved = replace(first, endpoint=LOCAL[version] + 77)
        assert await vxlan.change(device, [moved]) == ()
        assert_active(moved, version=version)
        assert await vxlan.change(device, [thief], [first.subnet]) == ()
        assert_active(thief, version=version)


@both
@in_own_netns
async def test_peer_without_an_fdb_entry_has_no_route(version, monkeypatch):
    """Without a route, packets to the peer can take another path. The former entries of the peer
    are removed."""
    def refuse_first(self, items):
        return [put(self, [item])[0] if item[0] != first else Refusal(errno.ENOBUFS, "")
                for item in items]

    first = bytes.fromhex(MACS[0].replace(":", ""))
    put = module.EntrySocket.put_forwarding
    underlay()
    async with opened(version) as (vxlan, device):
        await vxlan.sync(device, [peer(1, version)])
        monkeypatch.setattr(module.EntrySocket, "put_forwarding", refuse_first)
        moved = replace(peer(1, version), endpoint=LOCAL[version] + 77)
        for attempt in (vxlan.change(device, [moved, peer(2, version)]),
                        vxlan.sync(device, [moved, peer(2, version)])):
            failures = await attempt
            assert [item.peer for item in failures] == [moved]
            assert failures[0].error.errno == errno.ENOBUFS
            assert_active(peer(2, version), version=version)
            assert not ip_json(f"-{version} route show {subnet(1, version).network_address}")


@pytest.mark.parametrize(
    "mac", ["", "02:00:00:00:00", "02-00-00-00-00-01", "00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff",
            "01:00:5e:00:00:01", "02:00:00:00:00:0g", "02:00:00:00:00:01\n"],
)
def test_mac_that_is_not_unicast_is_refused(mac):
    with pytest.raises(FieldError) as caught:
        VxlanPeer(subnet(1), mac, LOCAL[4])
    assert caught.value.field == "VtepMAC"


@in_own_netns
def test_interrupted_dump_is_repeated(monkeypatch):
    receive = batch.RouteSocket._receive
    turns = []

    def interrupted(self):
        turns.append(None)
        flag = batch.NLM_F_DUMP_INTR if len(turns) == 1 else 0
        for kind, flags, sequence, body in receive(self):
            yield kind, flags | flag, sequence, body

    monkeypatch.setattr(batch.RouteSocket, "_receive", interrupted)
    with batch.RouteSocket() as netlink:
        body = bytes([socket.AF_INET, *bytes(11)])
        assert netlink.dump(26, body)  # RTM_GETROUTE
        assert len(turns) == 4  # two dumps; each has one datagram with routes and one with the end
        with pytest.raises(OSError, match="nvalid") as caught:
            netlink.dump(26, b"\1" * 12)
        assert caught.value.errno == errno.EINVAL
