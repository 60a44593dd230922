"""The programs that a lab needs, and the Debian packages that contain them.

Owns: the list of programs. Does not depend on how a program is used or installed. Any thread.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable

PACKAGES = {
    "ip": "iproute2",
    "ping": "iputils-ping",
    "iperf3": "iperf3",
    "nft": "nftables",
    "iptables": "iptables",
    "ethtool": "ethtool",
    "sysctl": "procps",
    "tcpdump": "tcpdump",
    "traceroute": "traceroute",
}
# These tools are enough to create hosts and to measure between hosts. The tests need all tools in
# PACKAGES.
LAB_TOOLS = ("ip", "ping", "iperf3", "sysctl")

# Some tools are in the sbin directories, which a user's PATH may not contain.
SEARCH_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


def missing_tools(wanted: Iterable[str] = LAB_TOOLS) -> list[tuple[str, str]]:
    """Return the missing tools of ``wanted``, as pairs (tool, Debian package)."""
    return [
        (tool, PACKAGES[tool])
        for tool in wanted
        if shutil.which(tool) is None and shutil.which(tool, path=SEARCH_PATH) is None
    ]


def install_command(missing: Iterable[tuple[str, str]]) -> str:
    return "apt-get install -y " + " ".join(sorted({package for _, package in missing}))
