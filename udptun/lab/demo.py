"""The demonstration: two hosts, a pod behind each, a tunnel between them, and what it does.

Owns: the story and its wording. Refuses to know: how hosts are made and how a tunnel works.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from .hosts import Host, Lab, LabError, Unavailable
from .measure import Ping, Throughput, iperf3, ping
from .tools import install_command, missing_tools
from .tunnels import PORT, Forwarder, Node, node, vxlan

_PINGS = 20


class Voice:
    """Lines to a person; colour only where it helps: on a terminal, and unless NO_COLOR is set."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._live = out.isatty()
        self._colour = self._live and not os.environ.get("NO_COLOR")

    def paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def say(self, text: str = "") -> None:
        print(text, file=self._out, flush=True)

    def title(self, text: str) -> None:
        self.say(self.paint("1", text))

    def step(self, what: str, result: str, good: bool = True) -> None:
        line = f"  {what:<28} {self.paint('32' if good else '31', result)}"
        self.say(f"\r{line}\x1b[K" if self._live else line)

    def progress(self, what: str, text: str) -> None:
        """A passing remark, overwritten by the step's result; nothing where that is impossible."""
        if self._live:
            print(f"\r  {what:<28} {text}\x1b[K", end="", file=self._out, flush=True)


def run(seconds: int = 4, out: TextIO | None = None) -> int:
    """Show it; the exit code: 0 when no ping was lost and TCP went through the tunnel."""
    return perform("udptun demo", lambda lab, voice: _show(lab, voice, seconds), out)


def perform(
    command: str, story: Callable[[Lab, Voice], bool], out: TextIO | None = None,
    obstacle: str | None = None,
) -> int:
    """Tell a story in a lab of its own, and say what was removed; the exit code.

    obstacle  what is in the way of this story, beyond what is in the way of every one
    """
    voice = Voice(out or sys.stdout)
    complaint = _what_is_in_the_way() or obstacle
    if complaint:
        print(f"{command} needs {complaint}", file=sys.stderr)
        return 1
    lab, removed = Lab(), "nothing: nothing was made"
    try:
        with lab:
            try:
                good = story(lab, voice)
            finally:
                removed = lab.close()
    except KeyboardInterrupt:
        voice.say(f"\ninterrupted; removed {removed}")
        return 130
    except LabError as e:
        voice.say()
        print(f"{voice.paint('31', 'the demo failed')}: {e}", file=sys.stderr)
        voice.say(f"removed {removed}")
        return 1
    voice.say(f"\nremoved {removed}")
    return 0 if good else 1


def _what_is_in_the_way() -> str | None:
    if os.geteuid() != 0:
        return "root: it makes hosts as network namespaces (try sudo)"
    if missing := missing_tools():
        names = ", ".join(tool for tool, _ in missing)
        return f"{names}: {install_command(missing)}"
    if not Path("/dev/net/tun").exists():
        return "/dev/net/tun: modprobe tun, or give this container the device"
    return None


def _show(lab: Lab, voice: Voice, seconds: int) -> bool:
    voice.title("udptun demo: two hosts, a pod behind each, one tunnel between them")
    a, b = lab.host("a"), lab.host("b")
    lab.link(a, b)
    at_a, at_b = node(1), node(2)
    pods = a.pod(str(at_a.subnet)), b.pod(str(at_b.subnet))
    voice.say(voice.paint("36", _picture(a, b, at_a, at_b)))
    voice.step("hosts", "4 network namespaces, joined by veths of MTU 1500")
    _start(a, at_a, f"{at_b.subnet} via {b.v4}", voice)
    _start(b, at_b, f"{at_a.subnet} via {a.v4}", voice)

    voice.say()
    far_pod = at_b.subnet[2]
    pings = [
        _ping(voice, "ping host a -> host b", a, at_b.v4),
        _ping(voice, "ping pod a -> pod b", pods[0], far_pod),
    ]
    tunnel = _tcp(voice, "TCP over udptun", (b, a), at_b.v4, seconds)
    kernel: Throughput | None = None
    kernel_ping: Ping | None = None
    try:
        _, over_vxlan = vxlan(a, b)
    except Unavailable as e:
        voice.step("TCP over kernel VXLAN", f"not measured: {e}")
    else:
        kernel_ping = _ping(voice, "ping over kernel VXLAN", a, over_vxlan)
        kernel = _tcp(voice, "TCP over kernel VXLAN", (b, a), over_vxlan, seconds)

    voice.say()
    voice.title(f"  {'':<16}{'loss':>8}{'round trip':>14}{'TCP, one stream':>20}")
    voice.say(_row("udptun", pings[0], tunnel))
    if kernel and kernel_ping:
        voice.say(_row("kernel VXLAN", kernel_ping, kernel))
        ratio = tunnel.bits_per_second / kernel.bits_per_second
        voice.say(f"\n  udptun runs at {voice.paint('1', f'{ratio:.2f} x')} kernel VXLAN here")
    return all(p.received == p.sent for p in pings)


def _picture(a: Host, b: Host, at_a: Node, at_b: Node) -> str:
    width = 27
    rows = (
        ("host a", f"UDP {PORT}", "host b"),
        (f"{a.v4}", "=" * 13, f"{b.v4}"),
        (f"TUN {at_a.v4}", "IP packets", f"TUN {at_b.v4}"),
    )
    lines = [
        f"  |{left:^{width}}|{middle:^15}|{right:^{width}}|" for left, middle, right in rows
    ]
    edge = f"  +{'-' * width}+{'':15}+{'-' * width}+"
    down = f"   {'|':^{width}} {'':15} {'|':^{width}}"
    pods = f"   {f'pod {at_a.subnet[2]}':^{width}} {'':15} {f'pod {at_b.subnet[2]}':^{width}}"
    return "\n".join(["", edge, *lines, edge, down.rstrip(), pods.rstrip(), ""])


def _start(host: Host, at: Node, route: str, voice: Voice) -> None:
    forwarder = Forwarder.start(host, addresses=[at.v4], routes=[route])
    voice.step(f"forwarder on host {host.name}", f"pid {forwarder.process.pid}, route {route}")


def _ping(voice: Voice, what: str, host: Host, address: object) -> Ping:
    voice.progress(what, "...")
    result = ping(host, address, count=_PINGS)
    text = f"{result.received} of {result.sent} came back"
    if result.rtt_avg is not None:
        text += f", {result.rtt_avg:.2f} ms on average"
    voice.step(what, text, good=result.received == result.sent)
    return result


def _tcp(
    voice: Voice, what: str, hosts: tuple[Host, Host], address: object, seconds: int
) -> Throughput:
    def tick(second: int) -> None:
        voice.progress(what, f"{second} of {seconds} s")

    tick(0)
    result = iperf3(*hosts, address, seconds=seconds, tick=tick)
    voice.step(what, _rate(result))
    return result


def _rate(throughput: Throughput) -> str:
    return f"{throughput.bits_per_second / 1e9:.2f} Gbit/s"


def _row(name: str, pings: Ping, throughput: Throughput) -> str:
    rtt = "-" if pings.rtt_avg is None else f"{pings.rtt_avg:.2f} ms"
    return f"  {name:<16}{pings.loss_percent:>6.0f} %{rtt:>14}{_rate(throughput):>20}"
