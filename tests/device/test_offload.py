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


def test_request_text_round_trip():
    for n in range(len(FEATURES) + 1):
        for names in itertools.combinations(FEATURES, n):
            request = OffloadRequest(frozenset(names))
            assert OffloadRequest.parse(str(request)) == request


def test_request_text_is_the_shortest_form():
    assert str(OffloadRequest()) == "auto"
    assert str(OffloadRequest(frozenset())) == "off"
    assert str(OffloadRequest(ALL - {"batch"})) == "auto,-batch"
    assert str(OffloadRequest(frozenset({"batch"}))) == "off,+batch"


def test_features_are_listed_after_their_dependencies():
    assert set(MEANINGS) == ALL
    for name, needed in NEEDS.items():
        assert FEATURES.index(needed) < FEATURES.index(name)


def test_all_features_are_in_use():
    capabilities = Capabilities.combine(OffloadRequest(), [TUN, UDP, UDP])
    assert capabilities.in_use == ALL
    assert capabilities.off == {}
    assert capabilities.to_json() == {
        "found": ["tun-gso", "tun-uso", "udp-gso", "udp-gro"], "in_use": list(FEATURES), "off": {},
    }


def test_feature_turned_off_by_the_operator():
    capabilities = Capabilities.combine(
        OffloadRequest.parse("auto,-tun-uso"),
        [Part(frozenset({"tun-gso"}), {"tun-uso": "asked"}), UDP],
    )
    assert capabilities.off == {"tun-uso": "asked", "udp-merge": "needs tun-uso"}
    assert capabilities.found == {"tun-gso", "udp-gso", "udp-gro"}
    assert capabilities.in_use == ALL - capabilities.off.keys()


def test_without_tun_gso_tun_uso_and_merging_are_off():
    part = Part(frozenset(), {"tun-gso": "kernel refuses", "tun-uso": "needs tun-gso"})
    capabilities = Capabilities.combine(OffloadRequest(), [part, UDP])
    assert capabilities.off == {
        "tun-gso": "kernel refuses", "tun-uso": "needs tun-gso", "tcp-merge": "needs tun-gso",
        "udp-merge": "needs tun-uso",
    }


def test_feature_is_off_if_one_socket_lacks_it():
    lacking = Part(frozenset({"udp-gro"}), {"udp-gso": "kernel refuses UDP_SEGMENT: ENOPROTOOPT"})
    for parts in ([TUN, UDP, lacking], [lacking, TUN, UDP]):
        capabilities = Capabilities.combine(OffloadRequest(), parts)
        assert capabilities.off == lacking.off
        assert "udp-gso" not in capabilities.found | capabilities.in_use


def test_refused_uso_write_turns_off_only_udp_merge():
    part = Part(TUN.features, {"udp-merge": "kernel refuses USO4 writes: EINVAL"})
    capabilities = Capabilities.combine(OffloadRequest(), [part, UDP])
    assert capabilities.in_use == ALL - {"udp-merge"}
    assert capabilities.off == part.off


def test_features_without_a_probe_are_off():
    assert Capabilities.combine(OffloadRequest(), [TUN]).off == {
        "udp-gso": "not probed", "udp-gro": "not probed",
    }


def test_lose_turns_off_a_feature_and_its_dependents():
    capabilities = Capabilities.combine(OffloadRequest.parse("auto,-tcp-merge"), [TUN, UDP])
    assert capabilities.lose("udp-gso", "EIO") == ("udp-gso",)
    assert capabilities.lose("udp-gso", "again") == ()
    assert capabilities.lose("tun-gso", "EINVAL") == ("tun-gso", "tun-uso", "udp-merge")
    assert capabilities.in_use == {"udp-gro", "batch"}
    assert capabilities.off == {
        "udp-gso": "EIO", "tun-gso": "EINVAL", "tun-uso": "needs tun-gso",
        "udp-merge": "needs tun-uso", "tcp-merge": "asked",
    }
    assert "udp-gso" in capabilities.found  # the kernel has it
