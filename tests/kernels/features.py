"""What the running kernel offers udptun: ``python -m tests.kernels.features FILE``, as root.

Tries each feature. First one process opens devices and sockets and loads programs, as a forwarder
does. Then two forwarders with the express path carry packets, which counters count. Only ``ecn`` is
read from the kernel's version, as the node does. Writes FILE, a JSON object: for each name of
FEATURES "yes", or why not. Runs in the virtual machine, but works on any host.
"""

import json
import sys
import time
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from udptun import _core
from udptun.device.offload import MEANINGS, Capabilities, OffloadRequest
from udptun.device.steering import attach_steering
from udptun.device.tun import Tun
from udptun.forwarder.config import ForwarderConfig
from udptun.forwarder.express import Express
from udptun.lab import Host, Lab, LabError, Unavailable, pair, ping, wait_for
from udptun.lab.pair import Pair
from udptun.lab.tunnels import vxlan
from udptun.model import Endpoint
from udptun.net.udp import keeps_marks, kernel_release, open_udp
from udptun.privileges import lift_memory_limit

YES = "yes"
OFFLOADS = ("tun-gso", "tun-uso", "udp-gso", "udp-gro", "udp-merge")
FEATURES = {
    **{name: MEANINGS[name] for name in OFFLOADS},
    "flow steering": "several workers: each flow stays on one queue of the TUN",
    "express programs": "the kernel accepts the programs of the express path",
    "express send": "the program at the TUN sends packets",
    "express receive": "the program at the underlay receives packets",
    "vxlan": "VXLAN: the path to flannel's nodes, and the fall-back",
    "ecn": "UDP_GRO keeps datagrams with different marks apart; the lease has `ecn`",
}


def main(target: Path) -> int:
    began = time.monotonic()
    known: dict[str, str] = {}

    def tell(found: dict[str, str]) -> None:
        """Save what is known so far: a slow machine may end before the last trial."""
        known.update(found)
        target.write_text(json.dumps(known))
        print(f"{time.monotonic() - began:5.1f} s  {found}", flush=True)

    release = kernel_release()
    tell({"ecn": YES if keeps_marks(release) else f"UDP_GRO of Linux {release} joins them"})
    with Lab() as lab:
        a, b = lab.host("a"), lab.host("b")
        lab.link(a, b)
        with a.inside():
            tell(_accepted(a))
        tell({"vxlan": _vxlan(a, b)})
    with Lab() as lab:
        tunnel = pair(lab, start=False)
        for side, other in zip(tunnel.sides, tunnel.sides[::-1], strict=True):
            side.options["routes"] = [f"{route} express" for route in side.routes_to(other)]
            side.start(extra=("--accelerate", "auto"))
        tell(_express(tunnel))
    return 0


def _accepted(host: Host) -> dict[str, str]:
    """What the kernel accepts from a process in the present namespace."""
    lift_memory_limit()
    request = OffloadRequest.parse("auto")
    udp = open_udp(Endpoint(ip_address(str(host.v4)), 8285), request, False)
    tun = Tun.open("tun0", 2, request)
    capabilities = Capabilities.combine(request, [tun, udp])
    found = {name: YES if name in capabilities.in_use else capabilities.off[name]
             for name in OFFLOADS}
    found["flow steering"] = attach_steering(tun.fds[0]) or YES
    config = ForwarderConfig(listen=(udp.endpoint,), accelerate="auto")
    core = cast(_core.Core, SimpleNamespace(expect_unfinished=lambda: None))
    express = Express(config, tun.name, core)
    found["express programs"] = express.off or YES
    express.release()
    tun.close()
    udp.close()
    return found


def _vxlan(a: Host, b: Host) -> str:
    try:
        _, far = vxlan(a, b)
    except Unavailable as error:
        return str(error)
    return YES if ping(a, far).received else "no ping is answered"


def _express(tunnel: Pair) -> dict[str, str]:
    def state() -> dict[str, Any]:
        accelerate: dict[str, Any] = tunnel.a.forwarder.status()["accelerate"]
        return accelerate

    try:
        wait_for(lambda: state()["active"] and state()["receives"], "the express path")
    except LabError as error:
        return dict.fromkeys(("express send", "express receive"), state()["reason"] or str(error))
    ping(tunnel.a.pod, tunnel.b.pod_v4)
    packets = state()["packets"]
    return {name: YES if packets[counter] else "no packet passed"
            for name, counter in (("express send", "sent"), ("express receive", "received"))}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
