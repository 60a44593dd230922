"""Contenders by their words, and description files."""

import pytest

from bench.contenders import DESCRIPTIONS, external, find

GOOD = 'title = "T"\ncarries = "udp dport 1"\ndevice = "t0"\nmtu = 1400\nstart = "run {here}"\n'


@pytest.mark.parametrize(
    "words",
    ["direct", "vxlan", "onepacket", "copylimit", "udptun", "udptun --offload off",
     "udptun --workers 2 --offload 'auto,-udp-gso'", *external.names()],
)
def test_find_keeps_the_words(words):
    assert find(words).name == words


def test_the_copy_limit_exists_on_p1_only():
    assert find("copylimit").profiles == ("P1",)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [("nobody", "no contender goes by 'nobody'; there are udptun, direct"),
     ("vxlan --fast", "takes no options"), ("udptun@/nowhere", "no built udptun in /nowhere")],
)
def test_find_complains(words, complaint):
    with pytest.raises(ValueError, match=complaint):
        find(words)


def test_the_descriptions_here_are_good():
    assert external.names() == ["fastd", "tinc"]
    for name in external.names():
        description = external.parse((DESCRIPTIONS / f"{name}.toml").read_text(), name)
        values = dict.fromkeys(
            ("here", "there", "inner", "inner_there", "mtu", "device", "dir", "dir_there", "side",
             "other"), "x",
        )
        commands = [description["start"], *description["prepare"], *description["setup"]]
        for command in commands:
            assert "{" not in " ".join(external.words(command, values))
        for text in description["files"].values():
            text.format_map(values)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("title = ", "t: "), (GOOD.replace("mtu = 1400\n", ""), "t: missing mtu"),
     (GOOD + "colour = 1", "t: unknown colour"),
     (GOOD + 'profiles = ["P9"]', "t: no such profile: P9")],
)
def test_a_bad_description_is_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        external.parse(text, "t")


def test_a_value_with_a_space_stays_one_word():
    assert external.words("run --at {here}", {"here": "a b"}) == ["run", "--at", "a b"]
    assert external.words(["sh", "-c", "x {here}"], {"here": "a b"}) == ["sh", "-c", "x a b"]


def test_programs_that_are_missing_are_found_missing():
    description = external.parse(GOOD + 'programs = ["no-such-program-here", "sh"]', "t")
    assert external.missing(description) == ["no-such-program-here"]
