"""``udptun capture``: write the packets that the forwarder handles as pcapng, or as lines of text.

Owns the options, the resolution of a peer's name, and the output. captured.py parses the records,
pcapng.py writes the file. Threading: main thread. SIGINT and SIGTERM end a capture between two
records, so a file is always complete.
"""

from __future__ import annotations

import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .._version import __version__
from ..errors import ControlError, NoForwarder
from ..files import open_new
from ..flows import flow, flow_text
from ..text import counted
from .captured import Counts, End, Packet, records
from .dropped import named, names_of
from .lazy import Failure
from .mesh import find, host_of, spelled
from .options import client, connection, terminal_width, wrap
from .pcapng import PcapngWriter

if TYPE_CHECKING:
    from .captured import Record

OVER = "the time is over"
INDENT = " " * 17  # below the direction
MEGABYTE = 1_000_000
NAMES_MAX = 4096  # endpoints whose text is kept
FILE_MODE = 0o600  # the file has the contents of packets


def _sample(ctx: click.Context, param: click.Parameter, value: str) -> int:
    text = value.removeprefix("1/")
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1_000_000:
        raise click.BadParameter(f"{value!r} is not valid: expected 1/N, N from 1 to 1000000")
    return int(text)


@click.command()
@click.option("-w", "--write", "path", metavar="FILE",
              help="Write pcapng to FILE; - is standard output.")
@click.option("--text", is_flag=True,
              help="Print a line for each packet, also if the output is not a terminal.")
@click.option("--direction", type=click.Choice(["both", "out", "in"]), default="both",
              show_default=True, help="out: from this host to a peer; in: from a peer.")
@click.option("--dropped", is_flag=True, help="Only packets that are dropped.")
@click.option("--peer", "peers", metavar="NAME|ADDRESS", multiple=True,
              help="Only packets to and from this peer; can be repeated.")
@click.option("--route", "routes", metavar="SUBNET", multiple=True,
              help="Only packets whose inner address on the peer's side is in SUBNET; can be "
              "repeated.")
@click.option("--host", "hosts", metavar="ADDRESS", multiple=True,
              help="Only packets from or to this inner address. Twice: between the two.")
@click.option("--port", "ports", type=click.IntRange(0, 65535), multiple=True,
              help="Only packets from or to this inner port. Twice: between the two.")
@click.option("--protocol", metavar="tcp|udp|icmp|N", help="Only this transport protocol.")
@click.option("-s", "--snaplen", type=click.IntRange(1, 65536), default=65536, show_default=True,
              help="Largest number of bytes of a packet that are recorded.")
@click.option("-c", "--count", type=click.IntRange(1), help="End after this number of packets.")
@click.option("--seconds", type=click.IntRange(1, 604800), help="End after this time.")
@click.option("--sample", metavar="1/N", default="1/1", callback=_sample,
              help="Record one of N packets.")
@click.option("--file-size", metavar="MB", type=click.IntRange(1),
              help="Begin a new file after MB megabytes: FILE, FILE.1, FILE.2 ...")
@click.option("--files", type=click.IntRange(1),
              help="With --file-size: keep only this number of files, the last ones.")
@connection
@click.pass_context
def capture(
    ctx: click.Context, /, path: str | None, text: bool, peers: tuple[str, ...], sample: int,
    count: int | None, seconds: int | None, protocol: str | None, file_size: int | None,
    files: int | None, **given: Any,
) -> None:
    """Record the inner packets that this host's forwarder sends and receives.

    Writes pcapng to FILE or to a pipe, or prints lines to a terminal. Comments name the peer and
    the reason of a drop. Only root and the forwarder's user may capture. Packets that VXLAN or the
    express path carries are not captured.

    \b
    udptun capture --peer n2 -w n2.pcapng
    udptun capture --dropped | tshark -r -
    """
    if path is not None and text:
        raise click.UsageError("--write and --text exclude each other")
    if file_size is not None and path in (None, "-"):
        raise click.UsageError("--file-size needs --write FILE")
    if files is not None and file_size is None:
        raise click.UsageError("--files needs --file-size")
    names = names_of(ctx)
    wanted = {name: [*value] if isinstance(value, tuple) else value
              for name, value in given.items()}
    of_peers = [endpoint for peer in peers for endpoint in _endpoints(peer, names)]
    wanted |= {"peers": of_peers, "sample": sample}
    wanted |= {name: value for name, value in (("protocol", protocol), ("seconds", seconds))
               if value is not None}
    output: Lines | File
    if path is None and (text or sys.stdout.isatty()):
        output = Lines(names)
    else:
        output = File(path or "-", names, (file_size or 0) * MEGABYTE, files)
    running, connected = _Running(), client(ctx)
    _tell_of_express_path(connected.status(peers=False))
    running.on_stop = connected.interrupt
    with running, _named_options(wanted), connected.capture(wanted) as (head, pieces):
        try:
            output.begin(head, _shown_filter())
            _copy(records(head, pieces), output, count, running)
            output.end(running)
        except NoForwarder:
            output.end(running)
            if not running.stopped:
                raise
        except BrokenPipeError:
            _forget_stdout()
    running.report(sample)


def _tell_of_express_path(status: Mapping[str, Any]) -> None:
    """Say that packets are missing in the capture if the kernel carries some."""
    state, device = status.get("accelerate", {}), status["device"]
    if state.get("active"):
        ports = sorted({one.rpartition(":")[2] for one in device["listen"]})
        filtered = " or ".join(f"udp port {port}" for port in ports)
        click.echo("packets that pass in the kernel (--accelerate auto) are not captured. To see "
                   "them within their datagrams:", err=True)
        for name in state["devices"]:
            click.echo(f"  tcpdump -ni {name} {filtered}", err=True)


def _copy(found: Iterable[list[Record]], output: Lines | File, count: int | None,
          running: _Running) -> None:
    """Write records until the capture ends or ``count`` packets are written."""
    for batch in found:
        for record in batch:
            if isinstance(record, Counts):
                running.counts(record)
            elif isinstance(record, End):
                running.reason = record.reason
                return
            else:
                output.packet(record)
                running.packet(record)
                if running.captured == count:
                    output.flush()
                    return
        output.flush()


class _Running:
    """The state of a capture in this process. In its context, signals end the capture.

    lost    packets that were not captured, because there was no space for them
    reason  why the forwarder has ended the capture
    """

    def __init__(self) -> None:
        self.begin_ns = time.time_ns()
        self.captured = self.matched = self.lost = 0
        self.stopped = False
        self.reason = ""
        self.on_stop: Callable[[], object] = lambda: None
        self._lost_before_packets = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._stop)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _stop(self, *_: object) -> None:
        self.stopped = True
        self.on_stop()

    def packet(self, packet: Packet) -> None:
        self.captured += 1
        self._lost_before_packets += packet.lost
        self.lost = max(self.lost, self._lost_before_packets)

    def counts(self, counts: Counts) -> None:
        self.matched = counts.matched
        self.lost = max(self.lost, counts.lost)

    def report(self, sample: int) -> None:
        """Print how many packets were captured. Fail if the forwarder has ended the capture."""
        parts = [f"{counted(self.captured, 'packet')} captured"]
        if sample > 1:
            parts.append(f"one of {sample} recorded")
        if self.lost:
            parts.append(f"{self.lost} not captured: they came faster than they were written")
        click.echo(", ".join(parts), err=True)
        if self.reason not in ("", OVER):
            raise Failure(f"the capture has ended: {self.reason}")


# Output


class Lines:
    """Prints one line for each packet. On a terminal, a line that is too long is continued on the
    next one, because the reason of a drop is at its end."""

    def __init__(self, names: list[dict[str, Any]]) -> None:
        self._named = _by_endpoint(names)

    def begin(self, head: dict[str, Any], filtered: str) -> None:
        pass

    def packet(self, packet: Packet) -> None:
        seconds, rest = divmod(packet.time_ns, 1_000_000_000)
        parts = [f"{flow_text(flow(packet.data[:64]))}", f"{packet.length} bytes",
                 *describe(packet, self._named)]
        line = f"{time.strftime('%H:%M:%S', time.gmtime(seconds))}.{rest // 1000:06d}  " \
            f"{packet.direction:3}  {', '.join(parts)}"
        room = terminal_width()
        sys.stdout.write((line if room is None else wrap(line, room, INDENT)) + "\n")

    def flush(self) -> None:
        sys.stdout.flush()

    def end(self, running: _Running) -> None:
        self.flush()


class File:
    """Writes pcapng to a file, or to standard output.

    most   begin a new file after this number of bytes; 0: never
    files  keep only this number of files; None: all
    """

    def __init__(
        self, path: str, names: list[dict[str, Any]], most: int, files: int | None
    ) -> None:
        self._path, self._most, self._files = path, most, files
        self._named = _by_endpoint(names)
        self._blocks: list[bytes] = []
        self._size = self._number = 0
        self._writer = PcapngWriter(self._add)
        self._fd = -1

    def begin(self, head: dict[str, Any], filtered: str) -> None:
        self._head, self._filter = head, filtered
        self._open()

    def packet(self, packet: Packet) -> None:
        self._writer.packet(
            packet.time_ns, packet.data, packet.length, outbound=packet.direction == "out",
            lost=packet.lost, comment="; ".join(describe(packet, self._named)))
        if self._most and self._size >= self._most:
            self.flush()
            os.close(self._fd)
            self._number += 1
            self._open()

    def _add(self, block: bytes) -> None:
        self._blocks.append(block)
        self._size += len(block)

    def flush(self) -> None:
        """Write the blocks at once, so that a reader of a pipe gets whole blocks."""
        left = memoryview(b"".join(self._blocks))
        self._blocks.clear()
        while left:
            left = left[os.write(self._fd, left) :]

    def end(self, running: _Running) -> None:
        self._writer.end(running.begin_ns, time.time_ns(),
                         max(running.matched, running.captured + running.lost), running.lost)
        self.flush()
        if self._path != "-":
            os.close(self._fd)

    def _open(self) -> None:
        self._size = 0
        if self._path == "-":
            self._fd = sys.stdout.fileno()
        else:
            self._fd = self._create(self._number)
            if self._files is not None and self._number >= self._files:
                Path(self._name(self._number - self._files)).unlink(missing_ok=True)
        system = platform.uname()
        self._writer.begin(
            hardware=system.machine, system=f"{system.system} {system.release}",
            application=f"udptun {__version__}", name=self._head["device"],
            description=f"inner packets of the forwarder (udptun {self._head['version']})",
            filtered=self._filter, snaplen=self._head["snaplen"])
        self.flush()

    def _create(self, number: int) -> int:
        name = self._name(number)
        try:
            return open_new(Path(name), FILE_MODE)
        except OSError as exc:
            raise Failure(f"cannot write {name}: {exc.strerror}") from exc

    def _name(self, number: int) -> str:
        return f"{self._path}.{number}" if number else self._path


def _by_endpoint(names: list[dict[str, Any]]) -> Callable[[str], str | None]:
    """Return ``named`` for these peers. It keeps its results: a search for each packet is slow."""
    return lru_cache(NAMES_MAX)(lambda endpoint: named(endpoint, names))


def describe(packet: Packet, named: Callable[[str], str | None]) -> Iterator[str]:
    """Yield what the forwarder knows of a packet, besides its bytes.

    named  returns an endpoint with the name of its peer
    """
    if packet.reason:
        yield f"dropped: {packet.reason}"
    if packet.endpoint:
        yield f"peer {named(packet.endpoint)}"
    if packet.segment:
        yield f"super-packet of {packet.packets} packets, {packet.segment} payload bytes each"
    elif packet.packets > 1:
        yield f"the first of {packet.packets} packets"
    if packet.generated:
        yield "made by the forwarder"


# Options


@contextmanager
def _named_options(wanted: dict[str, Any]) -> Iterator[None]:
    """Name the option in an error of the forwarder that names a field of the filter."""
    try:
        yield
    except ControlError as exc:
        field, _, text = str(exc).partition(": ")
        if field not in wanted:
            raise
        option = field if field == "seconds" else field.removesuffix("s")
        raise click.BadParameter(text, param_hint=f"--{option}") from exc


def _endpoints(text: str, names: list[dict[str, Any]]) -> list[str]:
    """Return the outer addresses of a peer. The forwarder checks an address or endpoint."""
    row = find(names, text)
    if row is None:
        if not any(mark in text for mark in ".:"):
            raise Failure(f"{text}: there is no peer of this name")
        return [text]
    if not row["endpoints"]:
        raise Failure(f"{text} has no path through the forwarder, so its packets are not captured")
    given = spelled(text)
    if any(given in (endpoint, host_of(endpoint)) for endpoint in row["endpoints"]):
        return [given]
    return sorted(set(map(host_of, row["endpoints"])))


def _shown_filter() -> str:
    """Return the arguments of the command, as the description of the filter."""
    words = sys.argv[1:]
    return shlex.join(words[words.index("capture") + 1 :]) if "capture" in words else ""


def _forget_stdout() -> None:
    """If standard output is closed, keep Python from reporting this when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
