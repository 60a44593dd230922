"""udptun.privileges: the limit of locked memory. Each case runs in a process of its own."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

KIB = 1024
PROGRAM = """
import os, resource, sys
from udptun.privileges import lift_memory_limit
soft, hard, user = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
if user:
    os.setuid(user)
lift_memory_limit()
print(*resource.getrlimit(resource.RLIMIT_MEMLOCK))
"""


def may_raise_limits():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return bool(int(status["CapEff"], 16) >> 24 & 1)


def limits_after(soft, hard, user):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(soft), str(hard), str(user)],
                          capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


@pytest.mark.skipif(not may_raise_limits(), reason="this process has no CAP_SYS_RESOURCE")
def test_root_lifts_the_limit():
    assert limits_after(64 * KIB, 64 * KIB, 0) == (resource.RLIM_INFINITY,) * 2


def test_another_user_gets_the_hard_limit():
    assert limits_after(64 * KIB, 128 * KIB, 65534) == (128 * KIB, 128 * KIB)
