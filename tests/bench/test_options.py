"""The options of ``python -m bench``: a wrong option is refused before the first measurement."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from bench import cli, profiles, record
from bench.blocks import SlotResult
from bench.metrics import lookup
from bench.summary import load


def steps(*argv):
    return cli._steps(cli._parser().parse_args(argv))[0]


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    def fail(*_):
        raise AssertionError("a lab was set up")

    monkeypatch.setattr(cli, "Lab", fail)
    monkeypatch.setattr(cli.flame, "Lab", fail)


@pytest.mark.parametrize(
    ("argv", "messages"),
    [
        (["tcp", "--profile", "P9"], ["'P9'", "P1", "P4"]),
        (["tcp", "--blocks", "0"], ["'0'", "expected a number above 0"]),
        (["tcp", "--blocks", "many"], ["'many'", "expected a number above 0"]),
        (["tcp", "--seconds", "-1"], ["'-1'", "expected a number above 0"]),
        (["tcp", "--minutes", "nan"], ["'nan'", "expected a number above 0"]),
        (["tcp", "--congestion", "warp"], ["'warp'", "expected one of"]),
        (["tcp", "--contender", "nobody"], ["'nobody'", "expected one of udptun, direct"]),
        (["tcp", "--with", "nobody"], ["'nobody'", "expected one of udptun, direct"]),
        (["tcp", "--variant", "1 up"], ["tcp: variant '1 up'", "N there, N back or N both"]),
        (["rtt", "--variant", "sctp idle"], ["rtt: variant 'sctp idle'", "udp, tcp or ping"]),
        (["pps", "--variant", "64"], ["pps: variant '64'", "N bytes"]),
        (["gap", "--variant", "0 routes"], ["gap: variant '0 routes'", "N: 1..1000000"]),
        (["isolation", "--variant", "151 dead"], ["isolation: variant '151 dead'", "N: 1..150"]),
        (["scale", "--variant", "101 peers"], ["scale: variant '101 peers'", "N: 1..100"]),
        (["pps", "--variant", "9 bytes"], ["pps: variant '9 bytes'", "16..1400"]),
        (["tcp", "--variant", "129 there"], ["tcp: variant '129 there'", "N: 1..128"]),
        (["scale", "--variant", "5 hosts"], ["scale: variant '5 hosts'", "N peers"]),
        (["lookup", "--variant", "v5 hit 9"], ["lookup: variant 'v5 hit 9'", "v4 or v6"]),
        (["start", "--variant", "fast"], ["start: variant 'fast'", "expected none"]),
        (["lookup", "--profile", "P2"], ["lookup: profile 'P2'", "uses no wire"]),
        (["gap", "--contender", "vxlan"], ["gap: contender 'vxlan'", "expected udptun"]),
        (["tcp", "--contender", "copylimit", "--profile", "P2"],
         ["tcp: contender 'copylimit' on profile P2", "expected profile P1"]),
        (["flame", "--contender", "copylimit", "--profile", "P3", "--out", "x"],
         ["contender 'copylimit' on profile P3", "expected profile P1"]),
        (["tcp", "--contender", "udptun --offlod off"], ["'udptun --offlod off'", "--offload"]),
        (["tcp", "--contender", "udptun --offload of"], ["--offload", "'of' is not valid"]),
        (["gap", "--with", "udptun --workers many"], ["--workers", "'many' is not valid"]),
        (["flame", "--contender", "udptun --mtu", "--out", "x"], ["--mtu", "requires an argument"]),
        (["quick", "--variant", "9 lives"], ["'9 lives'", "N there", "udp idle"]),
    ],
)
def test_a_wrong_option_is_refused_with_the_value_and_what_was_expected(
    argv, messages, capsys, monkeypatch
):
    monkeypatch.setattr(cli, "_missing_requirement", lambda: None)
    try:
        code = cli.main(argv)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    text = capsys.readouterr().err
    for message in messages:
        assert message in text


class NoLab:
    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def close(self):
        return ""


@pytest.fixture
def interrupted(monkeypatch, tmp_path, capsys):
    """The folder of a run that Ctrl-C ended in its third of four blocks."""
    monkeypatch.setattr(cli, "_missing_requirement", lambda: None)
    monkeypatch.setattr(cli, "Lab", NoLab)
    blocks = []

    def look_up(self):
        blocks.append(self.variant)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return SlotResult({"lookup_ns": 5.0})

    monkeypatch.setattr(lookup.LookUps, "__call__", look_up)
    argv = ["lookup", "--blocks", "2", "--variant", "v4 hit 9", "--variant", "v6 hit 9",
            "--out", str(tmp_path)]
    monkeypatch.setattr(cli.sys, "argv", ["bench", *argv])
    assert cli.main(argv) == 130
    assert f"python -m bench resume {tmp_path}" in capsys.readouterr().err
    assert blocks == ["v4 hit 9", "v4 hit 9", "v6 hit 9"]
    return tmp_path, blocks


def test_an_interrupted_run_is_continued(interrupted):
    """What was measured is not measured again, and the report has everything."""
    folder, blocks = interrupted
    assert "interrupted" in (folder / "report.md").read_text()
    blocks[:] = []
    assert cli.main(["resume", str(folder)]) == 0
    assert blocks == ["v6 hit 9", "v6 hit 9"]
    run = load(record.read(folder))
    assert set(run.accepted.values()) == {2}
    assert (run.ended, run.parts) == ("complete", 2)
    assert len([line for line in record.read(folder) if line["kind"] == "run"]) == 1


def test_a_run_of_another_revision_is_not_continued(interrupted, monkeypatch, capsys):
    monkeypatch.setattr(cli.system, "facts", lambda: {"revision": "other"})
    assert cli.main(["resume", str(interrupted[0])]) == 2
    assert "revision" in (text := capsys.readouterr().err)
    assert "now other" in text


def test_a_folder_without_a_run_cannot_be_continued(tmp_path, capsys):
    (tmp_path / record.LINES).write_text("")
    assert cli.main(["resume", str(tmp_path)]) == 2
    assert "expected the record of a run" in capsys.readouterr().err


def test_a_run_says_how_long_it_takes(tmp_path):
    steps, budget = cli.full()
    jobs = [job for metric, plan in steps for job in metric.jobs(plan)]
    with record.Recorder(tmp_path) as recorder:
        text = cli._announcement(jobs, budget, recorder)
        late = cli._announcement(jobs, budget / 9, recorder)
    expected, most = map(int, re.findall(r"(\d+) min", text))
    assert expected <= 0.8 * most < 90  # blocks may be rejected
    assert "left out" not in text
    assert "left out" in late


@pytest.mark.parametrize("how", ["complete", "out of time"])
def test_a_run_that_measures_nothing_fails(how, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_missing_requirement", lambda: None)
    monkeypatch.setattr(cli, "Lab", NoLab)
    monkeypatch.setattr(cli, "Session", lambda *_: None)
    monkeypatch.setattr(cli, "_run", lambda *_: how)
    assert cli.main(["tcp", "--out", str(tmp_path)]) == 1
    assert "bench: nothing was measured" in capsys.readouterr().err


def test_options_change_the_plan():
    [(metric, plan)] = steps(
        "pps", "--blocks", "7", "--seconds", "9", "--profile", "P4", "--profile", "P1",
        "--variant", "100 bytes", "--contender", "vxlan", "--with", "udptun --workers 2",
    )
    assert metric.name == "pps"
    assert (plan.blocks, plan.seconds, plan.profiles) == (7, 9, ("P4", "P1"))
    assert plan.variants == ("100 bytes",)
    assert plan.contenders == ("vxlan", "udptun --workers 2")


def test_a_command_with_several_metrics_measures_those_that_have_the_variant():
    [(metric, plan)] = steps("quick", "--variant", "udp idle")
    assert (metric.name, plan.variants) == ("rtt", ("udp idle",))


def test_a_command_with_several_metrics_measures_those_that_support_the_contender():
    names = [metric.name for metric, _ in steps("full", "--contender", "vxlan")]
    assert "gap" not in names
    assert names.count("tcp") > 1
    assert "kill" not in names


def test_p4_is_measured_by_full_and_on_request():
    assert any("P4" in plan.profiles for _, plan in steps("full"))
    for command in ("quick", *cli.SINGLE):
        assert all("P4" not in plan.profiles for _, plan in steps(command))
    assert [plan.profiles for _, plan in steps("quick", "--profile", "P4")] == [("P4",)] * 2


@pytest.mark.parametrize("command", ["quick", "full", "flame", *cli.SINGLE])
def test_the_help_explains_the_profiles(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, profile in profiles.PROFILES.items():
        assert f"{name} {profile.text}" in text


@pytest.mark.parametrize("command", [c for c, (metric, _) in cli.SINGLE.items() if metric.pattern])
def test_the_default_variants_are_possible(command):
    metric, plan = cli.SINGLE[command]
    for variant in (*metric.variants, *plan.variants):
        assert metric.variant_problem(plan, variant) is None


def test_the_kernels_congestion_control_is_accepted():
    name = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    assert cli._congestion_control(name) == name
    with pytest.raises(argparse.ArgumentTypeError, match="'no-such-control'"):
        cli._congestion_control("no-such-control")


def test_the_commands_of_the_readme_are_accepted():
    """A contender's programs may be missing here; its description is checked."""
    text = (Path(__file__).resolve().parents[2] / "bench" / "README.md").read_text()
    (block,) = re.findall(r"^```sh\n([^`]*)^```", text, re.MULTILINE)
    commands = [shlex.split(line, comments=True)[3:] for line in block.splitlines()]
    assert len(commands) >= 4
    for command in commands:
        if command != ["--help"]:
            arguments = cli._parser().parse_args(command)
            assert arguments.run is not cli._measure or cli._steps(arguments)


def test_the_readme_explains_every_profile():
    text = (Path(__file__).resolve().parents[2] / "bench" / "README.md").read_text()
    assert tuple(re.findall(r"^\| (P\d) \|", text, re.MULTILINE)) == profiles.NAMES
