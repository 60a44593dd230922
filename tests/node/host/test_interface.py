"""The choice of the interface that carries the overlay, on a host with several interfaces."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from ipaddress import ip_address

import pytest

from tests.own_netns import in_own_netns, sh
from udptun.errors import FieldError
from udptun.net.netlink import Netlink
from udptun.node.config import InterfaceOptions, interface_pattern
from udptun.node.host import sticky
from udptun.node.host.interface import NoInterface, choose

HOST = (
    "ip link add name eth0 type veth peer name peer0",
    "ip link add name eth1 type veth peer name peer1",
    "ip link set eth0 up mtu 1400", "ip link set peer0 up",
    "ip link set eth1 up mtu 1450", "ip link set peer1 up",
    "ip address add 192.0.2.1/24 dev eth0", "ip address add 192.0.2.2/24 dev eth0",
    "ip address add 198.51.100.1/24 dev eth1",
    "ip address add 2001:db8::1/64 dev eth0 nodad",
    "ip address add 2001:db8:1::1/64 dev eth1 nodad",
)
DEFAULT0 = ("ip route add default via 192.0.2.254", "ip -6 route add default via 2001:db8::fe")


def options(**given):
    for name in ("can_reach", "public_ip", "public_ipv6"):
        if name in given:
            given[name] = ip_address(given[name])
    return InterfaceOptions(**given)


async def chosen(want_v4=True, want_v6=False, own=(), former=(), **given):
    """Return the name, the address and the IPv6 address of the chosen interface."""
    former = [*map(ip_address, former)]
    with Netlink() as netlink:
        underlay = await choose(netlink, options(**given), want_v4, want_v6, own, former)
    return (underlay.name, underlay.address and str(underlay.address),
            underlay.address6 and str(underlay.address6))


@contextlib.contextmanager
def refused(*words):
    """Check that the error contains the words and lists the interfaces."""
    with pytest.raises(NoInterface) as caught:
        yield
    for word in (*words, "there are lo (127.0.0.1", "eth1 (198.51.100.1, 2001:db8:1::1"):
        assert word in str(caught.value)


E0, E1 = ("eth0", "192.0.2.1", None), ("eth1", "198.51.100.1", None)


@in_own_netns
@pytest.mark.parametrize(("given", "want"), [
    ({"names": ("eth1",)}, E1),
    ({"names": ("198.51.100.1",)}, E1),
    ({"names": ("192.0.2.2",)}, ("eth0", "192.0.2.2", None)),
    ({"names": ("eth7", "203.0.113.9", "eth1")}, E1),
    ({"names": ("2001:db8:1::1",)}, E1),  # selects eth1; IPv4 gets eth1's best address
    ({"regexes": (r"198\.51\..*",)}, E1),
    ({"regexes": (r"2\.2$",)}, ("eth0", "192.0.2.2", None)),
    ({"regexes": ("^eth1$",)}, E1),
    ({"regexes": ("^nothing$", "th1")}, E1),
    ({"regexes": ("eth",)}, E0),  # the first match
    # Addresses are compared before names. A loopback address never matches.
    ({"regexes": ("1",)}, E0),
    ({"can_reach": "198.51.100.77"}, E1),
    ({"can_reach": "198.51.100.1"}, E1),  # the kernel's route goes through lo
    ({"can_reach": "2001:db8:1::77"}, E1),
    ({"can_reach": "8.8.8.8"}, E0),
    ({"public_ip": "198.51.100.1"}, E1),
    ({"public_ip": "203.0.113.5"}, E0),  # behind a NAT: the default route decides
    ({}, E0),
    # flannel's order
    ({"names": ("eth1",), "regexes": ("eth0",), "can_reach": "192.0.2.7",
      "public_ip": "192.0.2.2"}, E1),
    ({"names": ("eth7",), "regexes": ("eth1",), "can_reach": "192.0.2.7"}, E1),
    ({"regexes": ("eth7",), "can_reach": "198.51.100.7", "public_ip": "192.0.2.2"}, E1),
])
async def test_the_order_of_choice(given, want):
    sh(*HOST, *DEFAULT0)
    assert await chosen(**given) == want


@in_own_netns
@pytest.mark.parametrize(("given", "want"), [
    ({}, ("eth0", "192.0.2.1", "2001:db8::1")),
    ({"names": ("eth1",)}, ("eth1", "198.51.100.1", "2001:db8:1::1")),
    ({"names": ("192.0.2.2",)}, ("eth0", "192.0.2.2", "2001:db8::1")),
    ({"names": ("2001:db8:1::1",)}, ("eth1", "198.51.100.1", "2001:db8:1::1")),
    # A pattern for addresses must match one address of each family.
    ({"regexes": (r"^198|2001:db8::1$", r"^198|2001:db8:1::")},
     ("eth1", "198.51.100.1", "2001:db8:1::1")),
    ({"can_reach": "198.51.100.7"}, ("eth1", "198.51.100.1", "2001:db8:1::1")),
    ({"public_ip": "198.51.100.1"}, ("eth1", "198.51.100.1", "2001:db8:1::1")),
])
async def test_dual_stack(given, want):
    sh(*HOST, *DEFAULT0)
    assert await chosen(want_v6=True, **given) == want


@in_own_netns
@pytest.mark.parametrize("given", [
    {}, {"names": ("eth0",)}, {"regexes": ("^2001:db8::",)}, {"public_ipv6": "2001:db8::1"},
    {"can_reach": "2001:db8::77"},
])
async def test_ipv6_alone(given):
    sh(*HOST, *DEFAULT0)
    assert await chosen(want_v4=False, want_v6=True, **given) == ("eth0", None, "2001:db8::1")


@in_own_netns
async def test_the_published_addresses():
    sh(*HOST, *DEFAULT0)
    with Netlink() as netlink:
        plain = await choose(netlink, options(), True, False)
        assert (plain.mtu, plain.public, plain.public6) == (1400, plain.address, None)
        behind = await choose(
            netlink, options(public_ip="203.0.113.5", public_ipv6="2001:db8:9::1"), True, True)
    assert (str(behind.address), str(behind.address6)) == ("192.0.2.1", "2001:db8::1")
    assert (str(behind.public), str(behind.public6)) == ("203.0.113.5", "2001:db8:9::1")


@in_own_netns
@pytest.mark.parametrize(("given", "words"), [
    ({"names": ("eth7", "203.0.113.9")}, ["--iface=eth7, --iface=203.0.113.9: none matches"]),
    ({"regexes": ("^x",)}, ["--iface-regex=^x: none matches"]),
    # If the configured interface does not exist, the default route does not replace it.
    ({"names": ("eth7",), "can_reach": "203.0.113.1"},
     ["--iface=eth7, --iface-can-reach=203.0.113.1", "Network is unreachable"]),
    ({"names": ("peer0",)}, ["peer0: has no IPv4 address"]),
    ({"names": ("lo",)}, ["lo: has no IPv4 address"]),
    ({}, ["there is no IPv4 default route", "--iface"]),
])
async def test_no_interface_matches(given, words):
    sh(*HOST)
    with refused(*words):
        await chosen(**given)


@in_own_netns
async def test_both_default_routes_must_agree():
    sh(*HOST, "ip route add default via 192.0.2.254", "ip -6 route add default via 2001:db8:1::fe")
    with refused("IPv4 default route goes through eth0, the IPv6 one through eth1", "--iface"):
        await chosen(want_v6=True)


@in_own_netns
async def test_a_link_local_ipv6_address_is_not_enough():
    sh(*HOST, "ip address add 203.0.113.1/24 dev peer0")
    with refused("peer0: has no IPv6 address that other nodes can reach, only a link-local one"):
        await chosen(want_v6=True, names=("peer0",))


@in_own_netns
async def test_the_overlays_own_devices_are_never_chosen():
    """After a restart the devices still exist, and a pattern may match their addresses."""
    sh(*HOST, "ip tuntap add udptun0 mode tun", "ip address add 203.0.113.0/32 dev udptun0",
       "ip link set udptun0 up", "ip route add default dev udptun0",
       "ip route add default via 198.51.100.254 metric 100")
    own = {"udptun0"}
    assert await chosen(regexes=("203", "eth1"), own=own) == E1
    assert await chosen(own=own) == E1
    with refused("--iface=udptun0: none matches"):
        await chosen(names=("udptun0",), own=own)
    with refused("--iface-can-reach=203.0.113.77: the route to 203.0.113.77 goes through"):
        await chosen(can_reach="203.0.113.77", own=own)


@in_own_netns
async def test_an_interface_that_is_down_is_chosen_with_a_warning(caplog):
    sh(*HOST, "ip link set eth1 down")
    with caplog.at_level(logging.WARNING):
        assert await chosen(names=("eth1",)) == E1
    assert "eth1 carries the overlay and is down" in caplog.text


@in_own_netns
async def test_a_change_of_address_is_seen_by_choosing_again():
    sh(*HOST, *DEFAULT0)
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def look(addresses):
        if ip_address("192.0.2.77") in addresses:
            loop.call_soon_threadsafe(changed.set)

    with Netlink() as netlink:
        before = await choose(netlink, options(), True, False)
        netlink.watch_addresses(look)
        sh("ip address add 192.0.2.77/25 dev eth0", "ip address del 192.0.2.1/24 dev eth0")
        await asyncio.wait_for(changed.wait(), 60)
        after = await choose(netlink, options(names=("eth0",)), True, False)
    assert (str(before.address), str(after.public)) == ("192.0.2.1", "192.0.2.77")


def test_a_pattern_that_cannot_be_compiled():
    with pytest.raises(FieldError, match=r"iface-regex: 'eth\['"):
        options(regexes=("eth[",))


@pytest.mark.parametrize(("regex", "part"), [
    ("eth[[:digit:]]+", r"0-9 .* \[:digit:\]"), ("[^[:alpha:]]", r"\[:alpha:\]"),
    ("[a-z[:^word:]]", r"\[:\^word:\]"), ("[]:[:digit:]x]", r"\[:digit:\]"),
    ("(en|[[:alnum:]x])0", r"\[:alnum:\]"), ("[[:digits:]]", r"\[:digits:\]"),
    ("eth0{,2}", r"\{0,2\} instead of \{,2\}"), ("e{,}", r"\{0,\} instead of \{,\}"),
])
def test_a_regex_that_means_something_else_in_flannel_is_refused(regex, part):
    with pytest.raises(FieldError, match=f"iface-regex: .* expected .*{part}"):
        InterfaceOptions(regexes=(regex,))


@pytest.mark.parametrize("regex", [
    r"\pL", r"\Qeth0\E", r"eth0\z", "(?U)e+", "(?<name>e)", r"\x{65}", "a(?i)b", r"\C",
])
def test_a_regex_that_only_flannel_understands_is_refused(regex):
    if regex == r"eth0\z" and sys.version_info >= (3, 14):
        pytest.skip("Python 3.14 has this syntax, with the same meaning")
    with pytest.raises(FieldError, match="iface-regex"):
        InterfaceOptions(regexes=(regex,))


@pytest.mark.parametrize(("regex", "matches", "differs"), [
    (r"eth\d", "eth0", "eth\u0660"), (r"^\w+$", "eth_0", "\u00e9th"), ("[:alpha:]", "l", "b"),
    (r"[\[:alpha:]", "[", "b"), (r"\{,2}", "{,2}", ""), ("[{,3}]", ",", "2"), ("[[e]", "[", "t"),
    ("[]e]", "]", "t"), ("[a&&b]", "&", "c"),
])
def test_a_regex_has_the_same_meaning_as_in_flannel(regex, matches, differs):
    """The expected matches are those of RE2. A warning of Python would fail the test."""
    pattern = interface_pattern(regex)
    assert pattern.search(matches) and not pattern.search(differs)


# -- the former choice ----------------------------------------------------------------------------


@in_own_netns
@pytest.mark.parametrize(("given", "former", "want"), [
    # The default route goes through eth0, but the address of eth1 is published.
    ({}, ["198.51.100.1"], E1),
    ({}, ["192.0.2.2"], ("eth0", "192.0.2.2", None)),
    ({"can_reach": "192.0.2.77"}, ["198.51.100.1"], E1),
    ({"names": ("eth0", "eth1")}, ["198.51.100.1"], E1),
    ({"names": ("eth0",)}, ["192.0.2.2"], ("eth0", "192.0.2.2", None)),
    ({"regexes": ("eth",)}, ["198.51.100.1"], E1),
    ({"public_ip": "203.0.113.5"}, ["198.51.100.1"], E1),  # behind a NAT
    # The options exclude the former choice.
    ({"names": ("eth0",)}, ["198.51.100.1"], E0),
    ({"names": ("192.0.2.1",)}, ["192.0.2.2"], E0),
    ({"regexes": ("^eth0$",)}, ["198.51.100.1"], E0),
    ({"public_ip": "192.0.2.2"}, ["198.51.100.1"], ("eth0", "192.0.2.2", None)),
    # The former address is gone, or was of the other IP version.
    ({}, ["203.0.113.77"], E0),
    ({}, ["2001:db8:1::1"], E0),
])
async def test_the_former_choice_is_kept_if_the_options_allow_it(given, former, want):
    sh(*HOST, *DEFAULT0)
    assert await chosen(former=former, **given) == want


@in_own_netns
async def test_the_former_choice_in_both_ip_versions():
    sh(*HOST, *DEFAULT0, "ip address add 2001:db8:1::2/64 dev eth1 nodad")
    both = ["198.51.100.1", "2001:db8:1::2"]
    assert await chosen(want_v6=True, former=both) == ("eth1", *both)
    sh("ip address del 2001:db8:1::2/64 dev eth1")
    assert await chosen(want_v6=True, former=both) == ("eth1", "198.51.100.1", "2001:db8:1::1")


@in_own_netns
async def test_a_choice_that_differs_from_the_former_one_is_noted():
    sh(*HOST, *DEFAULT0)
    with Netlink() as netlink:
        async def note(former, **given):
            kept = await choose(
                netlink, options(**given), True, False, (), [ip_address(former)])
            return kept.note

        assert await note("192.0.2.1") == ""
        assert await note("198.51.100.1") == (
            "the default route goes through eth0 now; the node stays at its published address on"
            " eth1")
        assert (await note("198.51.100.1", names=("eth0", "eth1"))).startswith(
            "the options would select eth0 now; ")
        sh("ip route del default via 192.0.2.254")
        assert "although there is" not in await note("198.51.100.1", names=("eth1",))
        assert "there is no IPv4 default route" in await note("198.51.100.1")


@in_own_netns
async def test_an_address_of_the_loopback_device_is_reached_through_the_default_route():
    """The device has an MTU of 65536, which is not that of any path."""
    sh(*HOST, *DEFAULT0, "ip address add 203.0.113.1/32 dev lo")
    with Netlink() as netlink:
        for given in ({"names": ("lo",)}, {"public_ip": "203.0.113.1"}):
            underlay = await choose(netlink, options(**given), True, False)
            assert (underlay.name, str(underlay.address), underlay.mtu) == \
                ("eth0", "203.0.113.1", 1400)
    sh("ip route del default via 192.0.2.254")
    with refused("an address of the loopback device needs a default route", "203.0.113.1"):
        await chosen(names=("lo",))


@in_own_netns
async def test_an_address_to_publish_that_another_machine_has_is_noted():
    """A copy of a machine uses the entry of the original in a hosts file."""
    sh(*HOST, *DEFAULT0)
    with Netlink() as netlink:
        async def note(public):
            return (await choose(netlink, options(public_ip=public), True, False)).note

        assert await note("192.0.2.1") == ""
        assert await note("203.0.113.5") == ""  # behind a NAT
        assert "192.0.2.7, is on the link of eth0, but not on this host" in await note("192.0.2.7")


@in_own_netns
async def test_another_address_is_taken_only_after_a_while(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(sticky.time, "monotonic", lambda: now)
    sh(*HOST, *DEFAULT0)
    former = [ip_address("192.0.2.2")]
    with Netlink() as netlink:
        choice = sticky.UnderlayChoice(netlink, 10)

        async def address():
            return str((await choice.choose(options(), {4}, (), former)).address)

        assert await address() == "192.0.2.2"
        sh("ip address del 192.0.2.2/24 dev eth0")
        gone = "192.0.2.2 is not on this host any more: .* within 10 s"
        for step in (0, 9):
            now += step
            with pytest.raises(NoInterface, match=gone):
                await address()
        sh("ip address add 192.0.2.2/24 dev eth0")
        assert await address() == "192.0.2.2"
        sh("ip address del 192.0.2.2/24 dev eth0")  # the time starts again
        now += 5
        with pytest.raises(NoInterface, match=gone):
            await address()
        now += 11
        assert await address() == "192.0.2.1"
