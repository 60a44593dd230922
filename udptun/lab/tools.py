"""The programs that a lab needs, and the Debian packages that contain them.

Owns: the list. Does not depend on how they are used, and how they are installed. Any thread.
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
# Enough to create hosts and measure between them. The tests need the others too.
LAB_TOOLS = ("ip", "ping", "iperf3", "sysctl")

# Some tools are in the sbin directories, which a user's PATH may leave out.
SEARCH_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


def missing_tools(wanted: Iterable[str] = LAB_TOOLS) -> list[tuple[str, str]]:
    """Return the wanted tools that this machine lacks, as (tool, Debian package) pairs."""
    return [
        (tool, PACKAGES[tool])
        for tool in wanted
        if shutil.which(tool) is None and shutil.which(tool, path=SEARCH_PATH) is None
    ]


def install_command(missing: Iterable[tuple[str, str]]) -> str:
    return "apt-get install -y " + " ".join(sorted({package for _, package in missing}))
