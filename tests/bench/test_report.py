"""Figures, verdicts, Markdown and the table in README.md, made from the lines of a run."""

import pytest

from bench import goals, profiles, readme, record, report, summary
from bench.units import number, spread

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
    found = {v.goal.row: v for v in goals.verdicts(run)}
    against_vxlan = found["TCP 1 stream, P1, vs kernel VXLAN"]
    assert against_vxlan.meets_required is True
    assert against_vxlan.meets_target is False
    assert found["TCP 1 stream, P2, vs kernel VXLAN"].meets_required is None
    assert len(found) == len(goals.GOALS)


def test_every_goal_names_a_value_with_a_unit():
    assert all(goal.value in report.UNITS for goal in goals.GOALS)
    for goal in goals.GOALS:
        assert (goal.target > goal.required) == goal.at_least


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


def test_only_the_block_in_readme_is_replaced(run):
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    new = readme.rewritten(text, readme.comparison(run))
    assert new.startswith(f"before\n{readme.BEGIN}\n|")
    assert new.endswith(f"{readme.END}\nafter\n")
    assert "old" not in new
    assert "**udptun**" in new
    assert readme.rewritten(new, readme.comparison(run)) == new


def test_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="bench:begin"):
        readme.rewritten("nothing", "block")


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
