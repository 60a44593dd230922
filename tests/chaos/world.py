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
from pathlib import Path

from udptun.control.protocol import NODE
from udptun.lab.cluster import Cluster, Member
from udptun.lab.hosts import NETNS_DIR
from udptun.lab.tunnels import control_request

from .mesh import Mesh

HERE = Path(__file__).parent
NODES = 5
TUN = "udptun0"
VXLAN = "flannel.1"
PORTS = {"vxlan": 8472, "udp": 8285}
RESTART_SECONDS = 1.0  # systemd's RestartSec in our units is of this order
# What each mode gives to the network's configuration and to the daemons.
MODES = {
    "auto": ("vxlan", "auto"),
    "mixed": ("vxlan", "auto"),  # n4 cannot make VXLAN devices, the forwarder of n5 is a unit
    "udp": ("udp", "udp"),
    "vxlan": ("vxlan", "vxlan"),
}


def build_preload(folder: Path, source: Path) -> str:
    """Compile a library for LD_PRELOAD; return its path."""
    made = folder / f"{source.stem}.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    return str(made)


class World:
    def __init__(self, lab, mode: str) -> None:
        self.lab, self.mode = lab, mode
        network, backend = MODES[mode]
        config = {"Network": "10.244.0.0/16", "Backend": {"Type": network}}
        options = [f"--backend={backend}", "--ip-masq"]
        self.cluster = Cluster(lab, NODES, config=config, options=options)
        self.etcd = self.cluster.etcd
        self.members = self.cluster.members
        self.switch = next(host for host in lab.hosts if host.name.startswith("bridge"))
        self.mesh = Mesh()
        self._died: dict[tuple[Member, str], float] = {}
        self._filters: list[str] = []
        clock = build_preload(lab.folder, HERE / "clock.c")
        for member in self.members:
            member.choose = True
            self.set_clock(member, 0)
            member.environment = {"LD_PRELOAD": clock, "CLOCK_FILE": str(self._clock(member))}
            self.add_default_route(member)
        if mode == "mixed":
            hides = build_preload(lab.folder, HERE.parent / "netns" / "no_vxlan.c")
            self.members[3].environment["LD_PRELOAD"] += f" {hides}"
            self.members[4].external = True

    def start(self) -> None:
        self.cluster.start()
        self.mesh.restart(self.members)

    def close(self) -> None:
        self.mesh.stop()

    def named(self, name: str) -> Member:
        return next(member for member in self.members if member.host.name == name)

    def others(self, member: Member) -> list[Member]:
        return [one for one in self.members if one is not member]

    def devices(self, member: Member) -> list[str]:
        """Return our devices that a node should have."""
        both = {"udp": [TUN], "vxlan": [VXLAN]}.get(self.mode, [TUN, VXLAN])
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
        member.host.ip(f"route replace default via {self.etcd.host.v4} dev {end.name}")

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

    def key(self, member: Member) -> str:
        """Return the key of a node's lease, by which its peers name it."""
        return str(member.subnet).replace("/", "-")

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
        self.subnets = {member.host.name: self.key(member) for member in self.members}
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
        parts = [f"ip -o addr show dev {device} | sed 's/^[0-9]*: //'; "
                 f"ip -o -d link show dev {device} | sed 's/^[0-9]*: //'"
                 for device in self.devices(member)]
        if TUN in self.devices(member):
            parts.append(f"ip route show dev {TUN} | sort")
        if VXLAN in self.devices(member):
            parts.append(f"ip neigh show dev {VXLAN} nud permanent | sort")
            parts.append(f"bridge fdb show dev {VXLAN} | grep permanent | sort")
        parts += ["nft -s list table ip udptun-ipv4", "cat /proc/sys/net/ipv4/ip_forward",
                  f"cat {member.subnet_file}"]
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


