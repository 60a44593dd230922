"""The plugin starts fast: it imports no module that takes as long as the rest of the start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cni.runtime import ROOT

SLOW = {"asyncio", "click", "contextlib", "ctypes", "dataclasses", "http", "inspect", "logging",
        "pathlib", "pyroute2", "selectors", "socket", "subprocess", "threading", "typing",
        "urllib", "uvloop"}
# other modules of udptun are loaded by these only for some configurations
ALLOWED = {"udptun", "udptun._version", "udptun.env_file", "udptun.errors", "udptun.text"}


def test_the_plugin_imports_no_slow_module() -> None:
    script = "import udptun.cni.plugin, sys; print(*sys.modules)"
    loaded = set(subprocess.run(
        [sys.executable, "-S", "-c", script], check=True, capture_output=True, text=True,
        timeout=60, cwd=ROOT).stdout.split())
    assert "udptun.cni.delegate" in loaded
    assert not loaded & SLOW
    assert {name for name in loaded if name.startswith("udptun")} - ALLOWED <= {
        "udptun.cni", *(f"udptun.cni.{path.stem}"
                        for path in (Path(ROOT) / "udptun" / "cni").glob("*.py"))}
