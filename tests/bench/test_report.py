"""Figures, verdicts, Markdown and the table in README.md, made from the lines of a run."""

import re
from pathlib import Path

import pytest

from bench import cli, goals, profiles, readme, record, report, summary
from bench.units import number, spread

ROOT = Path(__file__).resolve().parents[2]
TCP = {"metric": "tcp", "profile": "P1", "variant": "1 there"}  # one stream, from a to b


def slot(block, contender, value, refused=None, key=TCP, name="bits_per_second"):
    return {
        "kind": "slot", **key, "block": block, "contender": contender, "refused": refused,
        "values": {} if refused else {name: value}, "busy": 0.9, "stolen": 0.0, "at": 5.0,
    }


def block(number, rejected=None, key=TCP):
    return {"kind": "block", **key, "block": number, "rejected": rejected, "at": 6.0}


LINES = [
    {"kind": "run", "at": 1.0, "command": "python -m bench quick",
     "machine": {"processor": "2 x Fast", "kernel": "6.18", "revision": "abc of today"}},
    {"kind": "offloads", "profile": "P1", "text": "tso on", "at": 2.0},
    {"kind": "contender", "name": "udptun", "inner_mtu": 1472, "carries": "udp dport 8285",
     "in_use": ["tun-gso"], "off": {}, "at": 2.0},
    slot(0, "vxlan", 10e9), slot(0, "udptun", 8e9), slot(0, "udptun", 8e9), slot(0, "vxlan", 10e9),
    slot(0, "onepacket", 0.5e9), block(0),
    slot(1, "vxlan", 99e9), slot(1, "udptun", 1e9), block(1, "2 % stolen"),
    slot(2, "vxlan", 20e9), slot(2, "udptun", 0, "0 bytes crossed"), slot(2, "udptun", 14e9),
    block(2),
    slot(3, "vxlan", 1e9),
    {"kind": "note", "text": "fastd was not measured: not installed", "at": 8.0},
    {"kind": "end", "how": "out of time", "at": 61.0},
]


@pytest.fixture
def run():
    return summary.load(LINES)


def test_rejected_blocks_and_refused_slots_are_left_out(run):
    figures = run.get("tcp", "P1", "1 there", "bits_per_second")
    assert figures.names() == ["vxlan", "udptun", "onepacket"]
    assert len(figures.blocks) == 2
    assert figures.ratio("udptun", "vxlan").median == pytest.approx(0.75)
    assert figures.level("udptun").median == pytest.approx(11e9)
    assert run.accepted == {("tcp", "P1", "1 there"): 2}


def test_the_report_lists_what_was_left_out(run):
    key = ("tcp", "P1", "1 there")
    assert run.rejected == [(key, 1, "2 % stolen")]
    assert run.refused == [(key, 2, "udptun", "0 bytes crossed")]
    text = report.markdown(run)
    assert "block 1 rejected: 2 % stolen" in text
    assert "udptun refused: 0 bytes crossed" in text
    assert "fastd was not measured" in text
    assert "out of time" in text


def test_verdicts(run):
    found = {(v.goal.row, v.goal.subject, v.goal.compared): v for v in goals.verdicts(run)}
    assert len(found) == len(goals.GOALS)
    missed = found["TCP 1 stream, P1", goals.WORKERS, "vxlan"]
    assert (missed.measured.median, missed.meets_required) == (pytest.approx(0.75), False)
    assert found["TCP 1 stream, P2", goals.WORKERS, "vxlan"].meets_required is None
    express = found["TCP 1 stream, P1", goals.EXPRESS, "vxlan"]
    assert (express.measured, express.meets_target) == (None, None)


def test_the_report_counts_the_goals(run):
    """One figure is below both of its limits, one above both."""
    text = report.markdown(run)
    others = len(goals.GOALS) - 2
    assert f"Of {len(goals.GOALS)} required values, 1 are met, 1 are missed, {others} are" in text
    assert "| TCP 1 stream, P1 | udptun | vxlan | 0.75 (0.7..0.8), n=2 | >= 0.8 | >= 1" in text


def test_a_goal_that_compares_two_variants():
    """Of one contender, block by block."""
    few, many = (
        {"metric": "scale", "profile": "P1", "variant": f"{peers} peers"} for peers in (1, 100))
    name = "pps_at_half_percent"
    lines = [LINES[0]]
    for n, (one, hundred) in enumerate(((100, 50), (200, 160), (100, 70))):
        for key, value in ((few, one), (many, hundred)):
            lines += [slot(n, "udptun", value, key=key, name=name), block(n, key=key)]
    goal = next(g for g in goals.GOALS if g.relative and g.subject == goals.WORKERS)
    assert goal.measured(summary.load(lines)).median == pytest.approx(0.7)
    assert goal.measured(summary.load(lines[:3])) is None


def test_every_goal_names_a_value_with_a_unit():
    assert all(goal.value in report.UNITS for goal in goals.GOALS)
    for goal in goals.GOALS:
        assert goal.target == goal.required == 0 or (goal.target > goal.required) == goal.at_least


def test_the_full_run_measures_every_goal():
    """Each goal has its figure and the figure that it is compared with, on the same profile."""
    measured = {(metric.name, profile, variant, contender)
                for metric, plan in cli.full()[0] for profile in plan.profiles
                for variant in (plan.variants or metric.variants) for contender in plan.contenders}
    for goal in goals.GOALS:
        at = goal.metric, goal.profile
        needed = {(*at, goal.variant, goal.subject)}
        needed |= {(*at, goal.variant, goal.against)} if goal.against else set()
        needed |= {(*at, goal.relative, goal.subject)} if goal.relative else set()
        assert needed <= measured, goal


def test_a_goal_where_less_is_better():
    memory = next(g for g in goals.GOALS if g.metric == "memory")
    assert memory.reaches(63.0, memory.required)
    assert not memory.reaches(65.0, memory.required)


def test_terminal_output_has_each_title_once(run):
    text = report.terminal(run)
    assert text.count("TCP throughput") == 1
    assert "1 blocks rejected, 1 figures refused" in text


@pytest.mark.parametrize("output", [report.markdown, report.terminal, readme.comparison])
def test_every_output_explains_its_profiles(run, output):
    assert profiles.PROFILES["P1"].text in output(run)


def test_markdown_tables_have_as_many_cells_as_heads(run):
    width = None
    for line in report.markdown(run).splitlines():
        if not line.startswith("|"):
            width = None
            continue
        width = width or line.count("|")
        assert line.count("|") == width, line


def blocks_of(text):
    return f"{text}\n".join(
        f"{start}\n{text}\n{end}\n" for start, end in map(readme.markers, readme.BLOCKS))


def test_only_the_blocks_in_readme_are_replaced(run):
    text = f"before\n{blocks_of('old')}after\n"
    new = readme.rewritten(text, run)
    assert new.startswith(f"before\n{readme.markers('bench:costs')[0]}\n|")
    assert new.endswith(f"{readme.markers('bench')[1]}\nafter\n")
    assert new.count("old") == 1  # between the two
    assert "**udptun**" in new
    assert readme.rewritten(new, run) == new


def test_readme_without_markers_is_refused(run):
    with pytest.raises(ValueError, match="bench:costs:begin"):
        readme.rewritten("nothing", run)


def test_the_readme_shows_both_paths(run):
    assert "This run did not measure `--accelerate auto`." in readme.comparison(run)
    assert "| 0.75 (P1) | not measured |" in readme.costs(run)
    lines = [*LINES[:3]]
    bulk = {"metric": "rtt", "profile": "P1", "variant": "udp bulk"}
    for key, name in ((TCP, "bits_per_second"), (bulk, "p50_ns")):
        for contender, value in (("vxlan", 20e3), ("udptun", 80e3), (goals.EXPRESS, 10e3)):
            lines.append(slot(0, contender, value, key=key, name=name))
        lines.append(block(0, key=key))
    both = summary.load(lines)
    assert "| TCP throughput, one stream | more | 4.00 (P1) | 0.5 (P1) |" in readme.costs(both)
    assert "| round trip beside a TCP stream | less | 4.00 (P1) | 0.5 (P1) |" in readme.costs(both)
    text = readme.comparison(both)
    assert "round trip beside TCP, P1, us" in text
    assert "| **udptun, `--accelerate auto`** |" in text
    assert "did not measure" not in text


def test_readme_has_the_figures_of_the_committed_run():
    """``python -m bench readme docs/bench/lines.jsonl`` would change nothing, and the report is
    that of these lines."""
    run = summary.load(record.read(ROOT / "docs" / "bench"))
    text = (ROOT / "README.md").read_text()
    assert readme.rewritten(text, run) == text
    committed = (ROOT / "docs" / "bench" / "report.md").read_text()
    plots = re.findall(r"^!\[.*\]\((.*)\)$", committed, re.MULTILINE)
    assert report.markdown(run, plots) == committed
    assert all((ROOT / "docs" / "bench" / plot).exists() for plot in plots)


def test_a_run_without_udptun_gives_no_comparison():
    with pytest.raises(ValueError, match="no figures of udptun"):
        readme.comparison(summary.load(LINES[:1]))


def test_lines_are_read_as_they_were_written(tmp_path):
    with record.Recorder(tmp_path) as recorder:
        recorder.write("run", command="x", machine={})
        recorder.note("once")
        recorder.note("once")
    found = record.read(tmp_path)
    assert [line["kind"] for line in found] == ["run", "note"]
    assert found == recorder.lines


@pytest.mark.parametrize(
    ("text", "message"), [("{", "line 1 is not JSON"), ("[]", "line 1 has no kind")]
)
def test_invalid_lines_are_named(tmp_path, text, message):
    (tmp_path / record.LINES).write_text(text)
    with pytest.raises(ValueError, match=message):
        record.read(tmp_path)


@pytest.mark.parametrize(
    ("value", "want"), [(0, "0"), (0.083, "0.083"), (0.65, "0.65"), (9.43, "9.43"), (15.84, "15.8"),
                        (246.2, "246"), (100000, "100000")],
)
def test_numbers(value, want):
    assert number(value) == want


def test_without_an_estimate_the_spread_is_a_dash():
    assert spread(None) == "-"


def test_a_contender_in_fewer_blocks_is_named():
    lines = [*LINES[:3]]
    for n in range(3):
        lines += [slot(n, "vxlan", 10e9), slot(n, "udptun", 9e9), block(n)]
    lines += [slot(3, "vxlan", 10e9), slot(3, "fastd", 1e9), block(3)]
    text = report.markdown(summary.load(lines))
    assert "4 blocks (3 of udptun, 1 of fastd)" in text


def test_the_share_of_the_express_path_is_a_column():
    lines = [{**line, "in_kernel": 0.25} if line.get("contender") == "udptun" else line
             for line in LINES]
    text = report.markdown(summary.load(lines))
    assert "| contender | Gbit/s | vs vxlan | vs onepacket | machine busy | sent by the" in text
    assert re.search(r"^\| udptun \| .* \| 25% \|$", text, re.MULTILINE)
    assert re.search(r"^\| vxlan \| .* \| - \|$", text, re.MULTILINE)


def test_the_time_between_two_parts_of_a_run_does_not_count():
    lines = [*LINES, {"kind": "resume", "at": 10061.0, "machine": {}},
             {"kind": "end", "how": "complete", "at": 10071.0}]
    run = summary.load(lines)
    assert (run.seconds, run.parts, run.ended) == (70.0, 2, "complete")
    assert "1 minutes in 2 parts, complete" in report.markdown(run)
