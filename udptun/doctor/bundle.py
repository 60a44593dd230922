"""Collect the state of this host for a bug report, as files of one tar.

Owns the list of the parts, the limits of their sizes and times, and what is secret. If a part is
not available, the tar has the error instead. Changes nothing on the host. Threading: main thread;
each part runs in a thread of its own.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .._version import __version__
from ..build import build_id
from ..control.client import ControlClient
from ..errors import UdptunError
from ..files import read_tail
from ..text import counted, printable
from .facts import ANSWER_SECONDS, Facts
from .processes import PROC
from .redact import Pseudonyms, Secrets
from .sockets import NET, udp_sockets

PART_BYTES = 4 << 20
PART_SECONDS, COMMAND_SECONDS, ALL_SECONDS = 20.0, 10.0, 120.0
LOG_LINES = 3000
KEY_LINE = 40  # characters; the last line of a key is shorter, and tells little
SECRET_BYTES = 1 << 20  # of a file with a secret that is read in order to remove it
SYSCTLS = (
    "ipv4/ip_forward", "ipv4/conf/*/rp_filter", "ipv4/conf/*/forwarding",
    "ipv4/conf/*/accept_local", "ipv6/conf/*/forwarding", "ipv6/conf/*/disable_ipv6",
    "ipv4/ip_local_port_range", "ipv4/ip_no_pmtu_disc", "ipv4/tcp_mtu_probing",
    "bridge/bridge-nf-call-*", "netfilter/nf_conntrack_count", "netfilter/nf_conntrack_max",
    "core/rmem_max", "core/wmem_max", "core/netdev_max_backlog", "core/default_qdisc",
)
COMMANDS = {
    "ip-address.txt": ("ip", "-d", "address"),
    "ip-link.txt": ("ip", "-s", "-d", "link"),
    "ip-route.txt": ("ip", "route", "show", "table", "all"),
    "ip-route6.txt": ("ip", "-6", "route", "show", "table", "all"),
    "ip-rule.txt": ("ip", "rule"),
    "ip-rule6.txt": ("ip", "-6", "rule"),
    "ip-neighbours.txt": ("ip", "neigh"),
    "fdb.txt": ("bridge", "fdb"),
    "nftables.txt": ("nft", "list", "ruleset"),
    "iptables.txt": ("iptables-save",),
    "ip6tables.txt": ("ip6tables-save",),
}
UNITS = ("udptun-node", "udptun-forwarder", "udptun-node-forwarder")
# Variables that concern udptun. The values of others are not read.
VARIABLES = ("UDPTUN_", "FLANNELD_", "NODE_NAME", "POD_", "KUBERNETES_SERVICE_")
SECRET_FILES = ("etcd-password-file", "etcd-keyfile", "kubeconfig-file")
SERVICE_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


@dataclass(frozen=True, slots=True)
class Part:
    """One file of the report. error  why it is not available; its text is then the error"""

    name: str
    text: str
    error: str = ""


def collect(
    facts: Facts, doctor: Callable[[], Any], redact: bool,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Part]:
    """Return the parts, without secrets.

    doctor  returns the result of the checks as JSON
    redact  replace addresses and names by pseudonyms
    """
    deadline = time.monotonic() + ALL_SECONDS
    secrets = Secrets(_secrets(facts))
    names = Pseudonyms(_networks(facts), _names(facts)) if redact else None
    found = []
    for name, make in _parts(facts, doctor).items():
        progress(f"reading {name}")
        part = _make(name, make, min(PART_SECONDS, deadline - time.monotonic()))
        found.append(Part(name, _clean(part.text, secrets, names),
                          _clean(part.error, secrets, names)))
    return [Part("contents.txt", contents(found)), *found]


def contents(parts: Iterable[Part]) -> str:
    """List the parts."""
    return "".join(f"{part.name:<34}  " + (
        f"not there: {printable(part.error)}" if part.error
        else counted(len(part.text.encode()), "byte")) + "\n" for part in parts)


def archive(parts: Iterable[Part], folder: str) -> bytes:
    """Return a compressed tar of the parts."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for part in parts:
            data = part.text.encode("utf-8", "replace")
            entry = tarfile.TarInfo(f"{folder}/{part.name}")
            entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
            tar.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def _clean(text: str, secrets: Secrets, names: Pseudonyms | None) -> str:
    text = secrets.remove(text)
    return text if names is None else names.replace(text)


def _make(name: str, make: Callable[[], str], seconds: float) -> Part:
    result: list[Part] = []

    def run() -> None:
        try:
            text = make()
            if len(text) > PART_BYTES:
                text = f"(the last {PART_BYTES} of {len(text)} characters)\n{text[-PART_BYTES:]}"
            result.append(Part(name, text))
        except OSError as exc:
            why = f"{exc.filename or name}: {exc.strerror}" if exc.strerror else str(exc)
            result.append(Part(name, f"{why}\n", why))
        except UdptunError as exc:
            result.append(Part(name, f"{exc}\n", str(exc)))
        except Exception as exc:  # one part must not end the others
            result.append(Part(name, f"{exc!r}\n", repr(exc)))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(seconds, 0.0))
    late = f"not ready within {max(seconds, 0.0):.0f} s"
    return result[0] if result else Part(name, f"{late}\n", late)


def _parts(facts: Facts, doctor: Callable[[], Any]) -> dict[str, Callable[[], str]]:
    return {
        "versions.txt": _versions,
        "node.json": lambda: _answer(facts.node.answer, facts.node.error),
        "forwarder.json": lambda: _answer(facts.forwarder.answer, facts.forwarder.error),
        "doctor.json": lambda: _json(doctor()),
        "drops.json": lambda: _asked(facts, lambda client: _json(client.drops())),
        "events.jsonl": lambda: _asked(facts, lambda client: "".join(
            f"{json.dumps(event)}\n" for event in client.events(follow=False))),
        "metrics.txt": lambda: _asked(facts, ControlClient.metrics),
        "options.txt": lambda: _options(facts),
        "forward.json": lambda: _answer(
            None if facts.spec is None else facts.spec.to_json(), "there is no forward.json"),
        "net-conf.json": lambda: _net_conf(facts),
        "leases.json": lambda: _leases(facts),
        "subnet.env": lambda: facts.subnet_file.read_text(errors="replace"),
        "sysctls.txt": _sysctls,
        "udp-sockets.txt": lambda: "".join(
            f"{one.address} port {one.port} drops {one.drops}\n" for one in udp_sockets()),
        "snmp.txt": lambda: (NET / "snmp").read_text() + (NET / "netstat").read_text(),
        "forwarder.log": lambda: _tail(facts.forwarder_log),
        **{name: partial(_command, argv) for name, argv in COMMANDS.items()},
        "iptables-legacy.txt": partial(_legacy, 4, "iptables-legacy-save"),
        "ip6tables-legacy.txt": partial(_legacy, 6, "ip6tables-legacy-save"),
        **{f"journal-{unit}.txt": partial(_command, (
            "journalctl", "--no-pager", "-q", "-n", str(LOG_LINES), "-u", unit, "-u", f"{unit}@*"))
           for unit in UNITS},
    }


def _json(value: object) -> str:
    return json.dumps(value, indent=1) + "\n"


def _answer(value: Mapping[str, Any] | None, error: str) -> str:
    if value is None:
        raise UdptunError(error)
    return _json(value)


def _asked(facts: Facts, question: Callable[[ControlClient], str]) -> str:
    """Ask the forwarder, on a connection of its own."""
    if facts.forwarder.answer is None:
        raise UdptunError(facts.forwarder.error)
    with ControlClient(str(facts.control), ANSWER_SECONDS) as client:
        return question(client)


def _legacy(version: int, program: str) -> str:
    """Reading a legacy table creates the table, so only tables that exist are read."""
    from ..node.host.firewall.iptables import legacy_tables

    tables = sorted(legacy_tables(version))
    return "".join(_command((program, "-t", table)) for table in tables)


def _versions() -> str:
    lines = [
        f"udptun {__version__}, build {build_id()}",
        f"Python {platform.python_version()}, {platform.machine()}",
        f"Linux {os.uname().release} {os.uname().version}",
        f"CPUs {os.cpu_count()}, user {os.geteuid()}, host {socket.gethostname()}",
    ]
    for path in (Path("/etc/os-release"), PROC / "loadavg"):
        try:
            lines.append(f"# {path}\n{path.read_text(errors='replace').rstrip()}")
        except OSError as exc:
            lines.append(f"# {path}: {exc.strerror}")
    return "\n".join(lines) + "\n"


def _options(facts: Facts) -> str:
    """Return the command lines of our processes, and the variables that concern udptun."""
    lines = []
    for one in facts.processes:
        lines.append(f"process {one.pid}, state {one.state}: {' '.join(one.argv)}")
        try:
            lines += [f"  {name}={value}" for name, value in sorted(_variables(one.pid).items())]
        except OSError as exc:
            lines.append(f"  its environment cannot be read: {exc.strerror}")
    return "\n".join(lines) + "\n"


def _variables(pid: int) -> dict[str, str]:
    data = (PROC / str(pid) / "environ").read_bytes().decode(errors="replace")
    pairs = (entry.partition("=") for entry in data.split("\0"))
    return {name: value for name, _, value in pairs if name.startswith(VARIABLES)}


def _net_conf(facts: Facts) -> str:
    if facts.known is None:
        raise UdptunError(facts.known_error)
    return facts.known.network.text


def _leases(facts: Facts) -> str:
    known = facts.known
    if known is None:
        raise UdptunError(facts.known_error)
    return _json({
        "store": known.store, "own": None if known.lease is None else known.lease.key,
        "leases": [{
            "key": lease.key, "name": lease.name, "subnets": [str(one) for one in lease.subnets],
            "public": [str(one) for one in (lease.attributes.public_ip,
                                            lease.attributes.public_ipv6) if one is not None],
            "backend": lease.attributes.backend_type, "data": lease.attributes.backend_data,
            "data_v6": lease.attributes.backend_v6_data} for lease in known.leases]})


def _sysctls() -> str:
    root = Path("/proc/sys/net")
    lines = []
    for pattern in SYSCTLS:
        for path in sorted(root.glob(pattern)):
            try:
                lines.append(f"net.{path.relative_to(root)} = {path.read_text().strip()}")
            except OSError as exc:
                lines.append(f"net.{path.relative_to(root)}: {exc.strerror}")
    return "\n".join(lines) + "\n"


def _tail(path: Path) -> str:
    return read_tail(path, PART_BYTES).decode(errors="replace")


def _command(argv: tuple[str, ...]) -> str:
    """Return the output of a program. Raises UdptunError if it is missing or fails."""
    if shutil.which(argv[0]) is None:
        raise UdptunError(f"{argv[0]} is not installed")
    try:
        done = subprocess.run(argv, capture_output=True, timeout=COMMAND_SECONDS, check=False,
                              stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"})
    except subprocess.TimeoutExpired:
        raise UdptunError(f"{argv[0]} did not end within {COMMAND_SECONDS:.0f} s") from None
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        raise UdptunError(f"{' '.join(argv)}: {why}")
    return done.stdout.decode(errors="replace")


# -- what is secret, and what has a pseudonym -----------------------------------------------------


def _secrets(facts: Facts) -> Iterator[str]:
    """Yield the secrets of the configuration, in order to remove them wherever they appear."""
    paths = {SERVICE_TOKEN}
    for process in facts.processes:
        if (password := process.option("etcd-password")) is not None:
            yield password
        try:
            variables = _variables(process.pid)
        except OSError:
            variables = {}
        for name, value in variables.items():
            if name.endswith(("PASSWORD", "TOKEN", "SECRET")):
                yield value
        for option in SECRET_FILES:
            named = process.option(option) or variables.get(
                f"UDPTUN_NODE_{option.upper().replace('-', '_')}")
            if named:
                paths.add(Path(named))
    for path in paths:
        yield from _in_file(path)


def _in_file(path: Path) -> Iterator[str]:
    """Yield the secrets in a file: a file with one line, long lines of a key, and the values of a
    kubeconfig."""
    try:
        with path.open("rb") as file:
            text = file.read(SECRET_BYTES).decode(errors="replace")
    except OSError:
        return
    if "\n" not in text.strip():
        yield text
    for line in text.splitlines():
        if len(line) >= KEY_LINE and " " not in line.strip():
            yield line
        name, colon, value = line.partition(":")
        if colon and name.strip(" -").endswith(("token", "password", "-data")):
            yield value.strip(" \"'")


def _networks(facts: Facts) -> Iterator[Any]:
    if facts.known is not None:
        for lease in facts.known.leases:
            yield from lease.subnets
    yield from facts.networks


def _names(facts: Facts) -> Iterator[str]:
    yield socket.gethostname()
    if facts.known is not None:
        for lease in facts.known.leases:
            yield from (one for one in (lease.name, lease.key) if not one[:1].isdigit())
    for process in facts.processes:
        if (name := process.option("node-name")) is not None:
            yield name
