"""Signals, restarts, and route changes under load. The latter is in `make test-all`."""

import contextlib
import http.client
import json
import signal
import socket

import pytest

from tests.netns.netns_traffic import assert_invariant, settled_packets, transfer_tcp
from udptun.lab import LabError, pair, ping, wait_for


def routes(forwarder) -> set[str]:
    listed = json.loads(forwarder.udptun("route", "list", "-o", "json").stdout)["routes"]
    return {f"{r['dst']} via {r['via']}" for r in listed}


def has_tun(side) -> bool:
    return side.host.run(["ip", "link", "show", "udptun0"], check=False).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_by_signal_removes_everything_created(lab, number):
    tunnel = pair(lab)
    a = tunnel.a
    assert has_tun(a)
    a.forwarder.process.signal(number)
    assert a.forwarder.process.wait() == 0
    assert not has_tun(a)
    assert not a.forwarder.control.exists()
    route_left = a.host.run(["ip", "route", "show", "10.244.0.0/16"]).stdout
    assert "udptun0" not in route_left
    # A restart can use the same names.
    a.start()
    assert ping(a.host, tunnel.b.v4).received == 3


def test_stop_command(lab):
    a = pair(lab).a
    a.forwarder.udptun("stop")
    assert a.forwarder.process.wait() == 0
    assert not has_tun(a)
    refused = a.forwarder.udptun("status", check=False)
    assert refused.returncode == 1
    assert refused.stderr.strip()


def test_sighup_reads_the_route_file_again(lab):
    tunnel = pair(lab)
    a, b = tunnel.sides
    before = routes(a.forwarder)
    a.forwarder.routes_file.write_text(f"10.244.50.0/24 via {b.outer}\n# a comment\n")
    a.forwarder.process.signal(signal.SIGHUP)
    wanted = {f"10.244.50.0/24 via {b.outer}"}
    wait_for(lambda: routes(a.forwarder) == wanted, "the new table")
    # A file with an error changes nothing, and the error is logged.
    a.forwarder.routes_file.write_text(f"10.244.51.0/24 via {b.outer}\n10.244.52.0/24 over there\n")
    a.forwarder.process.signal(signal.SIGHUP)
    a.forwarder.process.wait_for_output("line 2")
    assert routes(a.forwarder) == wanted
    a.forwarder.routes_file.write_text("".join(f"{route}\n" for route in sorted(before)))
    a.forwarder.process.signal(signal.SIGHUP)
    wait_for(lambda: routes(a.forwarder) == before, "the old table")
    assert ping(a.host, b.v4).received == 3


def test_sigusr1_logs_the_state(lab):
    tunnel = pair(lab)
    a = tunnel.a
    ping(a.host, tunnel.b.v4)
    received = settled_packets(a.forwarder)["decap"]["read"]
    a.forwarder.process.signal(signal.SIGUSR1)
    a.forwarder.process.wait_for_output(f"decap: read={received} ")
    assert a.forwarder.process.alive


def test_the_state_file_survives_a_kill(lab):
    """The saved table is active before the first packet: the first ping gets a reply."""
    state = lab.folder / "a.state"
    tunnel = pair(lab, start=False)
    a, b = tunnel.sides
    b.start()
    a.start(state=state, routes=None)
    for subnet in (b.node.subnet, b.node.subnet6, "10.244.60.0/24"):
        a.forwarder.udptun("route", "add", str(subnet), "via", str(b.outer))
    a.forwarder.udptun("route", "add", "10.244.61.0/24", "via", str(b.outer), "mtu", "1300")
    a.forwarder.udptun("route", "del", "10.244.60.0/24")
    last = routes(a.forwarder)
    wait_for(
        lambda: state.exists() and "10.244.61.0" in (text := state.read_text())
        and "10.244.60.0" not in text,
        "the state on disk",
    )
    a.forwarder.process.kill()
    wait_for(lambda: not has_tun(a), "the TUN to go with its process")
    a.start(state=state, routes=None)
    assert ping(a.host, b.v4, count=1).received == 1
    assert ping(a.pod, b.pod_v6, count=1).received == 1
    assert routes(a.forwarder) == last
    trace = json.loads(a.forwarder.udptun("trace", "10.244.61.1", "-o", "json").stdout)
    assert trace["mtu"] == 1300


def test_a_live_control_socket_is_refused_and_a_stale_one_replaced(lab):
    a = pair(lab).a
    second = a.options | {"tun": "udptun1", "wait": False}
    intruder = type(a.forwarder).start(a.host, **second)
    assert intruder.process.wait() != 0
    assert a.forwarder.get("/v1/healthz")
    a.forwarder.process.kill()
    assert a.forwarder.control.exists()
    a.start()


class _Control(http.client.HTTPConnection):
    """A connection that stays open, like the node daemon's."""

    def __init__(self, path) -> None:
        super().__init__("localhost", timeout=60)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(60)
        self.sock.connect(str(path))

    def call(self, method: str, path: str, body: object = None) -> None:
        self.request(method, path, json.dumps(body) if body is not None else None)
        response = self.getresponse()
        answer = response.read()
        assert response.status < 300, answer


LOAD_SECONDS = 10


@pytest.mark.slow
@pytest.mark.timeout(LOAD_SECONDS + 110)
def test_route_changes_under_load(lab):
    """A route change every 10 ms under full load has no visible effect."""
    tunnel = pair(lab)
    a, b = tunnel.sides
    table = [{"dst": r[0], "via": r[2]} for r in map(str.split, a.options["routes"])]
    noise = [{"dst": f"10.244.{n}.0/24", "via": f"198.18.1.{n}"} for n in range(100, 200)]
    server = b.host.start(["iperf3", "-s", "-1", "--forceflush", "-B", str(b.v4)])
    server.wait_for_output("Server listening")
    client = a.host.start(["iperf3", "-J", "-c", str(b.v4), "-t", str(LOAD_SECONDS), "--bidir"])
    changes, rss_early = 0, 0
    with contextlib.closing(_Control(a.forwarder.control)) as control:
        while client.alive:
            one = f"/v1/routes/10.244.{100 + changes % 100}.0/24"
            if changes % 3 == 0:
                control.call("PUT", one, {"via": "198.18.1.99"})
            elif changes % 3 == 1:
                control.call("DELETE", one)
            else:
                control.call("PUT", "/v1/routes", {"routes": table + noise[: changes % 100]})
            changes += 1
            if changes == 200:
                rss_early = a.forwarder.rss_kib()
            with contextlib.suppress(LabError):  # the client still runs
                client.wait(0.01)
    report = json.loads(client.text())
    assert "error" not in report, report["error"]
    assert changes > 200  # the count after which the memory is compared
    grown = a.forwarder.rss_kib() - rss_early
    print(f"{changes} route changes, {grown} KiB more memory")
    assert grown < 2048, f"{grown} KiB more after {changes} changes"
    for side in tunnel.sides:
        packets = assert_invariant(side.forwarder)
        assert packets["encap"]["delivered"] > 1000
        log = side.forwarder.process.text().lower()
        assert "error" not in log
        assert "traceback" not in log
    transfer_tcp(a.host, b.host, b.v4)
