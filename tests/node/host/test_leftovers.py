"""When flannel's leftovers stay: real processes with flannel's names, and a real /proc."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import contextmanager
from ipaddress import ip_network

import pytest

from tests.node.daemon_host import NETWORK as CONFIG
from tests.own_netns import in_own_netns, sh
from udptun.net.netlink import Netlink
from udptun.node.host import leftovers

ASK = "from udptun.node.host.leftovers import why_keep; print(why_keep())"
ASK_WITHOUT_COMM = ASK.replace(
    "; ", "; from udptun.node.host import leftovers; leftovers._comm = lambda process: 'main'; ")
NO_PTRACE = ("setpriv", "--bounding-set", "-sys_ptrace")


@contextmanager
def running(folder, name):
    program = folder / name
    shutil.copy(shutil.which("sleep"), program)
    # ``exec`` has happened when Popen returns.
    process = subprocess.Popen([program, "1000"])
    try:
        yield program
    finally:
        process.kill()
        process.wait()


def ask(*wrapper, code=ASK):
    if wrapper and shutil.which(wrapper[0]) is None:
        pytest.skip(f"{wrapper[0]} is missing")
    done = subprocess.run([*wrapper, sys.executable, "-c", code], capture_output=True, text=True,
                          check=False)
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert not done.stderr
    return done.stdout.strip()


@in_own_netns
def test_a_why_keepd_is_seen(tmp_path):
    with running(tmp_path, "flanneld"):
        assert leftovers.why_keep() == "flanneld runs here"


@in_own_netns
def test_a_why_keepd_is_seen_without_the_privilege_to_inspect_it(tmp_path):
    """The unit and the DaemonSet give no CAP_SYS_PTRACE."""
    with running(tmp_path, "flanneld"):
        assert ask(*NO_PTRACE).startswith("flanneld runs")


@in_own_netns
def test_a_running_program_is_seen_whose_file_was_removed(tmp_path, monkeypatch):
    """By the name of its file; a process can change its comm."""
    monkeypatch.setattr(leftovers, "_comm", lambda process: "main")
    with running(tmp_path, "k3s") as program:
        program.unlink()
        assert leftovers.why_keep() == "k3s runs here"


@in_own_netns
def test_without_the_privilege_the_command_line_decides(tmp_path):
    with running(tmp_path, "flanneld"):
        assert ask(*NO_PTRACE, code=ASK_WITHOUT_COMM).startswith("flanneld runs")


@in_own_netns
def test_if_the_host_is_not_visible_no_leftover_is_removed():
    assert ask("unshare", "--pid", "--fork", "--mount-proc") == \
        "the host's processes are not visible here"


@in_own_netns
@pytest.mark.parametrize(("why", "reported"), [
    (leftovers.HIDDEN, True), ("flanneld runs here", False), ("", False)])
async def test_a_leftover_that_stays_is_reported(monkeypatch, why, reported):
    """In a container. If a flannel runs, it is none."""
    monkeypatch.setattr(leftovers, "why_keep", lambda: why)
    sh("nft add table ip flannel-ipv4", "nft add chain ip flannel-ipv4 postrtg")
    with Netlink() as netlink:
        left = leftovers.Leftovers(netlink)
        await left.remove(CONFIG, ())
        assert [*left.found] == (["flannel-ipv4"] if reported else [])
        sh("nft delete table ip flannel-ipv4")
        await left._attempt(left._remove_rules)
        assert left.found == {}


@in_own_netns
async def test_a_host_without_flannel_is_not_said_to_have_its_rules(monkeypatch, caplog):
    monkeypatch.setattr(leftovers, "why_keep", lambda: leftovers.HIDDEN)
    with Netlink() as netlink:
        await leftovers.Leftovers(netlink).remove(CONFIG, ())
    assert "flannel" not in caplog.text


# -- the rules of iptables ------------------------------------------------------------------------

NETWORK = ip_network("10.244.0.0/16")
FLANNEL = f"""\
*filter
:FLANNEL-FWD - [0:0]
:FLANNEL-FWD-EXTRA - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FORWARD -m comment --comment "before -j FLANNEL-FWD" -j ACCEPT
-A FORWARD -j FLANNEL-FWD-EXTRA
-A FLANNEL-FWD -s {NETWORK} -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d {NETWORK} -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
"""


def restore(text):
    if shutil.which("iptables-nft-restore") is None:
        pytest.skip("iptables-nft-restore is missing")
    subprocess.run(["iptables-nft-restore", "-n"], input=text, text=True, check=True)


def forward_rules():
    return [line for line in sh("iptables-nft-save -t filter").splitlines()
            if line.startswith("-A")]


@in_own_netns
async def test_only_jumps_to_flannels_chain_are_removed_with_it():
    restore(FLANNEL)
    before = forward_rules()
    assert not await leftovers._remove_chains(NETWORK, "nft")
    assert forward_rules() == before[1:3]
    assert "-A FORWARD -j FLANNEL-FWD-EXTRA" in before[1:3]


@in_own_netns
@pytest.mark.parametrize("rule", [
    f"-s {NETWORK} -j DROP", f"-s {NETWORK} -i eth0 -j ACCEPT", "-i eth0 -j ACCEPT",
    f'-m comment --comment "-s {NETWORK} -j ACCEPT"',
])
async def test_a_chain_with_another_rule_stays(rule):
    restore(FLANNEL + f"*filter\n-A FLANNEL-FWD {rule}\nCOMMIT\n")
    before = forward_rules()
    assert await leftovers._remove_chains(NETWORK, "nft") == [
        "the chain FLANNEL-FWD of iptables (nft) stays: not all of its rules are flannel's"]
    assert forward_rules() == before
