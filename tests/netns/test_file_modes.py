"""The modes of everything that a node and its forwarder create, whatever the umask.

The table in docs/security.md is what this test expects.
"""

from __future__ import annotations

import re
import socket
import stat
from fnmatch import fnmatch
from pathlib import Path

import pytest

from udptun.lab.cluster import Member, start_all

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `([^`]+)` \| (0[0-7]{3}) \|", re.MULTILINE)


def documented(folder: Path) -> dict[str, int]:
    """Return the modes in the table by path. The node's directories are in ``folder``."""
    page = (ROOT / "docs" / "security.md").read_text()
    places = {"/run/udptun": folder / "run", "/run/flannel": folder / "flannel",
              "/var/lib/udptun": folder / "state"}
    found = {}
    for path, mode in ROW.findall(page):
        for standard, ours in places.items():
            if path.startswith(standard):
                found[str(ours) + path.removeprefix(standard).rstrip("/")] = int(mode, 8)
    return found


@pytest.mark.parametrize("umask", ["000", pytest.param("077", marks=pytest.mark.slow)])
def test_the_modes_are_those_of_the_table_whatever_the_umask(lab, umask):
    host = lab.host("n1")
    lab.segment(host, lab.host("n2"))
    file = lab.folder / "hosts.toml"
    file.write_text(f'network = "10.244.0.0/16"\n[[nodes]]\nname = "n1"\npublic = "{host.v4}"\n'
                    'subnets = "10.244.1.0/24"\n')
    file.chmod(0o600)
    member = WithUmask(host, [f"--hosts={file}"], ("--node-name=n1",))
    member.umask = umask
    start_all([member])
    modes = documented(member.folder)
    assert len(modes) >= 10
    known, wrong = set(), []
    for path in (member.folder, *member.folder.rglob("*")):
        if path == member.folder:
            continue
        pattern = next((pattern for pattern in modes if fnmatch(str(path), pattern)), None)
        found = stat.S_IMODE(path.lstat().st_mode)
        if pattern is None:
            wrong.append(f"{path} is not in the table")
        elif found & ~modes[pattern] or (path.is_socket() and found != modes[pattern]):
            wrong.append(f"{path}: {found:04o} instead of {modes[pattern]:04o}")
        known.add(pattern)
    assert wrong == []
    subnet_file = member.subnet_file
    assert stat.S_IMODE(subnet_file.stat().st_mode) == 0o644  # the CNI plugin's user can read it
    assert stat.S_IMODE(subnet_file.parent.stat().st_mode) == 0o755
    # The sockets exist, and are among the files that were checked.
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(member.control))
    assert str(member.control) in known


class WithUmask(Member):
    umask = "022"

    @property
    def subnet_file(self) -> Path:
        return self.folder / "flannel" / "subnet.env"

    def argv(self, *more: str) -> list[str]:
        return ["sh", "-c", f'umask {self.umask}; exec "$@"', "sh", *super().argv(*more)]
