"""``udptun trace``: what the kernel does with a packet to one address, and then the forwarder.

Owns the combination of the two answers. The kernel routes a packet first: only packets that it
gives to the forwarder's TUN have a path by UDP. Threading: main thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..errors import FieldError, NoForwarder
from .options import client, connection, echo_json, output

if TYPE_CHECKING:
    from ..net.kernel_path import KernelPath

UNKNOWN = {"verdict": None, "reason": None, "route": None, "peer": None, "mtu": None}


@click.command()
@click.argument("address")
@output
@connection
@click.pass_context
def trace(ctx: click.Context, address: str, output: str) -> None:
    """Show what the kernel and the forwarder do with a packet from this host to ADDRESS.

    The kernel's route decides first: by UDP through the forwarder, by VXLAN, or by another device.
    """
    from ..model import parse_address
    from ..net.kernel_path import kernel_path

    try:
        target = parse_address("address", address)
    except FieldError as exc:
        raise click.BadParameter(str(exc), param_hint="ADDRESS") from exc
    kernel = kernel_path(target)
    tun = ""
    found: dict[str, Any] = {"address": str(target), **UNKNOWN}
    try:
        connected = client(ctx)
        found = connected.trace(str(target))
        tun = connected.status(peers=False)["device"]["name"]
    except NoForwarder:
        if kernel.vxlan is None:  # a node with only VXLAN has no forwarder
            raise
    found |= {"path": _path(kernel, tun), "kernel": _kernel_json(kernel)}
    if output == "json":
        echo_json(found)
        return
    for name, value in _lines(found, kernel, tun):
        click.echo(f"{name + ':':<9}{'-' if value is None else value}")


def _path(kernel: KernelPath, tun: str) -> str:
    """Return the kind of path that the packet takes: udp, vxlan, local, none or other."""
    if kernel.error:
        return "none"
    if kernel.local:
        return "local"
    if kernel.vxlan is not None:
        return "vxlan"
    return "udp" if kernel.device == tun else "other"


def _kernel_json(kernel: KernelPath) -> dict[str, Any]:
    vxlan = kernel.vxlan
    return {
        "error": kernel.error or None,
        "device": kernel.device or None,
        "gateway": _text(kernel.gateway),
        "source": _text(kernel.source),
        "mtu": kernel.mtu or None,
        "vxlan": None if vxlan is None else {
            "vni": vxlan.vni, "mac": vxlan.mac, "remote": _text(vxlan.remote)},
    }


def _lines(found: dict[str, Any], kernel: KernelPath, tun: str) -> list[tuple[str, object]]:
    path = found["path"]
    lines: list[tuple[str, object]] = [
        ("address", found["address"]), ("kernel", _route(kernel)), ("path", _PATHS[path])]
    if path == "vxlan":
        assert kernel.vxlan is not None
        lines += [("peer", _vxlan_peer(kernel)), ("mtu", kernel.mtu)]
    elif path == "udp":
        lines += _forwarder_lines(found)
    elif path == "other" and found["route"]:
        lines.append(("note", f"the forwarder has a route, but the kernel does not use {tun}"))
    elif path == "none" and found["verdict"]:
        lines.append(("note", f"from {tun}, the forwarder would {_verdict(found)}"))
    return lines


_PATHS = {
    "udp": "UDP, through the forwarder", "vxlan": "VXLAN, by the kernel",
    "local": "an address of this host", "none": "none: the kernel sends nothing",
    "other": "another device: neither the forwarder nor VXLAN",
}


def _route(kernel: KernelPath) -> str:
    if kernel.error:
        return kernel.error
    return kernel.device + (f" via {kernel.gateway}" if kernel.gateway is not None else "")


def _vxlan_peer(kernel: KernelPath) -> str:
    assert kernel.vxlan is not None
    if kernel.vxlan.mac is None:
        return f"unknown: {kernel.device} has no neighbour entry for this next hop"
    if kernel.vxlan.remote is None:
        return f"unknown: {kernel.device} has no FDB entry for {kernel.vxlan.mac}"
    return f"{kernel.vxlan.remote} (VNI {kernel.vxlan.vni}, MAC {kernel.vxlan.mac})"


def _forwarder_lines(found: dict[str, Any]) -> list[tuple[str, object]]:
    route = found["route"]
    if isinstance(route, dict):
        route = f"{route['dst']} via {route['via']} port {route['port']}" + (
            f" mtu {route['mtu']}" if route["mtu"] else ""
        )
    return [("verdict", _verdict(found)), ("route", route), ("peer", found["peer"]),
            ("mtu", found["mtu"])]


def _verdict(found: dict[str, Any]) -> str:
    reason = f" ({found['reason']})" if found["reason"] else ""
    return f"{found['verdict']}{reason}"


def _text(value: object) -> str | None:
    return None if value is None else str(value)
