"""The programs of the express path: the committed object file, and how it is read and loaded."""

import os
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.own_netns import in_own_netns
from udptun.device import bpf
from udptun.forwarder import express
from udptun.model import NO_EXPRESS_PEER
from udptun.takeover.document import (
    CountersDocument,
    dump,
    express_peers_of,
    load,
    peer_from_json,
    peer_to_json,
)
from udptun.takeover.message import TakeOverError

ROOT = Path(__file__).parents[2]
COMPILER = "clang version 14.0.6"  # with which the committed file was compiled


def test_the_object_file_is_that_of_the_source(tmp_path):
    clang = shutil.which("clang")
    if clang is None or not Path("/usr/include/linux/bpf.h").exists():
        pytest.skip("clang or the headers of the kernel's API are missing")
    version = subprocess.run([clang, "--version"], check=True, capture_output=True, text=True)
    if COMPILER not in version.stdout:
        pytest.skip(f"another compiler than {COMPILER}")
    made = tmp_path / "express.bpf.o"
    subprocess.run([ROOT / "scripts" / "express", made], check=True)
    assert made.read_bytes() == express.OBJECT.read_bytes(), "run `make express`, commit the result"


def test_each_program_uses_only_maps_that_exist():
    programs = bpf.read_object(express.OBJECT)
    assert set(programs) == set(express.PROGRAMS.values())
    for program in programs.values():
        maps = set(program.maps.values())
        assert maps <= {"settings", "tun", "table", "peers", "counters", "totals", "flows"}
        linked = program.linked(dict.fromkeys(maps, 77))
        for at in program.maps:
            assert linked[at] == 0x18 and linked[at + 1] >> 4 == bpf.PSEUDO_MAP_FD
            assert struct.unpack_from("<i", linked, at + 4) == (77,)


def test_another_file_is_refused(tmp_path):
    wrong = tmp_path / "wrong.o"
    wrong.write_bytes(b"no object file")
    with pytest.raises(OSError, match="not a 64-bit little-endian ELF file"):
        bpf.read_object(wrong)


@in_own_netns
def test_maps_hold_what_was_set(monkeypatch):
    try:
        found = bpf.Map("test", bpf.PERCPU_HASH, 4, 16, 8)
    except PermissionError:
        pytest.skip("bpf(2) is not permitted here")
    key = b"key1"
    with pytest.raises(KeyError):
        found[key]
    found.add(key, bytes(16))
    with pytest.raises(FileExistsError):
        found.add(key, bytes(16))
    found[key] = struct.pack(f"={2 * bpf.cpus_n()}Q", *range(2 * bpf.cpus_n()))
    first, second = found.per_cpu(key)
    assert sum(first) == sum(range(0, 2 * bpf.cpus_n(), 2))
    assert max(second) == 2 * bpf.cpus_n() - 1
    del found[key], found[key]
    assert found.items() == (b"", b"")
    with monkeypatch.context() as patch:
        patch.setattr(bpf, "BATCH_BYTES", 1)  # several calls
        many = bpf.Map("many", bpf.PERCPU_HASH, 4, 16, 1000)
        wanted = {struct.pack("=I", n): struct.pack("=QQ", n, 2 * n) for n in range(1000)}
        for one, value in wanted.items():
            many.add(one, value)
        keys, values = many.items()
    size = len(values) // 1000
    assert size >= 16 * bpf.cpus_n()
    assert {keys[4 * n :][:4]: values[size * n :][:16] for n in range(1000)} == wanted
    many.close()
    with pytest.raises(KeyError):
        found[key]
    trie = bpf.Map("trie", bpf.LPM_TRIE, 24, 24, 4)
    keys = [struct.pack("=IB3x16s", 32 + bits, 4, bytes([10, n])) for n, bits in ((1, 16), (2, 24))]
    trie.fill(b"".join(keys), bytes(24) + b"x" * 24)
    assert trie[struct.pack("=IB3x16s", 64, 4, bytes([10, 2]))] == b"x" * 24
    os.fstat(trie.fd)
    trie.close()
    found.close()


@in_own_netns
def test_a_peer_that_leaves_twice_is_counted_once():
    gone = []
    core = SimpleNamespace(
        expect_unfinished=lambda: None, has_peer=lambda *key: False, inherit_gone=gone.append,
        set_express=lambda keys, values, cpus_n, packets: [])
    path = express.Express(SimpleNamespace(accelerate="auto"), "lo", core)
    if path.off:
        pytest.skip(path.off)
    key = bytes((192, 0, 2, 1)), 8285
    counters = path._maps["counters"]

    def count(packets):
        counters[express._endpoint(key)] = struct.pack("=5Q", packets, 0, 0, 0, 0) + bytes(
            express.COUNTERS.size * (bpf.cpus_n() - 1))

    for before, now in ((7, 10), (None, 2)):
        path._set_peers({key: express.PEER.pack(1, 1400, 0)})
        if before is not None:
            count(before)
            path.read()
        count(now)
        path._set_peers({})
        path._forget_peers([])
    assert [one["encap"]["packets"] for one in gone] == [3, 2]
    path.release()


@in_own_netns
def test_without_memory_for_a_table_it_is_off_until_the_next_table():
    core = SimpleNamespace(
        expect_unfinished=lambda: None, express_peers=dict, snapshot_generation=2)
    config = SimpleNamespace(accelerate="auto", listen=(), mark=None, admit="any", dscp=None)
    path = express.Express(config, "lo", core)
    if path.off:
        pytest.skip(path.off)
    path._facts = express.Facts()  # as after a look at the host
    path.activate(None)
    assert path.report()["reason"] == "there is no memory for the table of the programs"
    assert path.receives is False
    table = bpf.Map("table", bpf.LPM_TRIE, express.KEY_BYTES, express.ENTRY_BYTES, 1)
    path.activate(express.Table(table, 2))
    assert path.report()["reason"] == NO_EXPRESS_PEER
    assert path.report()["kernel_generation"] == 2
    path.release()


def counting_core():
    """A core that keeps what it gets from the express path."""
    core = SimpleNamespace(
        expect_unfinished=lambda: None, has_peer=lambda *key: True, take_traffic=list,
        snapshot_generation=1, inherit_peers=lambda peers: setattr(core, "peers", [*peers]))

    def set_express(keys, values, cpus_n, packets):
        core.packets = packets
        return []

    core.set_express = set_express
    return core


@in_own_netns
@pytest.mark.parametrize("layout", ["same", "other", "none"])
def test_the_counters_go_on_after_a_take_over(layout):
    """The programs of the former forwarder count until ours replace them. If the maps have another
    layout, what they count meanwhile is lost."""
    config, core = SimpleNamespace(accelerate="auto"), counting_core()
    former = express.Express(config, "lo", core)
    if former.off:
        pytest.skip(former.off)
    rest = bytes(8 * len(express.TOTALS) * (bpf.cpus_n() - 1))

    def count(packets):
        former._maps["totals"][express.ZERO] = struct.pack(
            f"={len(express.TOTALS)}Q", *[packets] * len(express.TOTALS)) + rest

    key = bytes((192, 0, 2, 1)), 8285
    former._set_peers({key: express.PEER.pack(1, 1400, 0)})
    former._maps["counters"][express._endpoint(key)] = struct.pack("=5Q", 7, 70, 6, 60, 0) + bytes(
        express.COUNTERS.size * (bpf.cpus_n() - 1))
    count(7)
    former.read()
    count(8)  # belongs to the next read
    peer = peer_to_json(peer_from_json({
        "address": "c0000201", "port": 8285, "encap_packets": 10, "encap_bytes": 100,
        "decap_packets": 9, "decap_bytes": 90}))
    text = dump(CountersDocument(peers=[peer], **former.counted()))
    maps = {name: os.dup(fd) for name, fd in former.descriptors().items()}
    if layout == "other":
        os.dup2(former._maps["settings"].fd, maps["express-totals"])
    next_core = counting_core()
    following = express.Express(config, "lo", next_core, {} if layout == "none" else maps)
    following.inherit(load(CountersDocument, text))
    count(10)
    following.read()
    same = layout == "same"
    assert next_core.packets == ((3,) * 4 if same else (0,) * 4)
    assert set(following.report()["packets"].values()) == {10 if same else 7}
    [peer] = next_core.peers
    assert peer[3:7] == ((3, 30, 3, 30) if same else (10, 100, 9, 90)), peer
    again = counting_core()
    last = express.Express(SimpleNamespace(accelerate="off"), "lo", again)
    last.inherit(load(CountersDocument, dump(CountersDocument(**following.counted()))))
    assert set(last.report()["packets"].values()) == {10 if same else 7}
    for one in (former, following, last):
        one.release()
    if layout == "none":
        for fd in maps.values():
            os.close(fd)


def test_wrong_counters_of_peers_are_refused():
    for endpoint, numbers in (("00", [1, 2, 3, 4]), ("x", [1, 2, 3, 4]), ("00" * 20, [1])):
        with pytest.raises(TakeOverError, match="express_peers"):
            express_peers_of(CountersDocument(express_peers={endpoint: numbers}))
