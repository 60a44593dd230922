"""The machine: its description and its CPU time.

Owns: reading /proc and /sys, and the facts about the machine in a report. Any thread. CPU time is
the CPU time of the whole system: the kernel does most of a tunnel's work in softirqs, and softirq
time is not part of the CPU time of any process.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .tools import ROOT

_HERTZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class CpuTime:
    """CPU seconds of all cores together since boot. The hypervisor took the ``stolen`` seconds."""

    busy: float
    idle: float
    stolen: float

    @property
    def total(self) -> float:
        return self.busy + self.idle + self.stolen

    def share(self, part: float) -> float:
        """Return this part of the time; 0 for less time than the clock shows."""
        return round(part / self.total, 4) if self.total else 0.0

    def __sub__(self, before: CpuTime) -> CpuTime:
        return CpuTime(
            self.busy - before.busy, self.idle - before.idle, self.stolen - before.stolen
        )


def parse_stat(text: str, hertz: int = _HERTZ) -> CpuTime:
    """Parse the first line of /proc/stat; proc(5) gives the order of the numbers."""
    ticks = [int(word) for word in text.split("\n", 1)[0].split()[1:9]]
    user, nice, system, idle, iowait, irq, softirq, stolen = ticks
    return CpuTime(
        (user + nice + system + irq + softirq) / hertz, (idle + iowait) / hertz, stolen / hertz
    )


def cpu_time() -> CpuTime:
    return parse_stat(Path("/proc/stat").read_text())


def facts() -> dict[str, str]:
    """Return the facts about the machine that a reader needs to compare figures."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    flags = re.search(r"^flags\s*:(.*)", cpuinfo, re.MULTILINE)
    found = {
        "processor": f"{os.cpu_count()} x {model[1] if model else platform.machine()}",
        "virtual": "yes" if flags and " hypervisor" in flags[1] else "unknown",
        "memory": f"{int(memory[1]) / 2**20:.1f} GiB" if memory else "unknown",
        "kernel": platform.release(),
        "distribution": _distribution(),
        "clock": _text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "TCP": _text("/proc/sys/net/ipv4/tcp_congestion_control"),
        "Python": platform.python_version(),
        "iperf3": _first_line("iperf3", "--version"),
        "revision": revision(),
    }
    return {key: value for key, value in found.items() if value}


def revision() -> str:
    """Return the commit of the repository, and a note if tracked files differ from the commit."""
    described = _first_line("git", "-C", str(ROOT), "log", "-1", "--format=%h of %cs")
    changed = _first_line("git", "-C", str(ROOT), "status", "--porcelain", "-uno")
    return described + (", with uncommitted changes" if described and changed else "")


def offloads(lines: str) -> str:
    """Return one line with the offloads that a profile sets, from the output of ``ethtool -k``."""
    wanted = {
        "tcp-segmentation-offload": "tso", "generic-segmentation-offload": "gso",
        "generic-receive-offload": "gro", "tx-udp-segmentation": "tx-udp-segmentation",
        "tx-udp_tnl-segmentation": "tx-udp_tnl-segmentation",
    }
    found = dict(re.findall(r"^\s*([\w-]+): (on|off)", lines, re.MULTILINE))
    return " ".join(f"{short} {found[name]}" for name, short in wanted.items() if name in found)


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _first_line(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip()
