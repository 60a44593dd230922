"""The installation on a host: the plugin runs there without Python, and can be removed again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.cni.runtime import PLUGINS, ROOT, Runtime, needs_plugins
from tests.own_netns import in_own_mount_namespace, in_own_netns, sh
from udptun.cli import cli
from udptun.cni.install import Installation

CONFIG = {"name": "cbr0", "cniVersion": "1.0.0", "plugins": [{"type": "udptun"}]}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of scripts/cni_tree.py with this Python."""
    if shutil.which("gcc") is None:
        pytest.skip("building the launcher needs gcc")
    out = tmp_path_factory.mktemp("cni") / "out"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "cni_tree.py", out],
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small source in the place of the real one, for tests that do not run the plugin."""
    source = tmp_path / "source"
    (source / "tree" / "lib").mkdir(parents=True)
    (source / "tree" / "lib" / "file").write_text("1")
    (source / "launcher").write_text("launcher 1")
    (tmp_path / "plugins").mkdir()
    for name in ("bridge", "host-local", "loopback", "portmap"):
        (tmp_path / "plugins" / name).write_text(f"{name} 1")
    return source


def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "bin", tmp_path / "net.d")


def conflist(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "conflist"
    path.write_text(json.dumps({**CONFIG, **changes}))
    return path


def files(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file()}


def copy_with_libraries(program: Path, root: Path, loader: Path) -> None:
    """Copy a program of this host below ``root``, with the libraries that it needs."""
    listed = subprocess.run(
        [loader, "--list", program], capture_output=True, text=True, check=False).stdout
    for path in re.findall(r"(/\S+) \(0x", listed):
        if path != str(loader):
            (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(path).resolve(), root / path[1:])
    text = program.read_bytes()
    found = re.search(rb"/lib[^\0]*/ld-[^\0]+", text)
    if found:
        target = root / found[0].decode()[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(loader, target)


@needs_plugins
@in_own_netns
@pytest.mark.parametrize("name", ["udptun", "flannel"])
def test_a_host_without_python(built: Path, tmp_path: Path, name: str) -> None:
    """Its file system has the CNI plugins, the C library for them, and nothing else."""
    in_own_mount_namespace()
    root = tmp_path / "root"
    bin_dir = root / "opt" / "cni" / "bin"
    Installation(bin_dir, root / "etc").install(built, Path(PLUGINS), None)
    assert not [path for path in root.rglob("python3") if ".udptun" not in path.parts]
    for plugin in ("bridge", "host-local"):
        copy_with_libraries(bin_dir / plugin, root, built / "tree" / "lib" / "ld.so")
    runtime = Runtime(tmp_path, "/opt/cni/bin")
    runtime.program = ["chroot", str(root), f"/opt/cni/bin/{name}"]
    runtime.config |= {"type": name, "subnetFile": "/subnet.env", "dataDir": "/data",
                       "nodeSocket": "/run/none/node.sock", "ipam": {"dataDir": "/networks"}}
    runtime.write_subnet(subnet6="fd00:10:244:1::1/64")
    shutil.copy(runtime.subnet_file, root / "subnet.env")
    for directory in ("proc", "run/netns"):
        (root / directory).mkdir(parents=True)
    sh(f"mount --bind /proc {root}/proc")
    with runtime.pod() as pod:
        (root / "run" / "netns" / pod).touch()
        sh(f"mount --bind /run/netns/{pod} {root}/run/netns/{pod}")
        assert "supportedVersions" in runtime.run("VERSION").json
        hostile = {"LD_PRELOAD": "/none.so", "PYTHONPATH": "/none", "PYTHONHOME": "/none",
                   "LD_LIBRARY_PATH": "/none", "LC_ALL": "de_DE.UTF-8"}
        answer = runtime.run("ADD", environ={**hostile})
        assert answer.code == 0, answer
        assert len(answer.json["ips"]) == 2
        assert runtime.run("CHECK", prevResult=answer.json).code == 0
        assert runtime.run("STATUS").code == 0
        assert runtime.run("GC", **runtime.attachments()).code == 0
        assert runtime.run("DEL").code == 0
        assert runtime.run("ADD", instance="blue", name="../x").error[0] == 7
        assert runtime.run("STATUS", instance="blue", subnetFile="/none").error[0] == 50
        sh(f"umount {root}/run/netns/{pod}")
    assert list((root / "data").iterdir()) == []


def test_the_tree_is_small(built: Path) -> None:
    size = sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
    assert size < 40_000_000


def test_a_launcher_without_its_tree_answers_with_an_error(built: Path, tmp_path: Path) -> None:
    runtime = Runtime(tmp_path, "/none")
    shutil.copy(built / "launcher", tmp_path / "udptun")
    runtime.program = [str(tmp_path / "udptun")]
    code, message = runtime.run("ADD").error
    assert code == 5
    assert "install the CNI plugin" in message


def test_install_and_uninstall(small: Path, tmp_path: Path) -> None:
    """The host had flannel and loopback. After uninstall it has the same files as before."""
    bin_dir, net_dir = tmp_path / "bin", tmp_path / "net.d"
    bin_dir.mkdir()
    (bin_dir / "flannel").write_text("flannel's")
    (bin_dir / "loopback").write_text("the host's")
    before = files(bin_dir)
    for _ in range(2):
        installation(tmp_path).install(small, tmp_path / "plugins", conflist(tmp_path))
        assert files(bin_dir) == {
            "udptun": "launcher 1", "flannel": "launcher 1", "loopback": "the host's",
            "bridge": "bridge 1", "host-local": "host-local 1", "portmap": "portmap 1"}
        assert (bin_dir / "flannel").stat().st_mode & 0o777 == 0o755
        assert json.loads((net_dir / "10-udptun.conflist").read_text()) == CONFIG
    for _ in range(2):
        installation(tmp_path).uninstall()
        assert files(bin_dir) == before
        assert [*bin_dir.iterdir(), *net_dir.iterdir()] == [
            path for path in bin_dir.iterdir() if path.is_file()]


def test_an_update(small: Path, tmp_path: Path) -> None:
    """The former tree stays, because a plugin may run. Plugins of ours are updated."""
    trees = []
    for version in "123":
        (small / "tree" / "lib" / "file").write_text(version)
        (small / "launcher").write_text(f"launcher {version}")
        (tmp_path / "plugins" / "bridge").write_text(f"bridge {version}")
        installation(tmp_path).install(
            small, tmp_path / "plugins", conflist(tmp_path, version=version))
        home = tmp_path / "bin" / ".udptun"
        trees.append((home / "current").resolve())
        assert (home / "current" / "lib" / "file").read_text() == version
        assert (tmp_path / "bin" / "flannel").read_text() == f"launcher {version}"
        assert (tmp_path / "bin" / "bridge").read_text() == f"bridge {version}"
        assert f'"{version}"' in (tmp_path / "net.d" / "10-udptun.conflist").read_text()
    assert [tree.exists() for tree in trees] == [False, True, True]
    assert not (home / "replaced").exists()


def test_files_that_others_have_changed_stay(small: Path, tmp_path: Path) -> None:
    installation(tmp_path).install(small, tmp_path / "plugins", conflist(tmp_path))
    (tmp_path / "bin" / "bridge").write_text("newer")
    (tmp_path / "bin" / "flannel").write_text("flannel's")
    changed = tmp_path / "net.d" / "10-udptun.conflist"
    changed.write_text('{"plugins": [{"type": "calico"}]}')
    installation(tmp_path).uninstall()
    assert files(tmp_path / "bin") == {"bridge": "newer", "flannel": "flannel's"}
    assert changed.exists()


@pytest.mark.parametrize("text", [
    '{"name": "x", "plugins": [{"type": "calico"}]}', "", "not JSON", '{"plugins": 5}', "[]"])
def test_a_conflist_of_others_is_not_changed(small: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "net.d" / "10-udptun.conflist"
    path.parent.mkdir()
    path.write_text(text)
    one = installation(tmp_path)
    one.install(small, tmp_path / "plugins", conflist(tmp_path))
    assert path.read_text() == text
    assert any("it is not changed" in line for line in one.log)


def test_a_conflist_that_the_runtime_prefers_is_named(small: Path, tmp_path: Path) -> None:
    (tmp_path / "net.d").mkdir()
    (tmp_path / "net.d" / "10-flannel.conflist").write_text("{}")
    one = installation(tmp_path)
    one.install(small, tmp_path / "plugins", conflist(tmp_path))
    assert any("10-flannel.conflist comes before" in line for line in one.log)


@pytest.mark.parametrize(("broken", "words"), [
    ("launcher", "has no launcher"),
    ("plugin", "install the plugins"),
    ("conflist", "a plugin of the type udptun"),
])
def test_errors_of_the_command(small: Path, tmp_path: Path, broken: str, words: str) -> None:
    file = conflist(tmp_path, **({"plugins": []} if broken == "conflist" else {}))
    if broken == "launcher":
        (small / "launcher").unlink()
    if broken == "plugin":
        (tmp_path / "plugins" / "bridge").unlink()
    result = CliRunner().invoke(cli, [
        "cni", "install", "--bin-dir", str(tmp_path / "bin"), "--conf-dir",
        str(tmp_path / "net.d"), "--tree", str(small), "--plugins", str(tmp_path / "plugins"),
        "--conflist", str(file)])
    assert result.exit_code == 1
    assert words in result.output
    assert not (tmp_path / "net.d").exists()
