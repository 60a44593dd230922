"""Check the documents against the code: links, paths, make targets, commands, options and names.

A document may only name files, targets, commands, options and metrics that exist. The tables of
options, variables, metrics and checks are complete.
"""

import ipaddress
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import click
import pytest

from tests.control import fakes
from tests.node.node_reports import DEVICES, MEASURED, TRANSFERRED, ready, with_peers
from tests.own_netns import in_own_netns, sh
from udptun import Endpoint, Forwarder, ForwarderConfig, Route
from udptun.cli import cli
from udptun.control.metrics import CounterCollector
from udptun.device.offload import FEATURES
from udptun.drops import DROP_REASONS
from udptun.forwarder.config import SOURCE_CHECKS
from udptun.instance import Instance
from udptun.leases.base import Subnets
from udptun.node.process.launch import FORWARD_FILE
from udptun.node.status.metrics import ReportCollector
from udptun.node.status.readiness import is_ready, judge

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("bench", "deploy", "docs", "src_ext", "tests", "udptun")
PAGES = sorted(ROOT.glob("*.md")) + sorted(
    page for room in ROOMS for page in (ROOT / room).rglob("*.md") if "out" not in page.parts
)
UNIT = ROOT / "deploy" / "udptun-forwarder.service"
ENV_FILE = ROOT / "deploy" / "forwarder.env"
ENV_PREFIX = "UDPTUN_FORWARD_"

FENCE = re.compile(r"^( *)```.*?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
# "udptun" where a shell looks for a command: at the start of a line or of a second column, after a
# path, or after && and |
COMMAND = re.compile(r"(?:(?:^|[&|(;]) *|  +|bin/|ExecStart=\S*/)udptun +(?=[a-z-])", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z0-9-]*|-[a-zA-Z]{1,2})(?![\w-])")


def prose(text: str) -> str:
    return FENCE.sub("", text)


def blocks(text: str) -> list[str]:
    """Return the code blocks, with continued lines joined."""
    return [re.sub(r"\\ *(\n|  )", "  ", block) for _, block in FENCE.findall(text)]


def spans(text: str) -> list[str]:
    return SPAN.findall(prose(text))


def slug(heading: str) -> str:
    """Return the anchor that GitHub generates for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in HEADING.findall(prose(page.read_text()))}


def named(pages: list[Path]) -> list[object]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


every_page = pytest.mark.parametrize("page", named(PAGES))


# Links and paths


@every_page
def test_links_resolve(page: Path) -> None:
    wrong = []
    for link in LINK.findall(prose(page.read_text())):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


@every_page
def test_paths_of_the_repository_exist(page: Path) -> None:
    """A path is a word in a code span that begins with one of our directories."""
    paths = [word for span in spans(page.read_text()) for word in span.split()
             if word.startswith(tuple(f"{room}/" for room in ROOMS))]
    assert [path for path in paths if not list(ROOT.glob(path))] == []


# make


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z][a-z0-9/_-]*):(?!=)", text, re.MULTILINE))


def explained_by_make() -> set[str]:
    """Return the targets that ``make`` alone lists."""
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z][a-z0-9/_-]*):.*## ", text, re.MULTILINE))


def used_targets(text: str) -> Iterator[str]:
    for block in blocks(text):
        yield from re.findall(r"(?:^|&& |[A-Z]=\S+ )make +([a-z][\w/-]*)", block, re.MULTILINE)
    yield from (m[1] for span in spans(text) if (m := re.match(r"make ([a-z][\w/-]*)", span)))


@every_page
def test_make_targets_exist(page: Path) -> None:
    assert set(used_targets(page.read_text())) <= make_targets()


def test_the_install_table_names_files_where_make_puts_them() -> None:
    """Its commands run in the root of a clone."""
    section = (ROOT / "README.md").read_text().partition("\n## Install\n")[2].partition("\n## ")[0]
    rows = [row.split("|") for row in section.splitlines() if row.startswith("| ")]
    built = [word for _, made, *columns in (row[:-1] for row in rows) if "make" in made
             for command in re.findall("`([^`]+)`", "".join(columns))
             for word in command.split() if re.search(r"WHEEL\[|\.run$|\.deb$", word)]
    assert len(built) == 3
    assert [word for word in built if not re.match("'?(\\./)?dist/", word)] == []


def test_contributing_lists_every_target() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    have = {m[1] for m in re.finditer(r"^\| `make ([\w/-]+)` \|", page, re.MULTILINE)}
    assert have == explained_by_make() - {"help"}


# The command line


def command_lines(text: str) -> Iterator[str]:
    """Yield what follows each "udptun" that is a command, up to the next one or the end of line."""
    for block in blocks(text):
        for line in COMMAND.split(block)[1:]:
            yield line.partition("\n")[0].partition("#")[0]
    yield from (m[1] for span in spans(text) if (m := re.match(r"udptun +(.+)", span)))


def options_of(*commands: click.Command) -> set[str]:
    return {
        name for command in commands for param in command.params if isinstance(param, click.Option)
        for name in (*param.opts, *param.secondary_opts)
    } | {"-h", "--help"}


def mistakes(line: str) -> list[str]:
    """Return the commands and options of a command line that do not exist. Values are ignored."""
    command: click.Command = cli
    commands = [command]
    context = click.Context(cli)
    if re.fullmatch(r"[a-z]+( \| [a-z]+)+ *", line):  # alternatives, as in "route | status"
        line = line.replace(" ", "")
    for word in re.sub(r"^(--socket \S+ )+", "", line).split():
        names = word.rstrip(",").split("|")
        if not isinstance(command, click.Group) or not all(map(str.islower, names)) or (
            word.startswith("-")
        ):
            break
        children = [command.get_command(context, name) for name in names]
        if None in children:
            return [f"command {word}"]
        command = children[-1]
        commands.append(command)
    known = options_of(*commands)
    return [
        option for option in OPTION.findall(re.sub(r" \| (tshark|tcpdump) .*", "", line))
        if option not in known and not (
            re.fullmatch("-([a-z])\\1+", option) and option[:2] in known  # -vv
        )
    ]


@every_page
def test_commands_and_options_exist(page: Path) -> None:
    wrong = {line: found for line in command_lines(page.read_text()) if (found := mistakes(line))}
    assert wrong == {}


@every_page
def test_options_named_alone_exist(page: Path) -> None:
    """A code span that begins with an option names one of ours, or of a program in ``foreign``."""
    foreign = {"--device"}  # docker's
    every = options_of(cli)
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        every |= options_of(command, *getattr(command, "commands", {}).values())
    named = {m[1] for span in spans(page.read_text()) if (m := re.match(r"(--[a-z0-9_-]+)", span))}
    assert named <= every | foreign


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("```\nudptun forward --tun a \\\n  --lisen 192.0.2.1\n```\n", ["--lisen"]),
        ("```\nudptun route ad 10.0.0.0/8 via 192.0.2.2\n```\n", ["command ad"]),
        ("```\nmake build && .venv/bin/udptun status -x\n```\n", ["-x"]),
        ("```\nudptun drops --all     udptun stat\n```\n", ["command stat"]),
        ("Ask `udptun drops --why`.", ["--why"]),
        ("```\nudptun --socket /s route list --no-headers -o json  # -z\n```\n", []),
        ("A tunnel such as udptun needs `udptun forward -vv`.", []),
    ],
)
def test_the_check_of_commands_finds_mistakes(text: str, wrong: list[str]) -> None:
    assert [mistake for line in command_lines(text) for mistake in mistakes(line)] == wrong


# Names that a document must explain


@pytest.mark.parametrize("name", FEATURES)
def test_every_offload_is_explained(name: str) -> None:
    assert f"\n| `{name}` |" in (ROOT / "docs" / "datapath.md").read_text()


@pytest.mark.parametrize("name", SOURCE_CHECKS)
def test_every_source_check_is_explained(name: str) -> None:
    assert f"\n| `{name}`" in (ROOT / "docs" / "datapath.md").read_text()


@pytest.mark.parametrize("name", [reason.name for reason in DROP_REASONS])
def test_operations_page_lists_every_drop_reason(name: str) -> None:
    assert re.search(rf"^\|.*`{name}`.* \|", (ROOT / "docs" / "operations.md").read_text(),
                     re.MULTILINE)


def test_metrics_in_documents_exist() -> None:
    have = set()
    node = ReportCollector(with_peers(), 1)
    node.devices, node.measured, node.transferred = DEVICES, MEASURED, TRANSFERRED
    for collector in (CounterCollector(fakes.FakeForwarder(), 1), node):
        for family in collector.collect():
            have |= {family.name, *(sample.name for sample in family.samples)}
    for page in PAGES:
        named = {m[0] for span in spans(page.read_text())
                 if (m := re.match(r"udptun_[a-z_]+$|udptun_[a-z_]+(?= ==)", span))}
        assert named <= have, page


def test_the_example_of_readyz_is_real() -> None:
    now, report = time.time(), ready()
    source = report.source
    source.connected, source.error = False, "no response within 5 s"
    source.last_contact, source.lease_expires = time.monotonic() - 40, now + 20 * 3600
    report.started, report.unavailable = now - 3 * 3600, {"VXLAN": "the kernel has no vxlan module"}
    assert report.lease is not None
    report.lease = replace(report.lease, subnets=Subnets(IPv4Network("10.5.52.0/24")))
    report.mtu, report.peers.carried_n = 1472, {"udp": 6, "vxlan": 0}
    report.peers.unreachable = {
        "10.5.60.0-24":
        "this node has only UDP, and the peer's vxlan backend ignores nodes without VXLAN; "
        "the peer does not advertise UDP",
    }
    checks = judge(report)
    text = (ROOT / "docs" / "node.md").read_text()
    (block,) = re.findall(r"```\n(\[\+\]start.*?)```", text, re.DOTALL)
    verdict = "passed" if is_ready(checks) else "failed"
    assert block == "".join(f"{line}\n" for line in [*checks, f"readyz check {verdict}"])


def test_the_table_of_instance_names_is_complete() -> None:
    for instance in (Instance(), Instance("blue")):
        names = {
            instance.tun, *(instance.nft_table(version) for version in (4, 6)),
            *map(instance.iptables_chain, ("FORWARD", "POSTROUTING")),
            *(instance.vxlan_device(1, version) for version in (4, 6)),
            *map(str, (instance.control_socket(), instance.node_socket,
                       instance.run_dir / FORWARD_FILE,
                       instance.state_dir, instance.subnet_file)),
        }
        column = 1 if instance.is_default else 2
        assert names <= set(rows(ROOT / "docs" / "node.md", column)), instance.name


# Tables of options and variables


def rows(page: Path, column: int = 0) -> dict[str, str]:
    """Return the rows of all tables on a page, by each code span in one of their cells."""
    found = {}
    for line in page.read_text().splitlines():
        if line.startswith("| "):
            cells = re.split(r"(?<!\\) \| ?", line[2:])
            found |= dict.fromkeys(SPAN.findall("".join(cells[column : column + 1])), line)
    return found


def option_rows(page: Path) -> dict[str, str]:
    return {m[0]: row for span, row in rows(page).items() if (m := re.match(r"--?[\w-]+", span))}


def options_shown(name: str) -> dict[str, click.Option]:
    """Return the options of a command that its --help lists, by their longest name."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return {
        max(param.opts, key=len): param for param in command.params
        if isinstance(param, click.Option) and not param.hidden
    }


@pytest.mark.parametrize(("command", "document"), [("forward", "operations"), ("node", "node")])
def test_the_table_of_options_is_complete(command: str, document: str) -> None:
    documented = set(option_rows(ROOT / "docs" / f"{document}.md"))
    short = {"--verbose": "-v", "--v": "-v"}
    assert {short.get(name, name) for name in options_shown(command)} == documented - {"-vv"}


def test_the_table_of_options_has_the_defaults() -> None:
    table = option_rows(ROOT / "docs" / "operations.md")
    checked = 0
    for name, option in options_shown("forward").items():
        if option.show_default and isinstance(option.default, str):
            assert re.search(rf"\b{re.escape(option.default)}\b", table[name]), name
            checked += 1
    assert checked >= 4


def test_the_table_of_flanneld_variables_is_complete() -> None:
    group = cli.get_command(click.Context(cli), "ext")
    assert isinstance(group, click.Group)
    have = {
        name for command in group.commands.values() for param in command.params
        for name in ([param.envvar] if isinstance(param.envvar, str) else param.envvar or [])
    }
    documented = {name for name in rows(ROOT / "docs" / "flannel.md") if name.startswith("UDPTUN_")}
    assert have <= documented <= have | {"UDPTUN_SOCKET", "UDPTUN_INSTANCE"}


# The control API


def keys(value: Any, path: str = "") -> set[str]:
    """Return the paths of all keys of a JSON value; a list stands for its first entry."""
    if isinstance(value, list):
        return keys(value[0], f"{path}[]") if value else set()
    if not isinstance(value, dict) or path == ".capabilities.off":
        return set()
    return set().union(*({f"{path}.{k}"} | keys(v, f"{path}.{k}") for k, v in value.items()))


@in_own_netns
async def test_the_examples_of_answers_have_the_keys_of_a_real_forwarder() -> None:
    sh("ip addr replace 192.0.2.1/32 dev lo")
    async with Forwarder(ForwarderConfig(listen=(Endpoint.parse("192.0.2.1"),))) as forwarder:
        await forwarder.put_route(Route.make("10.244.2.0/24", "192.0.2.2", probe=True))
        probe = await forwarder.probe(Endpoint.parse("192.0.2.2"))
        assert probe.pop("error")
        status = await forwarder.status()
        await forwarder.put_route(Route.make("10.244.2.0/24", "192.0.2.2"))
        answers: list[Any] = [
            status,
            probe,
            {"drops": forwarder.drops()},
            forwarder.trace(ipaddress.ip_address("10.244.2.9")),
            json.loads(b"".join([chunk async for chunk in forwarder.route_chunks()])),
        ]
    text = (ROOT / "docs" / "control.md").read_text()
    examples = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", text,
                                                         re.MULTILINE | re.DOTALL)]
    documented = [keys(example) for example in examples]
    for answer in answers:
        assert keys(answer) in documented


def test_the_table_of_events_is_complete() -> None:
    source = "".join(path.read_text() for path in (ROOT / "udptun" / "forwarder").rglob("*.py"))
    emitted = set(re.findall(r"\.emit\(\s*f?\"([^\"]+)\"", source)) | {"hello"}
    if "route_{kind}" in emitted:
        emitted -= {"route_{kind}"}
        emitted |= {"route_added", "route_changed", "route_removed"}
    if "peer_{change}" in emitted:
        emitted -= {"peer_{change}"}
        emitted |= {"peer_reachable", "peer_unreachable", "peer_size"}
    page = (ROOT / "docs" / "control.md").read_text()
    table = page.partition("\n## Events\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    assert {name for cell in cells for name in SPAN.findall(cell)} == emitted


# The compiled core's reading order


def test_the_reading_order_names_every_source() -> None:
    page = (ROOT / "src_ext" / "README.md").read_text()
    named = {span for span in spans(page) if re.fullmatch(r"[\w/]+\.(pxd|pxi|pyx|h)", span)}
    core = ROOT / "src_ext"
    have = {str(path.relative_to(core)) for suffix in ("pxd", "pxi", "pyx", "h")
            for path in core.rglob(f"*.{suffix}") if path.name != "__init__.pxd"}
    assert named == have


def test_functions_named_in_the_reading_order_exist() -> None:
    """Text such as `file.pxd`, `function` names a function of that file."""
    page = (ROOT / "src_ext" / "README.md").read_text()
    pairs = re.findall(r"`([\w/]+\.pxd)`, `(\w+)`", page)
    assert pairs
    for file, function in pairs:
        text = (ROOT / "src_ext" / file).read_text()
        assert re.search(rf"^cdef inline .*\b{function}\(", text, re.MULTILINE), (file, function)


# deploy/


def test_the_unit_uses_existing_commands_and_variables() -> None:
    text = UNIT.read_text()
    (line,) = re.findall(r"^ExecStart=\S*/udptun (.*)$", text, re.MULTILINE)
    assert mistakes(line) == []
    variables = set(re.findall(rf"^Environment=({ENV_PREFIX}\w+)=", text, re.MULTILINE))
    assert variables <= environment_names()


def environment_names() -> set[str]:
    forward = cli.get_command(click.Context(cli), "forward")
    assert forward is not None
    return {ENV_PREFIX + (param.name or "").upper() for param in forward.params}


def test_the_example_of_options_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that are commented out are checked too."""
    text = ENV_FILE.read_text()
    values = dict(re.findall(rf"^#?({ENV_PREFIX}\w+)=(.*)$", text, re.MULTILINE))
    assert set(values) <= environment_names()
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    forward = cli.get_command(click.Context(cli), "forward")
    assert forward is not None
    with click.Context(cli, info_name="udptun", **cli.context_settings) as parent:
        context = forward.make_context("forward", [], parent=parent)
    for param in forward.params:
        source = context.get_parameter_source(param.name or "")
        set_here = ENV_PREFIX + (param.name or "").upper() in values
        assert (source is click.core.ParameterSource.ENVIRONMENT) == set_here
