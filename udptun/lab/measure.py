"""Runs ping and iperf3 between hosts, and returns their results as numbers.

Owns: the command lines and the parsing of the output. Does not depend on the connection between the
two hosts. Main thread only, like the whole lab.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from .hosts import Host, LabError, Process

_IPERF_PORT = 5201


@dataclass(frozen=True)
class Ping:
    """The result of ping.

    rtt_*   round-trip times in milliseconds; None if there was no reply
    errors  the lines of ping's output that report ICMP errors or errors of ping itself
    """

    sent: int
    received: int
    rtt_min: float | None = None
    rtt_avg: float | None = None
    rtt_max: float | None = None
    errors: tuple[str, ...] = ()

    @property
    def loss_percent(self) -> float:
        return 100.0 * (self.sent - self.received) / self.sent


def ping(
    host: Host, address: object, *, count: int = 3, interval: float = 0.05, wait: float = 2.0,
    size: int = 56, df: bool | None = None, source: object = None, ttl: int | None = None,
) -> Ping:
    """Ping ``address`` from ``host``.

    size  payload bytes, without the ICMP header
    df    True: set Don't Fragment. False: do not set it. None: the kernel decides
    """
    argv = ["ping", "-n", "-c", str(count), "-i", str(interval), "-W", str(wait), "-s", str(size)]
    if df is not None:
        argv += ["-M", "do" if df else "dont"]
    if source is not None:
        argv += ["-I", str(source)]
    if ttl is not None:
        argv += ["-t", str(ttl)]
    output = host.run([*argv, str(address)], check=False, seconds=30 + count * (interval + wait))
    text = output.stdout
    counts = re.search(r"(\d+) packets transmitted, (\d+) received", text)
    if counts is None:
        raise LabError(f"ping {address} on {host.name}: {(output.stderr or text).strip()}")
    times = re.search(r"= ([\d.]+)/([\d.]+)/([\d.]+)/", text)
    low, mean, high = map(float, times.groups()) if times else (None, None, None)
    errors = [line for line in text.splitlines() if line.startswith(("From ", "ping: "))]
    errors += [line for line in output.stderr.splitlines() if line]
    return Ping(int(counts[1]), int(counts[2]), low, mean, high, tuple(errors))


@dataclass(frozen=True)
class Throughput:
    """The result of iperf3: the throughput at the receivers.

    retransmits     the number of TCP retransmissions; None for UDP
    lost_percent    the percentage of iperf3's UDP packets that were lost; None for TCP
    received_bytes  for TCP: (bytes received by the server, bytes received by the client)
    """

    bits_per_second: float
    retransmits: int | None = None
    lost_percent: float | None = None
    received_bytes: tuple[int, int] = (0, 0)


def iperf3(
    server: Host, client: Host, address: object, *, seconds: float = 3, streams: int = 1,
    reverse: bool = False, both: bool = False, udp_bits_per_second: float | None = None,
    length: int | None = None, congestion: str | None = None, port: int = _IPERF_PORT,
    tick: Callable[[int], None] = lambda second: None,
) -> Throughput:
    """Send traffic from ``client`` to ``address`` on ``server``.

    reverse     True: send from the server to the client instead
    both        True: send TCP in both directions at the same time, ``streams`` streams in each
                direction
    congestion  TCP's congestion control algorithm; None: the machine's default
    tick        called after each second with the number of seconds since the start
    """
    listening = server.start(
        ["iperf3", "-s", "-1", "--forceflush", "-B", str(address), "-p", str(port)]
    )
    try:
        listening.wait_for_output("Server listening")
        argv = ["iperf3", "-J", "-c", str(address), "-p", str(port), "-t", f"{seconds:g}"]
        argv += ["-P", str(streams), "--connect-timeout", "5000"]
        if reverse:
            argv.append("-R")
        if both:
            argv.append("--bidir")
        if udp_bits_per_second is not None:
            argv += ["-u", "-b", f"{udp_bits_per_second:.0f}"]
        if congestion is not None:
            argv += ["-C", congestion]
        if length is not None:
            argv += ["-l", str(length)]
        sending = client.start(argv)
        try:
            _watch(sending, seconds, tick)
        finally:
            sending.kill()
    finally:
        listening.kill()
    try:
        report = json.loads(sending.text())
    except ValueError:
        raise LabError(f"iperf3 {address}: {sending.text().strip()}") from None
    if "error" in report:
        raise LabError(f"iperf3 {address}: {report['error']}")
    end = report["end"]
    if udp_bits_per_second is not None:
        total = end["sum"]
        received = total["bits_per_second"] * (1 - total["lost_percent"] / 100)
        return Throughput(received, lost_percent=total["lost_percent"])
    sums = [end["sum_received"], end["sum_received_bidir_reverse"]] if both else [
        end["sum_received"]
    ]
    there = [part["bytes"] for part in sums]
    return Throughput(
        sum(part["bits_per_second"] for part in sums),
        retransmits=end["sum_sent"].get("retransmits"),
        received_bytes=(0, there[0]) if reverse else (there[0], sum(there[1:])),
    )


def _watch(process: Process, seconds: float, tick: Callable[[int], None]) -> None:
    for second in range(1, int(seconds) + 31):
        try:
            process.wait(1.0)
            return
        except LabError:
            if second < seconds:
                tick(second)
    raise LabError(f"still running {seconds + 30:g} s after its start: {process}")
