"""The wheel contains the product alone: no tests, no reference implementation, no step wrappers."""

import runpy
import tomllib
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_has_only_packages_of_the_product():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = find_packages(str(ROOT), **config["packages"]["find"])
    assert "udptun" in packages
    assert {name.partition(".")[0] for name in packages} == {"udptun"}
    assert not {part for name in packages for part in name.split(".")} & {"reference", "steps"}


def test_the_wheel_has_one_compiled_module(monkeypatch):
    built = []
    monkeypatch.setattr("setuptools.setup", lambda **arguments: built.append(arguments))
    monkeypatch.setattr("Cython.Build.cythonize", lambda modules, **_: modules)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py", run_name="__main__")
    [arguments] = built
    assert [module.name for module in arguments["ext_modules"]] == ["udptun._core"]
