"""The cluster that the acts change, and what an operator can ask it.

Owns: the nodes in their modes, the service manager's part (an ended process is started again), the
network's filters, and reading a node's status, logs and host. Main thread only, like the lab.
"""

import contextlib
import difflib
import http.client
import mmap
import re
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from udptun.control.protocol import NODE
from udptun.lab.cluster import Member, start_all
from udptun.lab.hosts import NETNS_DIR
from udptun.lab.tunnels import control_request

from .mesh import Mesh
from .stores import STORES

HERE = Path(__file__).parent
NODES = 5
TUN = "udptun0"
VXLAN, VXLAN6 = "flannel.1", "flannel-v6.1"
PORTS = {"vxlan": 8472, "udp": 8285}
RESTART_SECONDS = 1.0  # systemd's RestartSec in our units is of this order
# What each mode gives to the network's configuration and to the daemons.
MODES = {
    "auto": ("vxlan", "auto"),
    "mixed": ("vxlan", "auto"),  # n4 cannot make VXLAN devices, the forwarder of n5 is a unit
    "udp": ("udp", "udp"),
    "vxlan": ("vxlan", "vxlan"),
}
# The nodes that have --accelerate auto, by their numbers. Two of the same kind use the express path
# to each other; to the others they send as without it.
ACCELERATED = {"off": (), "mixed": (2, 3), "all": tuple(range(1, NODES + 1))}


def build_preload(folder: Path, source: Path) -> str:
    """Compile a library for LD_PRELOAD; return its path."""
    made = folder / f"{source.stem}.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    return str(made)


@dataclass(frozen=True)
class ClusterKind:
    """A kind of cluster.

    mode   one of ``MODES``
    store  one of ``STORES``
    ipv6   the overlay has IPv4 and IPv6; else only IPv4
    accelerate  one of ``ACCELERATED``
    """

    mode: str
    store: str = "etcd"
    ipv6: bool = False
    accelerate: str = "off"

    def __str__(self) -> str:
        return (f"mode {self.mode}, store {self.store}, "
                f"{'IPv4 and IPv6' if self.ipv6 else 'IPv4'}, accelerate {self.accelerate}")

    def options(self) -> str:
        """Return the options of the command line that select this kind."""
        return (f"--mode {self.mode} --store {self.store}{' --ipv6' if self.ipv6 else ''} "
                f"--accelerate {self.accelerate}")


class World:
    """One cluster of a kind."""

    def __init__(self, lab, kind: ClusterKind, nodes: int = NODES) -> None:
        self.lab, self.mode, self.ipv6 = lab, kind.mode, kind.ipv6
        mode, store, ipv6 = kind.mode, kind.store, kind.ipv6
        network, backend = MODES[mode]
        config = {"Network": "10.244.0.0/16", "Backend": {"Type": network}}
        if ipv6:
            config |= {"EnableIPv6": True, "IPv6Network": "fd00:10:244::/56"}
        hosts = [lab.host(f"n{number}") for number in range(1, nodes + 1)]
        store_host = lab.host("store")
        lab.segment(*hosts, store_host)
        self.switch = next(host for host in lab.hosts if host.name.startswith("bridge"))
        self.store = STORES[store](store_host, hosts, config)
        options = f"--backend={backend}", "--ip-masq"
        express = ACCELERATED[kind.accelerate]
        self.members = [
            Member(host, self.store.options(host),
                   (*options, "--accelerate=auto") if number in express else options)
            for number, host in enumerate(hosts, start=1)
        ]
        self.mesh = Mesh()
        self._died: dict[tuple[Member, str], float] = {}
        self._filters: list[str] = []
        clock = build_preload(lab.folder, HERE / "clock.c")
        for member in self.members:
            member.choose = True
            self.set_clock(member, 0)
            member.environment = {"LD_PRELOAD": clock, "CLOCK_FILE": str(self._clock(member)),
                                  **self.store.environment(member.host)}
            self.add_default_route(member)
        if mode == "mixed":
            hides = build_preload(lab.folder, HERE.parent / "netns" / "no_vxlan.c")
            self.members[3].environment["LD_PRELOAD"] += f" {hides}"
            self.members[4].external = True

    def start(self) -> None:
        start_all(self.members)
        self.mesh.restart(self.members)

    def close(self) -> None:
        self.mesh.stop()
        self.store.close()

    def named(self, name: str) -> Member:
        return next(member for member in self.members if member.host.name == name)

    def others(self, member: Member) -> list[Member]:
        return [one for one in self.members if one is not member]

    def devices(self, member: Member) -> list[str]:
        """Return our devices that a node should have."""
        vxlan = [VXLAN, VXLAN6] if self.ipv6 else [VXLAN]
        both = {"udp": [TUN], "vxlan": vxlan}.get(self.mode, [TUN, *vxlan])
        hidden = "no_vxlan" in member.environment.get("LD_PRELOAD", "")
        return [TUN] if hidden else both

    # -- the service manager and the network's configuration on a node --------------------------

    def tend(self) -> None:
        """Start ended processes again, as the service manager does."""
        now = time.monotonic()
        for member in self.members:
            for role in ("daemon", "forwarder"):
                process = getattr(member, role)
                key = member, role
                if process is None or process.alive:
                    self._died.pop(key, None)
                elif now >= self._died.setdefault(key, now) + RESTART_SECONDS:
                    del self._died[key]
                    if role == "forwarder":
                        member.start_forwarder()
                    else:
                        member.daemon = member.host.start(
                            member.argv(), name="node", env=member.environment)

    def add_default_route(self, member: Member) -> None:
        """Add the route that DHCP or the distribution's network scripts add."""
        end = member.host.interfaces[0]
        member.host.ip(f"route replace default via {self.store.host.v4} dev {end.name}")
        if self.ipv6:
            member.host.ip(f"route replace default via {self.store.host.v6} dev {end.name}")

    def pids(self, *members: Member) -> list[int]:
        """Return all processes of udptun on these nodes."""
        spaces = {(NETNS_DIR / member.host.namespace).stat().st_ino for member in members}
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if (process / "ns/net").stat().st_ino in spaces:
                    command = (process / "cmdline").read_bytes().split(b"\0")
                    if b"udptun" in command and (b"node" in command or b"forward" in command):
                        found.append(int(process.name))
        return found

    def forwarder_pids(self, member: Member) -> list[int]:
        return [pid for pid in self.pids(member)
                if b"forward" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]

    def waited(self) -> dict[int, float]:
        """Return for how many seconds each process of udptun could run but had no CPU so far."""
        found = {}
        for pid in self.pids(*self.members):
            with contextlib.suppress(OSError, IndexError):  # it has ended; an old kernel
                found[pid] = int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
        return found

    # -- the network -----------------------------------------------------------------------------

    def block(self, rule: str) -> None:
        """Drop what matches an nftables rule on the switch that joins the nodes."""
        self._filters.append(rule)
        self._load_filters()

    def unblock(self, rule: str) -> None:
        self._filters.remove(rule)
        self._load_filters()

    def _load_filters(self) -> None:
        rules = "".join(f"{rule}\n" for rule in self._filters)
        self.switch.nft(
            "table bridge chaos {}\ndelete table bridge chaos\ntable bridge chaos {\nchain c {\n"
            f"type filter hook forward priority 0\n{rules}}}\n}}\n")

    # -- clocks ----------------------------------------------------------------------------------

    def _clock(self, member: Member) -> Path:
        return self.lab.folder / f"{member.host.name}.clock"

    def set_clock(self, member: Member, seconds: int) -> None:
        """Set by how much the wall clock of the node's daemon and forwarder is wrong."""
        path = self._clock(member)
        if not path.exists():
            path.write_bytes(bytes(8))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 8) as memory:
            memory[:] = struct.pack("=q", seconds)

    # -- what an operator sees -------------------------------------------------------------------

    def health(self, member: Member) -> "Health":
        """Ask a node how it is: by its socket, else by HTTP.

        Each of the two survives an act that the other does not. A stopped daemon is not asked,
        because it would answer only after the time limit.
        """
        if _is_stopped(member.daemon.pid):
            return Health(False, "the daemon does not answer: it is stopped", set())
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            status, answer = control_request(member.control.with_name("node.sock"), "GET", NODE)
            if status == 200:
                return Health.of(answer)
        return Health(*member.ready())

    def logs(self, member: Member) -> dict[Path, str]:
        """Return what the node's daemons and forwarders have logged, by file."""
        files = [process.log for process in member.host.processes if "udptun" in process.argv]
        files.append(member.folder / "state" / "forwarder.log")
        return {file: file.read_text(errors="replace") for file in files if file.exists()}

    def log_sizes(self, member: Member) -> dict[Path, int]:
        return {file: len(text) for file, text in self.logs(member).items()}

    def logged_since(self, member: Member, sizes: dict[Path, int]) -> str:
        """Return what was logged after ``log_sizes``. An act may remove a file."""
        return "".join(text[sizes.get(file, 0):] for file, text in self.logs(member).items())

    def remember(self) -> None:
        """Save what each node's host has now, as the state to which a node returns."""
        self.subnets = {member.host.name: self.store.key(member) for member in self.members}
        self.wanted = {member.host.name: self.host_state(member) for member in self.members}

    def differs(self, member: Member) -> list[str]:
        """Return how a node's host differs from what ``remember`` saved."""
        wanted, found = self.wanted[member.host.name], self.host_state(member)
        if wanted == found:
            return []
        lines = difflib.unified_diff(wanted.splitlines(), found.splitlines(), lineterm="", n=0)
        return [line for line in lines if not line.startswith(("---", "+++", "@@"))]

    def host_state(self, member: Member) -> str:
        """Return the parts of the host that udptun makes, as text.

        VXLAN's routes are not among them: with --backend auto they follow what was measured.
        """
        parts = [f"ip -o addr show dev {device} | grep -v fe80 | sed 's/^[0-9]*: //'; "
                 f"ip -o -d link show dev {device} | sed 's/^[0-9]*: //'"
                 for device in self.devices(member)]
        if TUN in self.devices(member):
            parts.append(f"ip route show dev {TUN} | sort")
            if self.ipv6:
                parts.append(f"ip -6 route show dev {TUN} | grep -v ^fe80 | sort")
        for device in self.devices(member):
            if device != TUN:
                parts.append(f"ip neigh show dev {device} nud permanent | sort")
                parts.append(f"bridge fdb show dev {device} | grep permanent | sort")
        parts += ["nft -s list table ip udptun-ipv4", "cat /proc/sys/net/ipv4/ip_forward",
                  f"cat {member.subnet_file}"]
        if self.ipv6:
            parts += ["nft -s list table ip6 udptun-ipv6",
                      "cat /proc/sys/net/ipv6/conf/all/forwarding"]
        script = "; ".join(f"echo '# {part.split('|')[0]}'; {part} 2>&1" for part in parts)
        return _normal(member.host.run(["sh", "-c", script], check=False).stdout)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except FileNotFoundError:
        return False


def _normal(text: str) -> str:
    """Remove the words that differ between two outputs for the same state: queues, counters."""
    text = re.sub(r" (qlen|group|state|mode|numtxqueues|numrxqueues) \S+", "", text)
    text = re.sub(r"valid_lft \S+|preferred_lft \S+|altname \S+", "", text)
    return re.sub(r"[ \t\\]+", " ", text)


_MARKS = {"ok": "+", "degraded": "!", "failed": "-"}


class Health:
    """Whether a node reports that it is ready, and its whole report.

    text  the checks, as ``/readyz?verbose`` prints them; for a node that does not answer, the error
    lost  the keys of the peers that it does not reach, or not with large packets; None: the text
          alone has them
    """

    def __init__(self, ready: bool, text: str, lost: set[str] | None = None) -> None:
        self.ready, self.text = ready, text
        self.lost = lost

    @classmethod
    def of(cls, answer: dict) -> "Health":
        checks = "".join(
            f"[{_MARKS[check['state']]}]{check['name']}: " + "\n    ".join(check["text"]) + "\n"
            for check in answer["checks"])
        lost = {peer["key"] for peer in answer["peers"]
                if peer["state"] in ("unreachable", "limited")}
        lost |= answer["no_path"].keys() | answer["refused"].keys()
        return cls(answer["ready"], checks, lost)

    def failed(self) -> list[str]:
        return re.findall(r"^\[-\]([\w-]+)", self.text, re.MULTILINE)

    def names(self, key: str) -> bool:
        """Return whether a peer is named as having a problem."""
        return key in self.lost if self.lost is not None else f"\n    {key}" in self.text


