"""The etcd source with a real etcd: the updates of all leases, during failures of the store.

A known lease stays active until the store reports a change of this lease.
"""

import asyncio
import contextlib
import ipaddress

import pytest

from tests.leases.etcd_server import Relay, cluster, needs_etcd, value_of
from tests.leases.observer import Observer
from tests.wait import until
from udptun.leases.base import Attributes, Subnets
from udptun.leases.etcd.config import EtcdConfig
from udptun.leases.etcd.source import EtcdSource

pytestmark = needs_etcd

CONFIG = '{"Network": "10.5.0.0/16"}'


@pytest.fixture
async def observe():
    """Return a function that creates sources with observers. Close them at the end."""
    async with contextlib.AsyncExitStack() as stack:
        async def observe(*urls, **options):
            source = EtcdSource(EtcdConfig(urls, **options))
            stack.push_async_callback(source.aclose)
            observer = Observer(source)
            stack.push_async_callback(observer.close)
            return observer
        yield observe


async def test_snapshot_then_changes(etcd, observe):
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    await etcd.put("subnets/10.5.2.0-24&fc00:0:0:2::-64",
                   value_of(2, ',"BackendType":"vxlan","BackendData":{"VNI":1}'), ttl=500)
    observer = await (await observe(etcd.url)).ready()
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


async def test_an_empty_store_yields_an_empty_snapshot(etcd, observe):
    assert (await (await observe(etcd.url)).ready()).leases == {}


async def test_a_changed_public_address_on_the_same_subnet_is_a_change(etcd, observe):
    await etcd.put("subnets/10.5.1.0-24", value_of(1), ttl=500)
    observer = await (await observe(etcd.url)).ready()
    await etcd.put("subnets/10.5.1.0-24", value_of(9), ttl=500)
    await until(lambda: observer.batches, "the change")
    change = observer.batches[0][0]
    assert str(change.old.attributes.public_ip) == "192.0.2.1"
    assert str(change.new.attributes.public_ip) == "192.0.2.9"


async def test_a_renewal_is_not_a_change(etcd, observe):
    await etcd.put("subnets/10.5.1.0-24", value_of(1), ttl=500)
    observer = await (await observe(etcd.url)).ready()
    await etcd.put("subnets/10.5.1.0-24", value_of(1), ttl=500)
    await etcd.put("subnets/10.5.2.0-24", value_of(2))
    await until(lambda: observer.batches, "the other lease")
    assert [change.key for batch in observer.batches for change in batch] == ["10.5.2.0-24"]


BAD = {
    "10.5.90.0-24": b'{"PublicIP":"192.0',  # an incomplete value
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
    "line\n\x1b[31m": b'{"PublicIP":"192.0.2.99"}',
}


@pytest.mark.parametrize("when", ["listed", "watched"])
async def test_an_invalid_key_is_skipped_and_reported(etcd, observe, when, caplog):
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    if when == "watched":
        observer = await (await observe(etcd.url)).ready()
    for key, value in BAD.items():
        await etcd.put(f"subnets/{key}", value)
    await etcd.put("subnets/10.5.2.0-24", value_of(2))
    if when == "listed":
        observer = await (await observe(etcd.url)).ready()
    await until(lambda: "10.5.2.0-24" in observer.leases, "the valid key after the invalid ones")
    assert observer.leases.keys() == {"10.5.1.0-24", "10.5.2.0-24"}
    health = observer.source.health
    named = {key.replace("\n", r"\n").replace("\x1b", r"\x1b") for key in BAD}
    assert health.skipped.keys() == named and health.connected
    assert all(line.isprintable() for line in caplog.messages)
    assert "not valid" in health.skipped["10.5.90.0-24"]
    for key in BAD:
        await etcd.delete(f"subnets/{key}")
    await until(lambda: not health.skipped, "the skipped entries to be gone")
    assert all(change.old is None for batch in observer.batches for change in batch)


async def test_a_renewal_does_not_change_the_age_of_a_lease(etcd, observe):
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    await etcd.put("subnets/10.5.2.0-24", value_of(2))
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    observer = await (await observe(etcd.url)).ready()

    def ages():
        return [one.key for one in sorted(observer.leases.values(), key=lambda one: one.age)]

    assert ages() == ["10.5.1.0-24", "10.5.2.0-24"]
    await etcd.put("subnets/10.5.1.0-24", value_of(3))
    await etcd.put("subnets/10.5.0.0-24", value_of(4))
    await until(lambda: "10.5.0.0-24" in observer.leases, "the new key")
    assert ages() == ["10.5.1.0-24", "10.5.2.0-24", "10.5.0.0-24"]
    await etcd.delete("subnets/10.5.1.0-24")
    await etcd.put("subnets/10.5.1.0-24", value_of(3))
    await until(lambda: ages()[-1] == "10.5.1.0-24", "the key that was created again")


async def test_an_invalid_new_value_keeps_the_previous_lease(etcd, observe, caplog):
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    observer = await (await observe(etcd.url)).ready()
    await etcd.put("subnets/10.5.1.0-24", "{")
    await until(lambda: observer.source.health.skipped, "the report")
    assert "stays active" in caplog.text
    etcd.kill()
    etcd.start()
    await etcd.put("subnets/10.5.2.0-24", value_of(2))
    await until(lambda: "10.5.2.0-24" in observer.leases, "the next change")
    assert observer.public_ips()["10.5.1.0-24"] == "192.0.2.1"
    await etcd.put("subnets/10.5.1.0-24", value_of(9))
    await until(lambda: observer.public_ips()["10.5.1.0-24"] == "192.0.2.9", "the valid value")
    assert not observer.source.health.skipped


async def test_a_killed_store_removes_no_lease_and_is_watched_again(etcd, observe):
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    observer = await (await observe(etcd.url)).ready()
    health = observer.source.health
    etcd.kill()
    await until(lambda: not health.connected, "the outage to be noticed")
    assert health.errors_n and "etcd at 127.0.0.1" in health.error
    assert observer.public_ips() == {"10.5.1.0-24": "192.0.2.1"}
    etcd.start()
    await until(lambda: health.connected, "the watch")
    await etcd.put("subnets/10.5.2.0-24", value_of(2))
    await until(lambda: "10.5.2.0-24" in observer.leases, "the next change")
    assert health.relists_n == 0 and health.error == ""


async def test_a_store_that_starts_later_yields_a_snapshot(etcd, observe):
    etcd.kill()
    observer = await observe(etcd.url)
    health = observer.source.health
    await until(lambda: health.errors_n >= 2, "attempts")
    assert not health.connected and not observer.snapshots
    etcd.start()
    await observer.ready()


async def test_a_compacted_watch_lists_again_and_yields_the_difference(etcd, observe):
    for i in (1, 2, 3):
        await etcd.put(f"subnets/10.5.{i}.0-24", value_of(i))
    relay = Relay(etcd.url)
    await relay.open()
    observer = await (await observe(relay.url)).ready()
    await relay.cut()
    await etcd.delete("subnets/10.5.1.0-24")
    await etcd.put("subnets/10.5.2.0-24", value_of(22))
    await etcd.put("subnets/10.5.4.0-24", value_of(4))
    await etcd.put("subnets/10.5.3.0-24", "{")  # invalid, so the previous lease stays
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
    await until(lambda: "10.5.6.0-24" in observer.leases, "the next change")
    await observer.source.aclose()
    await relay.cut()


async def test_changes_during_a_disconnection_need_no_listing(etcd, observe):
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    relay = Relay(etcd.url)
    await relay.open()
    observer = await (await observe(relay.url)).ready()
    await relay.cut()
    await etcd.delete("subnets/10.5.1.0-24")
    await etcd.put("subnets/10.5.2.0-24", value_of(2))
    await relay.open()
    await until(lambda: observer.leases.keys() == {"10.5.2.0-24"}, "the events")
    assert observer.source.health.relists_n == 0
    await observer.source.aclose()
    await relay.cut()


async def test_a_frozen_member_is_detected(etcd, observe):
    """The kernel accepts data for a stopped process. Only a response shows that the process runs.
    """
    await etcd.put("subnets/10.5.1.0-24", value_of(1))
    observer = await (await observe(etcd.url)).ready()
    health = observer.source.health
    etcd.freeze()
    await until(lambda: not health.connected, "the freeze to be noticed", 12)
    assert "response" in health.error
    assert observer.public_ips() == {"10.5.1.0-24": "192.0.2.1"}
    etcd.resume()
    await until(lambda: health.connected, "the reconnection")
    await etcd.put("subnets/10.5.2.0-24", value_of(2))
    await until(lambda: "10.5.2.0-24" in observer.leases, "the next change")


async def test_an_idle_watch_stays_connected(etcd, observe):
    observer = await (await observe(etcd.url)).ready()
    health = observer.source.health
    contacts = set()
    await until(lambda: contacts.add(health.last_contact) or len(contacts) >= 3, "two answers", 20)
    assert health.connected and health.errors_n == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_another_member_takes_over(tmp_path, observe, how):
    members = cluster(tmp_path, 3)
    try:
        await members[1].put("subnets/10.5.1.0-24", value_of(1))
        observer = await (await observe(*(member.url for member in members))).ready()
        members[0].kill() if how == "killed" else members[0].freeze()
        for member in members[1:]:
            member.wait_healthy()
        await members[1].put("subnets/10.5.2.0-24", value_of(2))
        await until(lambda: "10.5.2.0-24" in observer.leases, "a change from another member")
        await until(lambda: observer.source.health.connected, "health")
        assert observer.leases.keys() == {"10.5.1.0-24", "10.5.2.0-24"}
    finally:
        for member in members:
            member.kill()


@pytest.mark.slow
async def test_a_member_without_a_leader_counts_as_down(tmp_path, observe):
    members = cluster(tmp_path, 3)
    try:
        await members[0].put("subnets/10.5.1.0-24", value_of(1))
        observer = await (await observe(members[0].url)).ready()
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


async def test_a_wiped_store_removes_no_lease(etcd, observe):
    """Peers stay reachable while their daemons create their leases again."""
    relay = Relay(etcd.url)
    await relay.open()
    for i in (1, 2, 3, 4, 5):
        await etcd.put(f"subnets/10.5.{i}.0-24", value_of(i), ttl=500)
    observer = await (await observe(relay.url, ttl_seconds=12, renew_margin_minutes=0.1)).ready()
    await relay.cut()
    etcd.kill()
    etcd.wipe()
    etcd.start()
    await etcd.put("subnets/10.5.55.0-24", value_of(5), ttl=500)  # returned with another subnet
    await relay.open()
    health = observer.source.health
    await until(lambda: health.relists_n and health.connected, "the new listing")
    assert observer.leases.keys() == {f"10.5.{i}.0-24" for i in (1, 2, 3, 4, 55)}
    await etcd.put("subnets/10.5.1.0-24", value_of(1), ttl=500)  # the node returns
    await etcd.put("subnets/10.5.2.0-24", value_of(9), ttl=500)  # another node has the subnet
    await etcd.put("subnets/10.5.33.0-24", value_of(3), ttl=500)  # returned with another subnet
    await until(lambda: "10.5.33.0-24" in observer.leases, "a change from the new store")
    assert observer.public_ips() == {
        "10.5.1.0-24": "192.0.2.1", "10.5.2.0-24": "192.0.2.9", "10.5.33.0-24": "192.0.2.3",
        "10.5.4.0-24": "192.0.2.4", "10.5.55.0-24": "192.0.2.5",
    }
    # The fourth node does not come back: its lease is removed after the TTL.
    await until(lambda: "10.5.4.0-24" not in observer.leases, "the removal of the lost lease", 40)
    assert observer.leases.keys() == {f"10.5.{i}.0-24" for i in (1, 2, 33, 55)}
    await observer.source.aclose()
    await relay.cut()


async def test_our_lease_is_created_again_in_a_wiped_store(etcd, observe):
    await etcd.put("config", CONFIG)
    await etcd.put("subnets/10.5.1.0-24", value_of(1), ttl=500)
    observer = await (await observe(etcd.url)).ready()
    source = observer.source
    mine = Attributes(ipaddress.IPv4Address("192.0.2.7"))
    lease = await source.acquire(mine, Subnets())
    await until(lambda: lease.key in observer.leases, "our own lease")
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


async def test_updates_can_be_closed_and_started_again(etcd, observe):
    observer = await (await observe(etcd.url)).ready()
    await observer.close()
    again = await Observer(observer.source).ready()  # read the updates a second time
    assert again.snapshots == 1
    await again.close()
