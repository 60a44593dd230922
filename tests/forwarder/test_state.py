"""The state file: complete or not used, its owner, its lock, and what killed writers have left."""

import asyncio
import os
import random
import socket
import stat

import pytest

from udptun import Route
from udptun._core import RouteTable
from udptun.errors import DeviceError
from udptun.forwarder import state as state_module
from udptun.forwarder.state import StateFile

ROUTES = [Route.make(f"10.244.{n}.0/24", f"192.0.2.{n}") for n in range(1, 6)]


class File(StateFile):
    """A state file that collects its reports."""

    def __init__(self, path):
        self.reports = []
        super().__init__(path, self.reports.append)

    async def write(self, routes):
        await self.save(RouteTable.from_routes(routes))
        await self.flush()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "routes"


@pytest.fixture
def written(path):
    """The path of a file that was written by another process, which has ended."""
    file = File(path)
    assert file.load() is None
    asyncio.run(file.write(ROUTES))
    file.unlock()
    assert file.reports == []
    return path


def text_of(table):
    return table.text_slice(0, len(table))


EXPECTED = text_of(RouteTable.from_routes(ROUTES))


def test_the_file_is_read_back_and_only_its_owner_can_read_it(written):
    before = os.umask(0)
    try:
        test_the_file_can_be_written_again(written)
    finally:
        os.umask(before)
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert [*written.parent.iterdir()] == [written]


def test_the_file_can_be_written_again(written):
    file = File(written)
    assert text_of(file.load()) == EXPECTED
    asyncio.run(file.write([]))
    assert len(file.load()) == 0
    file.unlock()


def test_a_file_of_an_earlier_version_is_read(path):
    path.parent.mkdir()
    path.write_bytes(EXPECTED)
    assert text_of(File(path).load()) == EXPECTED
    assert EXPECTED in path.read_bytes()


def test_an_earlier_version_can_read_the_file(written):
    assert text_of(RouteTable.parse_text(written.read_bytes())) == EXPECTED


def refused(path, content):
    """Return whether a file with this content is moved aside and reported."""
    path.write_bytes(content)
    file = File(path)
    table = file.load()
    file.unlock()
    if table is not None:
        return False
    (report,) = file.reports
    aside = path.with_name("routes.bad")
    assert report.startswith(f"{path} is not a valid route table: ")
    assert report.endswith(f"is renamed to {aside}")
    assert aside.read_bytes() == content
    assert not path.exists()
    return True


def test_a_torn_file_is_moved_aside(written):
    content = written.read_bytes()
    kept = [at for at in range(len(content)) if not refused(written, content[:at])]
    assert kept == []


def test_a_changed_file_is_moved_aside(written):
    content, rng = written.read_bytes(), random.Random(5)
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= rng.randint(1, 255)
        assert refused(written, bytes(changed))


def make_link(path):
    (path.parent / "other").write_bytes(EXPECTED)
    path.symlink_to(path.parent / "other")


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def make_foreign(path):
    if os.geteuid() != 0:
        pytest.skip("giving a file to another user needs root")
    path.write_bytes(EXPECTED)
    os.chown(path, 65534, -1)


def make_writable(path):
    path.write_bytes(EXPECTED)
    path.chmod(0o620)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (os.mkfifo, "is not a regular file: expected a regular file"),
        (os.mkdir, "is not a regular file: expected a regular file"),
        (make_socket, "is not a regular file: expected a regular file"),
        (make_link, "is a symbolic link: expected a regular file"),
        (make_foreign, "belongs to the user 65534: expected a file of root or of the user 0"),
        (make_writable, "has mode 0620: expected a file that only its owner can write"),
    ],
)
def test_a_file_that_another_user_may_have_written_is_refused(path, make, text):
    path.parent.mkdir()
    make(path)
    file = File(path)
    with pytest.raises(DeviceError, match=f"the state file {path} {text}"):
        file.load()
    file.unlock()
    assert os.path.lexists(path)  # it stays as it is
    assert not path.with_name("routes.bad").exists()


def test_one_forwarder_at_a_time_has_the_file(written):
    first, second = File(written), File(written)
    first.load()
    with pytest.raises(DeviceError, match=f"another forwarder uses the state file {written}"):
        second.load()
    first.unlock()
    assert text_of(second.load()) == EXPECTED
    second.unlock()


def test_a_lock_that_another_user_can_take_is_refused(written):
    lock = written.with_name(".routes.lock")
    lock.touch(0o644)
    lock.chmod(0o644)
    with pytest.raises(DeviceError, match="has mode 0644: expected a file that only its owner"):
        File(written).load()


async def test_a_failure_is_reported_once_and_the_file_is_written_later(path, monkeypatch):
    monkeypatch.setattr(state_module, "RETRY_SECONDS", 0.01)
    path.parent.parent.joinpath("state").write_text("in the way of the directory")
    file = File(path)
    with pytest.raises(DeviceError, match=r"reading the state file .* Not a directory"):
        file.load()
    failed = asyncio.Event()
    write, failures = file._write, []

    def note(table):
        try:
            write(table)
        except OSError as error:
            failures.append(error)
            if len(failures) == 3:
                loop.call_soon_threadsafe(failed.set)
            raise

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(file, "_write", note)
    await file.save(RouteTable.from_routes(ROUTES))
    await asyncio.wait_for(failed.wait(), 60)
    assert len(file.reports) == 1
    assert "forwarding continues, and the file is written later" in file.reports[0]
    path.parent.unlink()
    async with asyncio.timeout(60):
        while not path.exists():
            await asyncio.sleep(0.01)
    await file.flush()
    file.unlock()
    assert text_of(File(path).load()) == EXPECTED
