"""Is the node ready? The answers of a daemon's real socket, of the kernel, and of subnet.env."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from tests.cni.runtime import Answer, Runtime, fake_plugin
from tests.control.fakes import LoopThread
from tests.node.node_reports import ready
from tests.own_netns import in_own_netns
from udptun.cni import node
from udptun.cni.failure import CniError
from udptun.control import protocol
from udptun.errors import FieldError
from udptun.leases.base import Lease, Subnets
from udptun.node.host.subnet_env import SubnetEnv
from udptun.node.status.report import NodeReport
from udptun.node.status.socket import NodeSocket

ECHO_MTU = """
mtu=$(sed 's/.*"mtu": *\\([0-9]*\\).*/\\1/')
echo '{"cniVersion": "1.0.0", "mtu": "'$mtu'"}'
"""


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    """A runtime whose delegate answers with the MTU that it gets."""
    runtime = Runtime(tmp_path, str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    for name in ("bridge", "host-local"):
        fake_plugin(tmp_path / "bin", name, ECHO_MTU)
    (tmp_path / "run").mkdir()
    return runtime


def report(subnet: str = "10.244.1.0/24", mtu: int = 1400) -> NodeReport:
    found = ready()
    assert found.lease is not None
    found.lease = Lease(
        found.lease.key, Subnets(IPv4Network(subnet)), found.lease.attributes)
    found.mtu = mtu
    return found


@contextmanager
def daemon(runtime: Runtime, answers: NodeReport) -> Iterator[None]:
    """Answer at the daemon's socket, in a thread."""
    with LoopThread() as thread:
        server = NodeSocket(answers, runtime.directory / "run" / "udptun.sock")
        thread.run(server.start)
        try:
            yield
        finally:
            thread.run(server.aclose)


def mtu(answer: Answer) -> int:
    assert answer.code == 0, answer
    return int(answer.json["mtu"])


def test_the_mtu_is_the_daemons(runtime: Runtime) -> None:
    runtime.write_subnet(mtu=1450)
    with daemon(runtime, report(mtu=1380)):
        assert runtime.run("STATUS").code == 0
        assert mtu(runtime.run("ADD")) == 1380


def test_a_daemon_that_is_not_ready(runtime: Runtime) -> None:
    """STATUS and ADD have its reason. Pods that exist have limited connectivity."""
    runtime.write_subnet()
    answers = report()
    answers.firewall_error = "nft failed"
    with daemon(runtime, answers):
        code, message = runtime.run("STATUS").error
        assert code == 51
        assert "firewall: nft failed" in message
        answer = runtime.run("ADD", waitSeconds=0.2)
        assert answer.error == (
            11, "this node is not ready after 0.2 s: firewall: nft failed")
        assert "waiting up to 0.2 s until this node is ready: firewall" in answer.stderr


def test_a_node_without_a_lease(runtime: Runtime) -> None:
    answers = report()
    answers.lease = None
    answers.waiting = "waiting for the podCIDR"
    with daemon(runtime, answers):
        code, message = runtime.run("STATUS").error
    assert code == 50
    assert "waiting for the podCIDR" in message


def test_a_subnet_file_of_another_lease_is_not_used(runtime: Runtime) -> None:
    """The daemon has acquired a lease, and has not written the file yet."""
    runtime.write_subnet()
    with daemon(runtime, report("10.244.9.0/24")):
        code, message = runtime.run("ADD").error
    assert code == 11
    assert "has the subnet 10.244.1.0/24, but the node has 10.244.9.0/24" in message


def test_add_waits_until_the_node_is_ready(runtime: Runtime) -> None:
    with runtime.start("ADD", waitSeconds=60) as process:
        assert process.stderr is not None
        told = process.stderr.readline()  # it waits
        assert "does not exist" in told and "waiting up to 60 s" in told
        runtime.write_subnet()
        output, _ = process.communicate(timeout=60)
    assert mtu(Answer(process.returncode, output, "")) == 1450


def test_without_a_daemon_no_file_is_written(runtime: Runtime) -> None:
    assert runtime.run("STATUS").error[0] == 50
    code, message = runtime.run("ADD").error
    assert code == 11
    assert "the node daemon has not written it yet" in message


@in_own_netns
def test_the_overlay_works_without_its_daemon(runtime: Runtime) -> None:
    """udptun has run here. The device decides if no daemon answers: pods need no daemon."""
    runtime.write_subnet()
    (runtime.directory / "run" / "forward.json").touch()
    assert runtime.run("ADD").error[0] == 11
    assert runtime.run("STATUS").error[0] == 51
    runtime.overlay_device(1399, "10.244.1.0/32")
    assert runtime.run("STATUS").code == 0
    assert mtu(runtime.run("ADD")) == 1399


def test_a_daemon_that_was_killed_has_left_its_socket(runtime: Runtime) -> None:
    runtime.write_subnet()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(runtime.config["nodeSocket"])
    assert "no node daemon answers" in runtime.run("ADD").error[1]


@pytest.mark.parametrize("answer", [
    b"", b"HTTP/1.1 404 Not Found\r\n\r\n{}", b"HTTP/1.1 200 OK\r\n\r\n{", b"{}",
    b"HTTP/1.1 200 OK\r\n\r\n[]", b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000,
])
def test_a_server_that_is_no_daemon_counts_as_none(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "node.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.recv(4096)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert node.ask_daemon(str(path)) is None
        thread.join()


def test_a_path_that_is_too_long_has_no_daemon() -> None:
    assert node.ask_daemon("/" + "x" * 300) is None


@in_own_netns
def test_only_devices_that_are_up_and_have_the_base_address_count(runtime: Runtime) -> None:
    runtime.write_subnet()
    overlay = node.parse(runtime.subnet_file.read_text(), "")
    assert node.device_mtus(overlay) == []
    runtime.overlay_device(1300, "10.244.1.1/32")  # the address of a bridge
    assert node.device_mtus(overlay) == []


def test_the_request_has_the_path_of_the_protocol() -> None:
    assert protocol.NODE_WITHOUT_PEERS.encode() in node._REQUEST


NET4, SUBNET4 = IPv4Network("10.244.0.0/16"), IPv4Network("10.244.1.0/24")
NET6, SUBNET6 = IPv6Network("fd00:244::/48"), IPv6Network("fd00:244:0:1::/64")
DUAL = SubnetEnv(NET4, SUBNET4, NET6, SUBNET6, 1450, False)


@pytest.mark.parametrize("written", [
    SubnetEnv(NET4, SUBNET4, None, None, 1450, True), DUAL,
    SubnetEnv(None, None, NET6, SUBNET6, 1430, False),
])
def test_what_the_daemon_writes_is_read(written: SubnetEnv) -> None:
    overlay = node.parse(written.text(), "")
    assert overlay.networks == [one for one in (written.network, written.network6) if one]
    assert overlay.subnets == [one for one in (written.subnet, written.subnet6) if one]
    assert (overlay.mtu, overlay.ip_masq) == (written.mtu, written.ip_masq)


def test_the_file_is_read_as_a_shell_reads_it() -> None:
    overlay = node.parse(
        "# by hand\n\nexport FLANNEL_NETWORK='10.244.0.0/16'\nFLANNEL_SUBNET=10.9.0.1/24\n"
        ' FLANNEL_SUBNET="10.244.1.1/24"  \nFLANNEL_MTU=1450\nOTHER\n#FLANNEL_MTU=9\n'
        "FLANNEL_IPMASQ=true", "")
    assert (overlay.networks, overlay.subnets) == ([NET4], [SUBNET4])
    assert (overlay.mtu, overlay.ip_masq) == (1450, True)


@pytest.mark.parametrize("field", [
    "FLANNEL_NETWORK", "FLANNEL_SUBNET", "FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET",
    "FLANNEL_MTU", "FLANNEL_IPMASQ",
])
def test_a_missing_variable_is_named(field: str) -> None:
    lines = [line for line in DUAL.text().splitlines() if not line.startswith(f"{field}=")]
    with pytest.raises(FieldError) as caught:
        node.parse("\n".join(lines), "/subnet.env")
    assert (caught.value.field, caught.value.where) == (field, "/subnet.env")


@pytest.mark.parametrize(("line", "field"), [
    ("FLANNEL_NETWORK=10.244.0.0/16/1", "FLANNEL_NETWORK"),
    ("FLANNEL_SUBNET=", "FLANNEL_SUBNET"),
    ("FLANNEL_SUBNET=10.244/24", "FLANNEL_SUBNET"),
    ("FLANNEL_SUBNET=fd00::1/64", "FLANNEL_SUBNET"),
    ("FLANNEL_MTU=", "FLANNEL_MTU"),
    ("FLANNEL_MTU=-1", "FLANNEL_MTU"),
    ("FLANNEL_MTU=99999", "FLANNEL_MTU"),
    ("FLANNEL_IPMASQ=yes", "FLANNEL_IPMASQ"),
    ("FLANNEL_IPV6_NETWORK=fd00::/56", "FLANNEL_IPV6_SUBNET"),
])
def test_an_invalid_file_names_the_variable(runtime: Runtime, line: str, field: str) -> None:
    runtime.write_subnet()
    text = f"{runtime.subnet_file.read_text()}{line}\n"
    with pytest.raises(FieldError, match=field):
        node.parse(text, "")
    runtime.subnet_file.write_text(text)
    with pytest.raises(CniError, match=field):
        node.check((str(runtime.subnet_file), "/none"))
