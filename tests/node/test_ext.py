"""``udptun ext`` as flanneld runs it.

flanneld splits the command at blanks, expands variables and calls exec. Older releases use a shell.
The configuration is the one that docs/flannel.md shows. Forwarders are real, between namespaces.
"""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tests.own_netns import in_own_mount_namespace, in_own_netns, sh
from udptun.cli import cli
from udptun.control.client import ControlClient
from udptun.errors import FieldError, NoForwarder
from udptun.instance import Instance
from udptun.lab import Host, Lab, missing_tools, ping, wait_for
from udptun.model import Route
from udptun.net.udp import keeps_marks, kernel_release
from udptun.node.extension import Extension, advertisement, peer_route
from udptun.node.process.launch import ForwarderSpec, spawn

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.244.0.0/16"
FEATURES = ["ecn", "probe"] if keeps_marks(kernel_release()) else ["probe"]
COMMANDS = ("PreStartupCommand", "PostStartupCommand", "SubnetAddCommand", "SubnetRemoveCommand")

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or bool(missing_tools()), reason="network namespaces: root and their tools"
)


def documented_backend() -> dict[str, str]:
    """Return the Backend of the configuration in docs/flannel.md."""
    page = (ROOT / "docs" / "flannel.md").read_text()
    blocks = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (backend,) = [
        config["Backend"] for block in blocks
        if (config := json.loads(block)).get("Backend", {}).get("Type") == "extension"
    ]
    return backend


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Return a value of PATH that contains the directory of ``udptun``, as flanneld has it."""
    program = tmp_path / "bin" / "udptun"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m udptun "$@"\n')
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


class Flanneld:
    """flanneld's extension backend on one node, without the rest of flanneld.

    by_shell  True: run commands by a shell, as releases before flannel 0.28.2 do
    """

    def __init__(self, folder: Path, path: str, host: Host | None = None, by_shell: bool = False):
        folder.mkdir()
        self.backend = documented_backend()
        self.control = folder / "run" / "udptun.sock"
        self.state = folder / "state"
        self.host, self._by_shell = host, by_shell
        self.env = {
            **os.environ, "PATH": path, "UDPTUN_SOCKET": str(self.control),
            "UDPTUN_EXT_STATE_DIR": str(self.state),
        }
        self.env.pop("INVOCATION_ID", None)

    def _argv(self, command: str, env: dict[str, str]) -> list[str]:
        if self._by_shell:
            return ["sh", "-c", command]
        return [re.sub(r"\$\{?(\w+)\}?", lambda name: env.get(name[1], ""), word)
                for word in command.split()]

    def run(self, name: str, stdin: str = "", **variables: str) -> tuple[int, str]:
        """Return the exit code, and the output that flanneld keeps: both streams, trimmed."""
        env = self.env | variables
        argv = self._argv(self.backend[name], env)
        if self.host is not None:
            argv = ["ip", "netns", "exec", self.host.namespace, *argv]
        # Like Go's CombinedOutput, run() returns only when no process holds the pipe open.
        done = subprocess.run(
            argv, env=env, input=stdin + "\n", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False, timeout=60, start_new_session=True,
        )
        return done.returncode, done.stdout.strip()

    def pre(self) -> str:
        code, said = self.run("PreStartupCommand")
        assert code == 0, said
        return json.loads(json.dumps(said))  # encoded as BackendData, and decoded at the peer

    def post(self, subnet: str, public_ip: object, **more: str) -> tuple[int, str]:
        return self.run(
            "PostStartupCommand",
            **{"NETWORK": NETWORK, "SUBNET": subnet, "IPV6SUBNET": "::/0",
               "PUBLIC_IP": str(public_ip), "PUBLIC_IPV6": "<nil>"} | more,
        )

    def add(self, subnet: str, public_ip: object, advertised: str) -> tuple[int, str]:
        return self.run("SubnetAddCommand", advertised, SUBNET=subnet, PUBLIC_IP=str(public_ip))

    def remove(self, subnet: str, public_ip: object, advertised: str) -> tuple[int, str]:
        return self.run("SubnetRemoveCommand", advertised, SUBNET=subnet, PUBLIC_IP=str(public_ip))

    def status(self) -> dict[str, Any]:
        with ControlClient(str(self.control)) as client:
            return client.status()

    def routes(self) -> list[Route]:
        with ControlClient(str(self.control)) as client:
            return [Route.from_json(route) for route in client.routes()["routes"]]


QUIET = (0, "")
SUBNETS = ("10.244.1.0/24", "10.244.2.0/24")


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def pair(lab: Lab, path: str) -> tuple[Flanneld, Flanneld]:
    """Return two hosts on which nothing was started."""
    a, b = lab.host("a"), lab.host("b")
    lab.link(a, b)
    return Flanneld(lab.folder / "a", path, a), Flanneld(lab.folder / "b", path, b)


def bring_up(pair: tuple[Flanneld, Flanneld]) -> None:
    hosts = [node.host for node in pair]
    said = [node.pre() for node in pair]
    for node, host, subnet in zip(pair, hosts, SUBNETS, strict=True):
        assert node.post(subnet, host.v4) == QUIET
    assert pair[0].add(SUBNETS[1], hosts[1].v4, said[1]) == QUIET
    assert pair[1].add(SUBNETS[0], hosts[0].v4, said[0]) == QUIET


# With real forwarders


@needs_root
@pytest.mark.netns
@pytest.mark.parametrize("by_shell", [False, True])
def test_two_flannelds_make_an_overlay(lab: Lab, path: str, by_shell: bool) -> None:
    a, b = lab.host("a"), lab.host("b")
    lab.link(a, b)
    nodes = tuple(Flanneld(lab.folder / h.name, path, h, by_shell) for h in (a, b))
    bring_up(nodes)
    pods = a.pod(SUBNETS[0]), b.pod(SUBNETS[1])
    assert ping(a, "10.244.2.0").received == 3
    assert ping(pods[0], "10.244.2.2").received == 3
    advertised = nodes[1].pre()
    # At each renewal of the lease, flanneld runs all commands again. Nothing changes.
    before = nodes[0].status()
    assert nodes[0].add(SUBNETS[1], b.v4, advertised) == QUIET
    assert nodes[0].post(SUBNETS[0], a.v4) == QUIET
    after = nodes[0].status()
    assert (after["pid"], after["generation"]) == (before["pid"], before["generation"])
    # The peer leaves.
    assert nodes[0].remove(SUBNETS[1], b.v4, advertised) == QUIET
    assert nodes[0].routes() == []
    assert ping(a, "10.244.2.0", count=1, wait=0.3).received == 0
    assert nodes[0].remove(SUBNETS[1], b.v4, advertised) == QUIET  # removing it twice is no error


@needs_root
@pytest.mark.netns
def test_a_peers_new_address_replaces_its_route(pair) -> None:
    """flanneld adds the subnet again, with another address and possibly another port."""
    node = pair[0]
    node.post(SUBNETS[0], node.host.v4)
    for address, port, mtu in (
        ("192.0.2.2", 8285, None), ("192.0.2.9", 8285, None), ("192.0.2.9", 8286, 1400),
    ):
        assert node.add(SUBNETS[1], address, advertisement(port, mtu)) == QUIET
        assert node.routes() == [
            Route.make(SUBNETS[1], address, port, mtu, True, ecn="ecn" in FEATURES)]


@needs_root
@pytest.mark.netns
def test_the_forwarder_outlives_flanneld_and_is_found_again(pair) -> None:
    bring_up(pair)
    node = pair[0]
    pid = node.status()["pid"]
    assert os.getsid(pid) == pid
    assert os.getpgid(pid) == pid
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        assert descriptor.name not in ("0", "1", "2") or "pipe" not in str(descriptor.readlink())
    # flanneld restarts and runs the same commands; the TUN stays.
    assert node.post(SUBNETS[0], node.host.v4) == QUIET
    assert node.status()["pid"] == pid
    assert ping(node.host, "10.244.2.0").received == 3


@needs_root
@pytest.mark.netns
def test_another_lease_replaces_the_forwarder(pair) -> None:
    bring_up(pair)
    node, host = pair[0], pair[0].host
    pid = node.status()["pid"]
    # A peer had the new subnet before: its saved route must not cover our own subnet.
    node.add("10.244.9.0/24", "192.0.2.9", "")
    code, said = node.post("10.244.9.0/24", host.v4)
    assert code == 0
    assert "10.244.1.0 instead of 10.244.9.0" in said
    status = node.status()
    assert status["pid"] != pid
    assert status["device"]["addresses"] == ["10.244.9.0"]
    assert [str(route.dst) for route in node.routes()] == [SUBNETS[1]]


@needs_root
@pytest.mark.netns
def test_a_dead_forwarder_is_brought_back_by_the_next_command(pair) -> None:
    """The new forwarder must have the saved routes, because flanneld repeats routes only once a
    day."""
    bring_up(pair)
    node, host = pair[0], pair[0].host
    wait_for(lambda: "10.244.2.0" in (node.state / "routes").read_text(), "the state file")
    os.kill(node.status()["pid"], signal.SIGKILL)
    wait_for(lambda: "udptun0" not in host.run(["ip", "link"]).stdout, "the TUN to go")
    assert node.add("10.244.3.0/24", "192.0.2.3", "") == QUIET
    assert [str(route.dst) for route in node.routes()] == [SUBNETS[1], "10.244.3.0/24"]
    assert ping(host, "10.244.2.0").received == 3


@needs_root
@pytest.mark.netns
def test_an_external_forwarder_is_waited_for(pair) -> None:
    """The forwarder has a separate unit or container, which starts before there is a lease."""
    node, host = pair[0], pair[0].host
    node.env["UDPTUN_EXT_FORWARDER"] = "external"
    process = host.start(
        [sys.executable, "-m", "udptun", "forward", "--wait-for",
         str(node.control.with_name("forward.json"))]
    )
    assert node.post(SUBNETS[0], host.v4) == QUIET
    assert node.status()["pid"] == process.pid


@needs_root
@pytest.mark.netns
def test_the_reason_why_a_forwarder_cannot_start_is_printed(pair) -> None:
    """PUBLIC_IP belongs to a NAT. flanneld ends on this error, and logs the line."""
    node = pair[0]
    code, said = node.post(SUBNETS[0], "192.0.2.77")
    assert code == 1
    assert said.startswith("udptun: error: the forwarder ended as soon as it was started:")
    assert "192.0.2.77" in said
    node.env["UDPTUN_EXT_LISTEN"] = str(node.host.v4)
    assert node.post(SUBNETS[0], "192.0.2.77") == QUIET


@needs_root
@pytest.mark.netns
def test_the_options_of_one_node_come_from_its_environment(pair) -> None:
    node, host = pair[0], pair[0].host
    node.env |= {"UDPTUN_EXT_PORT": "8286", "UDPTUN_EXT_MTU": "1400"}
    assert json.loads(node.pre()) == {
        "udptun": {"port": 8286, "mtu": 1400, "v": 1, "features": FEATURES}}
    assert node.post(SUBNETS[0], host.v4) == QUIET
    device = node.status()["device"]
    assert (device["listen"], device["mtu"]) == ([f"{host.v4}:8286"], 1400)


@needs_root
@pytest.mark.netns
def test_a_warning_says_that_ipv6_is_not_carried(pair) -> None:
    code, said = pair[0].post(SUBNETS[0], pair[0].host.v4, IPV6SUBNET="fd00:0:0:1::/64")
    assert code == 0
    assert "only IPv4" in said


@needs_root
@pytest.mark.netns
def test_a_warning_says_that_the_unit_stops_the_forwarder(pair) -> None:
    pair[0].env["INVOCATION_ID"] = "0" * 32  # as systemd sets it
    code, said = pair[0].post(SUBNETS[0], pair[0].host.v4)
    assert code == 0
    assert "KillMode=process" in said
    assert "external" in said


# Without a forwarder


def test_the_commands_of_each_peer_import_little(tmp_path: Path) -> None:
    """At its start, flanneld runs thousands of these commands, one after the other."""
    script = (
        "import sys\nfrom udptun.cli import cli\n"
        "cli.main(['ext', 'add'], prog_name='udptun', standalone_mode=False)"
    )
    env = os.environ | {
        "UDPTUN_SOCKET": str(tmp_path / "none.sock"), "SUBNET": "10.244.2.0/24",
        "PUBLIC_IP": "192.0.2.2",
    }
    traced = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", script], env=env, input="", text=True,
        capture_output=True, check=False,
    ).stderr
    loaded = {line.rpartition("|")[2].strip() for line in traced.splitlines() if "|" in line}
    assert {"udptun.node.extension", "udptun.control.client"} <= loaded
    heavy = {"asyncio", "aiohttp", "grpc", "pyroute2", "subprocess", "uvloop", "udptun._core"}
    assert not loaded & heavy


def test_the_documented_commands_need_no_shell() -> None:
    """A word that contains a quote or a blank would work only with a shell."""
    backend = documented_backend()
    assert set(backend) == {"Type", *COMMANDS}
    for name in COMMANDS:
        program, group, command = backend[name].split()
        assert (program, group) == ("udptun", "ext")
        found = cli.get_command(click.Context(cli), "ext")
        assert isinstance(found, click.Group)
        assert command in found.commands


def test_only_the_advertisement_is_printed(tmp_path: Path, path: str) -> None:
    flanneld = Flanneld(tmp_path / "node", path)
    advert = {"port": 8285, "v": 1, "features": FEATURES}
    assert json.loads(flanneld.pre()) == {"udptun": advert}
    assert len(flanneld.pre().splitlines()) == 1


@pytest.mark.parametrize(
    ("advertised", "port", "mtu", "probe"),
    [
        ("\n", 8285, None, False),
        (advertisement(8286, 1400) + "\n", 8286, 1400, True),
        ('{"udptun":{"port":8287}}\n', 8287, None, False),
        ("what another program printed\n", 8285, None, False),
        ('{"udptun":{"port":"no"}}\n', 8285, None, False),
        ("[]\n", 8285, None, False),
    ],
)
def test_the_advertisement_of_a_peer(
    advertised: str, port: int, mtu: int | None, probe: bool
) -> None:
    env = {"SUBNET": "10.244.2.0/24", "PUBLIC_IP": "192.0.2.2"}
    assert peer_route(env, advertised) == Route.make(
        "10.244.2.0/24", "192.0.2.2", port, mtu, probe, ecn='"ecn"' in advertised)


@pytest.mark.parametrize(
    ("env", "field"),
    [
        ({"PUBLIC_IP": "192.0.2.2"}, "SUBNET"),
        ({"SUBNET": "10.244.2.0/24"}, "PUBLIC_IP"),
        ({"SUBNET": "10.244.2.1/24", "PUBLIC_IP": "192.0.2.2"}, "SUBNET"),
        ({"SUBNET": "10.244.2.0/24", "PUBLIC_IP": "<nil>"}, "PUBLIC_IP"),
    ],
)
def test_a_missing_or_wrong_variable_is_named(env: dict[str, str], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        peer_route(env, "")
    assert caught.value.field == field


def test_a_missing_variable_is_named_and_exits_2(tmp_path: Path, path: str) -> None:
    flanneld = Flanneld(tmp_path / "node", path)
    code, said = flanneld.run("SubnetAddCommand", PUBLIC_IP="192.0.2.2", SUBNET="10.244.2/24")
    assert code == 2
    assert "SUBNET: '10.244.2/24' is not valid" in said


def test_a_route_before_the_first_start_is_refused(tmp_path: Path, path: str) -> None:
    flanneld = Flanneld(tmp_path / "node", path)
    code, said = flanneld.add("10.244.2.0/24", "192.0.2.2", "")
    assert code == 1
    assert "run `udptun ext up` first" in said
    with pytest.raises(NoForwarder):
        flanneld.status()


SPEC = ForwarderSpec(
    control="/run/udptun/udptun.sock", listen=("192.0.2.1:8285",), addresses=("10.244.1.0",),
    networks=("10.244.0.0/16",), tun="udptun0", state="/var/lib/udptun/routes",
)
DEVICE = {
    "name": "udptun0", "addresses": ["10.244.1.0"], "networks": ["10.244.0.0/16"],
    "listen": ["192.0.2.1:8285"], "mtu": 1472,
}


def test_the_instance_names_device_socket_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        Extension, "up", lambda self, env, tun, *_: seen.append(
            (self.instance.name, tun, self.control, self.state_dir)))
    for argv, env in (
        (["ext", "up", "--instance", "blue"], {}), (["ext", "up"], {"UDPTUN_INSTANCE": "blue"}),
        (["ext", "up", "--instance", "blue", "--tun", "x0", "--socket", "/c", "--state-dir", "/s"],
         {}),
    ):
        result = CliRunner().invoke(cli, argv, env=env)
        assert result.exit_code == 0, result.output
    named = ("blue", "blue0", Path("/run/blue/blue.sock"), Path("/var/lib/blue"))
    assert seen == [named, named, ("blue", "x0", Path("/c"), Path("/s"))]


def test_a_forwarder_is_started_with_the_instance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda argv, **_: seen.append(argv))
    spawn(tmp_path / "forward.json", tmp_path / "log", Instance("blue"))
    assert seen[0][1:] == ["-m", "udptun", "forward", "--instance", "blue",
                           "--wait-for", str(tmp_path / "forward.json"),
                           "--log-format", "text", "--log-file", str(tmp_path / "log")]


@in_own_netns
def test_flanneld_does_not_wait_for_a_forwarder_without_a_log(tmp_path: Path, path: str) -> None:
    """The disk of the log is read-only. flanneld waits until no process holds the pipe open."""
    in_own_mount_namespace()
    flanneld = Flanneld(tmp_path / "flannel", path)
    flanneld.state.mkdir()
    sh(f"mount -t tmpfs -o ro none {flanneld.state}", "ip addr add 192.0.2.1/32 dev lo")
    try:
        code, said = flanneld.post("10.244.1.0/24", "192.0.2.1")
        assert code == 0, said
    finally:
        with ControlClient(str(flanneld.control)) as client:
            client.stop()


def test_the_options_survive_the_file(tmp_path: Path) -> None:
    file = tmp_path / "made" / "forward.json"
    for spec in (SPEC, dataclasses.replace(SPEC, mtu=1400, dscp="inherit")):
        spec.write(file)
        assert ForwarderSpec.read(file) == spec
    assert [entry.name for entry in file.parent.iterdir()] == ["forward.json"]
    file.write_text('{"tun": "udptun0"}')
    with pytest.raises(FieldError, match="the options of a forwarder"):
        ForwarderSpec.read(file)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"name": "tun0"}, "its device: tun0 instead of udptun0"),
        ({"addresses": []}, "its addresses:"),
        ({"networks": ["10.245.0.0/16"]}, "its networks: 10.245.0.0/16 instead"),
        ({"listen": ["192.0.2.2:8285"]}, "it listens on: 192.0.2.2:8285 instead"),
        ({"mtu": 1400}, ""),
    ],
)
def test_which_running_forwarder_matches(change: dict[str, Any], why: str) -> None:
    found = SPEC.mismatch({"device": DEVICE | change})
    assert found.startswith(why)
    assert bool(found) is bool(why)


def test_another_dscp_does_not_match() -> None:
    asked = dataclasses.replace(SPEC, dscp="46")
    assert asked.mismatch({"device": DEVICE}) == "its option dscp: 0 instead of 46"
    assert asked.mismatch({"device": DEVICE, "dscp": "46"}) == ""
    assert SPEC.mismatch({"device": DEVICE, "dscp": "inherit"}).startswith("its option dscp")


def test_an_mtu_matters_only_if_it_is_configured() -> None:
    asked = dataclasses.replace(SPEC, mtu=1400)
    assert asked.mismatch({"device": DEVICE}) == "its MTU: 1472 instead of 1400"
    assert asked.mismatch({"device": DEVICE | {"mtu": 1400}}) == ""
