"""``udptun demo``: two hosts, a pod behind each host, and a tunnel between the hosts.

The demo sends pings and TCP through the tunnel.

Owns: the steps and their text. Does not depend on how hosts are created or how a tunnel works.
Main thread only, like the whole lab.
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


class Screen:
    """Prints lines. Uses colour only if the output is a terminal and NO_COLOR is not set."""

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
        """Print the progress of a step. The step's result overwrites the progress.

        Print nothing if the output is not a terminal.
        """
        if self._live:
            print(f"\r  {what:<28} {text}\x1b[K", end="", file=self._out, flush=True)


def run(seconds: int = 4, out: TextIO | None = None) -> int:
    """Run the demo. Return the exit code, which is 0 if no ping was lost and TCP worked."""
    return perform("udptun demo", lambda lab, screen: _show(lab, screen, seconds), out)


def perform(
    command: str, show: Callable[[Lab, Screen], bool], out: TextIO | None = None,
    missing: str | None = None,
) -> int:
    """Run a demo in a new lab, print what was removed, and return the exit code.

    show     the demo; returns whether everything worked
    missing  what this demo needs and this machine does not have, or None. ``perform`` itself checks
             what all demos need
    """
    screen = Screen(out or sys.stdout)
    missing = _missing() or missing
    if missing:
        print(f"{command} needs {missing}", file=sys.stderr)
        return 1
    lab, removed = Lab(), "nothing, because nothing was created"
    try:
        with lab:
            try:
                good = show(lab, screen)
            finally:
                removed = lab.close()
    except KeyboardInterrupt:
        screen.say(f"\ninterrupted; removed {removed}")
        return 130
    except LabError as e:
        screen.say()
        print(f"{screen.paint('31', 'the demo failed')}: {e}", file=sys.stderr)
        screen.say(f"removed {removed}")
        return 1
    screen.say(f"\nremoved {removed}")
    return 0 if good else 1


def _missing() -> str | None:
    if os.geteuid() != 0:
        return "root: it creates hosts as network namespaces (try sudo)"
    if missing := missing_tools():
        names = ", ".join(tool for tool, _ in missing)
        return f"{names}: {install_command(missing)}"
    if not Path("/dev/net/tun").exists():
        return "/dev/net/tun: modprobe tun, or give this container the device"
    return None


def _show(lab: Lab, screen: Screen, seconds: int) -> bool:
    screen.title("udptun demo: two hosts, a pod behind each, one tunnel between them")
    a, b = lab.host("a"), lab.host("b")
    lab.link(a, b)
    node_a, node_b = node(1), node(2)
    pods = a.pod(str(node_a.subnet)), b.pod(str(node_b.subnet))
    screen.say(screen.paint("36", _picture(a, b, node_a, node_b)))
    screen.step("hosts", "4 network namespaces, joined by veths of MTU 1500")
    _start(a, node_a, f"{node_b.subnet} via {b.v4}", screen)
    _start(b, node_b, f"{node_a.subnet} via {a.v4}", screen)

    screen.say()
    far_pod = node_b.subnet[2]
    pings = [
        _ping(screen, "ping host a -> host b", a, node_b.v4),
        _ping(screen, "ping pod a -> pod b", pods[0], far_pod),
    ]
    tunnel = _tcp(screen, "TCP over udptun", (b, a), node_b.v4, seconds)
    kernel: Throughput | None = None
    kernel_ping: Ping | None = None
    try:
        _, over_vxlan = vxlan(a, b)
    except Unavailable as e:
        screen.step("TCP over kernel VXLAN", f"not measured: {e}")
    else:
        kernel_ping = _ping(screen, "ping over kernel VXLAN", a, over_vxlan)
        kernel = _tcp(screen, "TCP over kernel VXLAN", (b, a), over_vxlan, seconds)

    screen.say()
    screen.title(f"  {'':<16}{'loss':>8}{'round trip':>14}{'TCP, one stream':>20}")
    screen.say(_row("udptun", pings[0], tunnel))
    if kernel and kernel_ping:
        screen.say(_row("kernel VXLAN", kernel_ping, kernel))
        ratio = tunnel.bits_per_second / kernel.bits_per_second
        factor = screen.paint("1", f"{ratio:.2f} x")
        screen.say(f"\n  throughput of udptun: {factor} that of kernel VXLAN on this machine")
    return all(p.received == p.sent for p in pings)


def _picture(a: Host, b: Host, node_a: Node, node_b: Node) -> str:
    width = 27
    rows = (
        ("host a", f"UDP {PORT}", "host b"),
        (f"{a.v4}", "=" * 13, f"{b.v4}"),
        (f"TUN {node_a.v4}", "IP packets", f"TUN {node_b.v4}"),
    )
    lines = [
        f"  |{left:^{width}}|{middle:^15}|{right:^{width}}|" for left, middle, right in rows
    ]
    edge = f"  +{'-' * width}+{'':15}+{'-' * width}+"
    down = f"   {'|':^{width}} {'':15} {'|':^{width}}"
    pods = f"   {f'pod {node_a.subnet[2]}':^{width}} {'':15} {f'pod {node_b.subnet[2]}':^{width}}"
    return "\n".join(["", edge, *lines, edge, down.rstrip(), pods.rstrip(), ""])


def _start(host: Host, at: Node, route: str, screen: Screen) -> None:
    forwarder = Forwarder.start(host, addresses=[at.v4], routes=[route])
    screen.step(f"forwarder on host {host.name}", f"pid {forwarder.process.pid}, route {route}")


def _ping(screen: Screen, what: str, host: Host, address: object) -> Ping:
    screen.progress(what, "...")
    result = ping(host, address, count=_PINGS)
    text = f"{result.received} of {result.sent} came back"
    if result.rtt_avg is not None:
        text += f", {result.rtt_avg:.2f} ms on average"
    screen.step(what, text, good=result.received == result.sent)
    return result


def _tcp(
    screen: Screen, what: str, hosts: tuple[Host, Host], address: object, seconds: int
) -> Throughput:
    def tick(second: int) -> None:
        screen.progress(what, f"{second} of {seconds} s")

    tick(0)
    result = iperf3(*hosts, address, seconds=seconds, tick=tick)
    screen.step(what, _rate(result))
    return result


def _rate(throughput: Throughput) -> str:
    return f"{throughput.bits_per_second / 1e9:.2f} Gbit/s"


def _row(name: str, pings: Ping, throughput: Throughput) -> str:
    rtt = "-" if pings.rtt_avg is None else f"{pings.rtt_avg:.2f} ms"
    return f"  {name:<16}{pings.loss_percent:>6.0f} %{rtt:>14}{_rate(throughput):>20}"
