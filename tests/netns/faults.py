"""Causes one fault on a running node: ``python -m tests.netns.faults NAME``, in its namespaces.

For the test of ``udptun doctor``. This program does not import udptun: it does what other programs,
administrators and broken disks do. It reads its arguments from the environment:
STATE_DIR, SUBNET_FILE and ADDRESS of the node. With --hold it keeps the fault until a signal.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def run(*argv: str) -> None:
    subprocess.run(argv, check=True)


def port_taken() -> object:
    """Another program has bound the tunnel's port."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((os.environ["ADDRESS"], 8285))
    return sock


def state_read_only() -> None:
    """The file system of the state directory is read-only."""
    folder = os.environ["STATE_DIR"]
    run("mount", "--bind", folder, folder)
    run("mount", "-o", "remount,bind,ro", folder)


def state_full() -> None:
    """The file system of the state directory is full."""
    folder = Path(os.environ["STATE_DIR"])
    saved = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    for path, data in saved.items():
        path.write_bytes(data)
    try:
        with (folder / "big").open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
    except OSError:
        return


def tun_missing() -> None:
    """/dev/net/tun is not the TUN device, as in a container without it."""
    run("mount", "--bind", "/dev/null", "/dev/net/tun")


def other_subnet() -> None:
    """subnet.env has the subnet of another node."""
    path = Path(os.environ["SUBNET_FILE"])
    lines = [line if not line.startswith("FLANNEL_SUBNET=") else "FLANNEL_SUBNET=10.244.99.1/24"
             for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")


def vni_taken() -> None:
    """Another program has a VXLAN device with our VNI."""
    run("ip", "link", "add", "vx9", "type", "vxlan", "id", "1", "dstport", "9999", "dev", "eth0")


def name_taken() -> None:
    """Another device has the name of the TUN."""
    subprocess.run(["ip", "link", "del", "udptun0"], check=False)
    run("ip", "link", "add", "udptun0", "type", "veth", "peer", "name", "far0")


FAULTS = {
    "port-taken": port_taken, "state-read-only": state_read_only, "state-full": state_full,
    "tun-missing": tun_missing, "other-subnet": other_subnet, "vni-taken": vni_taken,
    "name-taken": name_taken,
}

if __name__ == "__main__":
    kept = FAULTS[sys.argv[1]]()
    if "--hold" in sys.argv:
        signal.pause()
