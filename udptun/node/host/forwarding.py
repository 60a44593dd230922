"""Keep this host forwarding packets between pods and the overlay's devices.

Owns: which sysctls udptun sets, and their values. If ``--iptables-forward-rules`` is on, udptun
sets ``net.ipv4.ip_forward``, as CNI's bridge plugin does, and ``net.ipv4.conf.DEVICE.forwarding``
of its own devices. It does not set ``net.ipv6.conf.all.forwarding``: with the value 1 the kernel
ignores router advertisements, and the host may lose its default route. The files in /proc are
read and written directly. Any thread.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from ...text import os_reason

ROOT = Path("/proc/sys/net")
FORWARD4, FORWARD6 = "ipv4/ip_forward", "ipv6/conf/all/forwarding"


def keep_forwarding(
    versions: Collection[int], devices: Iterable[str]
) -> tuple[list[str], dict[str, str]]:
    """Turn on the forwarding settings that udptun owns (see above). Return a sentence for each
    repair, and by sysctl a sentence for each setting that is still off.

    versions  the IP versions of the overlay
    devices   the overlay's devices; some may not exist
    """
    repairs: list[str] = []
    off: dict[str, str] = {}
    if 4 in versions:
        settings = {FORWARD4: "pods on this host reach no other node over IPv4"} | {
            f"ipv4/conf/{device}/forwarding": f"packets that arrive on {device} do not reach pods"
            for device in devices}
        for name, effect in settings.items():
            if value_of(name) != "0":
                continue
            try:
                (ROOT / name).write_text("1")
                repairs.append(f"{sysctl(name)} is repaired: it was 0")
            except OSError as exc:
                off[sysctl(name)] = \
                    f"{sysctl(name)} is 0: {effect} (setting it: {os_reason(exc)})"
    if 6 in versions and value_of(FORWARD6) == "0":
        off[sysctl(FORWARD6)] = \
            f"{sysctl(FORWARD6)} is 0: pods on this host reach no other node over IPv6"
    return repairs, off


def value_of(name: str) -> str:
    """Return the value; "" if the host does not have the setting."""
    try:
        return (ROOT / name).read_text().strip()
    except OSError:
        return ""


def sysctl(name: str) -> str:
    """Return the name that sysctl(8) uses. The name of a device can contain a dot."""
    return "net." + name.translate(str.maketrans("/.", "./"))
