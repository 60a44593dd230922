"""SIGUSR2 starts the version that is installed now, also if it is in another directory."""

import sys
from pathlib import Path

import pytest

from udptun.cli.forward import _installed_program


def test_a_script_names_its_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is a link to the active version, as scripts/installer.py makes it."""
    command = tmp_path / "udptun"
    for version in ("1.0", "2.0"):
        (tmp_path / version).mkdir()
        script = tmp_path / version / "udptun"
        script.write_text(f"#!/opt/udptun/{version}/bin/python\n")
        script.chmod(0o755)
        command.unlink(missing_ok=True)
        command.symlink_to(script)
    old = ["/opt/udptun/1.0/bin/python", str(command), "forward", "--tun", "t0"]
    monkeypatch.setattr(sys, "orig_argv", old)
    assert _installed_program() == [str(command), "forward", "--tun", "t0"]


@pytest.mark.parametrize("option", [["--standby", "42"], ["--standby=42"]])
def test_a_former_standby_process_does_not_start_another_one(
    monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    """Its descriptor is not open any more, and a new forwarder must not wait at it."""
    monkeypatch.setattr(sys, "orig_argv", [
        "python3", "-m", "udptun", "forward", "--instance", "x", *option, "--wait-for", "f"])
    assert _installed_program() == [
        sys.executable, "-m", "udptun", "forward", "--instance", "x", "--wait-for", "f"]


def test_a_module_is_started_by_the_same_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "udptun", "forward"])
    assert _installed_program() == [sys.executable, "-m", "udptun", "forward"]
