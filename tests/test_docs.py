"""The documents against the code: links, paths, make targets, commands, options and names.

What a page says of its own files, of the command line and of the Makefile must exist.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.control import fakes
from udptun.cli import cli
from udptun.control.metrics import CounterCollector
from udptun.device.offload import FEATURES
from udptun.drops import DROP_REASONS
from udptun.forwarder.config import SOURCE_CHECKS

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
# "udptun" where a shell would look for a command: first in a line, in a second column, after a path
# or after && and |
COMMAND = re.compile(r"(?:(?:^|[&|(;]) *|  +|bin/|ExecStart=\S*/)udptun +(?=[a-z-])", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z0-9-]*|-[a-zA-Z]{1,2})(?![\w-])")


def prose(text: str) -> str:
    return FENCE.sub("", text)


def blocks(text: str) -> list[str]:
    """Code blocks, each command on one line."""
    return [re.sub(r"\\ *(\n|  )", "  ", block) for _, block in FENCE.findall(text)]


def spans(text: str) -> list[str]:
    return SPAN.findall(prose(text))


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
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
    """A word in code that begins with one of our folders."""
    paths = [word for span in spans(page.read_text()) for word in span.split()
             if word.startswith(tuple(f"{room}/" for room in ROOMS))]
    assert [path for path in paths if not list(ROOT.glob(path))] == []


# make


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z][a-z/_-]*):(?!=)", text, re.MULTILINE))


def explained_by_make() -> set[str]:
    """What ``make`` alone lists."""
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z][a-z/_-]*):.*## ", text, re.MULTILINE))


def asked_of_make(text: str) -> Iterator[str]:
    for block in blocks(text):
        yield from re.findall(r"(?:^|&& |[A-Z]=\S+ )make +([a-z][\w/-]*)", block, re.MULTILINE)
    yield from (m[1] for span in spans(text) if (m := re.match(r"make ([a-z][\w/-]*)", span)))


@every_page
def test_make_targets_exist(page: Path) -> None:
    assert set(asked_of_make(page.read_text())) <= make_targets()


def test_contributors_are_told_of_every_target() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    have = {m[1] for m in re.finditer(r"^\| `make ([\w/-]+)` \|", page, re.MULTILINE)}
    assert have == explained_by_make() - {"help"}


# The command line


def command_lines(text: str) -> Iterator[str]:
    """What follows each "udptun" that is a command, up to the next one or the line's end."""
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
    """What of a command line does not exist: commands and options, not their values."""
    command: click.Command = cli
    commands = [command]
    context = click.Context(cli)
    if re.fullmatch(r"[a-z]+( \| [a-z]+)+ *", line):  # one of several, as in "route | status"
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
        option for option in OPTION.findall(line)
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
    """`--option ...` in a sentence is one of ours, or of a program that its page names."""
    foreign = {"--device"}  # docker's
    every = options_of(cli)
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        every |= options_of(command, *getattr(command, "commands", {}).values())
    named = {m[1] for span in spans(page.read_text()) if (m := re.match(r"(--[a-z-]+)", span))}
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
def test_the_check_of_commands_can_fail(text: str, wrong: list[str]) -> None:
    assert [mistake for line in command_lines(text) for mistake in mistakes(line)] == wrong


# What must be mentioned


@pytest.mark.parametrize("name", FEATURES)
def test_every_offload_is_explained(name: str) -> None:
    assert f"\n| `{name}` |" in (ROOT / "docs" / "datapath.md").read_text()


@pytest.mark.parametrize("name", SOURCE_CHECKS)
def test_every_source_check_is_explained(name: str) -> None:
    assert f"\n| `{name}`" in (ROOT / "docs" / "datapath.md").read_text()


@pytest.mark.parametrize("name", [reason.name for reason in DROP_REASONS])
def test_operators_read_what_to_do_about_every_drop(name: str) -> None:
    assert re.search(rf"^\|.*`{name}`.* \|", (ROOT / "docs" / "operations.md").read_text(),
                     re.MULTILINE)


def test_metrics_that_are_named_exist() -> None:
    have = set()
    for family in CounterCollector(fakes.FakeForwarder()).collect():
        have |= {family.name, *(sample.name for sample in family.samples)}
    for page in PAGES:
        said = {span for span in spans(page.read_text()) if re.fullmatch(r"udptun_[a-z_]+", span)}
        assert said <= have, page


# The compiled core's reading order


def test_the_reading_order_names_every_source() -> None:
    page = (ROOT / "src_ext" / "README.md").read_text()
    said = {span for span in spans(page) if re.fullmatch(r"[\w/]+\.(pxd|pxi|pyx|h)", span)}
    core = ROOT / "src_ext"
    have = {str(path.relative_to(core)) for suffix in ("pxd", "pxi", "pyx", "h")
            for path in core.rglob(f"*.{suffix}") if path.name != "__init__.pxd"}
    assert said == have


def test_functions_named_in_the_reading_order_exist() -> None:
    """`file.pxd`, `function`: and the `function` is in that file."""
    page = (ROOT / "src_ext" / "README.md").read_text()
    pairs = re.findall(r"`([\w/]+\.pxd)`, `(\w+)`", page)
    assert pairs
    for file, function in pairs:
        text = (ROOT / "src_ext" / file).read_text()
        assert re.search(rf"^cdef inline .*\b{function}\(", text, re.MULTILINE), (file, function)


# deploy/


def test_the_unit_starts_what_exists() -> None:
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
    """All of them, those that are commented out too."""
    text = ENV_FILE.read_text()
    values = dict(re.findall(rf"^#?({ENV_PREFIX}\w+)=(.*)$", text, re.MULTILINE))
    assert set(values) <= environment_names()
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    forward = cli.get_command(click.Context(cli), "forward")
    assert forward is not None
    with click.Context(cli, info_name="udptun", auto_envvar_prefix="UDPTUN") as parent:
        context = forward.make_context("forward", [], parent=parent)
    for param in forward.params:
        source = context.get_parameter_source(param.name or "")
        set_here = ENV_PREFIX + (param.name or "").upper() in values
        assert (source is click.core.ParameterSource.ENVIRONMENT) == set_here
