"""What other users of the host can see of a node: the modes of all files, and no secrets.

The table in docs/security.md has the expected modes.
"""

from __future__ import annotations

import contextlib
import re
import socket
import stat
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from udptun.lab.cluster import Cluster, Member, etcd_obstacle, start_all

ROOT = Path(__file__).resolve().parents[2]
SECRET = b"a-password-of-etcd"
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


pytestmark = pytest.mark.skipif(etcd_obstacle() is not None, reason=str(etcd_obstacle()))


@pytest.mark.parametrize("umask", ["000", pytest.param("077", marks=pytest.mark.slow)])
def test_the_modes_are_those_of_the_table_whatever_the_umask(lab, umask):
    member = started(lab, umask)
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


@pytest.mark.slow
def test_the_password_of_the_store_is_in_no_file_and_in_no_other_process(lab):
    member = started(lab, "022")
    assert SECRET not in member.daemon.log.read_bytes()
    for path in member.folder.rglob("*"):
        assert not path.is_file() or SECRET not in path.read_bytes(), path
    assert SECRET not in member.host.run(
        [sys.executable, "-m", "udptun", "--socket", str(member.control), "status", "-o", "json"]
    ).stdout.encode()
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(member.daemon.pid):
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            assert SECRET not in (process / "cmdline").read_bytes()
            assert SECRET not in (process / "environ").read_bytes()
    assert SECRET not in Path(f"/proc/{member.daemon.pid}/cmdline").read_bytes()


def started(lab, umask: str) -> WithUmask:
    cluster = Cluster(lab, 1, options=["--etcd-username=u"])
    (one,) = cluster.members
    member = WithUmask(one.host, one.store, one.options,
                       environment={"UDPTUN_NODE_ETCD_PASSWORD": SECRET.decode()})
    member.umask = umask
    start_all([member])
    return member


class WithUmask(Member):
    umask = "022"

    @property
    def subnet_file(self) -> Path:
        return self.folder / "flannel" / "subnet.env"

    def argv(self, *more: str) -> list[str]:
        return ["sh", "-c", f'umask {self.umask}; exec "$@"', "sh", *super().argv(*more)]
