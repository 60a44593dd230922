"""Interoperation with a peer that speaks flannel's wire format and is not udptun.

The peer is bench/onepacket in every run, and the real flanneld if FLANNELD names its binary.
"""

import os
import socket
import struct
import threading

import pytest

from tests.netns.cluster_traffic import all_reach_all
from tests.netns.netns_traffic import UdpFlow, assert_invariant, transfer_tcp
from udptun.lab import Forwarder, OnePacket, node, ping, wait_for
from udptun.lab.cluster import PREFIX, Cluster, Etcd, etcd_obstacle

AT_A, AT_B = node(1), node(2)
SET_ROUTE, DEL_ROUTE, STOP = 1, 2, 3


def message(command: int, dest=AT_A.subnet, via=None, port: int = 8285) -> bytes:
    """flannel's 20-byte control message."""
    hop = via.packed if via else bytes(4)
    return struct.pack(
        "=i4si4sHxx", command, dest.network_address.packed, dest.prefixlen, hop, port
    )


def exchange_everything(a, b, pod_a, pod_b):
    for host, target in ((a, AT_B.v4), (b, AT_A.v4), (pod_a, AT_B.subnet[2])):
        assert ping(host, target, count=5).received == 5
    transfer_tcp(a, b, AT_B.v4)
    transfer_tcp(pod_b, pod_a, AT_A.subnet[2])
    # Under load: both ways at once, by local sockets and by pods.
    failures: list[BaseException] = []

    def attempt(*hosts_and_address) -> None:
        try:
            transfer_tcp(*hosts_and_address, size=8 << 20)
        except BaseException as e:
            failures.append(e)

    # Sockets are opened in this thread's namespace: threads have one each.
    threads = [
        threading.Thread(target=attempt, args=args)
        for args in ((a, b, AT_B.v4), (b, a, AT_A.v4), (pod_a, pod_b, AT_B.subnet[2]))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for host, target_host, target in ((a, b, AT_B.v4), (b, a, AT_A.v4)):
        with UdpFlow(host, target_host, target) as flow:
            for size in (0, 1, 64, 1400, 1472 - 28):
                flow.exchange([bytes([size % 251]) * size] * 20)
            flow.exchange_super(os.urandom(1200 * 30 + 7), 1200)


@pytest.mark.parametrize("offload", ["auto", "off"])
def test_one_packet_tunnel_at_the_other_end(lab, onepacket, offload):
    a, b = lab.host("a"), lab.host("b")
    lab.link(a, b)
    pods = a.pod(str(AT_A.subnet)), b.pod(str(AT_B.subnet))
    forwarder = Forwarder.start(
        a, addresses=[AT_A.v4], routes=[f"{AT_B.subnet} via {b.v4}"], offload=offload
    )
    peer = OnePacket.start(b, onepacket, address=AT_B.v4)
    assert ping(a, AT_B.v4, count=1, wait=0.3).received == 0  # b has no route to a yet
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
        control.connect(str(peer.control))
        control.send(message(SET_ROUTE, via=a.v4))
        wait_for(lambda: ping(a, AT_B.v4, count=1, wait=0.2).received == 1, "the route")
        exchange_everything(a, b, *pods)
        packets = assert_invariant(forwarder)
        assert packets["decap"]["delivered"] > 10_000
        control.send(message(DEL_ROUTE))
        wait_for(lambda: ping(a, AT_B.v4, count=1, wait=0.2).received == 0, "the route to go")
        control.send(message(STOP))
        assert peer.process.wait() == 0


def test_two_one_packet_tunnels(lab, onepacket):
    """The program of the comparison works: otherwise udptun's results would look too good."""
    a, b = lab.host("a"), lab.host("b")
    lab.link(a, b)
    pods = a.pod(str(AT_A.subnet)), b.pod(str(AT_B.subnet))
    ends = [
        OnePacket.start(a, onepacket, address=AT_A.v4, routes=[f"{AT_B.subnet}={b.v4}:8285"]),
        OnePacket.start(b, onepacket, address=AT_B.v4, routes=[f"{AT_A.subnet}={a.v4}:8285"]),
    ]
    exchange_everything(a, b, *pods)
    for end in ends:
        assert end.process.stop() == 0


def test_flannels_control_messages_drive_the_forwarder(lab, onepacket):
    """By a path and by an inherited descriptor."""
    a, b = lab.host("a"), lab.host("b")
    lab.link(a, b)
    OnePacket.start(b, onepacket, address=AT_B.v4, routes=[f"{AT_A.subnet}={a.v4}:8285"])
    path = lab.folder / "flannel.sock"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    by_path = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, by_path:
        forwarder = Forwarder.start(
            a, addresses=[AT_A.v4], routes=None, pass_fds=[theirs.fileno()],
            extra=["--flannel-control-fd", str(theirs.fileno()), "--flannel-control", str(path)],
        )
        theirs.close()
        by_path.connect(str(path))
        for control in (ours, by_path):
            control.send(b"too short")
            control.send(message(SET_ROUTE, AT_B.subnet, b.v4))
            wait_for(lambda: ping(a, AT_B.v4, count=1, wait=0.2).received, "SET_ROUTE")
            control.send(message(SET_ROUTE, AT_B.subnet, b.v4))  # as on each renewal of a lease
            control.send(message(DEL_ROUTE, AT_B.subnet))
            wait_for(lambda: not ping(a, AT_B.v4, count=1, wait=0.2).received, "DEL_ROUTE")
        ours.send(message(STOP))
        assert forwarder.process.wait() == 0


def the_flanneld() -> str:
    """Return the path of flanneld, or skip the test."""
    flanneld = os.environ.get("FLANNELD")
    if not flanneld:
        pytest.skip("REAL FLANNELD NOT TESTED: name its binary in FLANNELD")
    if obstacle := etcd_obstacle():
        pytest.skip(f"REAL FLANNELD NOT TESTED: {obstacle}")
    return flanneld


def test_the_real_flanneld_at_the_other_end(lab):
    """flanneld with its UDP backend, and an etcd to which the test writes our node's lease."""
    flanneld = the_flanneld()
    a, b = lab.host("a"), lab.host("b")
    lab.link(a, b)
    etcd = Etcd(b)
    etcd.put(f"{PREFIX}/config", '{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}')
    etcd.put(f"{PREFIX}/subnets/10.244.1.0-24", f'{{"PublicIP":"{a.v4}","PublicIPv6":null}}')
    env_file = lab.folder / "subnet.env"
    b.start([
        flanneld, f"--etcd-endpoints={etcd.url}", f"--iface={b.v4}", f"--subnet-file={env_file}",
    ])
    wait_for(lambda: env_file.exists() and "FLANNEL_MTU" in env_file.read_text(), "flanneld")
    values = dict(line.split("=", 1) for line in env_file.read_text().splitlines())
    assert values["FLANNEL_MTU"] == "1472"
    subnet = values["FLANNEL_SUBNET"].replace(".1/", ".0/")
    its_address = subnet.partition("/")[0]
    forwarder = Forwarder.start(a, addresses=[AT_A.v4], routes=[f"{subnet} via {b.v4}"])
    wait_for(lambda: ping(a, its_address, count=1, wait=0.5).received, "flanneld's route to us")
    assert ping(b, AT_A.v4, count=5).received == 5
    transfer_tcp(a, b, its_address)
    transfer_tcp(b, a, AT_A.v4)
    assert_invariant(forwarder)


def test_a_cluster_with_the_real_flanneld_and_its_replacement(lab):
    """VXLAN: one node runs flanneld, which udptun replaces afterwards."""
    flanneld = the_flanneld()
    config = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}
    cluster = Cluster(lab, 2, config=config, options=["--backend=auto"])
    ours, stock = cluster.members
    stock.folder.mkdir()
    process = stock.host.start([
        flanneld, *stock.store, f"--iface={stock.host.v4}", f"--subnet-file={stock.subnet_file}",
        "--ip-masq",
    ])
    ours.start()
    ours.wait_ready()
    wait_for(stock.subnet_file.exists, "flanneld")
    subnet = stock.subnet
    for member in cluster.members:
        member.add_pod()

    def peers() -> list[tuple[str, str]]:
        return [(peer["state"], peer["path"]) for peer in ours.ask_node()["peers"]]

    def rules() -> str:
        commands = (["iptables-save"], ["nft", "list", "ruleset"])
        shown = [stock.host.run(command, check=False).stdout for command in commands]
        return "".join(shown).upper()

    wait_for(lambda: peers() == [("reachable", "vxlan")], "an echo")
    all_reach_all(cluster.members)
    transfer_tcp(ours.pod, stock.pod, stock.pod_v4)
    transfer_tcp(stock.pod, ours.pod, ours.pod_v4)
    assert "FLANNEL" in rules().replace("FLANNEL.1", "")
    assert process.stop() == 0
    stock.start()
    stock.wait_ready()
    assert stock.subnet == subnet
    wait_for(lambda: "FLANNEL" not in rules().replace("FLANNEL.1", ""), "the leftovers to go")
    wait_for(lambda: peers() == [("reachable", "vxlan")], "a probe")
    all_reach_all(cluster.members)
