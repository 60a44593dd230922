"""``bench probes``: its peers speak VXLAN, and one small run gives plausible figures."""

import socket
import struct
from dataclasses import replace

import pytest

from bench import nodes, probe_peers, probes
from udptun.lab.cluster import etcd_obstacle

COST = probes.Cost(0.01, 0.005, 50.0, 60_000_000, 50_000_000, 20)


def words_sum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    return (total & 0xFFFF) + (total >> 16)


def test_a_frame_is_returned_to_its_sender():
    vxlan = bytes.fromhex("0800000000000100")
    ip = bytes(12) + socket.inet_aton("10.0.0.1") + socket.inet_aton("10.0.0.64")
    frame = vxlan + b"target" + b"source" + b"\x08\0" + ip + struct.pack(">4H", 1000, 2000, 0, 0)
    back = probe_peers.frame_back(frame, b"message!")
    assert back[:22] == vxlan + b"source" + b"target" + b"\x08\0"
    assert words_sum(back[22:42]) == 0xFFFF
    assert back[34:42] == socket.inet_aton("10.0.0.64") + socket.inet_aton("10.0.0.1")
    assert struct.unpack(">H", back[24:26])[0] == len(back) - 22
    assert struct.unpack(">4H", back[42:50]) == (2000, 1000, 16, 0)
    assert back[50:] == b"message!"


def test_the_table_has_the_difference():
    with_ = replace(COST, daemon_cpu=0.03, forwarder_bytes=57_000_000)
    lines = {line[:32].strip(): line[32:].split() for line in probes.table(COST, with_)}
    assert lines["both, % of a core"] == ["1.50", "3.50", "2.00"]
    assert lines["both, MB"] == ["110.0", "117.0", "7.0"]


@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))
@pytest.mark.parametrize("backend", nodes.BACKENDS)
def test_a_small_run(backend, monkeypatch):
    monkeypatch.setattr(probes, "SETTLE_SECONDS", 5.0)
    without = probes.measure(20, 2.0, backend, probe=False)
    with_ = probes.measure(20, 10.0, backend, probe=True)
    assert (without.reachable, with_.reachable) == (0, 20)
    assert with_.sent_per_second > without.sent_per_second
    assert min(without.daemon_bytes, with_.daemon_bytes) > 0
