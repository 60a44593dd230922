"""When a node is ready; /healthz, /livez, /readyz and /metrics over real HTTP."""

import asyncio
import http.client
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from types import MappingProxyType

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.control.fakes import LoopThread, Served
from tests.node.node_reports import ready, starting
from tests.path.test_worker_pressure import no_more_descriptors
from tests.wait import until
from udptun.control import http as server_module
from udptun.errors import DeviceError
from udptun.leases.base import Subnets
from udptun.model import parse_address
from udptun.node.status.readiness import (
    CHANGE_SECONDS,
    CHECKS,
    MAX_NAMED,
    Problem,
    State,
    is_ready,
    judge,
)
from udptun.node.status.report import FirewallDrop, NodeReport, PairReport
from udptun.node.status.scrape import NodeScrape
from udptun.node.status.server import HealthServer

FORWARD = "net.ipv6.conf.all.forwarding"
OFF = f"{FORWARD} is 0: pods on this host reach no other node over IPv6"
LOOPBACK = parse_address("address", "127.0.0.1")


def states(report: NodeReport) -> dict[str, State]:
    """Return the checks whose state is not OK."""
    return {check.name: check.state for check in judge(report) if check.state is not State.OK}


def text_of(report: NodeReport, name: str) -> str:
    (found,) = (check for check in judge(report) if check.name == name)
    return str(found)


# Readiness


def test_a_healthy_node_passes_every_check() -> None:
    report = ready()
    assert is_ready(judge(report))
    assert states(report) == {}
    lines = "\n".join(map(str, judge(report)))
    for text in ("[+]store: etcd answers; leases: 8",
                 "[+]lease: 10.5.1.0/24, expires in 11 h unless renewed",
                 "[+]interface: eth0, published as 192.0.2.1; inner MTU 1450",
                 "[+]forwarder: has all routes: 7", "[+]peers: 2 by UDP, 5 by VXLAN"):
        assert text in lines


def test_a_starting_node_fails_its_checks() -> None:
    assert set(states(starting())) == set(CHECKS) - {"conntrack", "daemon", "peers"}
    assert set(states(starting()).values()) == {State.FAILED}


def test_a_change_that_is_being_applied_does_not_make_the_node_unready() -> None:
    """In a large cluster there is always one."""
    report = ready()
    report.forwarder.mark_synced(False)
    assert states(report) == {}
    assert report.forwarder.behind is not None
    report.forwarder.behind -= CHANGE_SECONDS
    assert states(report) == {"forwarder": State.FAILED}
    report.forwarder.mark_synced(True)
    assert states(report) == {}


def set_store_down(report: NodeReport) -> None:
    report.source.connected, report.source.error = False, "no answer for 5 s"


def set_leftover(report: NodeReport) -> None:
    report.leftovers = {"FLANNEL-FWD": ("the chain stays", time.time() - 120)}


def set_stale(report: NodeReport) -> None:
    set_store_down(report)
    report.stale, report.source.lease = True, "none"


def set_never_reported(report: NodeReport) -> None:
    set_store_down(report)
    report.applied = None


def set_skipped(report: NodeReport) -> None:
    report.source.skipped = {"10.5.9.0-24": "no PublicIP"}


def set_lost(report: NodeReport) -> None:
    report.source.lease, report.source.lease_error = "lost", "192.0.2.9 has it"


def set_expired(report: NodeReport) -> None:
    report.source.lease_expires = time.time() - 100


def set_no_lease(report: NodeReport) -> None:
    report.lease, report.lease_error = None, "no subnet is free"


def set_not_published(report: NodeReport) -> None:
    report.lease_error = "no permission to write"


def set_no_interface(report: NodeReport) -> None:
    report.underlay, report.interface_error = None, "no interface eth9"


def set_interface_gone(report: NodeReport) -> None:
    report.interface_error = "eth0 has no address any more"


def set_too_small_for_ipv6(report: NodeReport) -> None:
    assert report.lease is not None
    subnets = Subnets(IPv4Network("10.5.1.0/24"), IPv6Network("fd44::/64"))
    report.lease = replace(report.lease, subnets=subnets)
    report.ipv6_error = "inner packets have at most 1252 bytes, and IPv6 needs 1280"


def set_only_ipv6_and_too_small(report: NodeReport) -> None:
    set_too_small_for_ipv6(report)
    assert report.lease is not None
    report.lease = replace(report.lease, subnets=Subnets(v6=report.lease.subnets.v6))


def set_no_forwarder(report: NodeReport) -> None:
    report.forwarder.connected, report.forwarder.error = False, "no forwarder answers on /run/s"


def set_out_of_step(report: NodeReport) -> None:
    report.forwarder.synced = False


def set_no_subnet_env(report: NodeReport) -> None:
    report.subnet_env_error = "No space left on device"


def set_contested(report: NodeReport) -> None:
    report.source.contested = "another machine writes it"


def set_off(report: NodeReport) -> None:
    report.host.set([], {FORWARD: OFF})


def set_no_firewall(report: NodeReport) -> None:
    report.firewall_error = "nft is not there"


def set_drop(report: NodeReport, *, cuts: bool) -> None:
    report.firewall_drops = (
        FirewallDrop("packets are dropped by X", "ask X", cuts, time.time() - 12),)


def set_conntrack_full(report: NodeReport) -> None:
    used = 8 if report.conntrack == "" else 7  # another number at each look
    report.conntrack = f"the table has {used} of 8 entries"


def set_unreachable(report: NodeReport) -> None:
    why = "its vxlan backend ignores a UDP-only node"
    report.peers.unreachable = MappingProxyType({"10.5.7.0-24": why})


def set_pairs(report: NodeReport, *states: str) -> None:
    """Give each of the peers 10.5.20.0/24, 10.5.21.0/24, ... one of the states."""
    for number, state in enumerate(states, 20):
        trouble = "" if state == "reachable" else f"VXLAN: it is {state}"
        pair = PairReport(f"10.5.{number}.0-24", IPv4Network(f"10.5.{number}.0/24"), "vxlan",
                          state=state, trouble=trouble, changed=time.time() - 40)
        report.pairs[pair.subnet] = pair


def set_silent(report: NodeReport) -> None:
    set_pairs(report, "reachable", "unreachable", "unknown")


def set_limited(report: NodeReport) -> None:
    set_pairs(report, "limited", "reachable")


def set_only_peer_silent(report: NodeReport) -> None:
    set_pairs(report, "unreachable")


def set_all_silent(report: NodeReport) -> None:
    set_pairs(report, "unreachable", "unreachable")


def set_not_measured(report: NodeReport) -> None:
    report.measure_errors = ("opening a raw socket for echoes: Operation not permitted",)


def set_refused(report: NodeReport) -> None:
    report.peers.refused = {"10.5.8.0-24": "Network is unreachable"}


def set_waiting(report: NodeReport) -> None:
    report.waiting = "for the network's configuration"


@pytest.mark.parametrize(
    ("spoil", "found", "says"),
    [
        (set_waiting, {"start": State.FAILED}, "[-]start: for the network's configuration"),
        (set_store_down, {"store": State.DEGRADED},
         "[!]store: etcd: no answer for 5 s; last answer 3 s ago\n"
         "    the active leases are those of the store's last answer"),
        (set_stale, {"store": State.DEGRADED, "lease": State.DEGRADED},
         "the active leases are from the cache"),
        (set_never_reported, {"store": State.FAILED}, "[-]store: etcd: no answer for 5 s"),
        (set_skipped, {"store": State.DEGRADED},
         "    1 cannot be used:\n    10.5.9.0-24: no PublicIP"),
        (set_lost, {"lease": State.DEGRADED},
         "[!]lease: 10.5.1.0/24: lost, being acquired again: 192.0.2.9 has it"),
        (set_expired, {"lease": State.DEGRADED}, "[!]lease: 10.5.1.0/24: expired 100 s ago"),
        (set_no_lease, {"lease": State.FAILED}, "[-]lease: no subnet is free"),
        (set_not_published, {"lease": State.DEGRADED}, "10.5.1.0/24: no permission to write"),
        (set_no_interface, {"interface": State.FAILED}, "[-]interface: no interface eth9"),
        (set_interface_gone, {"interface": State.FAILED}, "eth0 has no address any more"),
        (set_too_small_for_ipv6, {"mtu": State.DEGRADED},
         "[!]mtu: IPv6 is not carried: inner packets have at most 1252 bytes, and IPv6 needs 1280"),
        (set_only_ipv6_and_too_small, {"mtu": State.FAILED}, "[-]mtu: IPv6 is not carried"),
        (set_no_forwarder, {"forwarder": State.FAILED},
         "[-]forwarder: no forwarder answers on /run/s"),
        (set_out_of_step, {"forwarder": State.FAILED},
         "[-]forwarder: its routes are not up to date; routes: 7"),
        (set_no_subnet_env, {"subnet-env": State.FAILED}, "[-]subnet-env: No space left on device"),
        (set_silent, {"peers": State.DEGRADED},
         "    1 not answering:\n    10.5.21.0-24: for 40 s: VXLAN: it is unreachable"),
        (set_limited, {"peers": State.DEGRADED},
         "    1 not reached by large packets:\n    10.5.20.0-24: for 40 s: VXLAN: it is limited"),
        (set_only_peer_silent, {"peers": State.DEGRADED}, "    1 not answering:"),
        (set_all_silent, {"peers": State.FAILED}, "[-]peers: no peer answers; "),
        (set_not_measured, {"peers": State.DEGRADED},
         "    not measured: opening a raw socket for echoes: Operation not permitted"),
        (set_contested, {"lease": State.DEGRADED},
         "[!]lease: 10.5.1.0/24: another machine writes it"),
        (set_no_firewall, {"firewall": State.FAILED}, "[-]firewall: nft is not there"),
        (partial(set_drop, cuts=True), {"firewall": State.FAILED},
         "packets are dropped by X, for "),
        (partial(set_drop, cuts=False), {"firewall": State.DEGRADED}, "[!]firewall: our rules"),
        (set_leftover, {"firewall": State.DEGRADED},
         "[!]firewall: the chain stays, for 2 min; remove it if no flannel runs here"),
        (set_conntrack_full, {"conntrack": State.DEGRADED},
         "[!]conntrack: the table has 8 of 8 entries"),
        (set_unreachable, {"peers": State.DEGRADED},
         "    1 cannot be reached:\n    10.5.7.0-24: its vxlan backend ignores a UDP-only node"),
        (set_refused, {"peers": State.DEGRADED},
         "    1 refused:\n    10.5.8.0-24: Network is unreachable"),
    ],
)
def test_each_problem_has_its_own_check(
    spoil: Callable[[NodeReport], None], found: dict[str, State], says: str
) -> None:
    report = ready()
    spoil(report)
    assert states(report) == found
    assert is_ready(judge(report)) == (State.FAILED not in found.values())
    assert says in text_of(report, next(iter(found)))


@pytest.mark.parametrize("spoil", [
    set_waiting, set_store_down, set_stale, set_never_reported, set_skipped, set_lost, set_expired,
    set_no_lease, set_contested, set_too_small_for_ipv6, set_no_forwarder, set_out_of_step,
    set_no_subnet_env, set_silent, set_limited, set_all_silent, set_not_measured, set_no_firewall,
    partial(set_drop, cuts=True), set_conntrack_full, set_unreachable, set_refused, set_off,
])
def test_each_problem_has_fields_that_stay_the_same(
    spoil: Callable[[NodeReport], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failed check, and no other, has problems. Nothing in a text depends on the time."""
    def problems() -> list[Problem]:
        return [one for check in judge(report) for one in check.problems]

    report = ready()
    spoil(report)
    before = problems()
    assert {one.check for one in before} == states(report).keys() != set()
    now, monotonic = time.time(), time.monotonic()
    monkeypatch.setattr(time, "time", lambda: now + 1000)
    monkeypatch.setattr(time, "monotonic", lambda: monotonic + 1000)
    if spoil is set_conntrack_full:
        spoil(report)
    assert [replace(one, since=None) for one in problems()] == [
        replace(one, since=None) for one in before]
    for one, again in zip(before, problems(), strict=True):
        assert again.since is one.since is None or abs(again.since - one.since) < 1


def test_what_a_problem_is_about() -> None:
    report = ready()
    set_off(report)
    set_drop(report, cuts=True)
    set_silent(report)
    report.host.set_misrouted({"10.5.9.0-24": "it is a blackhole"})
    found = {one.text: one for check in judge(report) for one in check.problems}
    off = found[OFF]
    assert (off.setting, off.remedy) == (FORWARD, f"run: sysctl -w {FORWARD}=1")
    assert found["10.5.9.0-24: it is a blackhole"].peer == "10.5.9.0-24"
    assert found["packets are dropped by X"].remedy == "ask X"
    silent = found["10.5.21.0-24 does not answer: VXLAN: it is unreachable"]
    assert silent.peer == "10.5.21.0-24" and silent.since == report.pairs[
        IPv4Network("10.5.21.0/24")].changed


def test_few_of_many_problems_are_listed() -> None:
    report = ready()
    set_pairs(report, *["unreachable"] * 30)
    (peers,) = (check for check in judge(report) if check.name == "peers")
    assert len(peers.problems) == MAX_NAMED + 1
    assert peers.problems[-1].text == "10 more: not answering"


def test_a_peer_on_another_path_than_the_preferred_one_is_named() -> None:
    """Its packets arrive, so this is not degraded."""
    report = ready()
    set_pairs(report, "reachable")
    (pair,) = report.pairs.values()
    pair.path, pair.why, pair.since = "udp", "VXLAN: no answer", time.time() - 70
    assert states(report) == {}
    assert ("    1 by another path than the preferred one:\n"
            "    10.5.20.0-24: UDP for 70 s; VXLAN: no answer") in text_of(report, "peers")


def test_a_lease_without_an_end() -> None:
    report = ready()
    report.source.lease_expires = None
    assert text_of(report, "lease") == "[+]lease: 10.5.1.0/24, does not expire"


def test_a_vxlan_node_needs_no_forwarder() -> None:
    report = ready()
    set_no_forwarder(report)
    report.backend, report.forwarder.needed = "vxlan", False
    assert states(report) == {}


def test_an_unavailable_backend_is_shown_and_does_not_degrade() -> None:
    report = ready()
    report.unavailable = {"VXLAN": "the kernel has no vxlan module"}
    assert states(report) == {}
    assert "no VXLAN here: the kernel has no vxlan module" in text_of(report, "peers")


def test_only_the_first_of_many_peers_are_listed() -> None:
    report = ready()
    report.peers = replace(report.peers, unreachable={f"{n:04}": "far" for n in range(5000)})
    lines = text_of(report, "peers").splitlines()
    assert lines[1].strip() == "5000 cannot be reached:"
    assert lines[2].strip() == "0000: far"
    assert lines[-1].strip() == f"and {5000 - MAX_NAMED} more"
    assert len(lines) == MAX_NAMED + 3


# Over HTTP


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[HealthServer]:
    report = ready()
    scrape = NodeScrape(report, tmp_path / "udptun.sock")
    running = HealthServer(report, LOOPBACK, 0, scrape.render)
    await running.start()
    yield running
    await running.aclose()


Answer = tuple[int, dict[str, str], str]


async def ask(server: HealthServer, path: str, method: str = "GET") -> Answer:
    """Send a request with a common HTTP client."""
    def exchange() -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read().decode()
        finally:
            connection.close()

    return await asyncio.to_thread(exchange)


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/healthz/"])
async def test_healthz_and_livez_ignore_readiness(server: HealthServer, path: str) -> None:
    server._report = starting()
    status, headers, body = await ask(server, path)
    assert (status, body) == (200, "ok\n")
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert headers["Server"] == "udptun"


async def test_ready(server: HealthServer) -> None:
    assert (await ask(server, "/readyz"))[::2] == (200, "ok\n")
    status, _, body = await ask(server, "/readyz?verbose")
    assert status == 200
    lines = body.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == [f"[+]{name}" for name in CHECKS]
    assert lines[-1] == "readyz check passed"


async def test_not_ready_lists_the_failed_checks(server: HealthServer) -> None:
    set_no_forwarder(server._report)
    set_unreachable(server._report)
    status, _, body = await ask(server, "/readyz")
    assert status == 503
    assert body == "[-]forwarder: no forwarder answers on /run/s\nreadyz check failed\n"
    status, _, body = await ask(server, "/readyz?verbose")
    assert status == 503
    assert "[+]store: " in body and "[!]peers: " in body and "[-]forwarder: " in body


async def test_readyz_follows_the_report(server: HealthServer) -> None:
    set_waiting(server._report)
    assert (await ask(server, "/readyz"))[0] == 503
    server._report.waiting = ""
    assert (await ask(server, "/readyz"))[0] == 200


async def test_a_store_that_is_down_leaves_the_node_ready(server: HealthServer) -> None:
    set_store_down(server._report)
    assert (await ask(server, "/readyz"))[0] == 200
    status, _, body = await ask(server, "/readyz/store")
    assert status == 503
    assert body.startswith("[!]store: etcd: no answer for 5 s")


async def test_single_checks(server: HealthServer) -> None:
    for name in CHECKS:
        status, _, body = await ask(server, f"/readyz/{name}")
        assert (status, body.partition(":")[0]) == (200, f"[+]{name}")
    status, _, body = await ask(server, "/readyz/etcd")
    assert status == 404
    assert "start, store, lease" in body


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("HEAD", "/healthz", 200), ("HEAD", "/readyz", 200), ("GET", "/", 404), ("GET", "/x", 404),
     ("POST", "/healthz", 405), ("DELETE", "/metrics", 405)],
)
async def test_other_requests(server: HealthServer, method: str, path: str, status: int) -> None:
    have, headers, body = await ask(server, path, method)
    assert have == status
    if status == 405:
        assert headers["Allow"] == "GET, HEAD"
    if method == "HEAD":
        assert body == ""


@pytest.mark.parametrize(("host", "status"), [
    ("127.0.0.1:80", 200), ("[::1]:80", 200), ("localhost", 200), ("LocalHost.:80", 200), ("", 421),
    (None, 200), ("rebinds.example:80", 421), ("localhost.example", 421), ("[", 421),
])
async def test_a_page_of_another_name_cannot_read_it(
    server: HealthServer, host: str | None, status: int
) -> None:
    """DNS rebinding: the browser of a user of this host sends the name of the page."""
    line = "" if host is None else f"Host: {host}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET /metrics HTTP/1.0\r\n{line}\r\n".encode())
    answer = await reader.read()
    writer.close()
    assert int(answer.split()[1]) == status
    assert (b"udptun_" in answer) == (status == 200)


async def test_a_port_that_is_in_use(server: HealthServer) -> None:
    second = HealthServer(ready(), LOOPBACK, server.port, server._render)
    with pytest.raises(DeviceError, match=f"127.0.0.1 port {server.port}: "):
        await second.start()
    await second.aclose()


async def test_over_ipv6(server: HealthServer) -> None:
    running = HealthServer(ready(), parse_address("a", "::1"), 0, server._render)
    await running.start()
    try:
        reader, writer = await asyncio.open_connection("::1", running.port)
        writer.write(b"GET /livez HTTP/1.0\r\n\r\n")
        assert (await reader.read()).endswith(b"ok\n")
        writer.close()
        await writer.wait_closed()
    finally:
        await running.aclose()


# Clients that send nothing, or too slowly


async def test_idle_connections_never_keep_a_probe_out(server: HealthServer) -> None:
    idle = [await asyncio.open_connection("127.0.0.1", server.port)
            for _ in range(2 * server_module.CONNECTIONS_MAX)]
    assert (await ask(server, "/livez"))[0] == 200
    async with asyncio.timeout(60):
        assert await idle[0][0].read() == b""  # the oldest goes first
    assert not idle[-1][0].at_eof()
    for _, writer in idle:
        writer.close()


async def test_clients_that_do_not_read_never_keep_a_probe_out(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def large(method: str, target: str) -> server_module.Answer:
        nonlocal asked
        if target == "/livez":
            return server_module.Answer(b"ok")
        asked += 1
        return server_module.Answer(bytes(16 << 20))  # more than the buffers of both sockets

    monkeypatch.setattr(server, "answer", large)
    slow = []
    for _ in range(server_module.CONNECTIONS_MAX):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
        writer.write(b"GET /large HTTP/1.0\r\n\r\n")
        await reader.readexactly(1)  # now the server sends the answer
        slow.append(writer)
    assert asked == server_module.CONNECTIONS_MAX
    assert (await ask(server, "/livez"))[0] == 200
    for writer in slow:
        writer.close()


async def test_a_request_has_one_deadline(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "REQUEST_SECONDS", 0.5)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    closed = asyncio.create_task(reader.read())
    writer.write(b"GET /livez HTTP/1.0\r\nX-Slow: ")
    async with asyncio.timeout(60):
        while not closed.done():
            writer.write(b"x")
            await asyncio.wait([closed], timeout=0.05)
    writer.close()


@pytest.mark.parametrize("pause", [0.01, 3600])
async def test_a_lack_of_descriptors_costs_no_cpu_time_and_passes(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    monkeypatch.setattr(server_module, "ACCEPT_PAUSE", pause)
    tries, get_request = [], server_module._Http.get_request
    monkeypatch.setattr(server_module._Http, "get_request",
                        lambda self: (tries.append(0), get_request(self))[1])
    with socket.create_connection(("127.0.0.1", server.port), 60):
        await until(lambda: tries, "the first connection")
        second = socket.socket()
        with no_more_descriptors(), second:
            second.connect(("127.0.0.1", server.port))
            await until(lambda: len(tries) == 2, "the second connection")
            for _ in range(100):
                await asyncio.sleep(0)
            if pause > 1:
                assert len(tries) == 2
                return
    assert (await ask(server, "/livez"))[0] == 200


# Metrics


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with LoopThread() as running:
        yield running


async def test_the_forwarders_metrics_follow_ours(
    server: HealthServer, thread: LoopThread, tmp_path: Path
) -> None:
    with Served(thread, tmp_path / "udptun.sock"):
        status, headers, body = await ask(server, "/metrics")
    assert status == 200
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    names = [family.name for family in text_string_to_metric_families(body)]
    assert len(names) == len(set(names))  # a repeated metric family makes the whole scrape invalid
    assert {"udptun_node_leases", "udptun_packets", "udptun_build_info"} <= {
        sample.name for family in text_string_to_metric_families(body) for sample in family.samples
    } | set(names)


async def test_metrics_without_a_forwarder(server: HealthServer) -> None:
    status, _, body = await ask(server, "/metrics")
    assert status == 200
    assert "udptun_node_leases 8.0" in body
    assert "udptun_packets" not in body


async def test_a_hanging_forwarder_does_not_delay_a_scrape(
    server: HealthServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("udptun.node.status.scrape.FORWARDER_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(tmp_path / "udptun.sock"))
        hanging.listen()  # the kernel accepts the connection; no process answers
        status, _, body = await ask(server, "/metrics")
    assert status == 200
    assert "udptun_node_ready 1.0" in body
