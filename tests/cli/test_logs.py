"""The log of the daemons: which loggers write to it. Each test uses a process of its own."""

import json
import subprocess
import sys

import pytest

from tests.test_layering import THIRD_PARTY

# Starts the log, then logs one line at each level with every logger that exists in the process: of
# udptun, of each library that udptun imports, and of the libraries that these import.
PROGRAM = """
import importlib, logging, sys
from contextlib import suppress

from udptun.cli import logs

verbose, form, *modules = sys.argv[1:]
for name in modules:
    with suppress(ModuleNotFoundError):
        importlib.import_module(name)
logs.start(int(verbose), form)
manager = logging.getLogger("udptun.node.daemon").manager
for name in sorted({"", "a.later.library", *manager.loggerDict}):
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logging.getLogger(name).log(level, "said at %d", level)
"""
LIBRARIES = [*THIRD_PARTY, "google.protobuf", "asyncio"]

# One request to the Kubernetes API to a server that answers 404.
REQUEST = """
import sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from udptun.cli import logs

logs.start(2)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)
    def log_message(self, *args):
        pass
server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
import asyncio
from pathlib import Path
from udptun.leases.base import StoreRefused
from udptun.leases.kube.api import Api
from udptun.leases.kube.config import KubeConfig

async def request():
    api = Api(KubeConfig(node_name="n", api_url=f"http://127.0.0.1:{server.server_port}"))
    try:
        await api.node("n")
    except StoreRefused as error:
        assert "404" in str(error)
    else:
        raise AssertionError
    finally:
        await api.aclose()

asyncio.run(request())
"""


def stderr_of(program: str, *argv: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_libraries_log_warnings_and_errors_only(verbose: int) -> None:
    lines = map(json.loads, stderr_of(PROGRAM, str(verbose), "json", *LIBRARIES).splitlines())
    levels: dict[str, set[str]] = {}
    for line in lines:
        levels.setdefault(line["logger"], set()).add(line["level"])
    ours = {name: found for name, found in levels.items() if name.partition(".")[0] == "udptun"}
    assert "udptun.node.daemon" in ours and len(levels) > len(ours) + 5
    debug = {"debug"} if verbose else set()
    for name, found in levels.items():
        usual = {"info", *debug} if name in ours else set()
        assert found == {"warning", "error"} | usual, name


def test_a_request_to_the_kubernetes_api_logs_nothing() -> None:
    assert stderr_of(REQUEST) == ""
