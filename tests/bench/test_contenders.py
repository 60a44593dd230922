"""The look-up of a contender by its specification, and the description files of contenders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.contenders import DESCRIPTIONS, external, find
from udptun.lab import Unavailable, ping, vxlan

GOOD = 'title = "T"\ncarries = "udp dport 1"\ndevice = "t0"\nmtu = 1400\nstart = "run {here}"\n'


@pytest.mark.parametrize(
    "spec",
    ["direct", "vxlan", "onepacket", "copylimit", "udptun", "udptun --offload off",
     "udptun --workers 2 --offload 'auto,-udp-gso'", *external.names()],
)
def test_find_keeps_the_specification(spec):
    assert find(spec).name == spec


def test_the_copy_limit_exists_on_p1_only():
    assert find("copylimit").profiles == ("P1",)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("unknown", "contender 'unknown': expected one of udptun, direct"),
     ("", "contender '': expected one of udptun, direct"),
     ("vxlan --fast", "'vxlan --fast': vxlan takes no options"),
     ("./no-such.toml", "contender './no-such.toml': No such file"),
     ("udptun@/nowhere", "'udptun@/nowhere': no built udptun in /nowhere")],
)
def test_find_refuses_an_invalid_specification(spec, message):
    with pytest.raises(ValueError, match=message):
        find(spec)


@pytest.mark.parametrize("module", ["base", "builtin", "external", "registry"])
def test_each_module_can_be_imported_first(module):
    """The package has no import cycle: only the registry imports builtin and external."""
    code = (
        "import sys, types; import bench; p = types.ModuleType('bench.contenders'); "
        "p.__path__ = [bench.__path__[0] + '/contenders']; sys.modules['bench.contenders'] = p; "
        f"import bench.contenders.{module}; "
        "print(*(n.rpartition('.')[2] for n in sys.modules if n.startswith('bench.contenders.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert loaded == {"base", "builtin", "external", "registry"} if module == "registry" else (
        loaded == {"base", module}
    )


def test_our_descriptions_are_valid():
    assert external.names() == ["fastd", "tinc"]
    for name in external.names():
        description = external.parse((DESCRIPTIONS / f"{name}.toml").read_text(), name)
        values = dict.fromkeys(
            ("here", "there", "inner", "inner_there", "mtu", "device", "dir", "dir_there", "side",
             "other"), "x",
        )
        commands = [description["start"], *description["prepare"], *description["setup"]]
        for command in commands:
            assert "{" not in " ".join(external.argv(command, values))
        for text in description["files"].values():
            text.format_map(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [("title = ", "t: "), (GOOD.replace("mtu = 1400\n", ""), "t: missing mtu"),
     (GOOD + "colour = 1", "t: unknown colour"),
     (GOOD + 'profiles = ["P9"]', "t: unknown profile P9; expected P1, P2, P3, P4"),
     (GOOD.replace("1400", '"1400"'), "t: mtu: '1400': expected a whole number"),
     (GOOD.replace("{here}", "{hear}"), "t: start: 'run {hear}': expected only the placeholders"),
     (GOOD.replace("{here}", "{"), "t: start: 'run {': expected only the placeholders"),
     (GOOD + 'setup = "link set up"', "t: setup: 'link set up': expected a list of commands"),
     (GOOD + 'setup = [["ip", 5]]', "t: setup: .*: expected a list of commands"),
     (GOOD + "device = 5".replace("device", "package"), "t: package: 5: expected text")],
)
def test_an_invalid_description_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        external.parse(text, "t")


def test_a_value_with_a_space_stays_one_word():
    assert external.argv("run --at {here}", {"here": "a b"}) == ["run", "--at", "a b"]
    assert external.argv(["sh", "-c", "x {here}"], {"here": "a b"}) == ["sh", "-c", "x a b"]


def test_missing_programs_are_detected():
    description = external.parse(GOOD + 'programs = ["no-such-program-here", "sh"]', "t")
    assert external.missing(description) == ["no-such-program-here"]


def test_a_file_is_named_by_its_path(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(GOOD)
    assert find(str(file)).name == str(file)
    file.write_text(GOOD.replace("{here}", "{hear}"))
    with pytest.raises(ValueError, match="hear"):
        find(str(file))


TUNNEL = """
title = "a VXLAN device, set up by commands"
carries = "udp dport 9999"
device = "vx9"
mtu = 1450
prepare = [["sh", "-c", "echo {side} >/run/bench-side"]]
start = ["sh", "-c",
  "ip link add {device} type vxlan id 9 dstport 9999 local {here} remote {there}; sleep 999"]
setup = [
  "address add {inner}/24 dev {device}",
  ["sh", "-c", "test $(cat /run/bench-side) = {side} && ip link set {device} up mtu {mtu}"],
]
"""


@pytest.mark.netns
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_both_ends_have_a_run_of_their_own_and_any_set_up(lab, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(TUNNEL)
    try:
        a, b = lab.host("a"), lab.host("b")
        lab.link(a, b)
        vxlan(a, b)
    except Unavailable as e:
        pytest.skip(str(e))
    path = find(str(file)).set_up(lab)
    assert ping(path.a, path.at_b, count=1).received
    assert not Path("/run/bench-side").exists()
