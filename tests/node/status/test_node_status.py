"""What GET /v1/node and ``udptun status`` show."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import stat
import time
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.control.fakes import LoopThread, Served, thread  # noqa: F401
from tests.node.node_reports import ready
from udptun.cli import cli, options
from udptun.cli.node_status import node_block, problems
from udptun.control.client import ControlClient
from udptun.errors import ControlError
from udptun.instance import Instance
from udptun.leases.base import SourceHealth
from udptun.leases.cache import CACHE_FILE
from udptun.node.host import conntrack
from udptun.node.process.launch import FORWARD_FILE, ForwarderSpec
from udptun.node.status import socket as module
from udptun.node.status.report import NodeReport, PairReport, iso_time
from udptun.node.status.socket import NodeSocket, node_json

PAGE = Path(__file__).resolve().parents[3] / "docs" / "node.md"


def measured() -> NodeReport:
    """Return a report with one peer that was moved to UDP, like the example in docs/node.md."""
    report = ready()
    subnet = IPv4Network("10.5.60.0/24")
    report.pairs[subnet] = PairReport(
        "10.5.60.0-24", subnet, "udp", "VXLAN: 3 probes in a row were not answered",
        state="reachable", preferred="vxlan", hold=20.0)
    report.describe_paths = lambda _: {
        "udp": {"endpoint": "192.0.2.2:8285", "state": "reachable", "reason": "", "rtt_us": 310},
        "vxlan": {"state": "unreachable", "reason": "3 probes in a row were not answered",
                  "loss": 0.25, "largest_size": 1450, "last_answer": iso_time(time.time() - 300)},
    }
    report.event("path_changed", peer="10.5.60.0-24", subnet=str(subnet), path="udp",
                 reason="VXLAN: 3 probes in a row were not answered")
    return report


@pytest.fixture
def served_node(thread, tmp_path):  # noqa: F811
    node = NodeSocket(measured(), tmp_path / "udptun.sock")
    thread.run(node.start)
    yield tmp_path / "node.sock"
    thread.run(node.aclose)
    assert not (tmp_path / "node.sock").exists()


def test_the_socket_is_the_instances(served_node):
    assert Instance().node_socket.name == served_node.name
    assert Instance().node_socket.parent == Instance().control_socket().parent
    assert (options.FORWARD_FILE, options.CACHE_FILE) == (FORWARD_FILE, CACHE_FILE)
    assert stat.S_IMODE(served_node.stat().st_mode) == 0o660


def example_in_the_document():
    blocks = re.findall(r"^```\w*\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if '"path_since"' in block]
    return json.loads(block)


def test_the_example_in_the_document_has_the_keys_of_a_real_answer(served_node):
    with ControlClient(str(served_node)) as client:
        found = client.node()
    example = example_in_the_document()
    assert [*example] == [*found]
    assert [*example["peers"][0]] == [*found["peers"][0]]
    assert [*example["events"][0]] == [*found["events"][0]]
    assert [*example["checks"][0]] == [*found["checks"][0]]
    assert found["peers"][0]["paths"]["vxlan"]["state"] == "unreachable"


async def test_problems_in_fields_and_as_text():
    report = measured()
    report.conntrack = "the table is full"
    report.host.set([], {"net.ipv4.ip_forward": "it is 0"})
    found = json.loads(b"".join([piece async for piece in node_json(report)]))
    assert [*found["problems"][0]] == [*example_in_the_document()["problems"][0]]
    shown = re.sub(r"for \d+ s", "for N s", node_block(found))
    assert "\n  [!]host: it is 0 (for N s)\n      run: sysctl -w net.ipv4.ip_forward=1\n" in shown
    remedy = "raise net.netfilter.nf_conntrack_max"
    assert f"\n  [!]conntrack: {conntrack.PROBLEM}\n      {remedy}\n" in shown
    assert f"degraded: conntrack: {conntrack.PROBLEM}; {remedy}" in [*problems(found)]
    del found["problems"]  # of an earlier version
    assert f"\n  [!]conntrack: the table is full; {remedy}\n" in node_block(found)


def test_many_peers_and_many_requests(served_node):
    with ControlClient(str(served_node)) as client:
        for _ in range(3):
            assert len(client.node()["peers"]) == 1


@pytest.mark.parametrize("request_line", [
    b"GET /v1/status HTTP/1.1", b"POST /v1/node HTTP/1.1", b"\x00\xff", b"GET", b""])
def test_other_requests_are_refused(served_node, request_line):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(served_node))
        client.sendall(request_line + b"\r\n\r\n")
        assert client.recv(64).startswith(b"HTTP/1.1 404 ")
    with ControlClient(str(served_node)) as client, pytest.raises(ControlError, match="not found"):
        client.routes()


def test_a_request_that_is_too_long_or_incomplete_does_not_affect_others(served_node, monkeypatch):
    monkeypatch.setattr(module, "REQUEST_SECONDS", 0.1)
    for part in (b"GET /v1/node", b"x" * (2 * module.HEAD_LEN)):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(served_node))
            client.sendall(part)
            with contextlib.suppress(ConnectionResetError):  # not all of it was read
                assert client.recv(64) == b""
    with ControlClient(str(served_node)) as client:
        assert client.node()["ready"] is True


def run_status(control, *options):
    return CliRunner().invoke(cli, ["status", "--socket", str(control), *options])


def test_status_without_a_forwarder_shows_the_node(served_node, tmp_path):
    """As on a node with VXLAN only."""
    result = run_status(tmp_path / "udptun.sock")
    assert result.exit_code == 0, result.output
    for line in (
        "node: 10.5.1.0/24", "  state: ready"):
        assert line in result.output.splitlines()
    result = run_status(tmp_path / "udptun.sock", "10.5.60.0-24")
    for line in (
        "node peer: 10.5.60.0-24",
        "  path udp: reachable, round trip 0.31 ms",
        "  path vxlan: unreachable, loss 25%, largest packet 1450, last answer 5 min ago: "
        "3 probes in a row were not answered",
    ):
        assert line in result.output.splitlines()
    text = result.output + run_status(tmp_path / "udptun.sock").output
    for pattern in (
        r"^  carried by: udp for \d s; VXLAN: 3 probes in a row were not answered; "
        r"back to vxlan when it has answered for 20 s$",
        r"^  event: \d s ago, path_changed, 10.5.60.0-24: 10.5.60.0/24 by udp; VXLAN: 3 probes",
    ):
        assert re.search(pattern, text, re.MULTILINE), text
    found = json.loads(run_status(tmp_path / "udptun.sock", "-o", "json").output)
    assert [*found] == ["node", "mesh"]


def test_status_before_the_first_lease(thread, tmp_path):  # noqa: F811
    report = NodeReport("etcd", SourceHealth(), waiting="waiting for a lease")
    node = NodeSocket(report, tmp_path / "udptun.sock")
    thread.run(node.start)
    try:
        lines = run_status(tmp_path / "udptun.sock").output.splitlines()
    finally:
        thread.run(node.aclose)
    assert lines[0] == "node: no lease"
    assert {"  state: not ready: waiting for a lease", "  interface: -", "  backend: -",
            "  mtu: -"} <= {*lines}


def test_status_shows_both(served_node, tmp_path, thread):  # noqa: F811
    with Served(thread, tmp_path / "udptun.sock"):
        text = run_status(tmp_path / "udptun.sock").output
        assert text.index("node: 10.5.1.0/24") < text.index("device: udptun0")
        found = json.loads(run_status(tmp_path / "udptun.sock", "-o", "json").output)
        with ControlClient(str(tmp_path / "udptun.sock")) as client:
            assert [*found] == [*client.status(), "node", "mesh"]


def test_status_shows_when_the_preferred_path_is_used_again(thread, tmp_path):  # noqa: F811
    report = measured()
    (pair,) = report.pairs.values()
    pair.returns = time.time() + 600
    node = NodeSocket(report, tmp_path / "udptun.sock")
    thread.run(node.start)
    try:
        text = run_status(tmp_path / "udptun.sock", "10.5.60.0-24").output
    finally:
        thread.run(node.aclose)
    assert "; back to vxlan in 10 min if it keeps answering" in text


def test_status_mentions_a_stopped_daemon(thread, tmp_path):  # noqa: F811
    """But not if flanneld's extension, or an operator, has started the forwarder."""
    state = tmp_path / "state"
    state.mkdir()
    spec = ForwarderSpec("", (), (), (), "udptun0", str(state / "routes"))
    with Served(thread, tmp_path / "udptun.sock"):
        assert "node:" not in run_status(tmp_path / "udptun.sock").output
        spec.write(tmp_path / "forward.json")
        assert "node:" not in run_status(tmp_path / "udptun.sock").output
        (state / "leases.json").touch()
        text = run_status(tmp_path / "udptun.sock").output
        assert text.startswith(f"node: the daemon does not answer on {tmp_path}/node.sock. ")


def test_the_command_peers_shows_the_daemons_echo_measurements(thread, tmp_path):  # noqa: F811
    report = measured()
    subnet = IPv4Network("10.244.9.0/24")
    report.pairs[subnet] = PairReport("n9", subnet, "udp", state="reachable")
    since = "2026-01-31T08:00:00.000+00:00"
    measurement = {"since": since, "rtt_us": 420, "loss": 0.0, "last_answer": since,
                   "largest_size": 1472, "full_size_passes": True, "state": "reachable",
                   "reason": ""}
    fresh = []

    async def freshen():
        fresh.append(True)

    report.freshen_paths = freshen
    report.describe_paths = lambda net: {"udp": measurement} if net == subnet and fresh else {}
    node = NodeSocket(report, tmp_path / "udptun.sock")
    thread.run(node.start)
    try:
        with Served(thread, tmp_path / "udptun.sock") as served:
            served.forwarder.more_peers = [{"endpoint": "192.0.2.9:8285", "subnets": [str(subnet)],
                                            "probe": None}]
            result = CliRunner().invoke(cli, ["peers", "--socket", str(tmp_path / "udptun.sock")])
    finally:
        thread.run(node.aclose)
    row = next(line for line in result.output.splitlines() if "192.0.2.9" in line)
    assert re.split("  +", row) == [
        "192.0.2.9:8285", "reachable", "2026-01-31T08:00:00Z", "0.42 ms", "0%",
        "2026-01-31T08:00:00Z", "1472", "measured with echo requests"]


def test_status_without_both_is_an_error(tmp_path):
    result = run_status(tmp_path / "udptun.sock")
    assert result.exit_code == 1
    assert "no forwarder answers" in str(result.exception) + result.output


async def test_a_second_daemon_does_not_take_the_socket(tmp_path):
    first = NodeSocket(ready(), tmp_path / "udptun.sock")
    second = NodeSocket(ready(), tmp_path / "udptun.sock")
    await first.start()
    with pytest.raises(OSError, match="in use"):
        await second.start()
    await second.aclose()
    assert (tmp_path / "node.sock").exists()
    await first.aclose()
    await asyncio.sleep(0)
