"""The etcd source with a real etcd: acquire, renew, lose and regain our own lease."""

import asyncio
import contextlib
import ipaddress
import logging
import time

import pytest

from tests.leases.etcd_server import needs_etcd, value_of
from tests.leases.observer import Observer
from tests.wait import until
from udptun.errors import FieldError
from udptun.leases import contest
from udptun.leases.backoff import Backoff
from udptun.leases.base import Attributes, Lease, StoreDown, StoreRefused, Subnets
from udptun.leases.etcd import messages
from udptun.leases.etcd.client import Client
from udptun.leases.etcd.config import EtcdConfig
from udptun.leases.etcd.source import EtcdSource

pytestmark = needs_etcd

CONFIG = '{"Network": "10.5.0.0/16", "SubnetLen": 24, "Backend": {"Type": "udp", "Port": 8285}}'
DUAL = ('{"EnableIPv6": true, "Network": "10.5.0.0/16", "IPv6Network": "fc00::/48",'
        ' "Backend": {"Type": "vxlan"}}')
NONE = Subnets()


def me(last=1, **more):
    return Attributes(ipaddress.IPv4Address(f"192.0.2.{last}"), **more)


def subnets(v4, v6=None):
    return Subnets(ipaddress.IPv4Network(v4), None if v6 is None else ipaddress.IPv6Network(v6))


@pytest.fixture
async def make(etcd):
    """Return a function that creates sources. Close the sources at the end."""
    async with contextlib.AsyncExitStack() as stack:
        def make(**options):
            draw = options.pop("draw", min)
            source = EtcdSource(EtcdConfig((etcd.url,), **options), draw)
            stack.push_async_callback(source.aclose)
            return source
        yield make


@pytest.fixture
async def holding():
    """Hold a lease in a separate task."""
    tasks = []

    def hold(source, lease):
        tasks.append(asyncio.create_task(source.hold(lease)))
        return tasks[-1]

    yield hold
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, asyncio.CancelledError)


# The network's configuration

async def test_network_is_read(etcd, make):
    await etcd.put("config", CONFIG)
    network = await make().network()
    assert str(network.network) == "10.5.0.0/16" and network.text == CONFIG


async def test_a_missing_network_is_a_temporary_error(make):
    with pytest.raises(StoreDown, match=r"/coreos\.com/network/config does not exist"):
        await make().network()


@pytest.mark.parametrize("text", ["{", '{"Network": "10.5.0.0/33"}', b"\xff{}",
                                  '{"EnableIPv4": false, "EnableIPv6": true,'
                                  ' "IPv6Network": "fc00::/48"}'])
async def test_an_invalid_network_names_the_key(etcd, make, text):
    await etcd.put("config", text)
    with pytest.raises(FieldError, match=r"etcd key /coreos\.com/network/config"):
        await make().network()


async def test_another_prefix(etcd, make):
    await etcd.put_raw("/other/net/config", CONFIG)
    assert (await make(prefix="/other//net/").network()).subnet_len == 24


async def test_store_down_if_no_member_answers(etcd, make):
    etcd.kill()
    source = make()
    with pytest.raises(StoreDown, match=r"etcd at 127\.0\.0\.1"):
        await source.network()
    assert source.health.errors_n == 1


# Acquire

async def test_a_lease_is_written_as_flannel_does(etcd, make):
    await etcd.put("config", CONFIG)
    source = make()
    lease = await source.acquire(me(), NONE)
    assert lease == Lease("10.5.1.0-24", subnets("10.5.1.0/24"), me())
    assert await etcd.subnet_keys() == ["10.5.1.0-24"]
    assert (await etcd.get("subnets/10.5.1.0-24"))["value"] == value_of(1).encode()
    left, granted = await etcd.ttl("subnets/10.5.1.0-24")
    assert granted == 86400 and left > 86300
    assert source.health.lease == "held"
    assert 86300 < source.health.lease_expires - time.time() <= 86400


async def test_a_dual_stack_vxlan_lease_is_written_as_flannel_does(etcd, make):
    await etcd.put("config", DUAL)
    attributes = Attributes(
        ipaddress.IPv4Address("192.0.2.1"), ipaddress.IPv6Address("2001:db8::1"), "vxlan",
        {"VNI": 1, "VtepMAC": "aa:bb:cc:dd:ee:ff"}, {"VNI": 1, "VtepMAC": "aa:bb:cc:dd:ee:00"},
    )
    lease = await make().acquire(attributes, NONE)
    assert lease.subnets == subnets("10.5.1.0/24", "fc00:0:0:1::/64")
    record = await etcd.get("subnets/10.5.1.0-24&fc00:0:0:1::-64")
    assert record["value"] == (
        b'{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"aa:bb:cc:dd:ee:ff"},'
        b'"BackendV6Data":{"VNI":1,"VtepMAC":"aa:bb:cc:dd:ee:00"}}'
    )


async def test_a_lease_with_our_address_is_reused(etcd, make):
    await etcd.put("config", CONFIG)
    await etcd.put("subnets/10.5.77.0-24", value_of(1), ttl=50)
    lease = await make().acquire(me(), subnets("10.5.9.0/24"))
    assert lease.key == "10.5.77.0-24" and not lease.reserved
    assert (await etcd.ttl("subnets/10.5.77.0-24"))[1] == 86400
    assert await etcd.subnet_keys() == ["10.5.77.0-24"]


@pytest.mark.parametrize("key", ["10.9.0.0-24", "10.5.77.0-25", "10.5.77.0-24&fc00:0:0:1::-64"])
async def test_a_lease_with_our_address_that_does_not_fit_is_deleted(etcd, make, key):
    await etcd.put("config", CONFIG)
    await etcd.put(f"subnets/{key}", value_of(1), ttl=500)
    assert (await make().acquire(me(), NONE)).key == "10.5.1.0-24"
    assert await etcd.subnet_keys() == ["10.5.1.0-24"]


async def test_a_reservation_with_our_address_is_used_and_stays_a_reservation(etcd, make, holding):
    await etcd.put("config", CONFIG)
    await etcd.put("subnets/10.5.50.0-24", value_of(1))
    await etcd.put("subnets/10.5.60.0-24", value_of(1), ttl=500)
    source = make(ttl_seconds=2, renew_margin_minutes=1.9 / 60)
    lease = await source.acquire(me(backend_type="vxlan"), subnets("10.5.60.0/24"))
    assert lease.key == "10.5.50.0-24" and lease.reserved
    assert source.health.lease_expires is None
    holding(source, lease)
    await etcd.put("subnets/10.5.50.0-24", value_of(1))  # the operator writes it again

    async def our_attributes():
        return b"vxlan" in (await etcd.get("subnets/10.5.50.0-24"))["value"]

    observer = await Observer(source).ready()
    await until(our_attributes, "our attributes in the reservation")
    assert (await etcd.get("subnets/10.5.50.0-24"))["lease"] == 0
    assert observer.leases["10.5.50.0-24"].reserved
    await observer.close()


async def test_a_reservation_that_does_not_fit_is_not_changed(etcd, make):
    await etcd.put("config", CONFIG)
    await etcd.put("subnets/10.9.0.0-24", value_of(1))
    assert (await make().acquire(me(), NONE)).key == "10.5.1.0-24"
    assert await etcd.subnet_keys() == ["10.5.1.0-24", "10.9.0.0-24"]


async def test_another_nodes_reservation_is_never_taken(etcd, make):
    await etcd.put("config", CONFIG)
    await etcd.put("subnets/10.5.1.0-24", value_of(9))
    await etcd.put("subnets/10.5.2.0-24", "{}")  # invalid, but in use
    await etcd.put("subnets/10.5.3.128-25", value_of(8))
    lease = await make().acquire(me(), subnets("10.5.1.0/24"))
    assert lease.key == "10.5.4.0-24"
    assert (await etcd.get("subnets/10.5.1.0-24"))["value"] == value_of(9).encode()


async def test_the_former_subnet_is_assigned_again_if_possible(etcd, make):
    await etcd.put("config", CONFIG)
    assert (await make().acquire(me(), subnets("10.5.200.0/24"))).key == "10.5.200.0-24"
    # The former subnet is in use, is outside the network, has another length, or has other
    # families. In these cases another subnet is chosen.
    for i, former in enumerate([
        subnets("10.5.200.0/24"), subnets("10.6.1.0/24"), subnets("10.5.1.0/25"),
        subnets("10.5.201.0/24", "fc00::/64"),
    ], start=1):
        assert (await make().acquire(me(i + 1), former)).key == f"10.5.{i}.0-24"


async def test_no_subnet_is_free(etcd, make):
    await etcd.put("config", '{"Network": "10.5.0.0/22", "SubnetLen": 24,'
                             ' "SubnetMin": "10.5.2.0", "SubnetMax": "10.5.3.0"}')
    for last in (1, 2):
        await make().acquire(me(last), NONE)
    with pytest.raises(StoreRefused, match=r"10\.5\.2\.0 to 10\.5\.3\.0 are in use"):
        await make().acquire(me(3), NONE)


async def test_a_lost_race_is_repeated(etcd, make):
    """Ten nodes try to get the first free subnet at the same time. Each node gets a subnet, and no
    unused grant is left."""
    await etcd.put("config", CONFIG)
    sources = [make() for _ in range(10)]
    leases = await asyncio.gather(
        *(source.acquire(me(i), NONE) for i, source in enumerate(sources, start=1))
    )
    assert sorted(lease.key for lease in leases) == sorted(f"10.5.{i}.0-24" for i in range(1, 11))
    for lease in leases:
        assert str(lease.attributes.public_ip) in str(await etcd.get(f"subnets/{lease.key}"))
    assert len(await etcd.lease_ids()) == 10


async def test_acquire_again_with_other_attributes_keeps_the_subnet(etcd, make):
    """Our public address has changed, so the lease in the store does not show that it is ours."""
    await etcd.put("config", CONFIG)
    source = make()
    first = await source.acquire(me(1), NONE)
    second = await source.acquire(me(2), NONE)
    assert second.key == first.key and second.attributes == me(2)
    assert (await etcd.get("subnets/10.5.1.0-24"))["value"] == value_of(2).encode()
    assert await etcd.subnet_keys() == ["10.5.1.0-24"]
    assert len(await etcd.lease_ids()) == 1  # the first grant is revoked


async def test_no_other_network_is_touched(etcd, make):
    await etcd.put("config", CONFIG)
    await etcd.put("subnets.old/10.5.1.0-24", value_of(1))
    source = make()
    assert (await source.acquire(me(2), NONE)).key == "10.5.1.0-24"
    observer = await Observer(source).ready()
    assert [*observer.leases] == ["10.5.1.0-24"] and not source.health.skipped
    await observer.close()


# Hold

async def test_a_lease_is_renewed_before_it_ends(etcd, make, holding):
    await etcd.put("config", CONFIG)
    source = make(ttl_seconds=3, renew_margin_minutes=2 / 60)
    observer = await Observer(source).ready()
    lease = await source.acquire(me(), NONE)
    first = (await etcd.get("subnets/10.5.1.0-24"))["lease"]
    holding(source, lease)

    async def renewed_twice():
        record = await etcd.get("subnets/10.5.1.0-24")
        assert record, "it expired"
        return record["version"] >= 3

    await until(renewed_twice, "two renewals")
    assert first not in await etcd.lease_ids()
    assert source.health.lease == "held"
    assert [batch[0].new.key for batch in observer.batches] == ["10.5.1.0-24"]
    await observer.close()


async def test_the_lease_of_a_node_that_is_gone_expires(etcd, make):
    """A lease with a short TTL is not renewed. The lease expires, and its peers see the removal."""
    await etcd.put("config", CONFIG)
    observer = await Observer(make()).ready()
    await make(ttl_seconds=1, renew_margin_minutes=0.01).acquire(me(), NONE)
    await until(lambda: observer.leases, "the lease")
    await until(lambda: not observer.leases, "the expiry")
    await observer.close()


async def test_a_deleted_lease_is_created_again(etcd, make, holding, caplog):
    await etcd.put("config", CONFIG)
    source = make()
    lease = await source.acquire(me(), subnets("10.5.50.0/24"))
    observer = await Observer(source).ready()
    holding(source, lease)
    await etcd.delete("subnets/10.5.50.0-24")

    async def back():
        record = await etcd.get("subnets/10.5.50.0-24")
        return record and record["value"] == value_of(1).encode() and record["lease"]

    await until(back, "our lease")
    await until(lambda: source.health.lease == "held", "the health")
    assert "our lease 10.5.50.0/24 is lost" in caplog.text
    await until(lambda: "10.5.50.0-24" in observer.leases, "the change")
    await observer.close()


async def test_a_deleted_reservation_becomes_a_lease(etcd, make, holding):
    await etcd.put("config", CONFIG)
    await etcd.put("subnets/10.5.50.0-24", value_of(1))
    source = make()
    holding(source, await source.acquire(me(), NONE))
    observer = await Observer(source).ready()
    await etcd.delete("subnets/10.5.50.0-24")
    await until(lambda: "10.5.50.0-24" in observer.leases
                and not observer.leases["10.5.50.0-24"].reserved, "a lease instead")
    assert (await etcd.ttl("subnets/10.5.50.0-24"))[1] == 86400
    await observer.close()


async def expire_and_assign(etcd):
    """Let our lease expire, and give its key to another node."""
    await etcd.delete("subnets/10.5.1.0-24")
    await etcd.put("subnets/10.5.1.0-24", value_of(66), ttl=500)


async def test_a_lease_taken_by_another_node_is_reported_and_created_again_when_free(
    etcd, make, holding, caplog
):
    await etcd.put("config", CONFIG)
    source = make()
    lease = await source.acquire(me(), NONE)
    await expire_and_assign(etcd)
    observer = await Observer(source).ready()
    holding(source, lease)
    await until(lambda: source.health.lease == "lost", "the loss")
    assert "10.5.1.0/24 is now the lease of 192.0.2.66" in source.health.lease_error
    assert any(record.levelno == logging.ERROR and "192.0.2.66" in record.message
               for record in caplog.records)
    assert (await etcd.get("subnets/10.5.1.0-24"))["value"] == value_of(66).encode()
    await etcd.delete("subnets/10.5.1.0-24")
    await until(lambda: source.health.lease == "held", "our lease")
    assert (await etcd.get("subnets/10.5.1.0-24"))["value"] == value_of(1).encode()
    await observer.close()


async def test_a_renewal_does_not_overwrite_another_nodes_lease(etcd, make, holding):
    """No watch runs, so the comparison in the transaction must prevent the renewal."""
    await etcd.put("config", CONFIG)
    source = make(ttl_seconds=3, renew_margin_minutes=2 / 60)
    lease = await source.acquire(me(), NONE)
    await expire_and_assign(etcd)
    holding(source, lease)
    await until(lambda: source.health.lease == "lost", "the loss")
    assert (await etcd.get("subnets/10.5.1.0-24"))["value"] == value_of(66).encode()


async def test_a_clone_that_writes_our_lease_is_reported_and_overwritten_once(
    etcd, make, holding
):
    """The key was not free, so the other machine had no right to it. Our pods keep their subnet."""
    await etcd.put("config", CONFIG)
    source = make()
    lease = await source.acquire(me(), NONE)
    observer = await Observer(source).ready()
    holding(source, lease)

    async def ours():
        return (await etcd.get("subnets/10.5.1.0-24"))["value"] == value_of(1).encode()

    await etcd.put("subnets/10.5.1.0-24", value_of(66))
    await until(ours, "our address")
    assert source.health.lease == "held"
    assert (await etcd.ttl("subnets/10.5.1.0-24"))[1] == 86400  # it is not a reservation
    assert source.health.contested == (
        "another machine publishes our lease with the address 192.0.2.66, we with 192.0.2.1")
    await etcd.put("subnets/10.5.1.0-24", value_of(66), ttl=500)
    before = source._keeper._contest.delay
    await until(lambda: source._keeper._contest.delay > before, "the second write to be seen")
    with pytest.raises(StoreDown, match=r"192\.0\.2\.66, we with 192\.0\.2\.1"):
        await source.acquire(me(), lease.subnets)
    assert not await ours()
    assert await etcd.subnet_keys() == ["10.5.1.0-24"]
    await observer.close()


async def test_two_machines_with_one_address_notice_each_other(etcd, make, holding):
    """Both publish the same data, so only the etcd lease of the key shows who wrote it."""
    await etcd.put("config", CONFIG)
    both = [make(), make()]
    observers = []
    for source in both:
        observers.append(await Observer(source).ready())
        holding(source, await source.acquire(me(), NONE))
    for source in both:
        await until(lambda source=source: source.health.contested, "the other to be noticed")
        assert "with our public address 192.0.2.1" in source.health.contested
    assert (await etcd.get("subnets/10.5.1.0-24"))["version"] < 8
    for observer in observers:
        await observer.close()


async def test_an_invalid_value_in_our_key_is_replaced(etcd, make, holding):
    await etcd.put("config", CONFIG)
    source = make()
    lease = await source.acquire(me(), NONE)
    observer = await Observer(source).ready()
    holding(source, lease)
    await etcd.put("subnets/10.5.1.0-24", '{"PublicIP":"192.0', ttl=500)

    async def restored():
        return (await etcd.get("subnets/10.5.1.0-24"))["value"] == value_of(1).encode()

    await until(restored, "our value")
    await until(lambda: not source.health.skipped, "the watch to see it")
    await observer.close()


async def test_hold_after_a_restart_that_could_not_acquire(etcd, make, holding):
    """The daemon started with its cached lease while the store was down."""
    await etcd.put("config", CONFIG)
    lease = await make().acquire(me(), NONE)
    source = make()
    holding(source, lease)
    await until(lambda: source.health.lease == "held", "the lease")
    other = make()
    holding(other, Lease("10.5.1.0-24", subnets("10.5.1.0/24"), me(7)))
    await until(lambda: "192.0.2.1" in other.health.lease_error, "the loss")


async def test_a_lease_that_expires_in_an_outage_is_lost_and_created_again(etcd, make, holding):
    await etcd.put("config", CONFIG)
    source = make(ttl_seconds=2, renew_margin_minutes=1 / 60)
    lease = await source.acquire(me(), subnets("10.5.50.0/24"))
    observer = await Observer(source).ready()
    holding(source, lease)
    etcd.kill()
    await until(lambda: source.health.lease == "lost", "the expiry")
    assert "expired" in source.health.lease_error
    etcd.start()
    await until(lambda: source.health.lease == "held", "the lease")
    assert await etcd.subnet_keys() == ["10.5.50.0-24"]
    await observer.close()


@pytest.mark.parametrize("loop_turns", range(4))
async def test_hold_ends_when_cancelled_during_a_change(etcd, make, loop_turns):
    """hold() is cancelled at each turn of the event loop in which hold() can handle the change."""
    await etcd.put("config", CONFIG)
    source = make()
    task = asyncio.create_task(source.hold(await source.acquire(me(), NONE)))
    await until(lambda: source._keeper._check_now._waiters, "hold to wait")
    source._keeper.key_changed(None)
    for _ in range(loop_turns):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=60)
    assert done and task.cancelled()


@pytest.mark.parametrize("times", [0, 1, 2])
async def test_a_lost_response_to_a_write_is_handled(etcd, make, monkeypatch, times):
    """The write takes effect 0, 1 or 2 times. In each case the node finds its own key, and has one
    subnet and one grant."""
    await etcd.put("config", CONFIG)
    source = make()
    real, lost = Client.call, []

    async def call(client, method, request):
        if method is messages.TXN and not lost:
            lost.append(request)
            for _ in range(times):
                await real(client, method, request)
            raise StoreDown("the response is lost")
        return await real(client, method, request)

    monkeypatch.setattr(Client, "call", call)
    with pytest.raises(StoreDown, match="is lost"):
        await source.acquire(me(), NONE)
    assert source.health.lease == "none"
    assert (await source.acquire(me(), NONE)).key == "10.5.1.0-24"
    assert source.health.lease == "held"
    assert await etcd.subnet_keys() == ["10.5.1.0-24"]
    assert {(await etcd.get("subnets/10.5.1.0-24"))["lease"]} == await etcd.lease_ids()


async def test_two_daemons_with_the_same_address_back_off(
    etcd, make, holding, monkeypatch
):
    """This is a configuration error. Each daemon overwrites the other daemon's attributes, and
    backs off each time."""
    backed_off = []
    monkeypatch.setattr(Backoff, "next", lambda self: backed_off.append(self) or 0.02)
    monkeypatch.setattr(contest, "FIRST_DELAY_SECONDS", 0)
    await etcd.put("config", CONFIG)
    for backend_type in ("udp", "vxlan"):
        source = make()
        observer = await Observer(source).ready()
        holding(source, await source.acquire(me(backend_type=backend_type), NONE))

    async def version():
        return (await etcd.get("subnets/10.5.1.0-24"))["version"]

    async def contested():
        return await version() > 12

    await until(contested, "repeated overwriting")
    assert len(backed_off) >= await version() - 4  # not the 2 first writes, not 2 in progress
    await observer.close()
