"""The grammar of --offload, and the dependencies between features."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest

from udptun.device.offload import FEATURES, MEANINGS, NEEDS, Capabilities, OffloadRequest
from udptun.errors import FieldError

ALL = frozenset(FEATURES)


@dataclass
class Part:
    features: frozenset[str]
    off: dict[str, str] = field(default_factory=dict)


TUN = Part(frozenset({"tun-gso", "tun-uso"}))
UDP = Part(frozenset({"udp-gso", "udp-gro"}))


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("auto", ALL),
        ("off", frozenset()),
        ("auto,-udp-merge,-udp-gso", ALL - {"udp-merge", "udp-gso"}),
        ("off,+batch", {"batch"}),
        ("off, +batch , +udp-gro", {"batch", "udp-gro"}),
        ("-tun-gso", ALL - {"tun-gso"}),
        ("auto,-batch,+batch", ALL),
    ],
)
def test_parse(text, features):
    assert OffloadRequest.parse(text).features == features


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", ""), ("on", "on"), ("auto,", ""), ("auto,batch", "batch"), ("auto,-gso", "-gso"),
        ("batch", "batch"), ("auto,off", "off"), ("-auto", "-auto"), ("AUTO", "AUTO"),
        ("auto,--batch", "--batch"), ("auto,-", "-"),
    ],
)
def test_parse_refuses(text, word):
    with pytest.raises(FieldError) as caught:
        OffloadRequest.parse(text)
    assert (caught.value.field, caught.value.value) == ("offload", word)
    assert all(name in str(caught.value) for name in ("auto", "off", *FEATURES))


def test_every_request_is_parsed_back_from_its_text():
    for n in range(len(FEATURES) + 1):
        for names in itertools.combinations(FEATURES, n):
            request = OffloadRequest(frozenset(names))
            assert OffloadRequest.parse(str(request)) == request


def test_text_is_short():
    assert str(OffloadRequest()) == "auto"
    assert str(OffloadRequest(frozenset())) == "off"
    assert str(OffloadRequest(ALL - {"batch"})) == "auto,-batch"
    assert str(OffloadRequest(frozenset({"batch"}))) == "off,+batch"


def test_a_feature_comes_after_those_that_it_needs():
    assert set(MEANINGS) == ALL
    for name, needed in NEEDS.items():
        assert FEATURES.index(needed) < FEATURES.index(name)


def test_all_granted():
    capabilities = Capabilities.combine(OffloadRequest(), [TUN, UDP, UDP])
    assert capabilities.in_use == ALL
    assert capabilities.off == {}
    assert capabilities.to_json() == {
        "found": ["tun-gso", "tun-uso", "udp-gso", "udp-gro"], "in_use": list(FEATURES), "off": {},
    }


def test_turned_off_by_the_operator():
    capabilities = Capabilities.combine(
        OffloadRequest.parse("auto,-tun-uso"),
        [Part(frozenset({"tun-gso"}), {"tun-uso": "asked"}), UDP],
    )
    assert capabilities.off == {"tun-uso": "asked", "udp-merge": "needs tun-uso"}
    assert capabilities.found == {"tun-gso", "udp-gso", "udp-gro"}
    assert capabilities.in_use == ALL - capabilities.off.keys()


def test_without_tun_gso_all_features_of_the_tun_are_off():
    part = Part(frozenset(), {"tun-gso": "kernel refuses", "tun-uso": "needs tun-gso"})
    capabilities = Capabilities.combine(OffloadRequest(), [part, UDP])
    assert capabilities.off == {
        "tun-gso": "kernel refuses", "tun-uso": "needs tun-gso", "tcp-merge": "needs tun-gso",
        "udp-merge": "needs tun-uso",
    }


def test_one_socket_without_a_feature_turns_it_off():
    poor = Part(frozenset({"udp-gro"}), {"udp-gso": "kernel refuses UDP_SEGMENT: ENOPROTOOPT"})
    for parts in ([TUN, UDP, poor], [poor, TUN, UDP]):
        capabilities = Capabilities.combine(OffloadRequest(), parts)
        assert capabilities.off == poor.off
        assert "udp-gso" not in capabilities.found | capabilities.in_use


def test_a_refused_write_turns_off_only_the_merge():
    part = Part(TUN.features, {"udp-merge": "kernel refuses USO4 writes: EINVAL"})
    capabilities = Capabilities.combine(OffloadRequest(), [part, UDP])
    assert capabilities.in_use == ALL - {"udp-merge"}
    assert capabilities.off == part.off


def test_a_feature_that_was_not_probed():
    assert Capabilities.combine(OffloadRequest(), [TUN]).off == {
        "udp-gso": "not probed", "udp-gro": "not probed",
    }


def test_lose():
    capabilities = Capabilities.combine(OffloadRequest.parse("auto,-tcp-merge"), [TUN, UDP])
    assert capabilities.lose("udp-gso", "EIO") == ("udp-gso",)
    assert capabilities.lose("udp-gso", "again") == ()
    assert capabilities.lose("tun-gso", "EINVAL") == ("tun-gso", "tun-uso", "udp-merge")
    assert capabilities.in_use == {"udp-gro", "batch"}
    assert capabilities.off == {
        "udp-gso": "EIO", "tun-gso": "EINVAL", "tun-uso": "needs tun-gso",
        "udp-merge": "needs tun-uso", "tcp-merge": "asked",
    }
    assert "udp-gso" in capabilities.found  # the probe did find it
