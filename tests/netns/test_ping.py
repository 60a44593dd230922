"""``udptun ping`` between real hosts: the path, the largest size, and the direction that fails."""

import json
import sys

from tests.netns.hosts_file import two_nodes
from tests.netns.test_tunnel_probes import await_path, blocked, probing, traffic
from udptun.lab.cluster import start_all

LIMIT = 1200  # bytes of the outer packet


def pinged(host, control, *words, code=0):
    argv = [sys.executable, "-m", "udptun", "ping", *words, "-o", "json", "-i", "0.1"]
    done = host.run(argv, check=False, env={"UDPTUN_SOCKET": str(control)})
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_peer_that_answers_probes(lab):
    tunnel = probing(lab)
    a, b = tunnel.sides
    target = str(b.outer)

    def ping(*words, code=0):
        return pinged(a.host, a.forwarder.control, *words, code=code)

    found = ping(target)
    assert (found["method"], found["path"], found["endpoint"]) == ("probe", "udp", f"{target}:8285")
    assert (found["sent"], found["answered"], found["loss"]) == (4, 4, 0)
    assert all(0 < ms < 1000 for ms in found["rtt_ms"])
    assert found["largest_size"] == found["full_size"] == 1472
    echo = ping(target, "--path", "route", "-c", "1")
    assert (echo["method"], echo["address"], echo["largest_size"]) == ("echo", str(b.v4), 1472)
    pod = ping(str(b.pod_v6), "-c", "1", "--no-sweep")
    assert (pod["method"], pod["answered"], pod["largest_size"]) == ("echo", 1, None)

    with blocked(b, f"meta length > {LIMIT}"):
        limited = ping(target, "-c", "1")
        assert (limited["answered"], limited["full_size"]) == (1, 1472)
        # exact: the outer packet with its 28 bytes of headers has LIMIT bytes
        assert limited["largest_size"] == LIMIT - 28
        assert ping(target, "-c", "1", "-s", "1400", code=1)["answered"] == 0

    with traffic(tunnel), blocked(b, f"ip saddr {a.outer}"):
        await_path(a, state="unreachable")
        await_path(b, state="unreachable")
        lost = ping(target, "-c", "3", code=1)
        assert lost["loss"] == 1 and lost["largest_size"] is None
        assert lost["directions"]["from_peer"] and lost["directions"]["to_peer"] is False
        other = pinged(b.host, b.forwarder.control, str(a.outer), "-c", "3", code=1)
        assert other["directions"]["from_peer"] is False
        assert other["directions"]["to_peer"] is None


def test_a_node_by_its_name(lab):
    members = two_nodes(lab, head=["probe = false"])  # else the method depends on the moment
    start_all(members)
    a, b = members
    found = pinged(a.host, a.control, "n2", "-c", "1", "--no-sweep")
    assert (found["node"], found["method"], found["path"]) == ("n2", "echo", "udp")
    assert found["address"] == "10.244.2.0"
    b.remove_pod()
    pinged(a.host, a.control, "10.244.2.77", "-c", "1", code=1)
