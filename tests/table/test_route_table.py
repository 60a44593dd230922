"""RouteTable: its parsers compared with model.Route, its changes with set arithmetic."""

import ipaddress
import json
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.reference.lpm import table_order
from udptun._core import RouteTable
from udptun.errors import FieldError, RouteExists
from udptun.model import ANY_PORT, Route, is_unicast

v4 = st.integers(0, (1 << 32) - 1).map(ipaddress.IPv4Address)
v6 = st.one_of(
    st.integers(0, (1 << 128) - 1),
    # Runs of zero groups, for the rules of RFC 5952.
    st.lists(st.sampled_from((0, 0, 0, 1, 0xA, 0xFFFF)), min_size=8, max_size=8).map(
        lambda groups: int("".join(f"{g:04x}" for g in groups), 16)),
    st.integers(0, (1 << 32) - 1).map(lambda n: 0xFFFF << 32 | n),
).map(ipaddress.IPv6Address)
addresses = st.one_of(v4, v6)


@st.composite
def prefixes(draw):
    address = draw(addresses)
    length = draw(st.integers(0, address.max_prefixlen))
    return ipaddress.ip_network(f"{address}/{length}", strict=False)


ports = st.integers(1, 65535)
source_ports = st.none() | st.just(ANY_PORT) | ports.map(lambda p: (p, p)) | st.tuples(
    ports, ports).map(lambda pair: (min(pair), max(pair)))
routes = st.builds(Route, prefixes(), addresses.filter(is_unicast), ports,
                   st.none() | st.integers(1280, 65535), st.booleans(), source_ports)
tables = st.lists(routes, unique_by=lambda r: r.dst, max_size=30)


def routes_of(table):
    return [table.route_at(i) for i in range(len(table))]


def in_order(some):
    return sorted(some, key=lambda r: table_order(r.dst))


def parse_json(routes_json):
    return RouteTable.parse_json(b'{"routes":[%s]}' % routes_json)


def outcome(parse, *args):
    """Return the parser's result, or the text of its error."""
    try:
        return parse(*args)
    except FieldError as error:
        return str(error)


# Addresses and prefixes: the strings that ipaddress accepts, the text that it writes

SOUP = st.text("0123456789abcdefABCDEF:./%g -+_\u0663", max_size=45)


@st.composite
def address_texts(draw):
    """Draw valid addresses, not only in canonical form, and strings that are almost valid."""
    address = draw(addresses)
    text = draw(st.sampled_from((str(address), address.exploded, str(address).upper())))
    if address.version == 6 and draw(st.booleans()):
        head, _, _ = address.exploded.rpartition(":")
        head, _, _ = head.rpartition(":")
        text = f"{head}:{ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)}"
    if draw(st.booleans()):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.integers(0, 2))
        text = text[:at] + draw(st.sampled_from(("", "0", ":", "::", ".", "/", "%1", "f"))) \
            + text[at + cut:]
    return text


@given(st.one_of(address_texts(), SOUP))
@example("::")
@example(":::")
@example("1::")
@example("::1:2:3:4:5:6:7")
@example("::1:2:3:4:5:6:7:8")
@example("1:2:3:4:5:6:7::")
@example("1:2:3:4:5:6:7:8::")
@example("1::2::3")
@example(":1:2:3:4:5:6:7")
@example("1:2:3:4:5:6:7:")
@example("::1.2.3.4")
@example("1:2:3:4:5:6:1.2.3.4")
@example("1:2:3:4:5:6:7:1.2.3.4")
@example("1:2:3:4:5::1.2.3.4")
@example("1:2:3:4:5:6::1.2.3.4")
@example("::1.2.3.04")
@example("::1.2.3.4:5")
@example("01.2.3.4")
@example("1.2.3.256")
@example("1.2.3")
@example("1.2.3.4.")
@example("12345::")
@example("fe80::1%eth0")
def test_parser_and_ipaddress_accept_the_same_addresses(text):
    value = {"dst": "10.0.0.0/8", "via": text}

    def expected():
        return Route.from_json(value, "routes[0]").via

    def parse():
        return parse_json(json.dumps(value).encode()).route_at(0).via

    assert outcome(parse) == outcome(expected)


@given(
    st.one_of(address_texts(), prefixes().map(str), SOUP),
    st.sampled_from(("", "/", "/0", "/8", "/024", "/24", "/32", "/33", "/128", "/129", "/-1",
                     "/+8", "/ 8", "/8 ", "/255.0.0.0", "/8/8", "/\u0668", "/99999999999")),
)
@example("10.0.0.0/", "0" * 4290 + "24")
@example("10.0.0.0/", "0" * 4310 + "24")
def test_parser_and_model_accept_the_same_prefixes(text, suffix):
    value = {"dst": text + suffix, "via": "192.0.2.1"}

    def expected():
        return Route.from_json(value, "routes[0]").dst

    def parse():
        return parse_json(json.dumps(value).encode()).route_at(0).dst

    assert outcome(parse) == outcome(expected)


SOURCE_PORTS = st.one_of(
    st.sampled_from(("any", "ANY", "", "-", "0", "1", "65535", "65536", "1-65535", "1-1", "2-1",
                     "0-5", "5-65536", "5-", "-5", "5--7", "5-7-9", "any-5", "0007", "1 ",
                     "\u0665", "5-\u0665", "0000000001", "1e3", "null")),
    st.text("0123456789-any", max_size=13))


@given(st.one_of(SOURCE_PORTS, st.none(), st.booleans(), st.floats(), st.integers(), st.just([])))
@example(8285)
@example(1.0)
def test_parser_and_model_accept_the_same_source_ports_in_json(port):
    value = {"dst": "10.0.0.0/8", "via": "192.0.2.1", "source_port": port}

    def parse():
        return parse_json(json.dumps(value).encode()).route_at(0).source_port

    def expected():
        return Route.from_json(json.loads(json.dumps(value)), "routes[0]").source_port

    assert outcome(parse) == outcome(expected)


@given(SOURCE_PORTS)
def test_parser_and_model_accept_the_same_source_ports_in_text(port):
    line = f"10.0.0.0/8 via 192.0.2.1 source-port {port} mtu 1400"

    def parse():
        return RouteTable.parse_text(line.encode()).route_at(0).source_port

    def expected():
        return Route.from_words(line.split(), "line 1").source_port

    assert outcome(parse) == outcome(expected)


# Whole tables

@given(tables)
def test_text_and_json_give_the_same_table_as_the_model(some):
    text = "\r\n".join(f"  {r}\t# as written" for r in some)
    body = json.dumps({"generation": 7, "routes": [r.to_json() for r in some]}, indent=1)
    assert routes_of(RouteTable.parse_text(text.encode())) == in_order(some)
    assert routes_of(RouteTable.parse_json(body.encode())) == in_order(some)


@given(tables, st.integers(0, 40), st.integers(0, 40))
def test_slices_are_parsed_back(some, start, count):
    table = RouteTable.parse_text("\n".join(map(str, some)).encode())
    part = in_order(some)[start:start + count]
    assert routes_of(RouteTable.parse_text(table.text_slice(start, count))) == part
    assert routes_of(parse_json(table.json_slice(start, count))) == part
    ordered = sorted(some, key=lambda r: table_order(r.dst))[start:start + count]
    assert table.text_slice(start, count).decode().splitlines() == list(map(str, ordered))
    assert json.loads(b"[%s]" % table.json_slice(start, count)) == [r.to_json() for r in ordered]


WORDS = st.one_of(
    st.sampled_from(("via", "port", "mtu", "via", "port", "mtu", "probe", "express", "ecn",
                     "source-port", "source_port", "any", "8000-8015",
                     "10.0.0.0/8", "192.0.2.1", "::",
                     "0", "1", "67", "68", "65535", "65536", "008285", "1234567890", "1e3", "-1",
                     "\x00", "\u0661", "10.0.0.1/8")),
    SOUP, prefixes().map(str), addresses.map(str),
)


@given(st.lists(WORDS, min_size=1, max_size=8))
@example(["10.0.0.0/8", "via"])
@example(["10.0.0.0/8", "via", "::2", "port"])
@example(["10.0.0.0/8", "via", "::2", "port", "1", "port", "1"])
@example(["10.0.0.0/8", "via", "::2", "mtu", "1", "mtu", "1"])
@example(["10.0.0.0/8", "via", "::2", "ttl", "1"])
@example(["10.0.0.0/8", "via", "::2", "probe"])
@example(["10.0.0.0/8", "via", "::2", "probe", "mtu", "1400", "port", "1"])
@example(["10.0.0.0/8", "via", "::2", "probe", "probe"])
@example(["10.0.0.0/8", "via", "::2", "express"])
@example(["10.0.0.0/8", "via", "::2", "express", "probe", "port", "1"])
@example(["10.0.0.0/8", "via", "::2", "express", "express"])
@example(["10.0.0.0/8", "via", "::2", "ecn"])
@example(["10.0.0.0/8", "via", "::2", "ecn", "mtu", "1400", "express", "probe"])
@example(["10.0.0.0/8", "via", "::2", "ecn", "ecn"])
@example(["10.0.0.0/8", "via", "::2", "probe", "1"])
@example(["10.0.0.0/8", "via", "::2", "port", "probe"])
@example(["10.0.0.0/8", "via", "::2", "source-port", "any", "probe"])
@example(["10.0.0.0/8", "via", "::2", "source-port", "any", "source-port", "1"])
def test_parser_and_model_accept_the_same_lines(words):
    line = " ".join(words)
    words = [w.decode() for w in line.encode().split()]

    def expected():
        return in_order([Route.from_words(words, "line 2")] if words else [])

    def parse():
        return routes_of(RouteTable.parse_text(f"\n{line}\n".encode()))

    assert outcome(parse) == outcome(expected)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70000), st.integers(), st.floats(allow_nan=False,
    allow_infinity=False), st.text(max_size=5), WORDS, st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
KEYS = st.sampled_from(
    ("dst", "via", "port", "mtu", "source_port", "probe", "express", "ecn") * 2
    + ("ttl", "", "dstx"))
OBJECTS = st.one_of(
    VALUES, st.dictionaries(KEYS, VALUES, max_size=5),
    st.builds(lambda r, extra: {**r.to_json(), **extra}, routes,
              st.dictionaries(KEYS, VALUES, max_size=1)),
)


@given(OBJECTS, st.booleans(), st.sampled_from((None, 2)))
def test_parser_and_model_accept_the_same_objects(value, ascii_only, indent):
    body = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "replace")
    value = json.loads(body)  # as received

    def expected():
        first = Route.make("192.0.2.77/32", "192.0.2.1")
        return in_order([first, Route.from_json(value, "routes[1]")])

    def parse():
        return routes_of(parse_json(b'{"dst":"192.0.2.77","via":"192.0.2.1"}, %s' % body))

    assert outcome(parse) == outcome(expected)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=4), inner, max_size=3), max_leaves=8), st.booleans())
def test_any_json_value_is_skipped(value, ascii_only):
    """A JSON value that is not a route is reported as a wrong route, not as a wrong body."""
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    with pytest.raises(FieldError) as caught:
        parse_json(text)
    assert caught.value.where == "routes[0]"
    assert caught.value.expected != "a shorter text of the route"


JSON_SOUP = st.lists(st.sampled_from([
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b'"routes"', b'"generation"', b'"dst"',
    b'"via"', b'"port"', b'"mtu"', b'"probe"', b'"express"', b'"ecn"',
    b'"source_port"', b'"any"', b'"1-9"',
    b'"10.0.0.0/8"', b'"::1"', b"null", b"true", b"1", b"-", b"0",
    b".5", b"e1", b" ", b"\n", b"\\u0064", b"\xff", b"\xc3\xa9", b"\x00", b"NaN",
    b'{"dst":"10.0.0.0/8","via":"::1"}', b'{"routes":[', b"]}",
]), max_size=25).map(b"".join)


@given(st.one_of(st.binary(max_size=60), JSON_SOUP,
                 JSON_SOUP.map(lambda soup: b'{"routes":[' + soup)))
def test_arbitrary_bytes_are_parsed_or_refused(body):
    for parse in (RouteTable.parse_json, RouteTable.parse_text):
        try:
            table = parse(body)
        except FieldError as error:
            assert str(error)
        else:
            assert routes_of(RouteTable.parse_text(table.text_slice(0, 99))) == routes_of(table)


@given(JSON_SOUP.map(lambda soup: b'{"routes":[' + soup))
def test_strict_json_only(body):
    """The parser accepts only text that json.loads accepts."""
    try:
        table = RouteTable.parse_json(body)
    except FieldError as error:
        if error.where.startswith("byte"):
            assert 0 <= int(error.where.split()[1]) <= len(body)
    else:
        value = json.loads(body)
        assert set(value) <= {"routes", "generation"}
        assert len(value["routes"]) == len(table)


@pytest.mark.parametrize(("body", "byte"), [
    (b"", 0),
    (b"[]", 0),
    (b"{}", 1),
    (b'{"generation":1}', 15),
    (b'{"routes":{}}', 10),
    (b'{"routes":[]', 12),
    (b'{"routes":[],}', 13),
    (b'{"routes":[],"routes":[]}', 13),
    (b'{"routes":[],"other":1}', 13),
    (b'{"routes":[]}}', 13),
    (b'{"routes":[NaN]}', 11),
    (b'{"routes":[-]}', 12),
    (b'{"generation":01}', 15),
    (b'{"routes":["\xff"]}', 12),
    (b'{"routes":["\xed\xa0\x80"]}', 12),
    (b'{"routes":["\t"]}', 12),
    (b'{"routes":[' + b"[" * 40 + b"]" * 40 + b"]}", 43),
    (b'\xef\xbb\xbf{"routes":[]}', 0),
])
def test_an_unexpected_body_names_the_byte(body, byte):
    with pytest.raises(FieldError) as caught:
        RouteTable.parse_json(body)
    assert (caught.value.field, caught.value.where) == ("body", f"byte {byte}")


def test_escapes_in_strings():
    text = rb'{"\u0064st":"\u0031\u0030.0.0.0\/8","via":"::\u0061","port":"8\u0031"}'
    assert routes_of(parse_json(text)) == [Route.make("10.0.0.0/8", "::a", 81)]


def test_a_long_string_with_escapes_is_refused():
    with pytest.raises(FieldError, match=r"routes\[0\]: route: .*shorter text of the route"):
        parse_json(rb'{"dst":"10.0.0.0\/%s8","via":"::2"}' % (b"0" * 600))


def test_a_number_too_long_for_int_is_refused():
    with pytest.raises(FieldError, match=r"routes\[0\]: route: .*shorter text of the route"):
        parse_json(b'{"dst":"::","via":"::2","port":%s}' % (b"9" * 5000))


def test_a_repeated_key_is_refused():
    with pytest.raises(FieldError, match=r"routes\[1\]: route: 'via' .* each key once"):
        parse_json(b'{"dst":"::","via":"::2"},{"via":"::1","dst":"::1","via":"::1"}')


def test_a_very_long_route_is_refused_without_parsing_it_again():
    with pytest.raises(FieldError, match=r"line 1: route: .*shorter text of the route"):
        RouteTable.parse_text(b"x " * 100_000)


@given(tables.filter(bool), st.data())
def test_a_repeated_prefix_names_the_later_route(some, data):
    """The error names the first route in the text whose prefix came before."""
    again = data.draw(st.sampled_from(some))
    at = data.draw(st.integers(some.index(again) + 1, len(some)))
    given_routes = [*some[:at], Route.make(str(again.dst), "192.0.2.99"), *some[at:]]
    message = f"dst: {str(again.dst)!r} is not valid: expected each prefix once"
    body = json.dumps({"routes": [r.to_json() for r in given_routes]}).encode()
    assert outcome(RouteTable.parse_json, body) == f"routes[{at}]: {message}"
    text = "# two lines a route\n" + "\n\n".join(map(str, given_routes))
    assert outcome(RouteTable.parse_text, text.encode()) == f"line {2 + 2 * at}: {message}"


# Changes

class Model:
    """A table as a dict: the expected behaviour."""

    def __init__(self):
        self.routes = {}

    def set(self, route, replace):
        present = self.routes.get(route.dst)
        if present == route:
            return "same"
        if present and not replace:
            return f"There is a route already: {present}."
        self.routes[route.dst] = route
        return "changed" if present else "added"


SMALL = st.builds(
    Route.make, st.sampled_from(("0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/16", "10.1.0.0/16", "::/0",
                                 "2001:db8::/32", "2001:db8::/64", "::/128")),
    st.sampled_from(("192.0.2.1", "2001:db8::1")), st.sampled_from((8285, 1)),
    st.sampled_from((None, 1400)), st.booleans(),
)


@given(st.lists(st.tuples(st.sampled_from(("add", "put", "delete")), SMALL), max_size=40))
def test_changes_one_at_a_time(steps):
    table, model = RouteTable(), Model()
    for step, route in steps:
        if step == "delete":
            assert table.delete(route.dst) == (model.routes.pop(route.dst, None) is not None)
            assert table.get(route.dst) is None
            continue
        replace = step == "put"
        try:
            result = table.set(route, replace)
        except RouteExists as error:
            result = str(error)
        assert result == model.set(route, replace)
        assert table.get(route.dst) == model.routes[route.dst]
    assert routes_of(table) == in_order(model.routes.values())


def bad_routes():
    """Routes made without Route.make(), one field out of its range in each."""
    net, net6 = ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/64")
    host = ipaddress.ip_address("192.0.2.1")
    for port in (0, -1, 65536):
        yield "port", Route(net, host, port)
    for mtu in (0, 67, 65536):
        yield "mtu", Route(net, host, 1, mtu)
    yield "mtu", Route(net6, host, 1, 1279)
    for via in ("0.0.0.0", "224.0.0.1", "::", "ff02::1", "::ffff:192.0.2.1", "fe80::1%eth0"):
        yield "via", Route(net, ipaddress.ip_address(via))


@pytest.mark.parametrize(("field", "route"), list(bad_routes()), ids=str)
def test_changes_check_their_values(field, route):
    table = RouteTable()
    for change in (table.set, lambda route: RouteTable.from_routes([route])):
        with pytest.raises(FieldError) as caught:
            change(route)
        assert caught.value.field == field
    assert len(table) == 0


def test_an_empty_table():
    table = RouteTable()
    with pytest.raises(IndexError):
        table.route_at(0)
    assert len(table) == 0
    assert table.json_slice(0, 10) == b""
    assert table.prefixes(0, 10) == []
    assert table.sizeof() == 0


@given(tables, st.integers(0, 40), st.integers(0, 40))
def test_a_table_from_routes(some, start, count):
    table = RouteTable.from_routes(iter(some))
    assert routes_of(table) == in_order(some)
    assert table.prefixes(start, count) == [
        str(route.dst) for route in in_order(some)[start:start + count]]


@given(tables.filter(bool), st.data())
def test_a_table_from_routes_has_each_prefix_once(some, data):
    again = data.draw(st.sampled_from(some))
    at = data.draw(st.integers(some.index(again) + 1, len(some)))
    message = f"routes[{at}]: dst: {str(again.dst)!r} is not valid: expected each prefix once"
    assert outcome(RouteTable.from_routes, [*some[:at], again, *some[at:]]) == message


def row(route):
    return (str(route.dst), str(route.via), route.port, route.mtu, route.probe, route.source_port,
            route.express, route.ecn)


@given(st.lists(SMALL, unique_by=lambda r: r.dst), st.lists(SMALL, unique_by=lambda r: r.dst),
       st.integers(0, 20))
def test_difference_is_set_arithmetic(before, after, limit):
    old, new = (RouteTable.parse_text("\n".join(map(str, some)).encode())
                for some in (before, after))
    then, now = {r.dst: r for r in before}, {r.dst: r for r in after}
    added, removed = now.keys() - then.keys(), then.keys() - now.keys()
    changed = {dst for dst in now.keys() & then.keys() if now[dst] != then[dst]}
    assert new.diff_from(old) == (len(added), len(changed), len(removed))
    wanted = [("added" if dst in added else "changed" if dst in changed else "removed",
               *row(now.get(dst) or then[dst]))
              for dst in sorted(added | changed | removed, key=table_order)]
    assert new.changes_from(old, limit) == wanted[:limit]
    assert new.changes_from(old, 1 << 60) == wanted


def test_a_copy_is_independent():
    table = RouteTable.parse_text(b"10.0.0.0/8 via 192.0.2.1")
    copy = table.copy()
    table.set(Route.make("10.0.0.0/8", "192.0.2.2", 1), replace=True)
    table.set(Route.make("::/0", "192.0.2.2", 1))
    assert routes_of(copy) == [Route.make("10.0.0.0/8", "192.0.2.1")]
    assert routes_of(RouteTable().copy()) == []


def test_a_hundred_thousand_routes():
    rng = random.Random(11)
    numbers = rng.sample(range(1 << 24), 100_000)
    text = "".join(f"{ipaddress.IPv4Address(n << 8)}/24 via 192.0.2.{n % 200 + 1}\n"
                   for n in numbers)
    table = RouteTable.parse_text(text.encode())
    assert len(table) == 100_000
    assert table.sizeof() < 8 << 20
    body = b",".join(table.json_slice(start, 1000) for start in range(0, 100_000, 1000))
    again = parse_json(body)
    assert again.diff_from(table) == (0, 0, 0)
    first = sorted(numbers)[0]
    dst, via = f"{ipaddress.IPv4Address(first << 8)}/24", f"192.0.2.{first % 200 + 1}"
    assert table.route_at(0) == Route.make(dst, via)
    assert table.delete(table.route_at(50_000).dst)
    assert again.diff_from(table) == (1, 0, 0)
    with pytest.raises(FieldError, match=r"line 100001: dst: .* each prefix once"):
        RouteTable.parse_text((text + text.partition("\n")[0]).encode())


@pytest.mark.parametrize("form", ["json", "text"])
def test_bench_parse(benchmark, form):
    """Parse 100,000 routes in random order."""
    rng = random.Random(12)
    some = [f"{ipaddress.IPv4Address(n << 8)}/24" for n in rng.sample(range(1 << 24), 100_000)]
    if form == "text":
        body = "".join(f"{dst} via 192.0.2.2 port 8285\n" for dst in some).encode()
        parse = RouteTable.parse_text
    else:
        body = json.dumps({"routes": [
            {"dst": dst, "via": "192.0.2.2", "port": 8285, "mtu": None} for dst in some
        ]}).encode()
        parse = RouteTable.parse_json
    assert len(benchmark(parse, body)) == 100_000
