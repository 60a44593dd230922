"""The systemd units are valid, and the templates are those that scripts/units.py writes."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.scripts import script

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


def test_the_templates_are_written_from_the_units() -> None:
    want = script("units").templates()
    have = {path.name: path.read_text() for path in DEPLOY.glob("*@.service")}
    assert have == want, "run: python scripts/units.py"
    assert len(have) == 3
    for text in have.values():
        rules = [line for line in text.splitlines() if not line.startswith("#")]
        names = [line for line in rules if "udptun" in line and "Description" not in line]
        assert all("%i" in line or "/xtables" in line for line in names), names


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is missing")
def test_systemd_finds_no_mistake(tmp_path: Path) -> None:
    """The command in the units exists only on a host with udptun, so put another one there."""
    for unit in DEPLOY.glob("*.service"):
        text = unit.read_text().replace("/usr/local/bin/udptun", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    units = [path.name.replace("@.", "@blue.") for path in tmp_path.iterdir()]
    assert len(units) >= 6
    for template in tmp_path.glob("*@.service"):
        (tmp_path / template.name.replace("@.", "@blue.")).symlink_to(template)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in units)],
        capture_output=True, text=True, check=False,
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
    )
    ours = [line for line in done.stderr.splitlines() if "udptun" in line]
    assert ours == []
