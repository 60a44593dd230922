"""The wheel contains the product alone: no tests, no reference implementation, no step wrappers."""

import runpy
import tomllib
from pathlib import Path

from setuptools import find_packages

from udptun.cli.web.server import FILES

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_has_only_packages_of_the_product():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = find_packages(str(ROOT), **config["packages"]["find"])
    assert "udptun" in packages
    assert {name.partition(".")[0] for name in packages} == {"udptun"}
    assert not {part for name in packages for part in name.split(".")} & {"reference", "steps"}


def test_the_wheel_has_the_files_of_the_page():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = ROOT / "udptun" / "cli" / "web"
    declared = {path for pattern in config["package-data"]["udptun.cli.web"]
                for path in folder.glob(pattern)}
    assert declared == {path for path in folder.rglob("*") if path.suffix not in (".py", ".pyc")
                        and path.is_file()} != set()
    assert {path.name for path in declared} == {path[1:] for path in FILES}


def test_the_wheel_has_one_compiled_module(monkeypatch):
    built = []
    monkeypatch.setattr("setuptools.setup", lambda **arguments: built.append(arguments))
    monkeypatch.setattr("Cython.Build.cythonize", lambda modules, **_: modules)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py", run_name="__main__")
    [arguments] = built
    assert [module.name for module in arguments["ext_modules"]] == ["udptun._core"]
