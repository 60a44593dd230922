"""The hosts file source: grammar, validation, detection of changes, and our own node."""

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wait import until
from udptun.errors import FieldError
from udptun.leases.advert import PROBE, Advert, read
from udptun.leases.base import (
    Attributes,
    Change,
    Changes,
    Snapshot,
    StoreDown,
    StoreRefused,
    Subnets,
)
from udptun.leases.file import source as file_module
from udptun.leases.file.config import FileConfig
from udptun.leases.file.positions import Positions
from udptun.leases.file.schema import parse
from udptun.leases.file.source import FileSource
from udptun.model import ANY_PORT

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "hosts.toml"
NOTHING = (Attributes(), Subnets())
PROBED = frozenset({PROBE})


def toml(*nodes, network="10.42.0.0/16"):
    """Return a hosts file with the given node numbers. Each node's name, address and subnet contain
    its number."""
    return f'network = "{network}"\n' + "".join(
        f'\n[[nodes]]\nname = "n{i}"\npublic = "192.0.2.{i}"\nsubnets = "10.42.{i}.0/24"\n'
        for i in nodes
    )


def lease(i, text=None):
    (found,) = (lease for lease in parse((text or toml(i)).encode(), "").leases
                if lease.key == f"n{i}")
    return found


def refusal(text, name="hosts.toml"):
    with pytest.raises(FieldError) as caught:
        parse(text.encode(), name)
    return caught.value


# Valid files


def test_the_documented_example_is_valid():
    hosts = parse(EXAMPLE.read_bytes(), "hosts.toml")
    assert hosts.network.network == IPv4Network("10.42.0.0/16")
    assert hosts.network.network6 is None
    assert (hosts.network.backend_type, hosts.network.udp_port) == ("udp", 8285)
    alpha, beta, gamma, delta = hosts.leases
    assert (alpha.key, alpha.name) == ("alpha", "alpha")
    assert alpha.subnets == Subnets(IPv4Network("10.42.1.0/24"))
    assert alpha.attributes.public_ip == IPv4Address("192.0.2.1")
    assert alpha.attributes.public_ipv6 is None
    assert read(alpha.attributes.backend_data) == Advert(8285, 1400, PROBED)
    assert read(beta.attributes.backend_data) == Advert(8286, 1400, PROBED)
    assert gamma.attributes.public_ipv6 == IPv6Address("2001:db8::7")
    assert read(gamma.attributes.backend_data) == Advert(8285, 1280, PROBED)
    assert read(delta.attributes.backend_data) == Advert(8285, 1400, PROBED, ANY_PORT)


@pytest.mark.parametrize(("given", "ports"), [
    ("", [ANY_PORT, ANY_PORT, None]), ('source_port = 9000', [(9000, 9000), ANY_PORT, None]),
    ('source_port = "9000-9015"', [(9000, 9015), ANY_PORT, None]),
])
def test_nodes_with_one_public_address_may_send_from_any_port(given, ports):
    """They are behind a NAT. The file can name their ports."""
    text = toml(1, 2, 3).replace("192.0.2.2", "192.0.2.1", 1)
    text = text.replace('name = "n1"', f'name = "n1"\nport = 8286\n{given}')
    hosts = parse(text.encode(), "hosts.toml")
    assert [read(lease.attributes.backend_data).source_ports for lease in hosts.leases] == ports


@pytest.mark.parametrize(("default", "own", "probed"), [
    ("", "", [True, True]), ("probe = false", "", [False, False]),
    ("", "probe = false", [False, True]), ("probe = false", "probe = true", [True, False]),
    ("probe = true", "probe = false", [False, True]),
])
def test_the_nodes_answer_probes_unless_the_file_says_otherwise(default, own, probed):
    text = f"{default}\n{toml(1, 2)}".replace('name = "n1"', f'name = "n1"\n{own}')
    adverts = [read(lease.attributes.backend_data) for lease in parse(text.encode(), "").leases]
    assert [PROBE in advert.features for advert in adverts] == probed


def test_json_gives_the_same_result_as_toml():
    text = toml(1, 2)
    content = {
        "network": "10.42.0.0/16",
        "nodes": [{"name": f"n{i}", "public": [f"192.0.2.{i}"], "subnets": [f"10.42.{i}.0/24"]}
                  for i in (1, 2)],
    }
    want = parse(text.encode(), "hosts.toml")
    assert parse(json.dumps(content).encode(), "hosts.json") == want
    assert parse(json.dumps(content, indent=2).encode(), "hosts") == want
    assert parse(text.encode(), "hosts") == want
    assert read(want.leases[0].attributes.backend_data) == Advert(8285, None, PROBED)


def test_both_families():
    hosts = parse(b'''
        network = ["fd00:42::/48", "10.42.0.0/16"]
        port = 9000
        [[nodes]]
        name = "six"
        public = "2001:db8::1"
        subnets = ["10.42.1.0/24", "fd00:42:0:1::/64"]
        mtu = 1280
    ''', "hosts.toml")
    assert hosts.network.networks == (IPv4Network("10.42.0.0/16"), IPv6Network("fd00:42::/48"))
    assert hosts.network.udp_port == 9000
    (six,) = hosts.leases
    assert six.subnets == Subnets(IPv4Network("10.42.1.0/24"), IPv6Network("fd00:42:0:1::/64"))
    assert (six.attributes.public_ip, six.attributes.public_ipv6) == (
        None, IPv6Address("2001:db8::1"))
    assert read(six.attributes.backend_data) == Advert(9000, 1280, PROBED)


def test_the_lowest_mtu_depends_on_the_family():
    text = toml(1) + 'mtu = 1279\n'
    assert read(lease(1, text).attributes.backend_data) == Advert(8285, 1279, PROBED)
    six = text.replace('"10.42.0.0/16"', '"fd00::/16"').replace('"10.42.1.0/24"', '"fd00:1::/64"')
    error = refusal(six)
    assert (error.field, error.where) == ("mtu", "hosts.toml line 7")


# Invalid files. Node 2's table starts in line 8; its name, public and subnets are in lines 9 to 11.


@pytest.mark.parametrize(
    ("old", "new", "field", "line"),
    [
        ('network = "10.42.0.0/16"', "", "network", None),
        ('"10.42.0.0/16"', '"10.42.0.1/16"', "network", 1),
        ('"10.42.0.0/16"', '["10.42.0.0/16", "10.43.0.0/16"]', "network", 1),
        ('"10.42.0.0/16"', "[]", "network", 1),
        ('"10.42.0.0/16"', '"10.42.0.0/16"\nport = 0', "port", 2),
        ('"10.42.0.0/16"', '"10.42.0.0/16"\nmtu = 60', "mtu", 2),
        ('"10.42.0.0/16"', '"10.42.0.0/16"\nmtus = 1400', "mtus", 2),
        ('"10.42.0.0/16"', '"10.42.0.0/16"\nprobe = 1', "probe", 2),
        ('"10.42.0.0/16"', '"10.42.0.0/16"\nexpress = 1', "express", 2),
        ('"10.42.0.0/16"', '"10.42.0.0/16"\necn = 1', "ecn", 2),
        ('name = "n2"', "", "name", 8),
        ('name = "n2"', "name = 2", "name", 9),
        ('name = "n2"', 'name = "n 2"', "name", 9),
        ('name = "n2"', 'name = ""', "name", 9),
        ('name = "n2"', 'name = "n1"', "name", 9),
        ('public = "192.0.2.2"', "", "public", 8),
        ('"192.0.2.2"', '"192.0.2.256"', "public", 10),
        ('"192.0.2.2"', '"192.0.2.2:8285"', "public", 10),
        ('"192.0.2.2"', '"224.0.0.1"', "public", 10),
        ('"192.0.2.2"', '["192.0.2.2",\n"192.0.2.9"]', "public", 10),
        ('"192.0.2.2"', '["192.0.2.2",\n"nowhere"]', "public", 11),
        ('"192.0.2.2"', '"192.0.2.1"', "public", 10),
        ('"192.0.2.2"', "2020-01-01 07:32:00", "public", 10),
        ('subnets = "10.42.2.0/24"', "", "subnets", 8),
        ('"10.42.2.0/24"', "[]", "subnets", 11),
        ('"10.42.2.0/24"', '["10.42.2.0/24", "10.42.9.0/24"]', "subnets", 11),
        ('"10.42.2.0/24"', '"10.42.2.1/24"', "subnets", 11),
        ('"10.42.2.0/24"', '"10.43.2.0/24"', "subnets", 11),
        ('"10.42.2.0/24"', '"10.0.0.0/8"', "subnets", 11),
        ('"10.42.2.0/24"', '"10.42.0.0/15"', "subnets", 11),
        ('"10.42.2.0/24"', '"fd00:42::/64"', "subnets", 11),
        ('"10.42.2.0/24"', '"10.42.2.0/31"', "subnets", 11),
        ('"10.42.2.0/24"', '"10.42.1.0/24"', "subnets", 11),
        ('"10.42.2.0/24"', '"10.42.1.128/25"', "subnets", 11),
        ('"10.42.2.0/24"', '"10.42.0.0/22"', "subnets", 11),
        ('"10.42.2.0/24"', '"10.42.2.0/24"\nport = "x"', "port", 12),
        ('"10.42.2.0/24"', '"10.42.2.0/24"\nmtu = 65536', "mtu", 12),
        ('"10.42.2.0/24"', '"10.42.2.0/24"\nprobe = "no"', "probe", 12),
        ('"10.42.2.0/24"', '"10.42.2.0/24"\nvia = "192.0.2.9"', "via", 12),
        ('"10.42.2.0/24"', '"10.42.2.0/24"\nname = "again"', "the text", 12),
        ('"10.42.2.0/24"', '"10.42.2.0/24', "the text", 11),
        ("[[nodes]]", "[nodes]", "the text", 8),
    ],
)
def test_an_error_names_line_and_field(old, new, field, line):
    error = refusal(toml(1, 2).replace(old, new))
    assert error.field == field
    assert error.where == ("hosts.toml" if line is None else f"hosts.toml line {line}")


@pytest.mark.parametrize(
    ("old", "new", "field", "line"),
    [
        ('"10.42.0.0/16"', '"10.42"', "network", 1),
        ('"n2"', '"n 2"', "name", 5),
        ('"n2"', '"n1"', "name", 5),
        ('"n2"', "NaN", "name", 5),
        ('"192.0.2.2"', '"host"', "public", 7),
        ('"10.42.2.0/24"', '"10.42.1.0/24"', "subnets", 8),
        ('"10.42.2.0/24"', '"10.42.2.0/24", "name": "n3"', "name", 8),
        ('"name": "n2",', '"name": "n2"', "the text", 6),
    ],
)
def test_an_error_in_json_names_line_and_field(old, new, field, line):
    text = '''{"network": "10.42.0.0/16", "nodes": [
  {"name": "n1", "public": "192.0.2.1", "subnets": "10.42.1.0/24"},

  {
    "name": "n2",
    "public": [
      "192.0.2.2"],
    "subnets": "10.42.2.0/24"
  }
]}'''
    assert len(parse(text.encode(), "hosts.json").leases) == 2
    error = refusal(text.replace(old, new), "hosts.json")
    assert (error.field, error.where) == (field, f"hosts.json line {line}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hosts", ""), ("hosts.toml", ""), ("hosts.json", ""), ("hosts.json", "[]"),
        ("hosts.json", "null"), ("hosts.json", "{"), ("hosts.json", "[" * 100000),
        ("hosts.toml", "a = " + "[" * 9999), ("hosts.toml", "port = " + "9" * 5000),
        ("hosts.toml", 'network = "10.42.0.0/16"\nnodes = 5'),
        ("hosts.toml", 'network = "10.42.0.0/16"\nnodes = [5]'),
        ("hosts.toml", 'network = "10.42.0.0/16"\nnodes = []'),  # like a truncated file
        ("hosts.json", '{"network": "10.42.0.0/16", "nodes": {"a": 1}}'),
        ("hosts.json", '{"network": ' + "9" * 5000 + "}"),
    ],
)
def test_other_files_are_refused(name, text):
    assert refusal(text, name).where.startswith(name)


@pytest.mark.parametrize("depth", [100, 300, 600, 900, 960, 990])
@pytest.mark.parametrize("field", ["network", "nodes", "x"])
def test_deep_nesting_is_refused(field, depth):
    nested = "[" * depth + "]" * depth
    assert refusal(f'{{"{field}": {nested}}}', "hosts.json").where.startswith("hosts.json")
    assert refusal(f"{field} = {nested}", "hosts.toml").where.startswith("hosts.toml")


def test_text_that_is_not_utf_8_is_refused():
    with pytest.raises(FieldError, match=r"hosts line 2: the text: b'\\xff'"):
        parse(b'network = "10.42.0.0/16"\n# \xff\n', "hosts")


@given(st.data())
def test_a_file_with_a_gap_is_valid_or_a_field_error(data):
    text = EXAMPLE.read_text()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + 40, len(text))))
    try:
        assert parse((text[:start] + text[end:]).encode(), "hosts.toml").leases
    except FieldError as error:
        assert error.where.startswith("hosts.toml")


def test_positions_in_toml():
    positions = Positions('''# a [comment] = "with" 'all' kinds
a = """
[[nodes]] "quoted \\""" b = 1"""
b = \'\'\'
[c]\'\'\'
when = 1979-05-27T07:32:00Z
[c]  # after
d = [ # in between ]
  "x", 'y]',
  { e = [1,
         2], "f" = {} },
]
g."h" = 1
[[nodes]]
name = "one"
[nodes.more]
z = 1
[[nodes]]
name = "two"
''')
    lines = {"a": 2, "b": 4, "when": 6, "c": 7, "c.d": 8, "c.d[0]": 9, "c.d[1]": 9, "c.d[2].e": 10,
             "c.d[2].e[1]": 11, "c.d[2].f": 11, "c.g.h": 13, "nodes[0]": 14, "nodes[0].name": 15,
             "nodes.more.z": 17, "nodes[1]": 18, "nodes[1].name": 19}
    assert {path: positions.line(path) for path in lines} == lines
    assert positions.line("nodes[1].public[3]") == 18
    assert positions.line("unheard.of") is None
    assert not positions.repeated


@given(st.text("[]{}=:,\"'#\n ab"))
def test_positions_in_invalid_text(text):
    for odd in (text, "{" + text, "a = " + text + "[" * 5000):
        Positions(odd).line("a[0].b")


# Detection of changes


@asynccontextmanager
async def watching(path, **options):
    """Yield a source, and a function that waits for its next update."""
    source = FileSource(path, hostname="n1", **{"poll_s": 0.01, **options})
    updates = asyncio.Queue()

    async def listen():
        async for update in source.updates():
            updates.put_nowait(update)

    async def next_update():
        async with asyncio.timeout(60):
            return await updates.get()

    task = asyncio.create_task(listen())
    try:
        yield source, next_update
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await source.aclose()


def replace(path, text):
    """Replace a file in the way in which an editor replaces it."""
    fresh = path.with_name(path.name + "~")
    fresh.write_text(text)
    fresh.replace(path)


@pytest.fixture
def hosts(tmp_path):
    path = tmp_path / "hosts.toml"
    path.write_text(toml(1, 2))
    return path


async def test_a_snapshot_then_changes(hosts):
    async with watching(hosts) as (source, next_update):
        assert await next_update() == Snapshot((lease(1), lease(2)))
        assert source.health.connected
        replace(hosts, toml(1, 2, 3))
        assert await next_update() == Changes((Change(None, lease(3)),))
        moved = toml(1, 3).replace("192.0.2.3", "192.0.2.33")
        replace(hosts, moved)
        assert await next_update() == Changes(
            (Change(lease(2), None), Change(lease(3), lease(3, moved)))
        )


async def test_an_edit_in_place_is_seen(hosts):
    async with watching(hosts) as (_, next_update):
        await next_update()
        inode = hosts.stat().st_ino
        hosts.write_text(toml(1, 3))  # same length
        assert hosts.stat().st_ino == inode
        assert await next_update() == Changes((Change(lease(2), None), Change(None, lease(3))))


async def test_a_configmap_replaces_a_link_in_the_path(tmp_path):
    """The kubelet creates these links: hosts.toml -> ..data/hosts.toml, and ..data -> a directory.
    """
    for version, nodes in (("v1", (1, 2)), ("v2", (1, 2, 3))):
        (tmp_path / version).mkdir()
        (tmp_path / version / "hosts.toml").write_text(toml(*nodes))
    data, path = tmp_path / "..data", tmp_path / "hosts.toml"
    data.symlink_to("v1")
    path.symlink_to("..data/hosts.toml")
    async with watching(path) as (_, next_update):
        assert await next_update() == Snapshot((lease(1), lease(2)))
        fresh = tmp_path / "..data_tmp"
        fresh.symlink_to("v2")
        fresh.replace(data)
        assert await next_update() == Changes((Change(None, lease(3)),))


async def test_a_half_written_file_is_not_used(hosts, monkeypatch):
    """The first half of the file is valid and has fewer nodes. If the source used this half, it
    would remove the other nodes."""
    async with watching(hosts, poll_s=3600) as (source, next_update):
        await next_update()
        # From now on each state of the file counts as recent, so the source waits. The writer
        # continues in this time.
        monkeypatch.setattr(file_module, "SETTLE_SECONDS", 3600)
        clock = SimpleNamespace(
            time=file_module.time.time, monotonic=file_module.time.monotonic,
            sleep=lambda seconds: hosts.write_text(toml(1, 2, 3)),
        )
        monkeypatch.setattr(file_module, "time", clock)
        hosts.write_text(toml(1))
        source.reload()
        assert await next_update() == Changes((Change(None, lease(3)),))


async def test_an_invalid_edit_is_refused_and_the_last_valid_state_stays(hosts, caplog):
    caplog.set_level("INFO")
    async with watching(hosts) as (source, next_update):
        await next_update()
        replace(hosts, toml(1, 2, 3).replace("192.0.2.3", "192.0.2"))
        await until(lambda: source.health.error, "the error")
        assert not source.health.connected
        want = f"{hosts} line 15: public: '192.0.2' is not valid"
        assert source.health.error.startswith(want)
        assert (await source.network()).network == IPv4Network("10.42.0.0/16")
        assert await source.acquire(*NOTHING) == lease(1)
        polled = source.health.last_contact
        await until(lambda: source.health.last_contact > polled, "the next poll")
        assert caplog.text.count(want) == 1
        assert source.health.errors_n == 1
        assert "valid again" not in caplog.text
        replace(hosts, toml(1, 2, 3))
        assert await next_update() == Changes((Change(None, lease(3)),))
        assert source.health.connected and not source.health.error
        again = f"{hosts} is valid again, number of nodes: 3; the error was: {want}"
        assert caplog.text.count(again) == 1


async def test_a_deleted_file_removes_no_node(hosts, caplog):
    caplog.set_level("INFO")
    async with watching(hosts) as (source, next_update):
        await next_update()
        hosts.rename(hosts.with_suffix(".old"))
        await until(lambda: source.health.error, "the error")
        assert source.health.error .startswith(
            f"{hosts} does not exist; the daemon tries again every ")
        for _ in range(3):
            assert await source.acquire(*NOTHING) == lease(1)
        assert caplog.text.count("does not exist") == source.health.errors_n == 1
        assert "valid again" not in caplog.text
        replace(hosts, toml(1))
        assert await next_update() == Changes((Change(lease(2), None),))
        assert f"{hosts} is valid again, number of nodes: 1" in caplog.text


@pytest.mark.parametrize("text", [toml(1), "network = 1"])
async def test_each_state_of_the_file_is_read_once(hosts, text, monkeypatch):
    reads, read_one = [], file_module._read
    monkeypatch.setattr(file_module, "_read", lambda path: (reads.append(path), read_one(path))[1])
    hosts.write_text(text)
    source = FileSource(hosts)
    for _ in range(3):
        with suppress(FieldError):
            await source.network()
    assert len(reads) == 1


async def test_a_failed_read_is_repeated(hosts, monkeypatch):
    failures, read_one = [OSError(5, "Input/output error")], file_module._read

    def unreliable(path):
        if failures:
            raise failures.pop()
        return read_one(path)

    monkeypatch.setattr(file_module, "_read", unreliable)
    source = FileSource(hosts, hostname="n1")
    with pytest.raises(StoreDown, match="Input/output error"):
        await source.acquire(*NOTHING)
    assert await source.acquire(*NOTHING) == lease(1)


async def test_a_file_that_is_created_later(tmp_path, caplog):
    path = tmp_path / "hosts.toml"
    async with watching(path) as (source, next_update):
        await until(lambda: source.health.error, "the error")
        with pytest.raises(StoreDown, match="does not exist"):
            await source.network()
        assert "does not exist" not in caplog.text  # the daemon logs the error
        with pytest.raises(StoreDown, match="does not exist"):
            await source.acquire(*NOTHING)
        path.write_text("network = 1")
        await until(lambda: "line 1" in source.health.error, "the error in line 1")
        with pytest.raises(FieldError, match="line 1: network"):
            await source.network()
        with pytest.raises(StoreRefused, match="line 1: network"):
            await source.acquire(*NOTHING)
        replace(path, toml(1))
        assert await next_update() == Snapshot((lease(1),))


async def test_a_change_read_first_by_acquire_is_yielded(hosts):
    """acquire() and network() also read the file. updates() must still yield the change."""
    async with watching(hosts, poll_s=3600) as (source, next_update):
        await next_update()
        replace(hosts, toml(1, 2, 3))
        await source.acquire(*NOTHING)
        source.reload()
        assert await next_update() == Changes((Change(None, lease(3)),))


async def test_reload_reads_at_once_even_if_the_file_seems_unchanged(hosts, monkeypatch):
    monkeypatch.setattr(file_module, "_settled_signature", lambda path: (1,))
    async with watching(hosts, poll_s=3600) as (source, next_update):
        await next_update()
        replace(hosts, toml(1))
        source.reload()
        assert await next_update() == Changes((Change(lease(2), None),))


@pytest.mark.parametrize("steps", range(5))
async def test_cancellation_during_a_reload(hosts, steps):
    source = FileSource(hosts, poll_s=3600)
    snapshot = asyncio.Event()

    async def listen():
        async for _ in source.updates():
            snapshot.set()

    task = asyncio.create_task(listen())
    async with asyncio.timeout(60):
        await snapshot.wait()
    source.reload()
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=60)
    assert done


async def test_each_iteration_begins_with_a_snapshot(hosts):
    source = FileSource(hosts)
    for _ in range(2):
        updates = source.updates()
        assert await anext(updates) == Snapshot((lease(1), lease(2)))
        await updates.aclose()


async def test_a_change_of_the_network_is_logged(hosts, caplog):
    async with watching(hosts) as (source, next_update):
        await next_update()
        replace(hosts, toml(1, network="10.0.0.0/8"))
        await next_update()
        assert "the network section of the file has changed" in caplog.text
        assert (await source.network()).network == IPv4Network("10.0.0.0/8")


# Our own node


def addresses(*texts):
    async def local():
        return [IPv4Address("127.0.0.1"), *map(IPv4Address, texts)]
    return local


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"node_name": "n2", "hostname": "n1", "addresses": addresses("192.0.2.1")}, 2),
        ({"hostname": "n2", "addresses": addresses("192.0.2.1")}, 2),
        ({"hostname": "n2.example.org", "addresses": addresses("192.0.2.1")}, 2),
        ({"hostname": "other", "addresses": addresses("192.0.2.2")}, 2),
    ],
)
async def test_finding_our_own_node(hosts, options, want):
    source = FileSource(hosts, **options)
    assert source.health.lease == "none"
    assert await source.acquire(*NOTHING) == lease(want)
    assert source.health.lease == "held"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"node_name": "x", "hostname": "n1"}, ["no node x", "n1, n2"]),
        ({"hostname": "x", "addresses": addresses("192.0.2.9")},
         ["hostname x", "192.0.2.9", "n1, n2", "--node-name"]),
        ({"hostname": "x", "addresses": addresses("192.0.2.1", "192.0.2.2")},
         ["n1, n2", "hostname x", "--node-name"]),
    ],
)
async def test_the_error_without_an_own_node_lists_the_nodes(hosts, options, words):
    with pytest.raises(StoreRefused) as caught:
        await FileSource(hosts, **options).acquire(*NOTHING)
    assert all(word in str(caught.value) for word in (str(hosts), *words))


async def test_a_removed_own_entry_is_a_lost_lease_until_it_is_back(hosts, caplog):
    caplog.set_level("INFO")
    async with watching(hosts) as (source, next_update):
        await next_update()
        holding = asyncio.create_task(source.hold(await source.acquire(*NOTHING)))
        replace(hosts, toml(2))
        assert await next_update() == Changes((Change(lease(1), None),))
        assert source.health.lease == "lost"
        assert source.health.lease_error == f"{hosts} has no node n1 any more"
        assert source.health.lease_error in caplog.text
        replace(hosts, toml(1, 2))
        assert await next_update() == Changes((Change(None, lease(1)),))
        assert (source.health.lease, source.health.lease_error) == ("held", "")
        assert f"{hosts} has the node n1 again" in caplog.text
        assert not holding.done()
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)


def test_the_cache_of_another_node_is_not_used():
    file = Path("/etc/udptun/hosts.toml")
    ids = [FileConfig(file, name).store_id for name in ("", "alpha", "beta")]
    assert len({*ids}) == 3
    assert ids[0] == "file /etc/udptun/hosts.toml"  # caches of earlier versions stay valid


@pytest.mark.parametrize("network", ["127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/8", "fe80::/16"])
def test_a_network_with_reserved_addresses_is_refused(network):
    text = f'network = "{network}"\n[[nodes]]\nname = "n1"\npublic = "192.0.2.1"\n'
    with pytest.raises(FieldError, match=r"hosts line 1: network: .* a network without addresses"):
        parse(text.encode(), "hosts")
