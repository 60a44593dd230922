"""What the documents quote from the code is what the code has: words, intervals, signatures.

Each test reads the code's own value and looks for it on the page.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tests.e2e import programs
from tests.scripts import script
from tests.test_docs import slug
from udptun import ForwarderConfig, Route
from udptun.cli import cli
from udptun.cli.ping import _directions
from udptun.control import protocol, server
from udptun.doctor.check import Check
from udptun.doctor.checks import CHECKS
from udptun.doctor.checks.devices import OLDEST
from udptun.forwarder import forwarder
from udptun.leases.advert import FEATURES
from udptun.leases.etcd import client
from udptun.net.udp import RCVBUF
from udptun.node import daemon
from udptun.probe import prober, state
from udptun.probe.sizes import RETRY_SECONDS

pytestmark = pytest.mark.unprivileged

ROOT = Path(__file__).resolve().parents[2]
installer = script("installer")


def page(name: str) -> str:
    """Return the text of a page, without line breaks."""
    return " ".join((ROOT / name).read_text().split())


def section(name: str, anchor: str) -> str:
    """Return the text below a heading, up to the next heading of the same or a higher level."""
    lines = iter((ROOT / "docs" / name).read_text().splitlines())
    for line in lines:
        level, _, title = line.partition(" ")
        if set(level) == {"#"} and anchor == slug(title):
            break
    body = []
    for line in lines:
        if re.match(rf"#{{1,{len(level)}}} ", line):
            break
        body.append(line)
    return "\n".join(body).strip()


@pytest.mark.parametrize("from_peer", [True, False])
def test_the_directions_that_ping_shows_are_those_of_the_troubleshooting_page(
    from_peer: bool
) -> None:
    found = {"answered": 0, "method": "probe", "directions": {
        "from_peer": from_peer, "to_peer": False, "heard_seconds": 1.0, "peer_heard_seconds": None}}
    printed = list(_directions(found, "n2"))
    (fails,) = [line for line in printed if "do not arrive" in line or "nothing arrives" in line]
    assert f"`{re.split('; ', fails)[0]}`" in page("docs/troubleshoot.md")


@pytest.mark.parametrize(("name", "words", "values"), [
    ("control", r"the pair has traffic \| after (\d+) s", [state.ACTIVE_SECONDS]),
    ("control", r"the pair is idle \| after (\d+) s, or after N/(\d+) s",
     [state.IDLE_SECONDS, prober.IDLE_PER_SECOND]),
    ("control", r"has no answer yet \| after ([\d.]+) s", [state.SUSPECT_SECONDS]),
    ("control", r"at most (\d+) probes a second to idle .*? at most (\d+) a second to peers with",
     [prober.IDLE_PER_SECOND, prober.URGENT_PER_SECOND]),
    ("control", r"every N/(\d+) s, but not more often than every (\d+) s",
     [prober.STANDBY_PER_SECOND, state.IDLE_SECONDS]),
    ("control", r"the interval is N/(\d+) s, also at least (\d+) s",
     [prober.IDLE_PER_SECOND, state.IDLE_SECONDS]),
    ("control", r"how many of the last (\d+) probes were not answered in time",
     [state.LOSS_WINDOW]),
    ("control", r"has (\d+) seconds to send its first request, (\d+) seconds to send a body, and "
                r"(\d+) seconds to read",
     [server.REQUEST_SECONDS, server.REQUEST_SECONDS, server.ANSWER_SECONDS]),
    ("control", r"has a `hello` and the last (\d+) events", [protocol.RECENT_EVENTS]),
    ("node", r"probed about every (\d+) seconds, or every N/(\d+) seconds",
     [state.IDLE_SECONDS, prober.IDLE_PER_SECOND]),
    ("node", r"is probed every N/(\d+) seconds while VXLAN", [prober.STANDBY_PER_SECOND]),
    ("datapath", r"tested for at most (\d+) peers a second", [prober.HINTS_PER_SECOND]),
])
def test_an_interval_or_a_limit(name: str, words: str, values: list[float]) -> None:
    (found,) = re.findall(words, page(f"docs/{name}.md"))
    shown = [found] if isinstance(found, str) else found
    assert [float(one) for one in shown] == values


@pytest.mark.parametrize("name", ["docs/control.md", "docs/datapath.md"])
def test_the_interval_between_two_tries_of_larger_sizes(name: str) -> None:
    found = re.findall(r"(?:tries )?larger sizes (?:are tried|again) every (\d+) s", page(name))
    assert [float(seconds) for seconds in found] == [RETRY_SECONDS]


def test_the_signature_of_a_route() -> None:
    signature = ", ".join(
        name if one.default is one.empty else f"{name}={one.default}"
        for name, one in inspect.signature(Route).parameters.items())
    assert f"`Route({signature})`" in page("docs/python.md")


def test_the_optional_members_of_a_route() -> None:
    optional = [one.name for one in dataclasses.fields(Route)
                if one.default is not dataclasses.MISSING]
    *first, last = [f"`{name}`" for name in optional]
    (found,) = re.findall(r"use the requests below\. (.*?) are optional", page("docs/control.md"))
    assert set(re.findall(r"`\w+`", found)) == {*first, last}
    fields = section("control.md", "routes")
    assert [name for name in optional if f"`{name}`" not in fields] == []


def test_the_options_on_which_a_take_over_depends() -> None:
    options = {f"--{name}" for name in ForwarderConfig("192.0.2.1").agreed_options()}
    shown = " ".join(CliRunner().invoke(cli, ["forward", "--help"]).output.split())
    (words,) = re.findall(r"Take over from the running forwarder .*? start as usual", shown)
    assert set(re.findall(r"--[a-z]+", words)) == options
    for name in ("docs/operations.md", "docs/takeover.md"):
        (words,) = re.findall(r"((?:`--[a-z]+`(?:, | and )?)+)(?: must be the same|\. Otherwise)",
                              page(name))
        assert set(re.findall(r"--[a-z]+", words)) == options, name


@pytest.mark.parametrize("check", CHECKS, ids=[one.name for one in CHECKS])
def test_a_check_of_the_doctor_links_to_more_than_a_sentence(check: Check) -> None:
    name, _, anchor = check.page.partition("#")
    text = section(name, anchor) if anchor else (ROOT / "docs" / name).read_text()
    assert len(text) > 200, check.page


def test_the_node_daemons_socket_has_the_documented_requests() -> None:
    text = page("docs/node.md")
    for request in (f"GET {protocol.NODE}", f"POST {protocol.HAND_OVER}", f"GET {protocol.EVENTS}"):
        assert f"`{request}`" in text


def test_the_lines_of_a_good_start() -> None:
    shown = section("operations.md", "logs-and-events")
    up = r"udptun0 is up: mtu \d+, \d+ routes, offloads \w+"
    assert re.search(f"INFO {forwarder.__name__}: {up}", shown)
    assert '"%s is up: mtu %d, %s, offloads %s"' in inspect.getsource(forwarder)
    assert re.search(rf"INFO {daemon.__name__}: ready: [\d./]+, \d+ leases, peers: ", shown)
    assert '"ready: %s"' in inspect.getsource(daemon)


def test_the_oldest_kernel() -> None:
    version = ".".join(map(str, OLDEST))
    for name in ("docs/operations.md", "docs/index.md"):
        assert f"Linux {version} or newer" in page(name)


def test_the_supported_versions_of_kubernetes_and_etcd() -> None:
    chart = yaml.safe_load((ROOT / "deploy" / "helm" / "udptun" / "Chart.yaml").read_text())
    oldest = re.fullmatch(r">=(\d+\.\d+)\.0-0", chart["kubeVersion"])
    assert oldest
    tested = programs.KUBERNETES.rpartition(".")[0]
    assert f"Kubernetes {oldest[1]} or newer. `make e2e` tests with {tested}" in \
        page("docs/kubernetes.md")
    (etcd,) = re.findall(r"Needs etcd ([\d.]+) or newer", " ".join((client.__doc__ or "").split()))
    assert f"needs etcd {etcd} or newer, or [Kubernetes {oldest[1]}]" in page("docs/node.md")


def test_the_directories_below_opt_are_those_of_an_installation() -> None:
    """``VERSION``: of the bundle. ``clone``: that of deploy/README.md."""
    for path in [ROOT / "README.md", *sorted((ROOT / "deploy").rglob("*.md")),
                 *sorted((ROOT / "docs").glob("*.md"))]:
        found = set(re.findall(rf"{installer.BASE}/(\w+)", path.read_text()))
        assert found <= {"VERSION", "clone"}, path


def test_the_exit_code_of_an_interrupt() -> None:
    """Commands that exit with 130 after Ctrl-C, except those of which this is the usual end."""
    commands = {path.parent.name if path.stem == "__init__" else path.stem
                for path in (ROOT / "udptun" / "cli").rglob("*.py")
                if "sys.exit(130)" in path.read_text()}
    (row,) = re.findall(r"^\| 130 \|.*$", (ROOT / "docs" / "operations.md").read_text(), re.M)
    assert {name.split()[0] for name in re.findall(r"`([\w -]+)`", row)} == {
        {"dropped": "drops"}.get(name, name) for name in commands}


def test_the_limits_of_a_turn() -> None:
    code = (ROOT / "src_ext" / "path" / "encap.pxd").read_text()
    of = {name: int(value) for name, value in re.findall(r"^    (\w+) = (\d+)\b", code, re.M)}
    assert (f"{of['TURN_BYTES'] >> 10} KiB, or {of['TURN_FRAMES']} frames "
            f"({of['LONG_TURN_FRAMES']} frames if they go to more than {of['FEW_PEERS']} peers)"
            ) in page("docs/datapath.md")


def test_each_feature_of_a_node_is_explained() -> None:
    found = re.findall(r"[Tt]he feature `(\w+)` means", page("docs/flannel.md"))
    assert sorted(found) == sorted(FEATURES)


def test_by_how_much_a_take_over_misses_its_goal() -> None:
    text = section("performance.md", "take-over-and-kill")
    gaps = [[float(value) for value in re.findall(r"([\d.]+) ms", row)]
            for row in re.findall(r"^\| 15 take-overs.*$", text, re.M)]
    more, more_under_tcp = (f"{gap - control:.1f} ms" for _, gap, _, control in gaps)
    assert f"It was {more} longer, and {more_under_tcp} longer under bulk TCP" in \
        " ".join(text.split())


def test_the_size_of_the_receive_buffer() -> None:
    assert f"{RCVBUF >> 20} MiB" in section("operations.md", "the-receive-buffer")
