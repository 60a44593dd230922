"""The daemon's socket: it is made again if its file is removed; idle clients keep none out."""

import asyncio
import json
import shutil
from pathlib import Path

from tests.node.node_reports import ready
from tests.wait import until
from udptun.node.status import socket as module
from udptun.node.status.socket import NodeSocket


async def ask(path: Path) -> dict:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"GET /v1/node HTTP/1.1\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return json.loads(answer.partition(b"\r\n\r\n")[2])


async def test_a_removed_socket_is_made_again(tmp_path, caplog):
    control = tmp_path / "run" / "udptun.sock"
    path = control.with_name("node.sock")
    serving = asyncio.ensure_future(NodeSocket(ready(), control).serve())
    try:
        await until(path.exists)
        assert (await ask(path))["ready"]
        shutil.rmtree(path.parent)
        await until(path.exists)
        assert (await ask(path))["ready"]
        assert "was removed" in caplog.text
    finally:
        serving.cancel()
        await asyncio.wait({serving})
    assert not path.exists()


async def test_idle_connections_never_keep_a_client_out(tmp_path):
    path = tmp_path / "node.sock"
    serving = asyncio.ensure_future(NodeSocket(ready(), tmp_path / "udptun.sock").serve())
    try:
        await until(path.exists)
        idle = [await asyncio.open_unix_connection(path)
                for _ in range(2 * module.CONNECTIONS_MAX)]
        assert (await ask(path))["ready"]
        async with asyncio.timeout(60):
            assert await idle[0][0].read() == b""  # the oldest goes first
        assert not idle[-1][0].at_eof()
        for _, writer in idle:
            writer.close()
    finally:
        serving.cancel()
        await asyncio.wait({serving})
