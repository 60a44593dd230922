"""The descriptors that a forwarder inherits: from systemd, and from the node daemon."""

import json
import os
import subprocess
import sys

from udptun.takeover.kept import inherited, variable

PROGRAM = """
import json, os
from udptun.takeover.kept import inherited
named = inherited()
print(json.dumps([named, [os.get_inheritable(fd) for fd in named.values()],
                  sorted(name for name in os.environ if name.startswith(("LISTEN_", "UDPTUN_")))]))
"""


def started(environment, fds=(), shell="exec"):
    argv = ["bash", "-c", f'{shell} "$0" "$@"', sys.executable, "-c", PROGRAM]
    out = subprocess.run(argv, env=os.environ | environment, pass_fds=fds, check=True,
                         capture_output=True, text=True).stdout
    return json.loads(out)


def test_from_systemd():
    """A descriptor with another name (here: stored) is not one that udptun has stored. It is
    ignored."""
    read, write = os.pipe()
    try:
        environment = {"LISTEN_FDS": "3", "LISTEN_FDNAMES": "tun-0:stored:udp-0-4"}
        open_three = f"exec 3<&{read} 4<&{read} 5<&{read}; LISTEN_PID=$$ exec"
        assert started(environment, (read,), open_three) == [
            {"tun-0": 3, "udp-0-4": 5}, [False, False], []]
        assert started(environment | {"LISTEN_PID": "1"})[0] == {}
    finally:
        os.close(read)
        os.close(write)


def test_from_the_node_daemon():
    read, write = os.pipe()
    try:
        environment = variable({"tun-0": read, "udp-0-6": write})
        assert started(environment, (read, write)) == [
            {"tun-0": read, "udp-0-6": write}, [False, False], []]
        assert started(environment)[0] == {}, "they are not open"
    finally:
        os.close(read)
        os.close(write)


def test_invalid_variables_give_no_descriptors():
    for text in ("x", "tun-0", "tun-0=", "=3", "lock=1", "tun-0=x"):
        assert inherited({"UDPTUN_KEPT_DESCRIPTORS": text}) == {}
    assert inherited({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "-1"}) == {}
