"""The forwarder's keeper, tested with a real control server."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import itertools
import json
import subprocess
import time
from dataclasses import replace

import pytest

from tests.control import fakes
from tests.control.fakes import VERSION, LoopThread, Served, status_of
from tests.node.daemon_host import use_folder
from tests.own_netns import in_own_mount_namespace, in_own_netns, sh
from tests.wait import until
from udptun.control import server
from udptun.control.client import ControlClient
from udptun.errors import NoForwarder
from udptun.instance import Instance, InstanceLock
from udptun.leases.base import SourceHealth
from udptun.model import Route
from udptun.node.process import keeper as module
from udptun.node.process.keeper import ForwarderKeeper
from udptun.node.process.launch import ForwarderSpec
from udptun.node.status.report import NodeReport


def route(n, via=2):
    return Route(ipaddress.ip_network(f"10.244.{n}.0/24"), ipaddress.ip_address(f"192.0.2.{via}"))


def table(*routes):
    return {one.dst: one for one in routes}


@pytest.fixture
def thread():
    with LoopThread() as loop_thread:
        yield loop_thread


@pytest.fixture
def control(tmp_path):
    return tmp_path / "udptun.sock"


@pytest.fixture
def spec(control):
    """Return the options that FakeForwarder's status shows."""
    return ForwarderSpec(
        control=str(control), listen=("192.0.2.1:8285",), addresses=("10.244.1.0",),
        networks=("10.244.0.0/16",), tun="udptun0", state="/nowhere", mtu=1472,
    )


@pytest.fixture
async def keeper(control, tmp_path):
    """Run a keeper for a forwarder that another program starts."""
    async with running(control, tmp_path) as made:
        yield made


@contextlib.asynccontextmanager
async def running(control, tmp_path, spawned=False, folder=None):
    report = NodeReport("file", SourceHealth())
    loops, told, said = set(), [], []

    async def looping(addresses):
        return {one for one in addresses if str(ipaddress.ip_address(one)) in loops}

    made = ForwarderKeeper(
        control, (folder or tmp_path) / "forward.json", tmp_path / "forwarder.log",
        Instance(), not spawned, report, "udp", looping, lambda: told.append(made.refused),
        lambda: said.append(made.receives))
    made.report, made.loops, made.told, made.said = report, loops, told, said
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Child:
    """A started process, with only the members that the keeper uses."""

    pid, returncode = 4711, None

    def poll(self):
        return self.returncode


async def test_a_matching_forwarder_is_adopted_with_its_routes(
    thread, control, keeper, spec
):
    with Served(thread, control) as served:
        with ControlClient(str(control)) as client:
            client.put(route(2))
        keeper.want(spec)
        keeper.replace(table(route(2)))
        await keeper.wait_synced()
        assert served.forwarder.generation == 2  # nothing changed
        assert keeper.report.forwarder.connected
        assert not served.forwarder.stopped.is_set()


async def test_a_forwarder_of_an_earlier_version_gets_no_route_with_ecn(
    thread, control, keeper, spec, monkeypatch
):
    """It would refuse the whole table."""
    now = fakes.status_of
    monkeypatch.setattr(fakes, "status_of", lambda *args: {
        name: value for name, value in now(*args).items() if name != "dscp"})
    assert keeper.copies_marks
    with Served(thread, control) as served:
        keeper.want(spec)
        keeper.replace(table(replace(route(2), ecn=True)))
        await keeper.wait_synced()
        assert served.forwarder.table == table(route(2))
        assert not keeper.copies_marks


async def test_the_forwarders_routes_stay_until_ours_are_known(
    thread, control, keeper, spec, monkeypatch
):
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.01)
    with Served(thread, control) as served:
        with ControlClient(str(control)) as client:
            client.put(route(2))
        keeper.want(spec)
        await until(lambda: keeper.report.forwarder.connected, "the forwarder to be adopted")
        await asyncio.sleep(0.1)  # the keeper checks several times in this time
        assert served.forwarder.table == table(route(2))


async def test_what_the_kernel_receives_is_asked_again(
    thread, control, keeper, spec, monkeypatch
):
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(module, "DEAF_SECONDS", 0.0)
    with Served(thread, control) as served:
        def receives(value):
            state = status_of(1, 0)["accelerate"] | {"mode": "auto", "receives": value}
            served.forwarder.other_status = {"accelerate": state}

        receives(None)
        keeper.want(replace(spec, accelerate="auto"))
        await until(lambda: keeper.report.forwarder.connected, "the forwarder to be adopted")
        assert keeper.receives is None
        for value in (True, False, True):
            receives(value)
            await until(lambda value=value: keeper.receives is value, "the new state")
        assert keeper.said == [True, False, True]
    await until(lambda: not keeper.report.forwarder.connected, "the end of the forwarder")
    assert keeper.receives  # its programs go on


async def test_a_short_failure_of_the_kernels_programs_changes_no_lease(
    thread, control, keeper, spec, monkeypatch
):
    """Each change is a write to the store, and a changed route on all nodes."""
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.01)
    looks = []
    with Served(thread, control) as served:
        def receives(value):
            state = status_of(1, 0)["accelerate"] | {"mode": "auto", "receives": value}
            served.forwarder.other_status = {"accelerate": state}

        take = keeper._take_features
        monkeypatch.setattr(keeper, "_take_features", lambda status: (
            take(status), looks.append(status["accelerate"]["receives"])))
        receives(True)
        keeper.want(replace(spec, accelerate="auto"))
        for value in (True, False, True):
            receives(value)
            await until(lambda value=value: looks and looks[-1] is value, "a look")
        assert keeper.said == [True]


async def test_the_forwarder_is_checked_while_routes_change_all_the_time(
    thread, control, keeper, spec, monkeypatch
):
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.2)
    checks, check = [], keeper._check

    async def counted():
        checks.append(None)
        await check()

    monkeypatch.setattr(keeper, "_check", counted)
    with Served(thread, control):
        keeper.want(spec)
        keeper.replace(table(route(2)))
        await keeper.wait_synced()

        async def change():
            for number in itertools.count():
                keeper.change(table(route(2, 2 + number % 2)))
                await asyncio.sleep(0.01)

        changing = asyncio.create_task(change())
        try:
            checks.clear()
            await until(lambda: len(checks) > 2, "a third check")
        finally:
            changing.cancel()


async def test_a_change_that_the_forwarder_cannot_make_yet_is_asked_for_again(
    thread, control, keeper, spec, monkeypatch
):
    """It keeps its MTU while its address is on no interface."""
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.01)
    asked, device = [], status_of(1, 0)["device"]
    with Served(thread, control) as served:
        async def change_device(mtu=None, listen=None):
            asked.append(mtu)
            if len(asked) > 2:
                served.forwarder.other_status = {"device": {**device, "mtu": mtu}}
            return {"mtu": mtu if len(asked) > 2 else device["mtu"], "listen": device["listen"]}

        monkeypatch.setattr(served.forwarder, "change_device", change_device)
        keeper.want(replace(spec, mtu=1400))
        await until(lambda: len(asked) > 2, "the third request")
        keeper.replace(table(route(2)))
        await keeper.wait_synced()
        assert {*asked} == {1400}
        assert not served.forwarder.stopped.is_set()


async def test_a_few_changes_are_put_one_by_one_and_many_at_once(thread, control, keeper, spec):
    with Served(thread, control) as served:
        keeper.want(spec)
        keeper.replace(table(route(2), route(3)))
        await keeper.wait_synced()
        served.forwarder.calls.clear()
        keeper.change({route(2).dst: None, route(4).dst: route(4)})
        await keeper.wait_synced()
        assert served.forwarder.table == table(route(3), route(4))
        assert served.forwarder.calls == ["delete 10.244.2.0/24", f"put {route(4)}"]
        served.forwarder.calls.clear()
        keeper.change({one.dst: one for one in (route(n, 9) for n in range(2, 102))})
        await keeper.wait_synced()
        assert served.forwarder.calls == ["replace"]
        assert len(served.forwarder.table) == 100
        assert keeper.report.route_changes_n["udp"] == 2 + 2 + 100


async def test_changes_during_a_change_are_sent_after_it(thread, control, keeper, spec):
    with Served(thread, control) as served:
        keeper.want(spec)
        keeper.replace(table(route(2)))
        await keeper.wait_synced()
        for n in range(3, 60):
            keeper.change({route(n).dst: route(n)})
            if n % 7 == 0:
                await asyncio.sleep(0)
        await keeper.wait_synced()
        assert served.forwarder.table == table(*(route(n) for n in range(2, 60)))


async def test_a_route_that_would_loop_costs_only_itself(
    thread, control, keeper, spec, monkeypatch, caplog
):
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.05)
    keeper.loops.add("192.0.2.7")
    with Served(thread, control) as served:
        keeper.want(spec)
        keeper.replace(table(route(2), route(3, 7)))
        await keeper.wait_synced()
        assert served.forwarder.table == table(route(2))
        assert keeper.report.forwarder.routes_n == 1
        assert "10.244.3.0/24 cannot be reached by UDP: this host routes the peer's address " \
            "192.0.2.7 into the forwarder's own TUN" in caplog.text
        keeper.change({route(2).dst: route(2, 7), route(4).dst: route(4)})  # one by one
        await keeper.wait_synced()
        assert served.forwarder.table == table(route(4))
        assert keeper.refused.keys() == {route(2).dst, route(3).dst}
        keeper.change({route(n).dst: route(n, 7 if n % 2 else 9) for n in range(4, 104)})  # at once
        await keeper.wait_synced()
        assert served.forwarder.table == table(*(route(n, 9) for n in range(4, 104, 2)))
        keeper.change({route(3).dst: None})
        await keeper.wait_synced()
        assert keeper.told[-1] == keeper.refused
        assert route(3).dst not in keeper.refused
        keeper.loops.clear()  # the host has another route
        await until(lambda: len(served.forwarder.table) == 101, "all routes")
        assert keeper.told[-1] == keeper.refused == {}


async def test_after_a_reconnect_the_whole_table_is_sent(thread, control, keeper, spec):
    with Served(thread, control) as first:
        keeper.want(spec)
        keeper.replace(table(route(2)))
        await keeper.wait_synced()
        first.close()
    await until(lambda: not keeper.report.forwarder.connected, "the end to be noticed")
    keeper.change({route(3).dst: route(3)})
    with Served(thread, control) as second:
        await keeper.wait_synced()
        assert second.forwarder.table == table(route(2), route(3))


async def test_routes_changed_by_another_program_are_restored(
    thread, control, keeper, spec, monkeypatch
):
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.05)
    with Served(thread, control) as served:
        keeper.want(spec)
        keeper.replace(table(route(2)))
        await keeper.wait_synced()
        with ControlClient(str(control)) as client:
            client.put(route(66))
            client.delete(route(2).dst)
        await until(lambda: served.forwarder.table == table(route(2)), "our routes to be back")


async def test_a_change_by_another_program_between_two_of_ours_is_detected_at_once(
    thread, control, keeper, spec
):
    with Served(thread, control) as served:
        keeper.want(spec)
        keeper.replace(table(route(2)))
        await keeper.wait_synced()
        with ControlClient(str(control)) as client:
            client.put(route(66))
        keeper.change({route(3).dst: route(3)})
        await until(lambda: served.forwarder.table == table(route(2), route(3)), "our routes")


async def test_a_failed_change_is_tried_again_as_a_whole(
    thread, control, keeper, spec, monkeypatch
):
    monkeypatch.setattr(module, "FIRST_BACKOFF", 0.01)
    with Served(thread, control) as served:
        keeper.want(spec)
        keeper.replace(table(route(2)))
        await keeper.wait_synced()
        served.forwarder.fail_with = RuntimeError("as made for the test")
        keeper.change({route(3).dst: route(3)})
        await until(lambda: keeper.report.forwarder.error, "the error")
        assert not keeper.report.forwarder.synced
        served.forwarder.fail_with = None
        await keeper.wait_synced()
        assert served.forwarder.table == table(route(2), route(3))
        assert keeper.report.forwarder.error == ""


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("listen", ("192.0.2.9:8285",), "it listens on"), ("mtu", 1300, "MTU"),
        ("addresses", ("10.244.9.0",), "addresses"), ("tun", "udptun9", "device"),
        ("networks", ("10.0.0.0/8",), "networks"),
    ],
)
async def test_a_forwarder_with_other_options_is_stopped_and_the_reason_logged(
    thread, control, keeper, spec, caplog, field, value, said
):
    with Served(thread, control) as served:
        # As a forwarder of an earlier version, which cannot change while it runs.
        del served.server._handlers["/v1/device"]
        keeper.want(replace(spec, **{field: value}))
        await until(served.forwarder.stopped.is_set, "it to be stopped")
        assert any("because its options are wrong" in text and said in text
                   for text in caplog.messages)


@pytest.mark.parametrize(
    "changes", [{"mtu": 1400}, {"listen": ("192.0.2.9:8285",)},
                {"mtu": 1400, "listen": ("192.0.2.9:8285",)}])
async def test_a_running_forwarder_gets_another_mtu_or_address(
    thread, control, keeper, spec, changes
):
    with Served(thread, control) as served:
        keeper.replace(table(route(2)))
        keeper.want(replace(spec, **changes))
        await keeper.wait_synced()
        listen = changes.get("listen")
        assert served.forwarder.device == {
            "mtu": changes.get("mtu"), "listen": None if listen is None else [*listen]}
        assert served.forwarder.table == table(route(2))
        assert not served.forwarder.stopped.is_set()


async def test_what_a_running_forwarder_refuses_to_change_stops_it(
    thread, control, keeper, spec
):
    with Served(thread, control) as served:
        keeper.want(replace(spec, mtu=1300))
        await until(served.forwarder.stopped.is_set, "it to be stopped")


async def test_new_options_stop_the_forwarder_and_keep_the_routes(
    thread, control, keeper, spec
):
    with Served(thread, control) as served:
        keeper.want(spec)
        keeper.replace(table(route(2)))
        await keeper.wait_synced()
        keeper.want(replace(spec, tun="udptun9"))
        await until(served.forwarder.stopped.is_set, "it to be stopped")
    keeper.want(spec)
    with Served(thread, control) as second:
        await keeper.wait_synced()
        assert second.forwarder.table == table(route(2))


async def test_options_that_change_during_the_comparison_are_compared_too(
    thread, control, keeper, spec, monkeypatch
):
    """The old options match, but they are not wanted any more when the status arrives."""
    read = keeper._client.status

    def status(**options):
        found = read(**options)
        changed = asyncio.run_coroutine_threadsafe(change(), loop)
        changed.result(60)
        return found

    async def change():
        monkeypatch.setattr(keeper._client, "status", read)
        keeper.want(replace(spec, mtu=1300))

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(keeper._client, "status", status)
    with Served(thread, control) as served:
        keeper.want(spec)
        await until(served.forwarder.stopped.is_set, "the forwarder to be stopped")


async def test_the_options_are_written_before_there_is_a_forwarder(
    keeper, spec, tmp_path
):
    keeper.want(spec)
    assert json.loads((tmp_path / "forward.json").read_text()) == spec.to_json()
    await until(lambda: "--wait-for" in keeper.report.forwarder.error, "the reason")


async def test_an_equal_file_is_not_written(keeper, spec, tmp_path):
    spec.write(tmp_path / "forward.json")
    before = (tmp_path / "forward.json").stat()
    keeper.want(spec)
    after = (tmp_path / "forward.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


async def test_a_forwarder_of_another_version_is_taken_over_once(
    thread, control, tmp_path, spec, monkeypatch, caplog
):
    started = []
    monkeypatch.setattr(module, "spawn", lambda *args, **how: started.append(how) or Child())
    monkeypatch.setattr(module, "__version__", "9.9")
    with Served(thread, control):
        async with running(control, tmp_path, spawned=True) as keeper:  # it has no such socket
            keeper.want(spec)
            await until(lambda: "too old" in caplog.text, "the warning")
        (tmp_path / "takeover.sock").touch()
        async with running(control, tmp_path, spawned=True) as keeper:
            keeper.want(spec)
            keeper.replace(table(route(2)))
            await keeper.wait_synced()
        monkeypatch.setattr(module, "__version__", VERSION)
        async with running(control, tmp_path, spawned=True) as keeper:
            keeper.want(spec)
            keeper.replace(table(route(3)))
            await keeper.wait_synced()
    assert started == [{"take_over": True, "log_format": "text"}]


@pytest.mark.parametrize("build", ["0123456789ab", ""])
async def test_a_forwarder_of_the_same_version_but_another_build_is_taken_over(
    thread, control, tmp_path, spec, monkeypatch, build
):
    """After an update from source. An earlier version has no build in its status."""
    started = []
    monkeypatch.setattr(module, "spawn", lambda *args, **how: started.append(how) or Child())
    (tmp_path / "takeover.sock").touch()
    with Served(thread, control) as served:
        served.forwarder.other_status = {"build": build}
        async with running(control, tmp_path, spawned=True) as keeper:
            keeper.want(spec)
            await until(lambda: started, "the take-over")
    assert started == [{"take_over": True, "log_format": "text"}]


async def test_a_forwarder_is_started_if_none_answers(thread, control, tmp_path, spec, monkeypatch):
    served = Served(thread, control)

    def spawn(forward_file, log, instance, kept, log_format):
        assert ForwarderSpec.read(forward_file) == spec
        served.__enter__()
        return Child()

    monkeypatch.setattr(module, "spawn", spawn)
    async with running(control, tmp_path, spawned=True) as keeper:
        keeper.replace(table(route(2)))
        keeper.want(spec)
        await keeper.wait_synced()
        assert keeper.report.forwarder.starts_n == 1
        assert served.forwarder.table == table(route(2))
    assert not served.forwarder.stopped.is_set()  # the forwarder outlives the keeper
    served.close()


async def test_a_forwarder_that_ends_at_once_is_restarted_with_backoff_and_its_log_quoted(
    control, tmp_path, spec, monkeypatch
):
    monkeypatch.setattr(module, "FIRST_BACKOFF", 0.2)
    started = []

    def spawn(forward_file, log, instance, kept, log_format):
        log.write_text("TUN: operation not permitted\n")
        started.append(time.monotonic())
        child = Child()
        child.returncode = 1
        return child

    monkeypatch.setattr(module, "spawn", spawn)
    async with running(control, tmp_path, spawned=True) as keeper:
        keeper.want(spec)
        await until(lambda: len(started) == 3, "three attempts")
        assert "operation not permitted" in keeper.report.forwarder.error
    assert started[2] - started[1] > 0.15


async def test_a_forwarder_that_was_killed_is_reported_with_the_signal(
    control, tmp_path, spec, monkeypatch
):
    def spawn(forward_file, log, instance, kept, log_format):
        log.write_text("INFO udptun0 is up\n")  # not the reason
        child = subprocess.Popen(["sleep", "600"])
        child.kill()
        child.wait()
        return child

    monkeypatch.setattr(module, "spawn", spawn)
    async with running(control, tmp_path, spawned=True) as keeper:
        keeper.want(spec)
        await until(lambda: "SIGKILL" in keeper.report.forwarder.error, "the signal to be reported")


@pytest.fixture
def folder(tmp_path):
    """The directory of the options file. In a mount namespace, a test can make it read-only."""
    folder = tmp_path / "options"
    folder.mkdir()
    return folder


def readonly(folder):
    in_own_mount_namespace()
    sh(f"mount --bind {folder} {folder}", f"mount -o remount,bind,ro {folder}")


def writable(folder):
    sh(f"mount -o remount,bind,rw {folder}")


@in_own_netns
@pytest.mark.parametrize("spawned", [True, False])
async def test_a_forwarder_that_could_not_be_replaced_goes_on(
    thread, control, tmp_path, spec, folder, monkeypatch, spawned
):
    """The disk is full or read-only, so a new forwarder would get the old options, or none."""
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(module, "spawn", lambda *args, **options: Child())  # after the end
    spec.write(folder / "forward.json")
    readonly(folder)
    with Served(thread, control) as served:
        async with running(control, tmp_path, spawned, folder) as keeper:
            keeper.replace(table(route(2)))
            keeper.want(replace(spec, networks=("10.0.0.0/8",)))
            await until(lambda: served.forwarder.table == table(route(2)), "the routes")
            keeper.change(table(route(3)))
            await until(lambda: served.forwarder.table == table(route(2), route(3)), "a change")
            checks = keeper._check_at
            await until(lambda: keeper._check_at > checks, "a check")
            assert not served.forwarder.stopped.is_set()
            # The state is told as it is.
            report = keeper.report
            assert "its networks: 10.244.0.0/16 instead of 10.0.0.0/8" in report.forwarder.error
            assert not report.forwarder.connected and not report.forwarder.synced
            assert not keeper.matches
            assert "Read-only" in report.troubles["options"].text
            writable(folder)
            await until(served.forwarder.stopped.is_set, "it to be replaced")
            assert "options" not in report.troubles


@in_own_netns
@pytest.mark.parametrize("wanted", ["the same", "others"])
async def test_a_forwarder_is_started_though_the_disk_is_readonly(
    thread, control, tmp_path, spec, folder, monkeypatch, wanted
):
    served = Served(thread, control)

    def spawn(*args, **options):
        served.__enter__()
        return Child()

    monkeypatch.setattr(module, "spawn", spawn)
    spec.write(folder / "forward.json")
    readonly(folder)
    async with running(control, tmp_path, True, folder) as keeper:
        keeper.replace(table(route(2)))
        keeper.want(spec if wanted == "the same" else replace(spec, dscp="copy"))
        await until(lambda: served.forwarder.table == table(route(2)), "the routes")
        assert keeper.matches == (wanted == "the same")
        assert ("options" in keeper.report.troubles) == (wanted != "the same")
    served.close()


@in_own_netns
async def test_without_a_file_no_forwarder_is_started(control, tmp_path, spec, folder, monkeypatch):
    """It would wait for the file."""
    readonly(folder)
    async with running(control, tmp_path, True, folder) as keeper:
        keeper.want(spec)
        await until(lambda: "forward.json is not written" in keeper.report.forwarder.error, "it")
        assert keeper.report.forwarder.starts_n == 0


@in_own_netns
@pytest.mark.parametrize("end", ["the former options", "dismiss"])
async def test_options_that_need_not_be_written_are_no_trouble(
    thread, control, tmp_path, spec, folder, end
):
    spec.write(folder / "forward.json")
    readonly(folder)
    with Served(thread, control):
        async with running(control, tmp_path, False, folder) as keeper:
            keeper.want(replace(spec, mtu=1400))
            assert "options" in keeper.report.troubles
            if end == "dismiss":
                with contextlib.suppress(OSError):  # the file cannot be removed
                    await keeper.dismiss()
            else:
                keeper.want(spec)
            assert "options" not in keeper.report.troubles


async def test_dismiss_removes_the_file_before_it_stops_the_forwarder(
    thread, control, keeper, spec, tmp_path
):
    forward_file = tmp_path / "forward.json"
    with Served(thread, control) as served:
        keeper.want(spec)
        keeper.replace({})
        await keeper.wait_synced()
        await keeper.dismiss()
        assert served.forwarder.stopped.is_set()
    assert not forward_file.exists()


async def test_dismiss_does_not_stop_a_forwarder_that_is_not_ours(thread, control, keeper):
    with Served(thread, control) as served:
        await keeper.dismiss()
        assert not served.forwarder.stopped.is_set()


@pytest.mark.parametrize("turns", range(12))
async def test_the_keeper_can_be_cancelled_at_any_moment(thread, control, tmp_path, spec, turns):
    """The keeper can also be cancelled while it stops a forwarder with other options."""
    with Served(thread, control):
        async with running(control, tmp_path) as keeper:
            keeper.want(spec)
            await until(lambda: keeper.report.forwarder.connected, "the forwarder to be adopted")
            keeper.want(replace(spec, mtu=1400))
            for _ in range(turns):
                await asyncio.sleep(0)


async def test_a_forwarder_that_closes_silent_connections_is_not_lost(
    thread, control, keeper, spec, monkeypatch, caplog
):
    """The forwarder closes a connection that sends no request, and the daemon's must stay."""
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.2)
    with Served(thread, control):
        keeper.want(spec)
        keeper.replace(table(route(2)))
        await keeper.wait_synced()
        # A silent connection that is opened later is closed later than a silent one of the keeper.
        reader, writer = await asyncio.open_unix_connection(control)
        assert await reader.read() == b""
        writer.close()
        assert keeper.report.forwarder.connected
        assert "has ended" not in caplog.text


async def test_a_forwarder_is_not_stopped_while_its_new_options_cannot_be_written(
    thread, control, keeper, spec, monkeypatch
):
    """The next one would read the former options, and would be stopped too."""
    def refuse(self, path):
        raise OSError(refusals.append(path) or errno.EACCES, "no")

    refusals, write = [], ForwarderSpec.write
    with Served(thread, control) as served:
        monkeypatch.setattr(ForwarderSpec, "write", refuse)
        keeper.want(replace(spec, mark="0x9/0x9"))
        await until(lambda: "options are wrong" in keeper.report.forwarder.error, "a look")
        assert "is not written: no" in keeper.report.troubles["options"].text
        assert len(refusals) > 1 and not served.forwarder.stopped.is_set()
        monkeypatch.setattr(ForwarderSpec, "write", write)
        await until(served.forwarder.stopped.is_set, "the end")
        assert not keeper.report.troubles


@pytest.mark.parametrize("late", [True, False])
async def test_a_forwarder_that_is_opening_is_stopped_too(
    thread, tmp_path, monkeypatch, late
):
    """It has the lock of its instance, but its control socket does not answer yet."""
    use_folder(tmp_path, monkeypatch)
    monkeypatch.setattr(module, "OPENING_SECONDS", 60.0 if late else 0.1)
    control, file, instance = tmp_path / "control.sock", tmp_path / "forward.json", Instance("x")
    looks, is_free = [], InstanceLock.is_free
    monkeypatch.setattr(
        InstanceLock, "is_free", lambda lock: looks.append(lock) or is_free(lock))
    with instance.locked("forward"):
        stopping = asyncio.create_task(module.stop_forwarder(control, file, instance))
        if late:
            await until(lambda: len(looks) > 1, "a second look")
            with Served(thread, control) as served:
                assert await stopping
                assert served.forwarder.stopped.is_set()
        else:
            with pytest.raises(NoForwarder, match=f"instance x runs, but does not .* {control}"):
                await stopping
    assert not await module.stop_forwarder(control, file, instance)
