"""``udptun web`` without a browser: headers, methods, names of the host, order, hostile names."""

import asyncio
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from html.parser import HTMLParser
from pathlib import Path

import aiohttp
import pytest
from aiohttp import ClientResponse
from click.testing import CliRunner

from tests.cli.scene import HOSTILE, Scene, scene
from tests.cli.tty import UDPTUN
from udptun.cli import cli
from udptun.cli.web import DEFAULT_PORT
from udptun.cli.web import server as module
from udptun.cli.web.server import WebServer
from udptun.cli.web.watch import Watch
from udptun.connections import host_name

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def test_the_default_port_is_free_where_udptun_is_deployed() -> None:
    """The manifests put the health checks on a port of the host's network."""
    assert "healthz-port" in (DEPLOY / "kubernetes" / "daemonset.yaml").read_text()
    users = [str(path) for path in DEPLOY.rglob("*")
             if path.is_file() and re.search(rf"\b{DEFAULT_PORT}\b", path.read_text())]
    assert not users


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("node"), [*HOSTILE, "n2", "n10"]) as running:
        yield running


class Client:
    """Sends requests to a server. Each request has a connection of its own."""

    def __init__(self, server: WebServer, watch: Watch, session: aiohttp.ClientSession) -> None:
        self.port, self.watch, self._session = server.port, watch, session

    async def __call__(
        self, target: str = "/", method: str = "GET", host: str = "127.0.0.1", data: bytes = b""
    ) -> tuple[ClientResponse, str]:
        async with self._session.request(
            method, f"http://127.0.0.1:{self.port}{target}", headers={"Host": host},
            data=data or None,
        ) as answer:
            return answer, await answer.text()


@pytest.fixture
async def client(node: Scene) -> AsyncIterator[Client]:
    watch = Watch(node.path)
    server = WebServer(watch, ["n1.example"])
    await server.start_at("127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        yield Client(server, watch, session)
    await server.close()


class Elements(HTMLParser):
    """The elements and attributes of a document. ``text`` has the text of each element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        self.text += [value for name, value in attrs if value and name == "href"]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


async def test_hostile_names_are_text(client: Client) -> None:
    answer, page = await client()
    assert answer.status == 200
    found = Elements(page)
    assert found.tags.count("script") == 1  # ours
    assert not {"img", "iframe", "object"} & set(found.tags)
    assert not {name for name in found.names if name.startswith("on")} | {"style"} & found.names
    assert not [text for text in found.text if text.startswith("javascript:") and "#" in text]
    for shown in ("<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "&amp;",
                  "\\x1b]0;owned\\x07\\x1b[2J", "\\u202eevil\\u2066", "\\x00", "\\ud800"):
        assert shown in found.text
    assert all(char.isprintable() or char == "\n" for char in page)


async def test_headers_of_each_answer(client: Client) -> None:
    for target, kind in (("/", "text/html"), ("/page.css", "text/css"),
                         ("/page.js", "text/javascript"), ("/icon.svg", "image/svg+xml"),
                         ("/absent", "text/plain")):
        answer, _ = await client(target)
        assert answer.content_type == kind
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
        assert "http" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Server"] == "udptun"


async def test_only_get_and_head(client: Client) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer, _ = await client(method=method)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
    answer, text = await client("/page.js", method="HEAD")
    assert (answer.status, text) == (200, "") and int(answer.headers["Content-Length"]) > 1000
    assert (await client(data=b"x"))[0].status == 400
    assert (await client("/../../etc/passwd"))[0].status == 404


async def test_a_name_that_is_not_ours_is_refused(client: Client) -> None:
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8286", "", "n1",
                 "<script>"):
        answer, text = await client(host=host)
        assert answer.status == 421 and "--host NAME" in text, host
    for host in ("localhost", "LocalHost:9999", "127.0.0.1:1", "[::1]:8286", "n1.example:80",
                 "192.0.2.1"):
        assert (await client("/icon.svg", host=host))[0].status == 200, host
    assert host_name("[2001:db8::1]:80") == "2001:db8::1" and host_name("a.b.:1") == "a.b"


async def test_two_host_headers_and_bad_http_are_refused(client: Client) -> None:
    for lines in (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example", b"GET / HTTP/1.1",
                  b"\x00\x01"):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(lines + b"\r\n\r\n")
        assert re.match(rb"HTTP/1\.\d 4\d\d ", await reader.read())
        writer.close()


async def test_the_server_sorts_and_filters(client: Client) -> None:
    async def names(query: str) -> list[str]:
        _, page = await client(f"/?{query}")
        return re.findall(r'<span class="peer">(.*?)</span>', page)

    assert [name for name in await names("q=n") if name in ("n2", "n10")] == ["n2", "n10"]
    by_rate = await names("sort=out")
    assert by_rate[0] == "&lt;script&gt;alert(1)&lt;/script&gt;"
    reverse = await names("sort=-out")
    assert reverse[0] != by_rate[0]
    assert await names("state=limited") == ["\\u202eevil\\u2066"]
    assert (await names("sort=state"))[0] == "\\x1b]0;owned\\x07\\x1b[2J"
    assert await names("q=%3Cimg") == ["&lt;img src=x onerror=alert(2)&gt;"]
    assert await names("q=absent") == []
    # A form without JavaScript sends the hidden field first, and then the pressed button.
    assert await names("sort=name&q=&state=&sort=out") == by_rate
    for query, field in (("sort=x", "sort"), ("state=x", "state"), ("x=y", "query")):
        answer, text = await client(f"/?{query}")
        assert answer.status == 400 and text.startswith(f"{field}: ")
    assert (await client(f"/?q={'x' * 3000}"))[0].status == 400


async def test_many_clients_cost_the_forwarder_one_sample(client: Client) -> None:
    await client()
    taken = client.watch.taken_n
    assert taken == 2  # the first page has rates
    answers = await asyncio.gather(*(client() for _ in range(20)))
    assert all(answer.status == 200 for answer, _ in answers)
    assert client.watch.taken_n <= taken + 3


async def test_silent_clients_keep_none_out(client: Client) -> None:
    silent = [await asyncio.open_connection("127.0.0.1", client.port)
              for _ in range(module.CONNECTIONS_MAX + 5)]
    assert (await client("/icon.svg"))[0].status == 200
    assert await silent[0][0].read() == b""  # the oldest was closed
    for _, writer in silent:
        writer.close()


async def test_a_client_that_sends_no_request_is_closed(
    node: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REQUEST_SECONDS", 0.05)
    server = WebServer(Watch(node.path))
    await server.start_at("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    async with asyncio.timeout(60):
        assert await reader.read() == b""
    writer.close()
    await server.close()


async def test_nothing_answers(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "udptun.sock")
    server = WebServer(watch)
    await server.start_at("127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        answer, page = await Client(server, watch, session)()
    assert answer.status == 200 and "no forwarder answers on" in page
    await server.close()


def test_the_program(node: Scene) -> None:
    """It announces its address, warns, serves, and ends with SIGTERM."""
    for address, warning in (("127.0.0.1", "every user of this host can read it"),
                             ("0.0.0.0", "warning: every host that reaches 0.0.0.0 can read")):
        with socket.socket() as free:
            free.bind((address, 0))
            listen = f"{address}:{free.getsockname()[1]}"
        process = subprocess.Popen(
            [*UDPTUN, "--socket", str(node.path), "web", "--listen", listen],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == f"the page is at http://{listen}/; Ctrl-C ends it\n"
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^CapEff:\s0+$", status, re.MULTILINE)
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and warning in errors


def test_bad_options() -> None:
    for words, wanted in ((["--listen", "127.0.0.1:0"], "a whole number from 1 to 65535"),
                          (["--listen", "n1"], "an IPv4 or IPv6 address")):
        result = CliRunner().invoke(cli, ["web", *words])
        assert result.exit_code == 2 and "--listen" in result.output and wanted in result.output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        result = CliRunner().invoke(cli, ["web", "--listen", listen])
        assert result.exit_code == 1 and f"--listen: {listen}: " in result.output
