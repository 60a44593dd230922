"""Compile ``tests.steps._steps`` in place: ``python tests/steps/build.py``.

Uses the compiler options of setup.py, so that the tests run the steps as the product compiles them.
Compiles only what changed. ``UDPTUN_SANITIZE`` has the same effect as in setup.py.
"""

import os
import runpy
from pathlib import Path

from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    os.chdir(ROOT)
    setup = runpy.run_path("setup.py", run_name="setup")
    modules = setup["compiled"]("tests.steps._steps", "tests/steps/_steps.pyx")
    command = Distribution({"ext_modules": modules}).get_command_obj("build_ext")
    command.inplace = True
    # Do not use build/lib*: a wheel that is built from this tree would contain all its files.
    command.build_lib = command.build_temp = "build/steps"
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    main()
