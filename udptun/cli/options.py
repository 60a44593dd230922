"""Options that several commands share, parsing of values, and printing of results.

Does not depend on any single command. Imports nothing that a client command does not need.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from ..control.protocol import DEFAULT_SOCKET, NODE_SOCKET
from ..errors import FieldError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ..control.client import ControlClient
    from ..instance import Instance
    from ..model import Endpoint

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # not generic before click 8.2

__all__ = ["INSTANCE", "LISTEN", "METRICS", "Parsed", "client", "connection", "control_path",
           "echo_fitting", "echo_json", "echo_table", "instance", "instance_of",
           "named_socket", "no_headers", "node_client", "output", "remember", "socket",
           "terminal_width", "wrap"]

# Names of files of the node daemon. They equal those in node.process.launch and leases.cache (a
# test checks this). These modules take long to import.
FORWARD_FILE, CACHE_FILE = "forward.json", "leases.json"
LEAST_TEXT = 24  # smallest width, in characters, to which a column of text is cut
NODE_SECONDS = 5.0  # the longest time to wait for the answer of the node daemon

Decorated = TypeVar("Decorated", bound="Callable[..., Any]")

# Sources of a value, the highest precedence first. All other sources rank lower.
SOURCES = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)


class Parsed(_ParamType):
    """A parameter type whose values are checked by a parser that raises FieldError."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except FieldError as exc:
            part = "" if exc.value == value else f", not {exc.value!r}"
            self.fail(f"{value!r} is not valid: expected {exc.expected}{part}", param, ctx)


def _listen(text: str) -> Endpoint:
    from ..model import Endpoint

    return Endpoint.parse(text, "--listen")


LISTEN = Parsed("address[:port]", _listen)


def _metrics(text: str) -> Endpoint:
    from ..control.listen import parse_listen

    return parse_listen("--metrics", text)


METRICS = Parsed("[address:]port", _metrics)


def _instance(text: str) -> Instance:
    from ..instance import Instance

    return Instance(text)


INSTANCE = Parsed("name", _instance)

output = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True,
    help="Output format.",
)
no_headers = click.option("--no-headers", is_flag=True, help="Omit the header line of the table.")


# The options --socket and --instance select the control socket and the instance. Both are accepted
# before and after the command's name. The context of the ``udptun`` group stores the values. If an
# option has several values, the one from the source with the highest precedence counts.


def _rank(source: ParameterSource | None) -> int:
    return SOURCES.index(source) if source in SOURCES else len(SOURCES)


def remember(ctx: click.Context, param: click.Parameter, value: object) -> object:
    """Callback of ``--socket`` and ``--instance``: return the value with the highest precedence."""
    assert param.name is not None
    root, source = ctx.find_root(), ctx.get_parameter_source(param.name)
    precedes = _rank(source) <= _rank(root.get_parameter_source(param.name))
    if value is not None and source is not None and precedes:
        root.params[param.name] = value
        root.set_parameter_source(param.name, source)
    return root.params.get(param.name)


def instance(command: Decorated) -> Decorated:
    """Add ``--instance`` to a command, for use after the command's name."""
    option = click.option(
        "--instance", type=INSTANCE, expose_value=False, callback=remember,
        help="Instance of udptun on this host; selects the defaults of all names.  "
             "[env var: UDPTUN_INSTANCE; default: udptun]",
    )
    return option(command)


def socket(command: Decorated) -> Decorated:
    """Add ``--socket`` to a command, for use after the command's name."""
    option = click.option(
        "--socket", metavar="PATH", expose_value=False, callback=remember,
        help="Control socket of the forwarder.  "
             "[env var: UDPTUN_SOCKET; default: that of the instance]",
    )
    return option(command)


def connection(command: Decorated) -> Decorated:
    """Add ``--socket`` and ``--instance`` to a client command, for use after its name."""
    return socket(instance(command))


def instance_of(ctx: click.Context) -> Instance:
    from ..instance import Instance

    chosen: Instance | None = ctx.find_root().params.get("instance")
    return chosen or Instance()


def named_socket(ctx: click.Context) -> Path | None:
    """Return the socket that --socket or UDPTUN_SOCKET names. None: use the instance's socket.

    An instance on the command line takes precedence over a socket in the environment.
    """
    root = ctx.find_root()
    by_instance, by_socket = (
        _rank(root.get_parameter_source(name)) for name in ("instance", "socket")
    )
    path: str | None = root.params.get("socket")
    return None if path is None or by_socket > by_instance else Path(path)


def control_path(ctx: click.Context) -> str:
    if (path := named_socket(ctx)) is not None:
        return str(path)
    if ctx.find_root().params.get("instance") is None:
        return DEFAULT_SOCKET  # avoids the import of ``instance``
    return str(instance_of(ctx).control_socket())


def client(ctx: click.Context) -> ControlClient:
    """Return a client for the chosen socket. The client is closed at the end of the command."""
    from ..control.client import ControlClient

    return ctx.with_resource(ControlClient(control_path(ctx)))


def node_client(ctx: click.Context) -> ControlClient:
    """Return a client for the node daemon's socket, which is next to the forwarder's."""
    from ..control.client import ControlClient

    return ctx.with_resource(
        ControlClient(str(Path(control_path(ctx)).with_name(NODE_SOCKET)), NODE_SECONDS))


def node_stopped(ctx: click.Context) -> str:
    """Return a sentence if a node daemon has set up the forwarder, but does not answer; else "".

    The files with the forwarder's options and with the leases stay when the daemon ends. With
    flanneld's extension there is only the file with the options.
    """
    control = Path(control_path(ctx))
    try:
        state = json.loads(control.with_name(FORWARD_FILE).read_bytes())["state"]
        if not Path(state).with_name(CACHE_FILE).exists():
            return ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"the daemon does not answer on {control.with_name(NODE_SOCKET)}. What it has set up " \
        "stays, but does not follow the leases"


def echo_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def echo_table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], hide_headers: bool = False
) -> None:
    """Print a table. Columns are as wide as their content and two blanks apart. Numbers are aligned
    to the right, and None is printed as ``-``."""
    body = list(rows)
    numeric = [
        bool(body) and all(isinstance(row[i], int | None) for row in body)
        for i in range(len(headers))
    ]
    lines = [["-" if cell is None else str(cell) for cell in row] for row in body]
    if not hide_headers:
        lines.insert(0, list(headers))
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(len(headers))]
    for line in lines:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def terminal_width() -> int | None:
    """Return the number of columns of the terminal; None: the output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def echo_fitting(
    headers: Sequence[str], rows: Iterable[Sequence[object]], omitted: Sequence[str],
    room: int | None, hide_headers: bool = False, cut_last: bool = False,
) -> None:
    """Print a table in ``room`` columns, or the complete table if ``room`` is None.

    If the table is too wide, the columns ``omitted`` are omitted one by one, the first one first.
    If ``cut_last`` is true, the last column is text: its cells are cut, to LEAST_TEXT at least.
    """
    body = [[*row[:-1], "-" if row[-1] is None else str(row[-1])] for row in rows]
    widths = [max(len("-" if cell is None else str(cell)) for cell in column)
              for column in zip(headers, *body, strict=True)]
    least = [*widths[:-1], min(widths[-1], LEAST_TEXT) if cut_last else widths[-1]]
    shown = [*range(len(headers))]
    for name in omitted if room is not None else ():
        if sum(least[i] + 2 for i in shown) - 2 <= (room or 0):
            break
        shown = [i for i in shown if headers[i] != name]
    if room is not None and cut_last and shown[-1] == len(headers) - 1:
        left = max(room - sum(widths[i] + 2 for i in shown[:-1]), LEAST_TEXT)
        for row in body:
            row[-1] = _cut(str(row[-1]), left)
    echo_table([headers[i] for i in shown], [[row[i] for i in shown] for row in body], hide_headers)


def wrap(text: str, width: int, indent: str) -> str:
    """Return a text in lines of ``width`` columns. The later lines begin with ``indent``."""
    import textwrap

    return "\n".join(textwrap.wrap(text, max(width, 2 * LEAST_TEXT), subsequent_indent=indent,
                                   break_on_hyphens=False))


def _cut(text: str, width: int) -> str:
    from ..text import cut

    return text if len(text) <= width else f"{cut(text, width - 3)}..."
