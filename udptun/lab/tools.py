"""The programs a lab is made with, and the Debian packages that carry them.

Owns: the list. Refuses to know: how they are used, and how they get installed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable

PACKAGES = {
    "ip": "iproute2",
    "ping": "iputils-ping",
    "iperf3": "iperf3",
    "nft": "nftables",
    "ethtool": "ethtool",
    "sysctl": "procps",
    "tcpdump": "tcpdump",
    "traceroute": "traceroute",
}
# What making hosts and measuring between them takes; the tests use the rest as well.
LAB_TOOLS = ("ip", "ping", "iperf3", "sysctl")

# Tools of administrators live in the sbin folders, which a user's PATH may leave out.
SEARCH_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


def missing_tools(wanted: Iterable[str] = LAB_TOOLS) -> list[tuple[str, str]]:
    """The (tool, Debian package) pairs of what is wanted and not on this machine."""
    return [
        (tool, PACKAGES[tool])
        for tool in wanted
        if shutil.which(tool) is None and shutil.which(tool, path=SEARCH_PATH) is None
    ]


def install_command(missing: Iterable[tuple[str, str]]) -> str:
    return "apt-get install -y " + " ".join(sorted({package for _, package in missing}))
