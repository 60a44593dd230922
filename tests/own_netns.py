"""Run a test in a network namespace of its own.

The test runs in a new thread that moves to a new namespace. Threads and processes that the test
starts inherit the namespace. When the last of them has ended, the kernel removes the namespace with
its devices. Tests of several hosts use ``udptun.lab`` instead.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import inspect
import json
import os
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import pytest

CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x00020000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


def run_program(command: str) -> subprocess.CompletedProcess[str]:
    """Run a system program without the libraries that scripts/sanitize preloads: they would stop it
    on its own memory errors."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(
        command.split(), capture_output=True, text=True, check=False, env=environment
    )


def sh(*commands: str) -> str:
    """Run each command, which must succeed. Return the output of the last one."""
    out = ""
    for command in commands:
        done = run_program(command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        out = done.stdout
    return out


def in_own_mount_namespace() -> None:
    """Give the calling thread, and those that it starts, mounts of their own. Call it in a test
    with ``in_own_netns``."""
    if _libc.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNS)")
    sh("mount --make-rprivate /")


def ip_json(command: str) -> Any:
    return json.loads(sh(f"ip -j -d {command}") or "[]")


def in_own_netns(test: Callable[..., Any]) -> Callable[..., None]:
    """Decorate a plain or async test. It is skipped without root."""

    @pytest.mark.netns
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        if os.geteuid() != 0:
            pytest.skip("network namespaces need root")
        raised: list[BaseException] = []

        def body() -> None:
            try:
                if _libc.unshare(CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
                sh("ip link set lo up")
                result = test(*args, **kwargs)
                if inspect.iscoroutine(result):
                    asyncio.run(result)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]

    return run
