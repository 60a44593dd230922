"""The parts of ``udptun doctor`` that need no network: deadlines, output, the generated page."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from tests.control.fakes import Served, served, status_of, thread  # noqa: F401
from udptun._version import __version__
from udptun.cli import cli
from udptun.doctor import run as runner
from udptun.doctor.check import Check, Finding, Result, Skip, failed, ok, skipped, warning
from udptun.doctor.checks import CHECKS, devices, files, kubernetes, load, peers, programs, underlay
from udptun.doctor.checks.daemon import reported
from udptun.doctor.facts import Facts, Sample
from udptun.doctor.page import page
from udptun.doctor.processes import Process
from udptun.doctor.sockets import _address
from udptun.errors import ControlError
from udptun.instance import Instance
from udptun.leases.advert import Advert, embed
from udptun.leases.base import Attributes, Lease, Subnets
from udptun.model import NO_EXPRESS_PEER, NO_EXPRESS_WORD, parse_address
from udptun.node.status import readiness

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    return Facts(Instance(), tmp_path / "udptun.sock", lambda node, peers: [], tmp_path,
                 tmp_path / "subnet.env")


def made(look: object, seconds: float = 5.0) -> Check:
    return Check("it", "looks at it", "node.md", look, seconds)  # type: ignore[arg-type]


def test_the_page_lists_the_checks() -> None:
    assert (ROOT / "docs" / "doctor.md").read_text() == page(), \
        "run python -m udptun.doctor.page > docs/doctor.md"


def test_each_check_has_a_name_of_its_own_and_an_existing_page() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS) >= 40
    for check in CHECKS:
        assert (ROOT / "docs" / check.page.partition("#")[0]).exists()


def test_a_check_that_hangs_is_given_up(facts: Facts) -> None:
    over = threading.Event()

    def hangs(_: Facts) -> list[Finding]:
        over.wait()
        return []

    began = time.monotonic()
    found = runner.run(facts, [made(hangs, 0.2), made(lambda _: [ok("fine")])])
    over.set()
    assert time.monotonic() < began + 30
    assert [one.finding.result for one in found] == [Result.WARNING, Result.OK]
    assert "did not end within" in found[0].finding.text


def test_the_worst_comes_first_and_no_check_is_lost(facts: Facts) -> None:
    def skips(_: Facts) -> list[Finding]:
        raise Skip("not here")

    def breaks(_: Facts) -> list[Finding]:
        raise ZeroDivisionError("a bug")

    def denied(_: Facts) -> list[Finding]:
        raise PermissionError(13, "Permission denied", "/x")

    found = runner.run(facts, [made(lambda _: []), made(skips), made(breaks), made(denied),
                               made(lambda _: [warning("w")]), made(lambda _: [failed("f")])])
    assert [one.finding.result.value for one in found] == [
        "failed", "warning", "skipped", "skipped", "skipped", "ok"]
    assert "a bug" in found[3].finding.text
    assert ("a capability is missing here" if os.geteuid() == 0 else "run as root") in \
        found[4].finding.text


def test_the_whole_run_is_bounded(facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ALL_SECONDS", 0.0)
    (found,) = runner.run(facts, [made(lambda _: [failed("never looked at")])])
    assert found.finding == Finding(Result.SKIPPED, "no time is left")


def test_foreign_text_is_escaped() -> None:
    assert "\x1b" not in failed("a \x1b[2J name", "\x1b]0;", "\u202e").text
    assert "\\x1b" in failed("a \x1b[2J name").text


def test_a_host_without_udptun(facts: Facts) -> None:
    """Nothing runs, and no file is there: each check ends, and only one has a finding."""
    facts.gather()
    found = runner.run(facts, CHECKS)
    assert {one.check.name for one in found} == {check.name for check in CHECKS}
    assert not [one for one in found if "itself failed" in one.finding.text]


@pytest.mark.parametrize(("status", "wanted"), [
    ({"error": {"code": "internal", "message": "it broke"}}, "answers with an error: it broke"),
    ({"error": {"code": "forbidden", "message": "only root"}}, "may not be used by this user"),
])
def test_a_forwarder_that_answers_with_an_error(
    served: Served, tmp_path: Path, status: dict[str, dict[str, str]], wanted: str  # noqa: F811
) -> None:
    """It may still pass packets."""
    served.forwarder.fail_with = ControlError(**status["error"])
    facts = Facts(Instance(), served.path, lambda node, peers: [], tmp_path)
    facts.gather()
    facts.client.close()
    (found,) = runner.run(facts, [programs.CHECKS[1]])
    assert wanted in found.finding.text and "No packet" not in found.finding.text


def test_the_problems_of_the_daemon(facts: Facts) -> None:
    """Each one is in one check of doctor, with what was measured and what to do."""
    def problem(check: str, text: str, **more: str | None) -> dict[str, str | None]:
        return {"check": check, "text": text, "remedy": "", "since": None, "peer": "",
                "setting": "", **more}

    began = datetime.fromtimestamp(time.time() - 300, UTC).isoformat()
    facts.node.answer = {
        "checks": [{"name": name, "state": state, "text": ["a; b"]} for name, state in (
            ("host", "degraded"), ("lease", "failed"), ("store", "ok"))],
        "problems": [
            problem("host", "udptun0 is down", since=began, remedy="see its log"),
            problem("host", "n2: a blackhole; a rule", peer="n2"),
            problem("host", "980 more: misrouted"),
            problem("host", "forwarding is 0", setting="net.ipv4.ip_forward"),
            problem("host", "udptun0 is 0", setting="net.ipv4.conf.udptun0.forwarding"),
            problem("lease", "10.5.1.0/24: expired")]}
    found = {check.name: [*check.look(facts)] for check in CHECKS
             if check.name in ("host", "routes", "lease", "store")}
    assert found == {
        "host": [warning("udptun0 is down", "for 5 min", "see its log"),
                 warning("udptun0 is 0")],
        "routes": [warning("n2: a blackhole; a rule"), warning("980 more: misrouted")],
        "lease": [failed("10.5.1.0/24: expired")], "store": [ok("a; b")]}
    del facts.node.answer["problems"]
    assert reported(facts, "lease") == [failed("a; b")]  # of an earlier version
    with pytest.raises(Skip, match="has no check mtu"):
        reported(facts, "mtu")


def test_each_check_of_the_daemon_is_in_a_check_of_doctor(facts: Facts) -> None:
    itself = {"conntrack", "peers"}  # doctor measures what these two measure
    facts.forwarder.answer = status_of(0, 0)
    facts.node.answer = {
        "version": __version__, "backend": "udp", "mtu": 1472, "interface": "", "unavailable": {},
        "subnets": [], "peers": [], "no_path": {}, "refused": {},
        "checks": [{"name": name, "state": "degraded", "text": [f"({name})"]}
                   for name in readiness.CHECKS],
        "problems": [{"check": name, "text": f"({name})", "remedy": "", "since": None, "peer": "",
                      "setting": ""} for name in readiness.CHECKS]}
    asking = [one for one in CHECKS if one not in (*peers.CHECKS, *load.CHECKS)]
    texts = [one.finding.text for one in runner.run(facts, asking)
             if one.finding.result in (Result.FAILED, Result.WARNING)]
    assert {name for name in readiness.CHECKS if any(f"({name})" in text for text in texts)} == \
        readiness.CHECKS.keys() - itself
    assert itself < {check.name for check in CHECKS}


def test_an_express_path_that_was_asked_for_and_is_off(facts: Facts) -> None:
    (check,) = (one for one in CHECKS if one.name == "express-path")

    def look(reason: str | None, *reasons: str | None, mode: str = "auto") -> list[Finding]:
        facts.forwarder.answer = {
            "accelerate": {"mode": mode, "active": reason is None, "reason": reason},
            "peers": [{"endpoint": f"192.0.2.{i}:8285",
                       "express": {"active": one is None, "reason": one}}
                      for i, one in enumerate(reasons, 1)]}
        return [*check.look(facts)]

    assert look("--accelerate off", mode="off") == [ok("not asked for: --accelerate off")]
    no_right = "this process may not load programs: it needs CAP_BPF"
    (found,) = look(no_right)
    assert found.result is Result.WARNING and found.evidence == no_right
    assert "deploy/README.md" in found.remedy
    assert look(NO_EXPRESS_PEER, NO_EXPRESS_WORD) == look(None, NO_EXPRESS_WORD) == [
        ok("0 of 1 peer can use it; the others do not have it")]
    (found,) = look(None, None, "an IPsec policy applies", NO_EXPRESS_WORD)
    assert found.text == "the workers carry all packets to and from 192.0.2.2:8285"
    assert found.evidence == "an IPsec policy applies"
    facts.forwarder.answer = {}
    with pytest.raises(Skip, match="another version"):
        [*check.look(facts)]


def test_addresses_of_proc() -> None:
    assert str(_address("0100007F")) == "127.0.0.1"
    assert str(_address("00000000000000000000000001000000")) == "::1"
    assert str(_address("0000000000000000FFFF0000010200C0")) == "192.0.2.1"  # bound by IPv6


@pytest.mark.parametrize(("files", "plugins", "found"), [
    ({}, (), "has no configuration"),
    ({"10-calico.conflist": "calico"}, ("bridge", "host-local", "loopback"), "does not use udptun"),
    ({"10-flannel.conflist": "flannel"}, ("flannel", "bridge", "loopback"),
     "the CNI plugin host-local is missing"),
    ({"10-flannel.conflist": "flannel"}, ("flannel", "bridge", "host-local", "loopback"), ""),
])
def test_cni_on_a_host_with_a_kubelet(
    facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str],
    plugins: tuple[str, ...], found: str,
) -> None:
    for name, folder in (("CONFIG_DIR", tmp_path / "net.d"), ("PLUGIN_DIR", tmp_path / "bin")):
        folder.mkdir()
        monkeypatch.setattr(kubernetes, name, folder)
    monkeypatch.setattr(kubernetes, "kubelet_is_here", lambda: True)
    monkeypatch.setattr(kubernetes, "runtime_configs", list)
    for name, kind in files.items():
        (tmp_path / "net.d" / name).write_text(json.dumps({"plugins": [{"type": kind}]}))
    for name in plugins:
        (tmp_path / "bin" / name).touch()
    problems = [one.text for one in kubernetes.cni.look(facts) if one.result != Result.OK]
    assert problems == [] if not found else found in problems[0]


def test_a_tun_in_another_container_is_not_missing(
    facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Kubernetes, only the container of the forwarder has /dev/net/tun."""
    tun = tmp_path / "tun"
    monkeypatch.setattr(devices, "TUN_FILE", tun)
    ours = Process(os.getpid(), "forward", "udptun", "S", False, ())
    facts.processes, facts.forwarder.answer = [], {}
    with pytest.raises(Skip, match="in the container of the forwarder"):
        [*devices.tun_device.look(facts)]
    facts.processes = [replace(ours, standby=True)]  # the one of the daemon
    with pytest.raises(Skip, match="in the container of the forwarder"):
        [*devices.tun_device.look(facts)]
    facts.processes = [ours]  # a forwarder with the same files
    assert [*devices.tun_device.look(facts)] == [
        failed(f"{tun} does not exist", remedy="run: modprobe tun")]
    facts.processes, facts.forwarder.answer = [], None
    facts.node.answer = {"backend": "udp"}
    assert [*devices.tun_device.look(facts)] == [
        failed(f"{tun} does not exist", remedy="run: modprobe tun")]


@pytest.mark.parametrize(("state", "folder", "found"), [
    ("ok", False, "in the container of the daemon"),
    ("ok", True, ""),
    ("failed", False, ""),
])
def test_a_subnet_file_in_another_container_is_not_missing(
    tmp_path: Path, state: str, folder: bool, found: str
) -> None:
    file = tmp_path / "flannel" / "subnet.env"
    if folder:
        file.parent.mkdir()
    facts = Facts(Instance(), tmp_path / "udptun.sock", lambda node, peers: [], tmp_path, file)
    facts.node.answer = {"checks": [{"name": "subnet-env", "state": state, "text": ["so"]}],
                         "backend": "udp"}
    if found:
        with pytest.raises(Skip, match=found):
            [*files.subnet_env.look(facts)]
    else:
        *_, last = files.subnet_env.look(facts)
        assert "does not exist: no pod" in last.text


def test_loss_that_cannot_be_measured_again_is_not_a_problem(
    facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probes of the first seconds are lost if the peer starts later."""
    row = {"state": "reachable", "loss": 0.2, "path": "vxlan", "probed": True, "name": "n2",
           "subnets": ["10.244.2.0/24"], "endpoint": "192.0.2.2:8285"}
    facts.node.answer, facts.rows = {}, [row]
    denied = PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(peers, "_answers", Mock(side_effect=denied))
    assert [*peers.loss.look(facts)] == [skipped(
        "20% of the last 32 probes of n2 (10.244.2.0/24, 192.0.2.2:8285) were lost, and this"
        " process cannot measure again: Operation not permitted")]
    monkeypatch.setattr(peers, "_answers", lambda facts, row: [True, False])
    assert [one.result for one in peers.loss.look(facts)] == [Result.WARNING, Result.OK]


DEBIAN = """version = 2
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
"""
K3S = """version = 3
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["/var/lib/rancher/k3s/data/cni"]
conf_dir = "/var/lib/rancher/k3s/agent/etc/cni/net.d"
"""
K3S_DIRECTORIES = ("/var/lib/rancher/k3s/agent/etc/cni/net.d", "/var/lib/rancher/k3s/data/cni")
DEFAULT = ("/etc/cni/net.d", "/opt/cni/bin")


@pytest.mark.parametrize(("configs", "found"), [
    ([], DEFAULT),
    ([""], DEFAULT),
    (["not TOML"], DEFAULT),
    ([DEBIAN], ("/etc/cni/net.d", "/usr/lib/cni")),
    ([K3S], K3S_DIRECTORIES),
    (['imports = ["conf.d/*.toml"]'], K3S_DIRECTORIES),
])
def test_the_directories_of_the_container_runtime(
    tmp_path: Path, configs: list[str], found: tuple[str, str]
) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "k3s.toml").write_text(K3S)
    paths = [tmp_path / f"{i}.toml" for i in range(len(configs))]
    for path, text in zip(paths, configs, strict=True):
        path.write_text(text)
    assert [*kubernetes.directories(paths)] == [tuple(map(Path, found))]


def test_the_directories_of_several_container_runtimes(tmp_path: Path) -> None:
    for name, text in (("debian", DEBIAN), ("k3s", K3S), ("other", DEBIAN)):
        (tmp_path / name).write_text(text)
    found = kubernetes.directories(tmp_path / name for name in ("debian", "k3s", "other"))
    assert found == {(Path("/etc/cni/net.d"), Path("/usr/lib/cni")): tmp_path / "debian",
                     tuple(map(Path, K3S_DIRECTORIES)): tmp_path / "k3s"}


SYSTEM, OWN = ("containerd",), ("containerd", "-c", "/k3s/config.toml")
K0S = ("/usr/bin/containerd", "--config=/k0s.toml")
NAMED = ("containerd", "--config", "/none/config.toml")


@pytest.mark.parametrize(("kubelet", "lines", "found"), [
    ("kubelet", [SYSTEM, OWN], ["/none/config.toml", "/k3s/config.toml"]),
    ("k3s-server", [SYSTEM, OWN], ["/k3s/config.toml"]),
    ("k3s-agent", [NAMED, OWN], ["/k3s/config.toml"]),
    ("k0s", [K0S, SYSTEM], ["/k0s.toml"]),
    ("k3s-agent", [SYSTEM], ["/none/config.toml"]),  # k3s agent --docker, or an endpoint
    ("kubelet", [K0S], ["/k0s.toml"]),
    ("rke2", [], []),
])
def test_the_configurations_of_the_containerds_that_run(
    monkeypatch: pytest.MonkeyPatch, kubelet: str, lines: list[tuple[str, ...]], found: list[str]
) -> None:
    """k3s, rke2 and k0s do not use the containerd of the distribution, which may run too."""
    running = [(pid, line) for pid, line in enumerate(lines, 1)]
    monkeypatch.setattr(kubernetes, "named", lambda *names: (
        [(pid, "containerd") for pid, _ in running] if "containerd" in names else
        [(9, kubelet)] if kubelet in names else []))
    monkeypatch.setattr(kubernetes, "command_line", dict(running).__getitem__)
    monkeypatch.setattr(kubernetes, "RUNTIME_CONFIG", Path("/none/config.toml"))
    assert kubernetes.runtime_configs() == [*map(Path, found)]


@pytest.mark.parametrize("kubelet", ["kubelet", "k3s-server"])  # k3s may use the distribution's
def test_the_containerd_of_docker_serves_no_kubelet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kubelet: str
) -> None:
    lines = {1: ("containerd",)}
    for pid, name in enumerate(("cri", "io.containerd.grpc.v1.cri"), 2):
        (tmp_path / name).write_text(f'disabled_plugins = ["{name}"]')
        lines[pid] = ("containerd", "--config", str(tmp_path / name))
    monkeypatch.setattr(kubernetes, "named", lambda *names: (
        [(pid, "containerd") for pid in lines] if "containerd" in names else
        [(9, kubelet)] if kubelet in names else []))
    monkeypatch.setattr(kubernetes, "command_line", lines.__getitem__)
    monkeypatch.setattr(kubernetes, "RUNTIME_CONFIG", Path("/none/config.toml"))
    assert kubernetes.runtime_configs() == [Path("/none/config.toml")]


def test_the_runtime_of_the_kubelet_is_not_known(
    facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """udptun is installed for one of two. It can be the right one, so nothing is failed."""
    configs = []
    for name in ("one", "other"):
        for folder in ("net.d", "bin"):
            (tmp_path / name / folder).mkdir(parents=True)
        configs.append(tmp_path / name / "config.toml")
        configs[-1].write_text(f'[plugins.x.cni]\nbin_dir = "{tmp_path / name / "bin"}"\n'
                               f'conf_dir = "{tmp_path / name / "net.d"}"\n')
    monkeypatch.setattr(kubernetes, "kubelet_is_here", lambda: True)
    monkeypatch.setattr(kubernetes, "runtime_configs", lambda: configs)
    for plugin in ("udptun", "bridge", "host-local", "loopback"):
        (tmp_path / "other" / "bin" / plugin).touch()
    (tmp_path / "other" / "net.d" / "10-udptun.conflist").write_text('{"type": "udptun"}')
    wrong, fine = kubernetes.cni.look(facts)
    assert (wrong.result, fine.result) == (Result.WARNING, Result.OK)
    assert wrong.text == (
        f"if the kubelet uses the containerd of {configs[0]}: {tmp_path}/one/net.d has no"
        " configuration: no pod can be attached")
    assert wrong.remedy.startswith("if it does, run: udptun cni install --bin-dir")


REFUSED = "kernel refuses TUNSETOFFLOAD USO: EINVAL"


@pytest.mark.parametrize(("release", "off", "found"), [
    ("6.1.0-28-amd64", {"tun-uso": REFUSED, "udp-merge": "needs tun-uso"},
     [ok("off: tun-uso, udp-merge. Linux 6.1.0-28-amd64 does not have tun-uso; Linux 6.2 does")]),
    ("6.2.0", {"tun-uso": REFUSED, "udp-merge": "needs tun-uso"},
     [warning("off, so throughput is lower: tun-uso, udp-merge", REFUSED,
              "a newer kernel may have this offload")]),
    ("5.10.0", {"tun-gso": "refused", "tun-uso": "needs tun-gso", "udp-gso": "asked",
                "tcp-merge": "needs tun-gso", "udp-merge": "needs tun-uso"},
     [warning("off, so throughput is lower: tun-gso, tun-uso, tcp-merge, udp-merge", "refused",
              "a newer kernel may have this offload")]),
    ("6.18.0", {"tun-uso": "asked", "udp-merge": "needs tun-uso"}, []),
    ("6.1.0", {}, [ok("in use: batch")]),
])
def test_an_offload_that_this_kernel_cannot_have_is_not_a_problem(
    facts: Facts, monkeypatch: pytest.MonkeyPatch, release: str, off: dict[str, str],
    found: list[Finding],
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    facts.forwarder.answer = {"capabilities": {"in_use": ["batch"], "off": off}}
    assert [*devices.offloads.look(facts)] == found


def test_an_unknown_check_is_a_usage_error() -> None:
    done = CliRunner().invoke(cli, ["doctor", "--check", "nonsense"])
    assert done.exit_code == 2
    assert "node-daemon" in done.output  # the names that exist


def test_the_output_of_a_pipe_has_one_line_for_each_finding(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, [
        "--socket", str(tmp_path / "none.sock"), "doctor", "--check", "node-daemon", "--check",
        "kernel", "--state-dir", str(tmp_path)])
    assert done.exit_code in (0, 1)
    assert len(done.output.splitlines()) == done.exit_code + 1


def test_nothing_is_claimed_of_a_host_without_udptun(facts: Facts) -> None:
    """A check that has nothing to look at is skipped, not ok."""
    facts.processes = []  # without those of other tests
    facts.gather()
    found = {one.check.name: one.finding for one in runner.run(facts, CHECKS)}
    for name in ("forwarder", "open-files", "device-names", "rp-filter", "mtu"):
        assert found[name].result == Result.SKIPPED, name
    assert "it is not known whether" in found["forwarder"].text
    assert found["open-files"].text == "neither the daemon nor the forwarder runs"


def test_the_shell_completes_the_names_of_checks() -> None:
    def names(typed: str) -> list[str]:
        found = ShellComplete(cli, {}, "udptun", "_UDPTUN_COMPLETE").get_completions(
            ["doctor", "--check"], typed)
        return [one.value for one in found]

    assert names("") == [check.name for check in CHECKS]
    assert names("mt") == ["mtu"]


def test_what_is_dropped_now_is_not_called_nothing(facts: Facts) -> None:
    def sample(at: float, packets: int) -> Sample:
        return Sample(at, [{"reason": "no_route", "direction": "encap", "packets": packets}], [])

    facts.first, facts.last = sample(1.0, 3), sample(3.0, 8)
    rises, total = load.drops.look(facts)
    assert rises.result == Result.WARNING
    assert total.text == "dropped within 2.0 s: 5; since the start: 8"


def test_a_peer_of_routes_by_hand_may_have_no_route_back(
    facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_echo", lambda address: "")
    monkeypatch.setattr(Facts, "is_root", True)
    row = {"endpoint": "192.0.2.2:8285", "path": "udp", "probed": False}
    layer, remedy = peers._of_host(facts, row, parse_address("address", "192.0.2.2"))
    assert "or has no route to this host" in layer
    assert "udptun route list" in remedy


def test_nodes_behind_one_address_are_duplicates_only_with_the_same_port(facts: Facts) -> None:
    def lease(key: str, port: int) -> Lease:
        return Lease(key, Subnets(ip_network("10.244.1.0/24")), Attributes(
            IPv4Address("192.0.2.1"), None, "", embed(None, Advert(port, 1450))))

    def found(*leases: Lease) -> list[str]:
        facts.__dict__["known"] = SimpleNamespace(lease=None, leases=leases)
        return [one.text for one in underlay.duplicate_peers.look(facts)]

    assert found(lease("a", 8285), lease("b", 8286)) == []
    assert found(lease("a", 8285), lease("b", 8285)) == [
        "a, b publish the same address 192.0.2.1 port 8285"]
