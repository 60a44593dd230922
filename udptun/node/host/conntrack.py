"""Checks whether the kernel's table of connections (conntrack) has room for new flows.

If the table is full, the kernel drops the first packet of each new flow: of pods, and of the tunnel
itself. Only the kernel's log reports this. Owns: reading the two numbers, and the threshold. All
network namespaces have the same limit, but each has its own number of entries. Reading takes
microseconds. Any thread.
"""

from __future__ import annotations

from pathlib import Path

COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
LIMIT = Path("/proc/sys/net/netfilter/nf_conntrack_max")
# Without the numbers, which change all the time.
PROBLEM = ("the kernel's conntrack table is nearly full: if it is full, the first packet of each "
           "new flow is dropped")
REMEDY = "raise net.netfilter.nf_conntrack_max"
NEARLY_FULL = 0.95  # the number changes all the time, and a full table briefly has fewer entries


def shortage(count_file: Path = COUNT, limit_file: Path = LIMIT) -> str:
    """Return the reason why new flows are dropped, or will be soon; "" if the table has room.

    A kernel without connection tracking has no such files; then nothing is dropped.
    """
    try:
        count, limit = int(count_file.read_text()), int(limit_file.read_text())
    except (OSError, ValueError):
        return ""
    if not limit or count < NEARLY_FULL * limit:  # limit 0: no limit
        return ""
    return (f"the kernel's conntrack table has {count} of {limit} entries: if it is full, the "
            "first packet of each new flow is dropped")
