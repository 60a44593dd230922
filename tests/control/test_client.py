"""The control client, with the real server and with servers that make errors."""

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.control.fakes import Served
from udptun.control import client as client_module
from udptun.control import protocol
from udptun.control.client import ControlClient
from udptun.errors import ControlError, NoForwarder
from udptun.model import Route, RouteDiff

ROUTE = Route.make("10.244.2.0/24", "192.0.2.2")
OTHER = Route.make("10.244.2.0/24", "192.0.2.3", 9000, 1400)
SIX = Route.make("2001:db8:5::/64", "2001:db8::1")


@pytest.fixture
def client(served: Served) -> Iterator[ControlClient]:
    with ControlClient(str(served.path)) as connected:
        yield connected


def test_read_requests(client: ControlClient, served: Served) -> None:
    assert client.status()["device"]["name"] == "udptun0"
    assert client.drops() == served.forwarder.drops()
    assert client.routes() == {"generation": 1, "routes": []}
    assert b"".join(client.routes_text()) == b'{"generation":1,"routes":[]}\n'
    assert client.trace("10.244.2.9")["reason"] == "no_route"
    assert "udptun_build_info" in client.metrics()


def test_route_changes(client: ControlClient) -> None:
    assert client.add(ROUTE) == RouteDiff(2, added=1)
    assert client.add(ROUTE) == RouteDiff(2)
    with pytest.raises(ControlError) as caught:
        client.add(OTHER)
    assert caught.value.code == "route_exists"
    assert client.put(OTHER) == RouteDiff(3, changed=1)
    assert client.put(SIX) == RouteDiff(4, added=1)
    assert client.routes()["routes"] == [OTHER.to_json(), SIX.to_json()]
    assert client.delete(OTHER.dst) == RouteDiff(5, removed=1)
    assert client.delete("10.244.2.0/24") == RouteDiff(5)


def test_replace(client: ControlClient) -> None:
    assert client.replace([ROUTE, SIX]) == RouteDiff(2, added=2)
    assert client.replace([OTHER], expect_generation=2) == RouteDiff(3, changed=1, removed=1)
    with pytest.raises(ControlError) as caught:
        client.replace([], expect_generation=2)
    assert caught.value.code == "generation_mismatch"
    assert client.replace_text(f"{SIX}\n".encode()) == RouteDiff(4, added=1, removed=1)
    with pytest.raises(ControlError, match=r"line 2: via: 'x'"):
        client.replace_text(b"\n10.0.0.0/8 via x\n")


def test_all_requests_use_one_connection(client: ControlClient) -> None:
    client.status()
    sock = client._connection.sock
    with pytest.raises(ControlError):
        client.trace("x")
    list(client.routes_text())
    client.metrics()
    assert client._connection.sock is sock


def test_events(client: ControlClient, served: Served) -> None:
    events = client.events()
    assert next(events) == {"type": "hello", "generation": 1}
    with ControlClient(str(served.path)) as other:
        other.add(ROUTE)
    assert next(events)["dst"] == "10.244.2.0/24"
    served.close()
    assert list(events) == []


def test_recent_events(client: ControlClient) -> None:
    client.add(ROUTE)
    assert [e["type"] for e in client.events(follow=False)] == ["hello", "route_added"]
    assert client.status()["generation"] == 2  # the same client can send another request


def test_following_events_has_no_timeout(served: Served) -> None:
    with ControlClient(str(served.path), timeout=0.05) as client:
        events = client.events()
        next(events)
        assert client._connection.sock.gettimeout() is None
        events.close()


def test_stop_returns_after_the_socket_is_removed(client: ControlClient, served: Served) -> None:
    client.status()
    client.stop()
    served._closing.result(10)
    assert not served.path.exists()


def test_stop_waits_for_the_process(tmp_path: Path) -> None:
    """The server closes its connections before its process ends. stop waits for the process."""
    import subprocess

    path = tmp_path / "udptun.sock"
    script = """
import socket, sys
listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]); listener.listen()
print("ready", flush=True)
connection, _ = listener.accept()
connection.recv(65536)
connection.sendall(b'HTTP/1.1 202 OK\\r\\nContent-Type: x\\r\\nContent-Length: 2\\r\\n\\r\\n{}')
connection.close()
sys.stdin.read()
"""
    argv = [sys.executable, "-S", "-c", script, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdin.close()
        ControlClient(str(path)).stop()
        assert process.wait(0) == 0


# No forwarder


def test_missing_socket(tmp_path: Path) -> None:
    path = tmp_path / "udptun.sock"
    with pytest.raises(NoForwarder) as caught:
        ControlClient(str(path)).status()
    assert str(caught.value) == (
        f"no forwarder answers on {path}: start one with `udptun forward ...`, or select its "
        "socket with --socket, UDPTUN_SOCKET or --instance"
    )


def test_stale_socket(tmp_path: Path) -> None:
    path = tmp_path / "udptun.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with pytest.raises(NoForwarder, match="start one with"):
        ControlClient(str(path)).routes()


def test_permission_denied_has_its_own_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(self: socket.socket, address: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(client_module.socket.socket, "connect", connect, raising=False)
    with pytest.raises(NoForwarder, match="permission denied: only root and the socket's group"):
        ControlClient(str(tmp_path / "x")).status()


def test_path_that_cannot_be_a_socket(tmp_path: Path) -> None:
    with pytest.raises(NoForwarder, match="too long"):
        ControlClient("/" + "x" * 200).status()
    (tmp_path / "file").write_text("")
    with pytest.raises(NoForwarder, match="no forwarder answers"):
        ControlClient(str(tmp_path / "file")).status()


# Servers with errors


@contextmanager
def serving(path: Path, *answers: Callable[[socket.socket], None]) -> Iterator[ControlClient]:
    """Accept one connection for each function in ``answers``, and call the function with it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    done = threading.Event()

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                answer(connection)
        done.wait(60)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ControlClient(str(path), timeout=5) as client:
            yield client
    finally:
        done.set()
        thread.join()
        listener.close()


def say(text: bytes, times: int = 1) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        for _ in range(times):
            connection.recv(65536)
            connection.sendall(text)

    return answer


DROPS = b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"drops":[]}'


def test_client_reconnects_after_the_server_closed(tmp_path: Path) -> None:
    with serving(tmp_path / "s", say(DROPS), say(DROPS, times=2)) as client:
        assert client.drops() == client.drops() == client.drops() == []


def test_server_that_closes_without_an_answer(tmp_path: Path) -> None:
    hang_up = say(b"")
    with (
        serving(tmp_path / "s", hang_up) as client,
        pytest.raises(NoForwarder, match="closed the connection"),
    ):
        client.status()
    with serving(tmp_path / "t", say(DROPS), hang_up) as client:
        client.drops()
        with pytest.raises(NoForwarder, match="closed the connection"):
            client.drops()


@pytest.mark.parametrize(
    "text",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"SSH-2.0-OpenSSH\r\n",
    ],
    ids=["short", "chunked", "no http"],
)
def test_incomplete_answer(tmp_path: Path, text: bytes) -> None:
    with (
        serving(tmp_path / "s", say(text)) as client,
        pytest.raises(NoForwarder, match="closed the connection"),
    ):
        client.status()


def test_incomplete_event_stream(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n"
    with serving(tmp_path / "s", say(head)) as client:
        events = client.events()
        assert next(events) == {}
        with pytest.raises(NoForwarder, match="closed the connection"):
            next(events)


def test_timeout_of_an_answer(tmp_path: Path) -> None:
    released = threading.Event()

    def stall(connection: socket.socket) -> None:
        released.wait(60)

    with serving(tmp_path / "s", stall) as client:
        client._connection._timeout = 0.05
        with pytest.raises(NoForwarder, match="does not answer"):
            client.status()
        released.set()


def test_error_in_another_format(tmp_path: Path) -> None:
    text = b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n"
    with serving(tmp_path / "s", say(text)) as client, pytest.raises(ControlError) as caught:
        client.status()
    assert caught.value.code == "internal"


def test_table_over_the_limit_is_not_sent(
    client: ControlClient, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_TABLE_BODY", 10)
    with pytest.raises(ControlError) as caught:
        client.replace_text(b"# 34567890")
        client.replace_text(b"# 345678901")
    assert caught.value.code == "too_large"
    assert served.forwarder.bodies == [b"# 34567890"]


def test_error_answer_before_the_request_is_read(tmp_path: Path) -> None:
    """The server answers 413 and closes the connection, so the client gets EPIPE while it sends."""

    def refuse(connection: socket.socket) -> None:
        connection.recv(10)
        body = b'{"error":{"code":"too_large","message":"no"}}'
        connection.sendall(b"HTTP/1.1 413 X\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    with serving(tmp_path / "s", refuse, say(DROPS)) as client:
        with pytest.raises(ControlError) as caught:
            client.replace_text(b"#" * 10_000_000)
        assert caught.value.code == "too_large"
        assert client.drops() == []
