"""The cache of leases on disk: ``load`` returns exactly the written data, or nothing."""

import asyncio
import json
import logging
import os
import shutil
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest

from tests.wait import until
from udptun.leases import cache
from udptun.leases.base import Attributes, Lease, Subnets
from udptun.leases.cache import LastKnown, LeaseCache
from udptun.leases.netconf import NetConfig

ETCD = "etcd http://192.0.2.1:2379 /coreos.com/network"
NETWORK = NetConfig.parse('{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": 7}}')
OWN = Lease(
    "10.5.1.0-24&fc00:0:0:1::-64",
    Subnets(IPv4Network("10.5.1.0/24"), IPv6Network("fc00:0:0:1::/64")),
    Attributes(IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1"), "vxlan",
               {"VNI": 7, "VtepMAC": "aa:bb:cc:dd:ee:ff", "other": ["<&>", None]}, {"VNI": 7}),
    name="alpha",
    reserved=True,
)
# JSON values in peers' leases that code can confuse with a missing value
ODD = [
    Lease(f"10.5.{i}.0-24", Subnets(IPv4Network(f"10.5.{i}.0/24")), Attributes(backend_data=data))
    for i, data in enumerate((None, 0, False, "", [], {}, "\ud800"), start=2)
]


def known(*leases, store=ETCD, lease=OWN):
    return LastKnown(store, NETWORK, lease, leases or (OWN, *ODD),
                     overrides=(IPv4Address("192.0.2.9"), IPv6Address("2001:db8::9")),
                     memory={"of": "the source"})


async def write(path, what):
    file = LeaseCache(path)
    file.keep(what)
    await file.aclose()


async def test_load_returns_what_was_written(tmp_path):
    path = tmp_path / "not" / "yet" / "leases.json"
    await write(path, known())
    assert LeaseCache(path).load(ETCD) == known()
    await write(path, known(replace(OWN, since=7), lease=None))
    loaded = LeaseCache(path).load(ETCD)
    assert loaded == known(OWN, lease=None)
    assert loaded.leases[0].since == 7
    assert [entry.name for entry in path.parent.iterdir()] == ["leases.json"]


async def test_a_removed_file_is_written_again(tmp_path, caplog):
    path = tmp_path / "state" / "leases.json"
    file = LeaseCache(path)
    file.keep(known())
    await until(path.exists)
    shutil.rmtree(path.parent)
    await until(path.exists)
    assert "was removed: writing it again" in caplog.text
    await file.aclose()
    assert LeaseCache(path).load(ETCD) == known()


async def test_a_lease_that_cannot_be_encoded_is_left_out_alone(tmp_path):
    nested = []
    for _ in range(5000):
        nested = [nested]
    deep = Lease("10.5.9.0-24", Subnets(), Attributes(backend_data=nested))
    path = tmp_path / "leases.json"
    await write(path, known(OWN, deep, *ODD))
    assert LeaseCache(path).load(ETCD) == known()


async def test_a_network_whose_subnets_the_store_assigns(tmp_path):
    path = tmp_path / "leases.json"
    network = NetConfig.parse('{"Network": "10.5.0.0/29", "SubnetLen": 99}', check_subnets=False)
    what = LastKnown("kubernetes", network, None, ())
    await write(path, what)
    assert LeaseCache(path).load("kubernetes") == what


def test_no_file(tmp_path):
    assert LeaseCache(tmp_path / "leases.json").load(ETCD) is None


async def test_the_state_of_another_store_is_not_used(tmp_path):
    path = tmp_path / "leases.json"
    await write(path, known())
    assert LeaseCache(path).load("kubernetes") is None
    assert LeaseCache(path).load(ETCD) is not None


def _without(key):
    def damage(content):
        del content["leases"][0][key]
    return damage


def _with(**fields):
    return lambda content: content.update(fields)


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"\xff", b"[]", b"null", b"{}", b"[" * 100000,
        _without("key"), _without("backend_type"), _without("reserved"),
        _with(version=2), _with(network="{}"), _with(network=None), _with(leases=None),
        _with(leases=[5]), _with(lease="x"), _with(leases=[{"key": "k", "v4": "10.0.0.1/8"}]),
    ],
)
async def test_an_invalid_file_is_renamed_and_logged(tmp_path, caplog, damage):
    path = tmp_path / "leases.json"
    await write(path, known())
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        content = json.loads(path.read_bytes())
        damage(content)
        path.write_text(json.dumps(content))
    broken = path.read_bytes()
    assert LeaseCache(path).load(ETCD) is None
    assert not path.exists()
    assert (tmp_path / "leases.json.bad").read_bytes() == broken
    assert "leases.json.bad" in caplog.text
    await write(path, known())
    assert LeaseCache(path).load(ETCD) == known()


async def test_an_unreadable_file_is_not_renamed(tmp_path, caplog):
    path = tmp_path / "leases.json"
    path.mkdir()
    assert LeaseCache(path).load(ETCD) is None
    assert path.exists()
    assert "cannot be read" in caplog.text


async def test_an_unchanged_state_is_not_written_again(tmp_path):
    path = tmp_path / "leases.json"
    file, state = LeaseCache(path, interval_s=0.0), known()
    file.keep(state)
    await until(path.exists)
    await until(lambda: file._next is None)
    written = path.stat().st_ino
    file.keep(replace(state, leases=(*state.leases,)))
    assert file._next is None
    file.keep(replace(state, lease=None))
    await until(lambda: path.stat().st_ino != written)
    await file.aclose()
    assert LeaseCache(path).load(ETCD).lease is None


async def test_many_changes_are_one_write_of_the_last(tmp_path):
    path = tmp_path / "leases.json"
    file = LeaseCache(path, interval_s=0)
    written = []
    write_one, file._write = file._write, lambda what: (written.append(what), write_one(what))
    for last in ODD[-3:]:
        for lease in (*ODD, last):
            file.keep(known(lease))
        await until(lambda last=last: written and written[-1] == known(last), "the write")
    await file.aclose()
    assert len(written) == 3
    assert LeaseCache(path).load(ETCD) == known(ODD[-1])


async def test_a_write_after_a_quiet_period_is_immediate(tmp_path):
    path = tmp_path / "leases.json"
    file = LeaseCache(path, interval_s=3600)
    file.keep(known())
    await until(path.exists, "the file")
    file.keep(known(OWN))
    await asyncio.sleep(0)
    assert LeaseCache(path).load(ETCD) == known()
    await file.aclose()


async def test_the_interval_is_proportional_to_the_duration_of_a_write(tmp_path, monkeypatch):
    """The first write is immediate. The next write waits for the interval."""
    path = tmp_path / "leases.json"
    pauses = []

    async def wait(event, seconds):
        pauses.append(seconds)

    monkeypatch.setattr(cache, "wait_at_most", wait)
    file = LeaseCache(path)
    for lease in (OWN, ODD[-1]):
        file.keep(known(lease))
        await until(
            lambda lease=lease: path.exists() and LeaseCache(path).load(ETCD) == known(lease),
            "the file",
        )
    await file.aclose()
    assert len(pauses) == 2
    assert pauses[0] <= 0 < pauses[1] <= cache.MAX_INTERVAL_SECONDS


async def test_a_change_during_a_write_is_written(tmp_path):
    path = tmp_path / "leases.json"
    file = LeaseCache(path, interval_s=0)
    loop = asyncio.get_running_loop()
    write_one = file._write

    def write_and_change(what):
        write_one(what)
        if what != known(OWN):
            asyncio.run_coroutine_threadsafe(change(), loop).result()

    async def change():
        file.keep(known(OWN))

    file._write = write_and_change
    file.keep(known())
    await until(lambda: path.exists() and LeaseCache(path).load(ETCD) == known(OWN), "the file")
    await file.aclose()


async def test_closing_writes_without_waiting_for_the_interval(tmp_path):
    path = tmp_path / "leases.json"
    file = LeaseCache(path, interval_s=3600)
    file.keep(known(OWN))
    await until(path.exists, "the file")
    file.keep(known())
    await file.aclose()
    assert LeaseCache(path).load(ETCD) == known()


async def test_a_failed_write_is_logged_once_and_repeated(
    tmp_path, caplog, monkeypatch
):
    """After a failed write, the previous file is still complete."""
    path = tmp_path / "leases.json"
    await write(path, known(OWN))
    monkeypatch.setattr(cache, "RETRY_SECONDS", 0.01)
    full, tries = True, []

    def fsync(fd):
        tries.append(fd)
        if full:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    file = LeaseCache(path, interval_s=0)
    with caplog.at_level(logging.ERROR):
        file.keep(known())
        await until(lambda: len(tries) >= 3, "three attempts")
    assert LeaseCache(path).load(ETCD) == known(OWN)
    assert [record.getMessage() for record in caplog.records] == [
        f"the leases are not saved to {path}: No space left on device (ENOSPC)"
    ]
    full = False
    await until(lambda: LeaseCache(path).load(ETCD) == known(), "the file")
    await file.aclose()


async def test_closing_does_not_wait_for_a_full_disk(tmp_path):
    path = tmp_path / "file" / "leases.json"
    path.parent.write_text("no directory")
    file = LeaseCache(path)
    file.keep(known())
    await asyncio.wait_for(file.aclose(), 60)
