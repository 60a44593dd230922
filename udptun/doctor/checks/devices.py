"""Checks of the devices: /dev/net/tun, the TUN, VXLAN, and the kernel's settings for them."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ...device.offload import ASKED, FIRST_KERNEL, NEEDS
from ...model import MIN_MTU6, NO_EXPRESS_PEER, NO_EXPRESS_WORD, OVERHEAD
from ...node.host.forwarding import FORWARD4, FORWARD6, sysctl, value_of
from ...text import counted
from ..check import Finding, Skip, check, failed, ok, warning
from ..facts import Facts
from ..processes import PROC

TUN_FILE = Path("/dev/net/tun")
TUN_NUMBER = (10, 200)
PEERS_SHOWN = 3  # of those that do not use the express path for the same kind of reason
OLDEST = (5, 10)  # the oldest kernel that udptun supports
BRIDGE_FILTER = "bridge/bridge-nf-call-iptables"
UNKNOWN_DEVICES = "it is not known which devices this host should have"


@check("tun-device", "/dev/net/tun: it exists and may be opened (device cgroup, seccomp, AppArmor)",
       "troubleshoot.md#opening-devnettun-no-such-file-or-directory")
def tun_device(facts: Facts) -> Iterator[Finding]:
    if not facts.expects_forwarder and facts.expects_node:
        raise Skip("this node does not need a TUN")
    try:
        found = TUN_FILE.stat()
    except FileNotFoundError:
        if _another_container_has_it(facts):
            raise Skip(f"{TUN_FILE} is in the container of the forwarder only") from None
        yield failed(f"{TUN_FILE} does not exist", remedy="run: modprobe tun")
        return
    number = os.major(found.st_rdev), os.minor(found.st_rdev)
    if not stat.S_ISCHR(found.st_mode) or number != TUN_NUMBER:
        yield failed(f"{TUN_FILE} is not the TUN device", f"its device number is {number}",
                     f"run: rm {TUN_FILE} && mknod {TUN_FILE} c 10 200")
        return
    try:
        os.close(os.open(TUN_FILE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EPERM) and not facts.is_root:
            raise Skip(f"this user may not open {TUN_FILE}: run as root") from None
        remedy = "run: modprobe tun"
        if exc.errno in (errno.EACCES, errno.EPERM):
            remedy = "give this container the device (--device /dev/net/tun)"
        yield failed(f"{TUN_FILE} cannot be opened: {exc.strerror}", _confinement(), remedy)
        return
    yield ok(f"{TUN_FILE} can be opened")


def _another_container_has_it(facts: Facts) -> bool:
    """Return whether a forwarder works that does not run in this container."""
    if facts.forwarder.answer is None:
        return False
    here = [one.pid for one in facts.running("forward") if not one.standby]
    return not here or any((PROC / f"{pid}/root{TUN_FILE}").exists() for pid in here)


def _confinement() -> str:
    """Return the AppArmor profile and the seccomp mode of this process."""
    parts = []
    try:
        profile = Path("/proc/self/attr/current").read_text().strip("\0\n ")
        if profile and profile != "unconfined":
            parts.append(f"AppArmor profile {profile}")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Seccomp:") and line.split()[1] != "0":
                parts.append(f"seccomp mode {line.split()[1]}")
    except OSError:
        pass
    return ", ".join(parts)


@check("kernel", "the version of the kernel, and features that udptun uses",
       "datapath.md#offloads")
def kernel(facts: Facts) -> Iterator[Finding]:
    release = os.uname().release
    if _version(release) < OLDEST:
        yield warning(f"the kernel {release} is older than {OLDEST[0]}.{OLDEST[1]}",
                      remedy="update the kernel")
    else:
        yield ok(f"Linux {release}")


def _version(release: str) -> tuple[int, ...]:
    return tuple(int(word) for word in release.partition("-")[0].split(".")[:2]
                 if word.isdigit())


@check("offloads", "offloads that the kernel has refused, though its version has them",
       "datapath.md#offloads")
def offloads(facts: Facts) -> Iterator[Finding]:
    if facts.forwarder.answer is None:
        raise Skip("no forwarder answers")
    found = facts.forwarder.answer["capabilities"]
    off, release = found["off"], os.uname().release
    for name, cause in off.items():
        if cause == ASKED or NEEDS.get(name) in off:
            continue
        lost = [name]
        for other in off:  # a feature comes after those that it needs
            if NEEDS.get(other) in lost:
                lost.append(other)
        names = ", ".join(lost)
        first = FIRST_KERNEL.get(name)
        if first is not None and _version(release) < first:
            yield ok(f"off: {names}. Linux {release} does not have {name};"
                     f" Linux {first[0]}.{first[1]} does")
        else:
            yield warning(f"off, so throughput is lower: {names}", cause,
                          "a newer kernel may have this offload")
    if not off:
        yield ok(f"in use: {', '.join(found['in_use'])}")


@check("express-path", "whether packets can pass in the kernel, if `--accelerate auto` is set",
       "datapath.md#the-express-path")
def express_path(facts: Facts) -> Iterator[Finding]:
    if facts.forwarder.answer is None:
        raise Skip("no forwarder answers")
    found = facts.forwarder.answer.get("accelerate")
    if found is None:
        raise Skip("the forwarder has another version, which has no express path")
    if found["mode"] == "off":
        yield ok("not asked for: --accelerate off")
        return
    if not found["active"] and found["reason"] != NO_EXPRESS_PEER:
        yield warning("--accelerate auto is set, but the workers carry all packets",
                      found["reason"], _express_remedy(found["reason"]))
        return
    reasons = {peer["endpoint"]: peer["express"]["reason"]
               for peer in facts.forwarder.answer["peers"] if not peer["express"]["active"]}
    bad = {peer: reason for peer, reason in reasons.items() if reason != NO_EXPRESS_WORD}
    for peer, reason in list(bad.items())[:PEERS_SHOWN]:
        yield warning(f"the workers carry all packets to and from {peer}", reason,
                      _express_remedy(reason))
    if not bad:
        peers_n = len(facts.forwarder.answer["peers"])
        yield ok(f"{peers_n - len(reasons)} of {counted(peers_n, 'peer')} can use it; "
                 "the others do not have it")


def _express_remedy(reason: str) -> str:
    if "CAP_BPF" in reason:
        return "give the forwarder CAP_BPF, see deploy/README.md, or set --accelerate off"
    return "remove the cause, or set --accelerate off"


@check("vxlan", "whether this kernel can make VXLAN devices, if the network wants them",
       "flannel.md#nodes-that-cannot-make-vxlan-devices")
def vxlan(facts: Facts) -> Iterator[Finding]:
    if facts.node.answer is not None:
        for backend, why in facts.node.answer["unavailable"].items():
            yield warning(f"{backend} is not available on this node: {why}",
                          remedy="run: modprobe vxlan" if "vxlan" in f"{backend}{why}".lower()
                          else "")
        return
    missing = [name for name in facts.vxlan_devices if name not in facts.links]
    if not facts.vxlan_devices:
        raise Skip("this node does not use VXLAN, or it is not known whether it does")
    if len(missing) == len(facts.vxlan_devices) and not Path("/sys/module/vxlan").exists():
        yield failed("the kernel has no module vxlan", remedy="run: modprobe vxlan")


@check("device-names", "devices of other programs with the names or the VNI of ours",
       "node.md#several-overlays-on-one-host")
def device_names(facts: Facts) -> Iterator[Finding]:
    if not facts.devices:
        raise Skip(UNKNOWN_DEVICES)
    tun = facts.links.get(facts.tun)
    if facts.expects_forwarder and tun is not None and tun.kind != "tun":
        yield failed(f"{facts.tun} is not a TUN: another program has a device of this name",
                     f"its type is {tun.kind or 'a network card'}",
                     f"run: ip link delete {facts.tun}, or give udptun another --tun")
    network = None if facts.known is None else facts.known.network
    if network is None:
        return
    for name in facts.vxlan_devices:
        link = facts.links.get(name)
        if link is not None and (link.kind != "vxlan" or link.vni != network.vni):
            yield failed(f"{name} is not a VXLAN device with VNI {network.vni}",
                         f"its type is {link.kind}, its VNI {link.vni}",
                         f"run: ip link delete {name}")
    for link in facts.links.values():
        if facts.vxlan_devices and link.kind == "vxlan" and link.vni == network.vni and \
                link.name not in facts.vxlan_devices:
            yield failed(f"{link.name} has the VNI {network.vni} of this overlay",
                         remedy=f"run: ip link delete {link.name}, if no other program needs it")


def differences(facts: Facts) -> Iterator[Finding]:
    """Compare the overlay's devices with what the daemon or the forwarder has set up."""
    found = [*_tun_differences(facts)]
    if not found and not facts.vxlan_devices:
        raise Skip(UNKNOWN_DEVICES)
    yield from found
    for name in facts.vxlan_devices:
        link = facts.links.get(name)
        if link is None:
            if facts.backend == "vxlan":
                yield failed(f"{name} does not exist",
                             remedy="start the node daemon: it makes the device")
        elif not link.up:
            yield failed(f"{name} is down", remedy=f"run: ip link set {name} up")
        elif facts.known is not None and facts.known.lease is not None:
            own = {subnet.network_address for subnet in facts.known.lease.subnets}
            if not own & {one.address for one in link.addresses}:
                yield failed(f"{name} has lost its address",
                             remedy="start the node daemon: it sets the address")


def _tun_differences(facts: Facts) -> Iterator[Finding]:
    """Yield an ok finding if nothing differs, so that the caller knows that it was looked at."""
    from ...model import parse_address, parse_prefix
    from ...net.netlink import Netlink
    from ...net.tun_state import tun_state

    answer = facts.forwarder.answer
    if answer is not None:
        device = answer["device"]
        addresses, networks, mtu = device["addresses"], device["networks"], device["mtu"]
    elif facts.spec is not None:
        addresses, networks, mtu = facts.spec.addresses, facts.spec.networks, facts.spec.mtu
    else:
        return
    link = facts.links.get(facts.tun)
    restart = "run: systemctl reload udptun-node, or start the daemon: it repairs the device"
    if link is None:
        yield failed(f"{facts.tun} does not exist", remedy=restart)
        return
    wanted = [parse_prefix("network", text) for text in networks]
    with Netlink() as netlink:
        state = asyncio.run(tun_state(netlink, link.index, wanted))
    if state is None:
        return
    found = state.differences(facts.tun, state.mtu if mtu is None else mtu,
                              [parse_address("address", text) for text in addresses], wanted)
    for text in found:
        yield failed(f"{facts.tun}: {text}", remedy=restart)
    if not found:
        yield ok(f"{facts.tun}: MTU {state.mtu}, addresses and routes are there")


@check("forwarding", "net.ipv4.ip_forward and net.ipv6.conf.all.forwarding",
       "troubleshoot.md#the-packet-arrives-at-the-host-but-not-at-the-pod")
def forwarding(facts: Facts) -> Iterator[Finding]:
    if not facts.networks:
        raise Skip("the overlay's networks are not known")
    if not facts.expects_node:
        raise Skip("this host has no subnet for pods: it may be only an endpoint")
    versions = {network.version for network in facts.networks}
    for version, name in ((4, FORWARD4), (6, FORWARD6)):
        if version in versions and value_of(name) == "0":
            key = sysctl(name)
            yield failed(f"{key} is 0: pods on this host reach no other node over IPv{version}",
                         remedy=f"run: sysctl -w {key}=1")


@check("rp-filter", "strict reverse path filtering on the overlay's devices",
       "troubleshoot.md#the-packet-arrives-at-the-host-but-not-at-the-pod")
def rp_filter(facts: Facts) -> Iterator[Finding]:
    if not facts.devices:
        raise Skip(UNKNOWN_DEVICES)
    for name in facts.devices:
        settings = [f"ipv4/conf/{one}/rp_filter" for one in (name, "all")]
        own, all_ = map(value_of, settings)
        if own and max(int(own), int(all_ or "0")) == 1:
            key, key_of_all = map(sysctl, settings)
            yield failed(
                f"the kernel drops packets from {name} if it routes their source to another device",
                f"{key} is {own}, {key_of_all} is {all_}", f"run: sysctl -w {key}=2")


@check("bridge-filter", "net.bridge.bridge-nf-call-iptables, on a Kubernetes node",
       "node.md#firewall")
def bridge_filter(facts: Facts) -> Iterator[Finding]:
    from .kubernetes import kubelet_is_here

    value, key = value_of(BRIDGE_FILTER), sysctl(BRIDGE_FILTER)
    if not kubelet_is_here():
        raise Skip("no kubelet runs here")
    if value == "0":
        yield warning("services do not work between pods of this node: iptables does not see"
                      " packets on the bridge", f"{key} is 0", f"run: sysctl -w {key}=1")
    elif not value:
        yield warning("the module br_netfilter is not loaded: services do not work between pods of"
                      " this node", remedy="run: modprobe br_netfilter")


@check("mtu", "the MTU of the overlay, of the underlay, of subnet.env and of the pods' bridge",
       "operations.md#choose-the-mtu")
def mtu(facts: Facts) -> Iterator[Finding]:
    from .daemon import reported

    if facts.node.answer is None and not facts.devices:
        raise Skip(UNKNOWN_DEVICES)
    yield from reported(facts, "mtu") or ()
    underlay = facts.underlay
    tun = facts.links.get(facts.tun) if facts.expects_forwarder else None
    addresses = facts.underlay_addresses
    if underlay is not None and tun is not None and addresses:
        overhead = OVERHEAD[min(one.version for one in addresses)]
        if tun.mtu > underlay.mtu - overhead and tun.mtu > MIN_MTU6 and underlay.name != "lo":
            yield failed(
                f"{tun.name} has MTU {tun.mtu}, and {underlay.name} has only {underlay.mtu}: large"
                " packets are lost or fragmented", f"the tunnel adds {overhead} bytes",
                "restore the MTU of the interface, or restart the forwarder")
    bridge = facts.links.get("cni0")
    wanted = None if facts.node.answer is None else facts.node.answer["mtu"]
    if bridge is not None and wanted and bridge.mtu > wanted:
        yield warning(f"the pods' bridge cni0 has MTU {bridge.mtu}, and the overlay {wanted}",
                      remedy="delete the pods and the bridge: the CNI plugin makes it again")


@check("ipv6", "IPv6 on the overlay's devices, if the overlay has IPv6", "node.md#health")
def ipv6(facts: Facts) -> Iterator[Finding]:
    if not any(network.version == 6 for network in facts.networks):
        raise Skip("the overlay has no IPv6, or its networks are not known")
    for name in facts.devices:
        setting = f"ipv6/conf/{name}/disable_ipv6"
        if value_of(setting) == "1" and name in facts.links and not (
                name.startswith(("flannel.", f"{facts.instance.name}."))):
            yield failed(f"IPv6 is disabled on {name}",
                         remedy=f"run: sysctl -w {sysctl(setting)}=0")


CHECKS = (tun_device, kernel, offloads, express_path, vxlan, device_names, forwarding, rp_filter,
          bridge_filter, mtu, ipv6)
