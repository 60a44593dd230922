"""scripts/installer.py installs, activates and uninstalls versions, and leaves nothing behind.

The bundles are small, with wheels that the test makes. They are installed below a directory.
"""

import io
import os
import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.scripts import SCRIPTS, script

bundle, lock, release = script("bundle"), script("lock"), script("release")

ROOT = Path(__file__).resolve().parent.parent
CPU = platform.machine()
TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"
UNIT = "lib/systemd/system/udptun.service"


def wheel(files: dict[str, str]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return packed.getvalue()


def make_bundle(folder: Path, version: str, more: dict[str, bytes] | None = None) -> Path:
    target = folder / f"udptun-{version}.run"
    bundle.write_bundle(target, CPU, {
        f"wheels/udptun-{version}-{TAG}-{TAG}-linux_{CPU}.whl": wheel({
            "udptun/cli.py": f"import purelib_part\ndef main(): print('version {version}')",
            "udptun/_core.so": "",
            "udptun-1.data/": "",  # setuptools writes entries for directories
            "udptun-1.data/purelib/": "",
            "udptun-1.data/purelib/purelib_part.py": "",
            "udptun-1.data/scripts/not_installed": "",
        }),
        f"wheels/udptun-{version}-cp399-cp399-linux_{CPU}.whl": wheel({"other_python.py": ""}),
        "wheels/pure-1-py3-none-any.whl": wheel({"pure.py": ""}),
        "wheels/stable-1-cp36-abi3-linux.whl": wheel({"stable.py": ""}),
        f"system/{UNIT}": f"# {version}\nExecStart=/usr/local/bin/udptun node\n".encode(),
        "system/share/udptun/node.env": b"",
        "VERSION": version.encode(),
        "__main__.py": (SCRIPTS / "installer.py").read_bytes(),
        **(more or {}),
    })
    return target


def test_the_links_of_the_documents_lead_to_files_of_the_bundle() -> None:
    files = set(bundle.documents())
    missing = {
        (name, target)
        for name in files if name.endswith(".md")
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (ROOT / name).read_text())
        for found in [os.path.normpath(Path(name).parent / target)]
        if found not in files and not any(one.startswith(f"{found}/") for one in files)
    }
    assert sorted(missing) == []


def run(program: Path, *arguments: str, root: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-I", str(program), *arguments, "--root", str(root)],
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def installer(root: Path, version: str) -> Path:
    return root / "opt/udptun" / version / "installer.py"


def active(root: Path) -> str:
    """Return what the command prints, and check that the unit has the same version."""
    command = root / "usr/local/bin/udptun"
    home = Path(f"{root}{command.readlink()}").parent  # the link is absolute
    shown = subprocess.run([str(home / "python"), str(home / "udptun")], check=True,
                           capture_output=True, text=True).stdout
    version = shown.strip().removeprefix("version ")
    assert (root / "usr/local" / UNIT).read_text().startswith(f"# {version}\n")
    return version


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


def test_the_installed_version_runs_and_has_the_fitting_wheels(tmp_path: Path) -> None:
    root = tmp_path / "root"
    run(make_bundle(tmp_path, "1.0"), root=root)
    assert active(root) == "1.0"
    packages = next((root / "opt/udptun/1.0/lib").glob("python3.*/site-packages"))
    assert {path.name for path in packages.glob("*.py")} == {
        "purelib_part.py", "pure.py", "stable.py",
    }
    assert not list(root.rglob("not_installed"))
    assert list(packages.rglob("cli.*.pyc"))
    assert (packages / "udptun/_core.so").stat().st_mode & 0o777 == 0o755


def test_versions_stand_side_by_side_and_leave_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "usr/local/bin").mkdir(parents=True)
    (root / "usr/local/bin/other").touch()
    run(make_bundle(tmp_path, "9.0"), root=root)
    run(make_bundle(tmp_path, "10.0"), "install", "--inactive", root=root)
    assert active(root) == "9.0"
    run(installer(root, "10.0"), "activate", root=root)
    assert active(root) == "10.0"
    run(make_bundle(tmp_path, "8.0"), root=root)
    assert active(root) == "8.0"
    assert "opt/udptun/10.0 is the active" in run(installer(root, "8.0"), "uninstall", root=root)
    assert active(root) == "10.0"
    run(installer(root, "9.0"), "uninstall", root=root)
    assert active(root) == "10.0"
    run(installer(root, "10.0"), "uninstall", root=root)
    assert files(root) == {"usr/local/bin/other"}
    assert [str(path) for path in root.rglob("*udptun*")] == []


def test_a_changed_file_stays(tmp_path: Path) -> None:
    root = tmp_path / "root"
    run(make_bundle(tmp_path, "1.0"), root=root)
    (root / "usr/local" / UNIT).write_text("mine")
    run(installer(root, "1.0"), "uninstall", root=root)
    assert files(root) == {f"usr/local/{UNIT}"}


def test_units_name_the_command_of_another_system_directory(tmp_path: Path) -> None:
    root = tmp_path / "root"
    run(make_bundle(tmp_path, "1.0"), "install", "--venv", "/usr/lib/udptun", "--system", "/usr",
        root=root)
    assert "ExecStart=/usr/bin/udptun node" in (root / "usr" / UNIT).read_text()
    assert str((root / "usr/bin/udptun").readlink()) == "/usr/lib/udptun/bin/udptun"


@pytest.mark.parametrize("again", [True, False])
def test_a_failed_installation_changes_nothing(tmp_path: Path, again: bool) -> None:
    """The version is there already, or a wheel is damaged."""
    root = tmp_path / "root"
    root.mkdir()
    target = make_bundle(tmp_path, "1.0", {} if again else {"wheels/bad-1-py3-none-any.whl": b"x"})
    if again:
        run(target, root=root)
    before = files(root)
    done = subprocess.run([sys.executable, str(target), "--root", str(root)], check=False,
                          capture_output=True, text=True)
    assert done.returncode != 0
    assert not again or "opt/udptun/1.0 exists" in done.stderr
    assert files(root) == before


def test_the_file_refuses_another_processor(tmp_path: Path) -> None:
    target = tmp_path / "udptun.run"
    bundle.write_bundle(target, "other", {"__main__.py": b"print('started')"})
    done = subprocess.run(["sh", str(target)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"udptun: this file is for other, not {CPU}\n"


def test_a_bundle_has_the_same_bytes_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert len({make_bundle(tmp_path, "1.0").read_bytes() for _ in range(2)}) == 1


def test_the_lock_file_has_each_dependency() -> None:
    locked = lock.LOCK.read_text()
    for requirement in lock.requirements():
        name = release.normal_name(release.bare_name(requirement))
        assert f"\n{name}==" in locked, f"{name}: run make lock"
