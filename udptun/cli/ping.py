"""``udptun ping``: by which path a node or an address is reached, how fast, and up to which size.

A node that answers probes is probed over UDP: the forwarder sends the probes. All others get ICMP
echo requests, which take the route that packets take. This module owns the choice between the two,
the search for the largest size, and the text. Threading: main thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import click

from ..errors import ControlError, FieldError, UdptunError
from ..model import MAX_UDP_PAYLOAD
from ..net.echo import Answer, EchoPinger
from .answers import ask
from .mesh import Row, endpoint_of, find, find_behind, spelled
from .options import client, connection, echo_json, node_client, output

if TYPE_CHECKING:
    from ..control.client import ControlClient
    from ..model import IPAddress
    from ..net.kernel_path import KernelPath

ANSWER_SECONDS = 1.0
# During the search for the largest size, the wait for an answer is this number of round trips, but
# at least SEARCH_MIN_SECONDS and at most ANSWER_SECONDS.
SEARCH_ROUND_TRIPS, SEARCH_MIN_SECONDS = 5, 0.3
SEARCH_TRIES = 2  # a size fails after this number of unanswered packets
PROBE_MIN = 24  # the smallest packet
EXIT_UNREACHABLE = 1


class Pinger(Protocol):
    smallest: int

    def once(self, size: int, seconds: float) -> Answer: ...

    def directions(self) -> dict[str, Any]: ...


@click.command()
@click.argument("target", metavar="NODE|ADDRESS")
@click.option("-c", "--count", type=click.IntRange(1), default=4, show_default=True,
              help="Number of packets.")
@click.option("-i", "--interval", type=click.FloatRange(0.05), default=1.0, show_default=True,
              help="Seconds between two packets.")
@click.option("-s", "--size", type=click.IntRange(1, MAX_UDP_PAYLOAD),
              help="Bytes of a packet, with its IP header.  [default: the smallest]")
@click.option("--sweep/--no-sweep", default=True, show_default=True,
              help="Afterwards, search for the largest packet that passes.")
@click.option("--path", "wanted", type=click.Choice(["auto", "udp", "route"]), default="auto",
              show_default=True,
              help="udp: probes over UDP. route: echo requests on the route of the kernel. auto: "
                   "probes if UDP carries the packets and the node answers probes; else echo "
                   "requests.")
@output
@connection
@click.pass_context
def ping(
    ctx: click.Context, target: str, count: int, interval: float, size: int | None, sweep: bool,
    wanted: str, output: str,
) -> None:
    """Show by which path a node or an address is reached, how fast, and up to which packet size.

    NODE is the name of a peer, its subnet or its public address, as `udptun status` shows them.
    ADDRESS is an address in the overlay, for example of a pod.

    The exit code is 0 if a packet was answered, else 1.
    """
    answers = ask(node_client(ctx), client(ctx))
    rows = answers.rows
    row, address = _resolve(rows, target)
    name = target if row is None else row["name"]
    found: dict[str, Any] = {"target": target, "node": None if row is None else name}
    if _by_probe(row, address, wanted):
        assert row is not None
        assert answers.forwarder is not None  # without it, no row is ``probed``
        endpoint = endpoint_of(row, target)
        assert endpoint is not None
        found |= {"method": "probe", "path": "udp", "address": None, "endpoint": endpoint}
        pinger: Pinger = ProbePinger(client(ctx), endpoint)
        mtus = answers.forwarder["device"]["mtu"], _route_mtu(ctx, row["endpoints"][endpoint])
        full, way = min(filter(None, mtus)), f"UDP to {endpoint}"
    else:
        address = _base_address(row) if address is None else address
        from ..net.kernel_path import kernel_path

        kernel = kernel_path(address)
        path, way = _way(kernel, row)
        found |= {"method": "echo", "path": path, "address": str(address),
                  "endpoint": None if row is None else row["endpoint"]}
        if kernel.error:
            raise UdptunError(f"{address}: {kernel.error}")
        pinger, full = _echo_pinger(address), kernel.mtu
    if output != "json":
        click.echo(_title(found, way))
    _run(pinger, found, (count, interval, size or pinger.smallest), sweep and full,
         quiet=output == "json")
    if not found["answered"] and found["method"] == "echo" and row is not None:
        found["directions"]["from_peer"] = _arrives(
            row, ask(node_client(ctx), client(ctx)).rows)
    if output == "json":
        echo_json(found)
    else:
        for line in _summary(found, name):
            click.echo(line)
    sys.exit(0 if found["answered"] else EXIT_UNREACHABLE)


# What is pinged


def _resolve(rows: list[Row], target: str) -> tuple[Row | None, IPAddress | None]:
    """Return the peer, and the address if the target is an address in the overlay."""
    row = find(rows, target)
    if row is not None:
        return row, None
    from ..model import parse_address

    try:
        address = parse_address("address", spelled(target))
    except FieldError:
        names = ", ".join(row["name"] for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
        raise click.BadParameter(
            f"{target!r} is neither an address nor a known node; the nodes are: {names or 'none'}",
            param_hint="NODE|ADDRESS") from None
    return find_behind(rows, address), address


def _by_probe(row: Row | None, address: IPAddress | None, wanted: str) -> bool:
    probed = row is not None and address is None and row["probed"]
    if wanted == "udp" and not probed:
        raise click.UsageError("--path udp: only for a node that answers probes over UDP")
    return probed and (wanted == "udp" or (
        wanted == "auto" and row is not None and row["path"] == "udp"))


def _base_address(row: Row | None) -> IPAddress:
    """Return the address that flannel and udptun give to the overlay device of a node."""
    from ipaddress import ip_network

    if row is None or not row["subnets"]:
        reason = f": {row['reason']}" if row is not None and row["reason"] else ""
        raise UdptunError(f"this node has no subnet that can be reached{reason}")
    return ip_network(row["subnets"][0]).network_address


def _route_mtu(ctx: click.Context, subnets: list[str]) -> int | None:
    """Return the MTU of the route to the first subnet; None: it has none."""
    found = client(ctx).trace(subnets[0].partition("/")[0]) if subnets else {}
    route = found.get("route")
    return route["mtu"] if isinstance(route, dict) else None


def _way(kernel: KernelPath, row: Row | None) -> tuple[str, str]:
    """Return the kind of path, and words for it."""
    if kernel.local:
        return "local", "this host itself"
    if kernel.vxlan is not None:
        remote = kernel.vxlan.remote
        return "vxlan", f"VXLAN ({kernel.device}) to {remote or 'an unknown address'}"
    if kernel.kind == "tun":
        peer = f" to {row['endpoint']}" if row is not None and row["endpoint"] else ""
        return "udp", f"UDP ({kernel.device}){peer}"
    return "other", f"{kernel.device}, without encapsulation"


def _arrives(before: Row, rows: list[Row]) -> bool | None:
    """Return whether packets of the peer have arrived since; None: none did, or not known."""
    after = find(rows, before["name"])
    if after is None or not after["received"] or not before["received"]:
        return None
    return after["received"]["packets"] > before["received"]["packets"] or None


# How it is pinged


class ProbePinger:
    """Lets the forwarder probe a peer."""

    smallest = PROBE_MIN

    def __init__(self, control: ControlClient, endpoint: str) -> None:
        self._control, self._endpoint = control, endpoint
        self._last: dict[str, Any] = {}

    def once(self, size: int, seconds: float) -> Answer:
        try:
            self._last = self._control.probe(self._endpoint, size, seconds)
        except ControlError as exc:
            raise UdptunError(str(exc)) from exc
        rtt = self._last["rtt_us"]
        return Answer(None if rtt is None else rtt / 1e6, self._last.get("error", ""))

    def directions(self) -> dict[str, Any]:
        """Return the last answer's ``from_peer`` and ``to_peer``: the direction works (True), does
        not work (False), or this is not known (None)."""
        return {key: self._last.get(key) for key in (
            "from_peer", "to_peer", "heard_seconds", "peer_heard_seconds")}


def _echo_pinger(address: IPAddress) -> EchoPinger:
    try:
        return EchoPinger(address)
    except PermissionError:
        raise UdptunError("echo requests need root or CAP_NET_RAW") from None
    except OSError as exc:
        raise UdptunError(f"sending an echo request to {address}: {exc.strerror}") from exc


# The run


def _run(
    pinger: Pinger, found: dict[str, Any], plan: tuple[int, float, int], full: int, quiet: bool
) -> None:
    """Send the packets of the plan, then search for the largest size up to ``full``; 0: do not."""
    answers = []
    for number, answer in enumerate(_series(pinger, *plan), 1):
        answers.append(answer)
        if not quiet:
            click.echo(_line(number, plan[2], answer))
    times = [answer.rtt for answer in answers if answer.rtt is not None]
    found |= {
        "size": plan[2], "sent": len(answers), "answered": len(times),
        "loss": round(1 - len(times) / len(answers), 4),
        "rtt_ms": [None if answer.rtt is None else _ms(answer.rtt) for answer in answers],
        "error": next((answer.error for answer in answers[::-1] if answer.error), ""),
        "directions": {"from_peer": True, "to_peer": True} if times else pinger.directions(),
        "full_size": full or None, "largest_size": None,
    }
    if times and full:
        wait = min(max(SEARCH_ROUND_TRIPS * max(times), SEARCH_MIN_SECONDS), ANSWER_SECONDS)
        found["largest_size"] = _largest(pinger, plan[2], full, wait)


def _series(pinger: Pinger, count: int, interval: float, size: int) -> Iterator[Answer]:
    """Yield the answer to each packet. Ctrl-C ends the series; during the
    first packet, it ends the command."""
    try:
        for number in range(count):
            began = time.monotonic()
            yield pinger.once(size, ANSWER_SECONDS)
            if number < count - 1:
                time.sleep(max(began + interval - time.monotonic(), 0.0))
    except KeyboardInterrupt:
        if not number:
            raise


def _largest(pinger: Pinger, passes: int, full: int, seconds: float) -> int:
    """Return the largest size that is answered, by halving; ``passes`` is known to be answered."""
    def answered(size: int) -> bool:
        return any(pinger.once(size, seconds).rtt is not None for _ in range(SEARCH_TRIES))

    if passes >= full or answered(full):
        return max(passes, full)
    fails = full
    while fails - passes > 1:
        middle = (passes + fails) // 2
        if answered(middle):
            passes = middle
        else:
            fails = middle
    return passes


# Text


def _title(found: dict[str, Any], way: str) -> str:
    node = found["node"] or found["target"]
    if found["method"] == "probe":
        return f"{node}: probes by {way}"
    address = "" if found["address"] == node else f" to {found['address']}"
    return f"{node}: echo requests{address} by {way}"


def _line(number: int, size: int, answer: Answer) -> str:
    result = answer.error if answer.rtt is None else f"{_ms(answer.rtt):.2f} ms"
    return f"  {number}: {size} bytes, {result}"


def _summary(found: dict[str, Any], name: str) -> Iterator[str]:
    times = [ms for ms in found["rtt_ms"] if ms is not None]
    yield f"sent {found['sent']}, answered {found['answered']}, loss {found['loss']:.0%}" + (
        f", round trip {min(times):.2f} / {sum(times) / len(times):.2f} / {max(times):.2f} ms "
        "(min / mean / max)" if times else "")
    largest, full = found["largest_size"], found["full_size"]
    if largest is not None:
        yield f"largest packet: {largest} bytes" + (
            ", the MTU of this path" if largest >= full else
            f", less than the MTU of this path, {full}: larger packets are lost")
    yield from _directions(found, name)
    if not found["answered"]:
        more = f"`udptun status {name}`" if found["node"] else \
            f"`udptun trace {found['address']}`"
        yield f"next: {more} shows its path; `udptun doctor` looks for the cause"


def _directions(found: dict[str, Any], name: str) -> Iterator[str]:
    if found["answered"]:
        yield "directions: both work"
        return
    if found["method"] == "echo":
        if found["directions"]["from_peer"]:
            yield f"from {name}: packets arrived in the meantime"
            yield f"to {name}: unknown"
        else:
            yield "directions: unknown, because echo requests do not show which one fails"
        return
    shown = found["directions"]
    if not shown["from_peer"]:
        yield f"from {name}: nothing arrives; {_last(shown['heard_seconds'])}"
        yield f"to {name}: unknown, because {name} could not report what it receives"
        return
    yield f"from {name}: packets arrive, {_last(shown['heard_seconds'])}"
    if shown["to_peer"] is None:
        yield f"to {name}: unknown, because {name} has not reported yet what it receives"
    elif shown["to_peer"]:
        yield f"to {name}: packets arrive; {name} has received a probe " \
              f"{_seconds(shown['peer_heard_seconds'])} ago"
    else:
        heard = shown["peer_heard_seconds"]
        yield f"to {name}: packets do not arrive; {name} " + (
            "has not reported any probe" if heard is None
            else f"has received no probe for {_seconds(heard)}")


def _last(seconds: float | None) -> str:
    return "there was no packet yet" if seconds is None else \
        f"the last one {_seconds(seconds)} ago"


def _seconds(seconds: float) -> str:
    from ..spans import span

    return span(seconds)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
