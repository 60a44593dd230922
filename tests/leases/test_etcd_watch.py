"""The etcd source against a real etcd: following all leases through everything that happens to it.

Whatever the store does, what was known stays in force until the store says otherwise.
"""

import asyncio
import contextlib
import ipaddress

import pytest

from tests.leases.etcd_server import Etcd, Relay, cluster, needs_etcd
from tests.leases.observer import Observer
from tests.wait import until
from udptun.leases.base import Attributes, Subnets
from udptun.leases.etcd.config import EtcdConfig
from udptun.leases.etcd.source import EtcdSource

pytestmark = needs_etcd

CONFIG = '{"Network": "10.5.0.0/16"}'


def value_of(last, more=""):
    return f'{{"PublicIP":"192.0.2.{last}","PublicIPv6":null{more}}}'


@pytest.fixture
def etcd(tmp_path):
    server = Etcd(tmp_path).start()
    yield server
    server.kill()


@pytest.fixture
async def follow():
    """Makes sources that are observer; closes both."""
    async with contextlib.AsyncExitStack() as stack:
        async def follow(*urls, **options):
            source = EtcdSource(EtcdConfig(urls, **options))
            stack.push_async_callback(source.aclose)
            observer = Observer(source)
            stack.push_async_callback(observer.close)
            return observer
        yield follow


async def test_snapshot_then_changes(etcd, follow):
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    await etcd.put("subnets/10.5.2.0-24&fc00:0:0:2::-64",
                   value_of(2, ',"BackendType":"vxlan","BackendData":{"VNI":1}'), ttl=500)
    observer = await (await follow(etcd.url)).ready()
    one, two = observer.leases["10.5.1.0-24"], observer.leases["10.5.2.0-24&fc00:0:0:2::-64"]
    assert one.reserved and not two.reserved
    assert two.subnets == Subnets(ipaddress.IPv4Network("10.5.2.0/24"),
                                  ipaddress.IPv6Network("fc00:0:0:2::/64"))
    assert two.attributes == Attributes(
        ipaddress.IPv4Address("192.0.2.2"), None, "vxlan", {"VNI": 1}
    )
    await etcd.put("subnets/10.5.3.0-24", value_of(3), ttl=500)
    await etcd.delete("subnets/10.5.1.0-24")
    await until(lambda: len(observer.batches) == 2, "the changes")
    (added,), (removed,) = observer.batches
    assert added.old is None and removed.new is None and removed.old == one
    assert observer.snapshots == 1 and observer.source.health.errors_n == 0


async def test_an_empty_store_is_an_empty_snapshot(etcd, follow):
    assert (await (await follow(etcd.url)).ready()).leases == {}


async def test_a_changed_public_address_on_the_same_subnet_is_a_change(etcd, follow):
    await etcd.put("subnets/10.5.1.0-24", value_of(1), ttl=500)
    observer = await (await follow(etcd.url)).ready()
    await etcd.put("subnets/10.5.1.0-24", value_of(9), ttl=500)
    await until(lambda: observer.batches, "the change")
    change = observer.batches[0][0]
    assert str(change.old.attributes.public_ip) == "192.0.2.1"
    assert str(change.new.attributes.public_ip) == "192.0.2.9"


async def test_a_renewal_is_no_news(etcd, follow):
    await etcd.put("subnets/10.5.1.0-24", value_of(1), ttl=500)
    observer = await (await follow(etcd.url)).ready()
    await etcd.put("subnets/10.5.1.0-24", value_of(1), ttl=500)
    await etcd.put("subnets/10.5.2.0-24", value_of(2))
    await until(lambda: observer.batches, "the other")
    assert [change.key for batch in observer.batches for change in batch] == ["10.5.2.0-24"]


BAD = {
    "10.5.90.0-24": b'{"PublicIP":"192.0',  # half-written
    "10.5.91.0-24": b"",
    "10.5.92.0-24": b"\xff\xfe",
    "10.5.93.0-24": b'{"PublicIP":null}',
    "10.5.94.0-24": b'{"PublicIP":7}',
    "10.5.95.0-24": b"[" * 100_000,
    "10.5.96.1-24": b'{"PublicIP":"192.0.2.96"}',
    "10.5.97.0-33": b'{"PublicIP":"192.0.2.97"}',
    "0.0.0.0-0": b'{"PublicIP":"192.0.2.98"}',
    "nonsense": b'{"PublicIP":"192.0.2.99"}',
    "deep/10.5.1.0-24": b'{"PublicIP":"192.0.2.99"}',
}


@pytest.mark.parametrize("when", ["listed", "watched"])
async def test_a_bad_key_is_skipped_and_reported(etcd, follow, when):
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    if when == "watched":
        observer = await (await follow(etcd.url)).ready()
    for key, value in BAD.items():
        await etcd.put(f"subnets/{key}", value)
    await etcd.put("subnets/10.5.2.0-24", value_of(2))
    if when == "listed":
        observer = await (await follow(etcd.url)).ready()
    await until(lambda: "10.5.2.0-24" in observer.leases, "the good key behind the bad")
    assert observer.leases.keys() == {"10.5.1.0-24", "10.5.2.0-24"}
    health = observer.source.health
    assert health.skipped.keys() == BAD.keys() and health.connected
    assert "not valid" in health.skipped["10.5.90.0-24"]
    for key in BAD:
        await etcd.delete(f"subnets/{key}")
    await until(lambda: not health.skipped, "an end of the reports")
    assert all(change.old is None for batch in observer.batches for change in batch)


async def test_a_lease_whose_value_is_spoilt_stays_as_it_was(etcd, follow, caplog):
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    observer = await (await follow(etcd.url)).ready()
    await etcd.put("subnets/10.5.1.0-24", "{")
    await until(lambda: observer.source.health.skipped, "the report")
    assert "stays active" in caplog.text
    etcd.kill()
    etcd.start()
    await etcd.put("subnets/10.5.2.0-24", value_of(2))
    await until(lambda: "10.5.2.0-24" in observer.leases, "the watch to go on")
    assert observer.public_ips()["10.5.1.0-24"] == "192.0.2.1"
    await etcd.put("subnets/10.5.1.0-24", value_of(9))
    await until(lambda: observer.public_ips()["10.5.1.0-24"] == "192.0.2.9", "the mended value")
    assert not observer.source.health.skipped


async def test_kill_9_and_start_again(etcd, follow):
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    observer = await (await follow(etcd.url)).ready()
    health = observer.source.health
    etcd.kill()
    await until(lambda: not health.connected, "the outage to be noticed")
    assert health.errors_n and "etcd at 127.0.0.1" in health.error
    assert observer.public_ips() == {"10.5.1.0-24": "192.0.2.1"}
    etcd.start()
    await until(lambda: health.connected, "the watch")
    await etcd.put("subnets/10.5.2.0-24", value_of(2))
    await until(lambda: "10.5.2.0-24" in observer.leases, "the watch to go on")
    assert health.relists_n == 0 and health.error == ""


async def test_down_at_the_start(etcd, follow):
    etcd.kill()
    observer = await follow(etcd.url)
    health = observer.source.health
    await until(lambda: health.errors_n >= 2, "attempts")
    assert not health.connected and not observer.snapshots
    etcd.start()
    await observer.ready()


async def test_a_compacted_watch_lists_again_and_tells_the_difference(etcd, follow):
    for i in (1, 2, 3):
        await etcd.put(f"subnets/10.5.{i}.0-24", value_of(i))
    relay = Relay(etcd.url)
    await relay.open()
    observer = await (await follow(relay.url)).ready()
    await relay.cut()
    await etcd.delete("subnets/10.5.1.0-24")
    await etcd.put("subnets/10.5.2.0-24", value_of(22))
    await etcd.put("subnets/10.5.4.0-24", value_of(4))
    await etcd.put("subnets/10.5.3.0-24", "{")  # spoilt: it stays what it was
    await etcd.put("subnets/10.5.5.0-24", "{")
    await etcd.compact()
    await relay.open()
    await until(lambda: observer.batches, "the difference")
    (batch,) = observer.batches
    assert [(change.key, change.old is None, change.new is None) for change in batch] == [
        ("10.5.1.0-24", False, True), ("10.5.2.0-24", False, False), ("10.5.4.0-24", True, False),
    ]
    health = observer.source.health
    await until(lambda: health.connected, "the watch")
    assert health.relists_n == 1 and health.skipped.keys() == {"10.5.3.0-24", "10.5.5.0-24"}
    await etcd.put("subnets/10.5.6.0-24", value_of(6))
    await until(lambda: "10.5.6.0-24" in observer.leases, "the watch to go on")
    await observer.source.aclose()
    await relay.cut()


async def test_what_happened_while_it_was_cut_off_is_told_without_a_listing(etcd, follow):
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    relay = Relay(etcd.url)
    await relay.open()
    observer = await (await follow(relay.url)).ready()
    await relay.cut()
    await etcd.delete("subnets/10.5.1.0-24")
    await etcd.put("subnets/10.5.2.0-24", value_of(2))
    await relay.open()
    await until(lambda: observer.leases.keys() == {"10.5.2.0-24"}, "the events")
    assert observer.source.health.relists_n == 0
    await observer.source.aclose()
    await relay.cut()


async def test_a_frozen_member_is_noticed(etcd, follow):
    """The kernel goes on taking data for it: only an answer shows that it lives."""
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    observer = await (await follow(etcd.url)).ready()
    health = observer.source.health
    etcd.freeze()
    await until(lambda: not health.connected, "the freeze to be noticed", 12)
    assert "response" in health.error
    assert observer.public_ips() == {"10.5.1.0-24": "192.0.2.1"}
    etcd.resume()
    await until(lambda: health.connected, "its return")
    await etcd.put("subnets/10.5.2.0-24", value_of(2))
    await until(lambda: "10.5.2.0-24" in observer.leases, "the watch to go on")


async def test_a_quiet_watch_is_not_taken_for_a_frozen_one(etcd, follow):
    observer = await (await follow(etcd.url)).ready()
    health = observer.source.health
    contacts = set()
    await until(lambda: contacts.add(health.last_contact) or len(contacts) >= 3, "two answers", 20)
    assert health.connected and health.errors_n == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_another_member_takes_over(tmp_path, follow, how):
    members = cluster(tmp_path, 3)
    try:
        await members[1].put("subnets/10.5.1.0-24", value_of(1))
        observer = await (await follow(*(member.url for member in members))).ready()
        members[0].kill() if how == "killed" else members[0].freeze()
        for member in members[1:]:
            member.wait_healthy()
        await members[1].put("subnets/10.5.2.0-24", value_of(2))
        await until(lambda: "10.5.2.0-24" in observer.leases, "news from another member")
        await until(lambda: observer.source.health.connected, "health")
        assert observer.leases.keys() == {"10.5.1.0-24", "10.5.2.0-24"}
    finally:
        for member in members:
            member.kill()


@pytest.mark.slow
async def test_a_member_without_a_leader_is_no_store(tmp_path, follow):
    members = cluster(tmp_path, 3)
    try:
        await members[0].put("subnets/10.5.1.0-24", value_of(1))
        observer = await (await follow(members[0].url)).ready()
        health = observer.source.health
        for member in members[1:]:
            member.kill()
        await until(lambda: not health.connected, "the loss of the leader")
        assert observer.public_ips() == {"10.5.1.0-24": "192.0.2.1"}
        for member in members[1:]:
            member.start(wait=False)
        await until(lambda: health.connected, "a leader", 40)
    finally:
        for member in members:
            member.kill()


async def test_a_wiped_store_takes_no_lease_away(etcd, follow):
    """Peers go on being reached while they take their leases back, each by its own daemon."""
    relay = Relay(etcd.url)
    await relay.open()
    for i in (1, 2, 3, 4, 5):
        await etcd.put(f"subnets/10.5.{i}.0-24", value_of(i), ttl=500)
    observer = await (await follow(relay.url, ttl_seconds=12, renew_margin_minutes=0.1)).ready()
    await relay.cut()
    etcd.kill()
    etcd.wipe()
    etcd.start()
    await etcd.put("subnets/10.5.55.0-24", value_of(5), ttl=500)  # back already, elsewhere
    await relay.open()
    health = observer.source.health
    await until(lambda: health.relists_n and health.connected, "the wipe to be noticed")
    assert observer.leases.keys() == {f"10.5.{i}.0-24" for i in (1, 2, 3, 4, 55)}
    await etcd.put("subnets/10.5.1.0-24", value_of(1), ttl=500)  # back
    await etcd.put("subnets/10.5.2.0-24", value_of(9), ttl=500)  # another's
    await etcd.put("subnets/10.5.33.0-24", value_of(3), ttl=500)  # back elsewhere
    await until(lambda: "10.5.33.0-24" in observer.leases, "news from the new store")
    assert observer.public_ips() == {
        "10.5.1.0-24": "192.0.2.1", "10.5.2.0-24": "192.0.2.9", "10.5.33.0-24": "192.0.2.3",
        "10.5.4.0-24": "192.0.2.4", "10.5.55.0-24": "192.0.2.5",
    }
    # The fourth never comes back: it ends when its lease would have.
    await until(lambda: "10.5.4.0-24" not in observer.leases, "the end of what is forgotten", 40)
    assert observer.leases.keys() == {f"10.5.{i}.0-24" for i in (1, 2, 33, 55)}
    await observer.source.aclose()
    await relay.cut()


async def test_our_lease_in_a_wiped_store_is_put_back(etcd, follow):
    await etcd.put("config", CONFIG)
    await etcd.put("subnets/10.5.1.0-24", value_of(1), ttl=500)
    observer = await (await follow(etcd.url)).ready()
    source = observer.source
    mine = Attributes(ipaddress.IPv4Address("192.0.2.7"))
    lease = await source.acquire(mine, Subnets())
    await until(lambda: lease.key in observer.leases, "our own lease among all")
    holding = asyncio.create_task(source.hold(lease))
    etcd.kill()
    etcd.wipe()
    etcd.start()

    async def back():
        return await etcd.subnet_keys() == [lease.key]

    await until(back, "our lease")
    holding.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await holding
    assert observer.leases.keys() == {"10.5.1.0-24", lease.key}


async def test_closing_ends_the_stream(etcd, follow):
    observer = await (await follow(etcd.url)).ready()
    await observer.close()
    again = await Observer(observer.source).ready()  # and it may be observer anew
    assert again.snapshots == 1
    await again.close()
