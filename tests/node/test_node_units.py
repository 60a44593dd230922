"""deploy/: the units of a node start existing commands, and match each other.

``tests/test_docs.py`` tests the pages and the forwarder's own unit.
"""

import json
import re
import shutil
import subprocess
from configparser import RawConfigParser
from pathlib import Path

import click
import pytest
from click.core import ParameterSource

from udptun.cli import cli
from udptun.leases.file.config import FileConfig
from udptun.node.config import NodeConfig
from udptun.node.process.launch import FORWARD_FILE

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
NODE = DEPLOY / "udptun-node.service"
FORWARDER = DEPLOY / "udptun-node-forwarder.service"
ALONE = DEPLOY / "udptun-forwarder.service"
UNITS = (NODE, FORWARDER, ALONE)
MAX_EXPOSURE = 30  # tenths


class _Unit(RawConfigParser):
    """A parser for systemd's format: keys can be repeated, and a comment is always a whole line."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, comment_prefixes=("#",), inline_comment_prefixes=None)
        self.optionxform = str  # type: ignore[assignment,method-assign]
        self.read(path)

    def words(self, key: str) -> list[str]:
        return self["Service"][key].split()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for unit in UNITS:
        text = unit.read_text().replace("/usr/local/bin/udptun", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=one",
         *(str(tmp_path / unit.name) for unit in UNITS)],
        capture_output=True, text=True, check=False,
    )
    ours = [line for line in checked.stderr.splitlines() if "udptun" in line]
    assert ours == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_the_units_are_confined(unit: Path) -> None:
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager",
         f"--threshold={MAX_EXPOSURE}", str(unit)],
        capture_output=True, text=True, check=False,
    )
    if "unrecognized option" in rated.stderr:
        pytest.skip("systemd-analyze before 250")
    assert rated.returncode == 0, rated.stdout + rated.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_the_units_allow_what_the_program_needs(unit: Path) -> None:
    text = unit.read_text()
    assert "ProtectKernelTunables=yes" not in text  # the program writes to /proc/sys
    assert re.search(r"^SystemCallFilter=capset$", text, re.MULTILINE)  # to give up capabilities


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
@pytest.mark.parametrize("unit", [FORWARDER, ALONE], ids=lambda path: path.stem)
@pytest.mark.parametrize("with_drop_in", [False, True])
def test_only_the_drop_in_allows_to_load_programs(
    unit: Path, with_drop_in: bool, tmp_path: Path,
) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/usr/local/bin/udptun", "/bin/true"))
    if with_drop_in:
        folder = tmp_path / f"{unit.name}.d"
        folder.mkdir()
        shutil.copy(DEPLOY / "bpf.conf", folder)
    path = {"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"}
    verified = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], env=path,
                              capture_output=True, text=True, check=False)
    assert [line for line in verified.stderr.splitlines() if str(tmp_path) in line] == []
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", "--json=short",
         f"--threshold={MAX_EXPOSURE}", str(copy)],
        env=path, capture_output=True, text=True, check=False)
    if "unrecognized option" in rated.stderr:
        pytest.skip("systemd-analyze before 250")
    assert rated.returncode == 0, rated.stdout + rated.stderr
    about = {one["json_field"]: one for one in json.loads(rated.stdout)}
    assert about["CapabilityBoundingSet_CAP_BPF"]["set"] != with_drop_in
    told = about["SystemCallFilter_privileged"]["description"]
    assert ("bpf is allowed" in told) == with_drop_in


def test_the_forwarder_has_a_unit_of_its_own() -> None:
    """If the daemon started the forwarder, systemd would stop both with the daemon's unit."""
    environment = dict(re.findall(r"^Environment=(\w+)=(.*)$", NODE.read_text(), re.MULTILINE))
    assert environment == {"UDPTUN_NODE_FORWARDER": "external"}
    node, forwarder = _Unit(NODE), _Unit(FORWARDER)
    assert "udptun-node-forwarder.service" in node["Unit"]["Wants"].split()
    for tie in ("PartOf", "BindsTo", "Requires", "PropagatesReloadTo"):
        assert tie not in node["Unit"]
        assert tie not in forwarder["Unit"]


def test_the_forwarder_waits_for_the_file_that_the_daemon_writes() -> None:
    *command, file = _Unit(FORWARDER).words("ExecStart")
    assert command == ["/usr/local/bin/udptun", "forward", "--wait-for"]
    assert Path(file) == NodeConfig(FileConfig(Path("hosts.toml"))).forward_file
    assert Path(file).name == FORWARD_FILE  # the file that `udptun ext` writes


@pytest.mark.parametrize("unit", [NODE, FORWARDER], ids=lambda path: path.stem)
def test_both_units_may_write_their_directories(unit: Path) -> None:
    """Stopping one unit does not remove the other unit's files."""
    found = _Unit(unit)
    assert "udptun" in found.words("RuntimeDirectory")
    assert found.words("StateDirectory") == ["udptun"]
    assert found.words("RuntimeDirectoryMode") == ["0750"]  # the last unit that starts sets it
    assert found.words("RuntimeDirectoryPreserve") == ["yes"]
    raw = ["CAP_NET_RAW"] if unit == NODE else []  # echoes
    assert found.words("CapabilityBoundingSet") == ["CAP_NET_ADMIN", *raw]
    assert "User" not in found["Service"]
    assert "DynamicUser" not in found["Service"]


def test_the_daemon_starts_with_the_example_of_its_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each variable is an option with a valid value, even if its line is commented out."""
    assert _Unit(NODE).words("ExecStart") == ["/usr/local/bin/udptun", "node"]
    text = (DEPLOY / "node.env").read_text()
    values = dict(re.findall(r"^#?(UDPTUN_NODE_\w+)=(.*)$", text, re.MULTILINE))
    assert len(values) > 8
    node = cli.get_command(click.Context(cli), "node")
    assert node is not None
    for name, value in values.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with click.Context(cli, info_name="udptun", auto_envvar_prefix="UDPTUN") as parent:
                context = node.make_context("node", [], parent=parent)
        from_there = {
            param for param in context.params
            if context.get_parameter_source(param) is ParameterSource.ENVIRONMENT
        }
        assert from_there == {name.removeprefix("UDPTUN_NODE_").lower()}
