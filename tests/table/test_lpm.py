"""Longest prefix match: the compiled look-up compared with the linear scan of the reference."""

import ipaddress
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import lpm as reference
from tests.steps import Lpm


def route_file(prefixes):
    return "".join(f"{p} via 192.0.2.1\n" for p in prefixes).encode()


def edges(network):
    """Yield the first and last address of a prefix, and the addresses next to them outside it."""
    width = network.max_prefixlen
    first, last = int(network.network_address), int(network.broadcast_address)
    for number in (first, last, first - 1, last + 1):
        yield (number % (1 << width)).to_bytes(width // 8, "big")


@st.composite
def networks(draw):
    """Draw prefixes that often overlap: few high bits, all lengths, both families."""
    width = draw(st.sampled_from((32, 128)))
    length = draw(st.one_of(st.integers(0, width), st.sampled_from((0, 1, 6, 18, 24, width))))
    base = draw(st.sampled_from((0, (1 << width) - 1, 0x0AF4 << (width - 16))))
    mixed = base ^ draw(st.integers(0, (1 << width) - 1)) & draw(
        st.sampled_from((0xFF << (width - 24), 0xFFFF, (1 << width) - 1)))
    number = mixed >> (width - length) << (width - length)
    make = ipaddress.IPv4Network if width == 32 else ipaddress.IPv6Network
    return make((number, length))


@pytest.mark.parametrize("popcount", ["cpu", "slow"])
@given(
    prefixes=st.sets(networks(), max_size=40),
    others=st.lists(st.one_of(st.binary(min_size=4, max_size=4),
                              st.binary(min_size=16, max_size=16)), max_size=10),
)
def test_equals_the_linear_scan(popcount, prefixes, others):
    fast, slow = Lpm(route_file(prefixes)), reference.Lpm(map(str, prefixes))
    if popcount == "slow":
        fast.slow_popcount()
    for addr in [*others, *(a for p in prefixes for a in edges(p))]:
        assert fast.lookup(addr) == slow.lookup(addr)


def test_an_empty_table_has_no_route():
    table = Lpm(b"")
    assert table.lookup(bytes(4)) == 0
    assert table.lookup(bytes(16)) == 0


@pytest.mark.parametrize("addr", [b"", bytes(3), bytes(5), bytes(15), bytes(17)])
def test_an_address_of_another_length_is_refused(addr):
    with pytest.raises(ValueError, match="4 or 16"):
        Lpm(b"").lookup(addr)


def test_all_lengths_nested():
    """All prefixes of one address: an address just outside one is found in the next shorter one."""
    for text in ("10.244.137.201", "2001:db8:55aa:1::c9"):
        address = ipaddress.ip_address(text)
        width = address.max_prefixlen
        nested = [ipaddress.ip_network(f"{text}/{n}", strict=False) for n in range(width + 1)]
        table = Lpm(route_file(nested))
        order = sorted(nested, key=reference.table_order)
        for n in range(width):
            outside = (int(address) ^ 1 << (width - 1 - n)).to_bytes(width // 8, "big")
            assert order[table.lookup(outside) - 1] == nested[n]
        assert order[table.lookup(address.packed) - 1] == nested[width]


@pytest.mark.parametrize("family", [4, 6])
def test_a_default_route_does_not_shorten_the_shared_prefix(family):
    default, inside = ("0.0.0.0/0", "10.244.7.0/24") if family == 4 else ("::/0", "fd00:7::/64")
    table = Lpm(route_file([default, inside]))
    assert table.lookup(ipaddress.ip_network(inside)[9].packed) == 2
    assert table.lookup(bytes([1]) * (4 if family == 4 else 16)) == 1


def test_a_hundred_thousand_routes():
    rng = random.Random(7)
    routes = {}
    for number in rng.sample(range(1 << 24), 100_000):
        routes[number << 8] = f"{ipaddress.IPv4Address(number << 8)}/24"
    table = Lpm(route_file(routes.values()))
    order = sorted(routes)
    for i in range(0, len(order), 97):
        addr = (order[i] | rng.randrange(256)).to_bytes(4, "big")
        assert table.lookup(addr) == i + 1
    for _ in range(2000):
        number = rng.getrandbits(32)
        found = table.lookup(number.to_bytes(4, "big"))
        assert (found > 0) == (number & ~255 in routes)
        assert not found or order[found - 1] == number & ~255
    addrs = b"".join(number.to_bytes(4, "big") for number in order)
    assert table.bench(addrs, 4, 2) == 2 * sum(range(1, 100_001))
    assert table.sizeof() < 8 << 20  # a few MiB, so that a forwarder stays small


def test_few_routes_take_little_memory():
    assert Lpm(route_file(f"10.244.{n}.0/24" for n in range(10))).sizeof() < 4096


@pytest.mark.parametrize(("family", "base"), [(4, 10 << 24), (6, 0xFD00 << 112)])
def test_bench_lookup(benchmark, family, base):
    """Random addresses under 100,000 random /24s, or /64s within one /32."""
    rng = random.Random(3)
    if family == 4:
        firsts = [n << 8 for n in rng.sample(range(1 << 24), 100_000)]
        text = route_file(f"{ipaddress.IPv4Address(n)}/24" for n in firsts)
        addrs = b"".join((n | rng.randrange(256)).to_bytes(4, "big") for n in firsts)
    else:
        firsts = [base | n << 64 for n in rng.sample(range(1 << 32), 100_000)]
        text = route_file(f"{ipaddress.IPv6Address(n)}/64" for n in firsts)
        addrs = b"".join((n | rng.getrandbits(64)).to_bytes(16, "big") for n in firsts)
    table = Lpm(text)
    assert benchmark(table.bench, addrs, family, 1) == sum(range(1, 100_001))


def test_bench_build(benchmark):
    rng = random.Random(4)
    firsts = [n << 8 for n in rng.sample(range(1 << 24), 100_000)]
    table = Lpm(route_file(f"{ipaddress.IPv4Address(n)}/24" for n in firsts))
    benchmark(table.build)
    assert table.lookup(firsts[0].to_bytes(4, "big")) == sorted(firsts).index(firsts[0]) + 1
