"""A real etcd for the tests: one or more members, with TLS or users. A test can kill or freeze it.

The tests access etcd through its JSON gateway. So the data that our client writes and reads are
compared with an independent encoding.
"""

import asyncio
import base64
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from udptun.lab.hosts import wait_for

PREFIX = "/coreos.com/network"

needs_etcd = pytest.mark.skipif(
    shutil.which("etcd") is None, reason="needs etcd (apt-get install etcd-server)"
)


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def b64(text):
    return base64.b64encode(text if isinstance(text, bytes) else text.encode()).decode()


def value_of(last, more=""):
    """Return the value of the lease of node 192.0.2.LAST, as flannel writes it."""
    return f'{{"PublicIP":"192.0.2.{last}","PublicIPv6":null{more}}}'


class Etcd:
    """One member. ``url`` is for the client under test, ``gateway`` is for the tests."""

    def __init__(self, folder: Path, name="m0", ports=None, cluster=None, tls=()):
        client, self._gateway_port, peer = ports or free_ports(3)
        self.folder, self.data = folder, folder / name
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{client}"
        self.gateway = f"http://127.0.0.1:{self._gateway_port}"
        self.headers = {}
        self._argv = [
            "etcd", "--name", name, "--data-dir", str(self.data), "--log-outputs", "stderr",
            "--heartbeat-interval", "50", "--election-timeout", "500",
            "--listen-client-urls", f"{self.url},{self.gateway}",
            "--advertise-client-urls", self.gateway,
            "--listen-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-cluster", cluster or f"{name}=http://127.0.0.1:{peer}",
            "--unsafe-no-fsync", *tls,
        ]
        self._process = None

    def start(self, wait=True):
        with (self.folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(self._argv, stderr=log)
        if wait:
            self.wait_healthy()
        return self

    def wait_healthy(self):
        def healthy():
            assert self._process.poll() is None, (self.folder / "etcd.log").read_text()[-2000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(
                f"{self.gateway}/health", timeout=2
            ) as answer:
                return json.load(answer)["health"] == "true"

        wait_for(healthy, f"etcd at {self.url}", 30)

    def kill(self):
        if self._process is not None:
            self.resume()
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self):
        """Delete all data, like the replacement of a disk. Stop the member first."""
        shutil.rmtree(self.data)

    def freeze(self):
        self._process.send_signal(signal.SIGSTOP)

    def resume(self):
        self._process.send_signal(signal.SIGCONT)

    async def ask(self, path, **body):
        return await asyncio.to_thread(self.ask_now, path, **body)

    def ask_now(self, path, **body):
        request = urllib.request.Request(
            f"{self.gateway}/v3/{path}", json.dumps(body).encode(), self.headers
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{path}: {error.read().decode()}") from None

    async def put(self, key, value, ttl=None):
        """Write a key under the prefix. If ``ttl`` is None, the key has no lease, like a key that
        an operator writes."""
        lease = 0 if ttl is None else (await self.ask("lease/grant", TTL=ttl))["ID"]
        await self.ask("kv/put", key=b64(f"{PREFIX}/{key}"), value=b64(value), lease=lease)

    async def put_many(self, values):
        """Write {key: value} under the prefix with one lease. One transaction contains at most 128
        puts."""
        lease = (await self.ask("lease/grant", TTL=5000))["ID"]
        puts = [{"request_put": {"key": b64(f"{PREFIX}/{key}"), "value": b64(value),
                                 "lease": lease}} for key, value in values.items()]
        for start in range(0, len(puts), 100):
            await self.ask("kv/txn", success=puts[start:start + 100])

    async def put_raw(self, key, value):
        await self.ask("kv/put", key=b64(key), value=b64(value))

    async def delete(self, key):
        await self.ask("kv/deleterange", key=b64(f"{PREFIX}/{key}"))

    async def get(self, key):
        """Return the record of a key, or None if the key does not exist.

        The value is bytes, the numbers are int.
        """
        kvs = (await self.ask("kv/range", key=b64(f"{PREFIX}/{key}"))).get("kvs")
        if not kvs:
            return None
        kv = kvs[0]
        return {
            "value": base64.b64decode(kv["value"]), "lease": int(kv.get("lease", 0)),
            "version": int(kv["version"]), "mod_revision": int(kv["mod_revision"]),
        }

    async def subnet_keys(self):
        start, end = b64(f"{PREFIX}/subnets/"), b64(f"{PREFIX}/subnets0")
        kvs = (await self.ask("kv/range", key=start, range_end=end)).get("kvs", [])
        return [base64.b64decode(kv["key"]).decode().rpartition("/")[2] for kv in kvs]

    async def lease_ids(self):
        return {int(lease["ID"]) for lease in (await self.ask("lease/leases")).get("leases", [])}

    async def ttl(self, key):
        answer = await self.ask("lease/timetolive", ID=(await self.get(key))["lease"])
        return int(answer["TTL"]), int(answer["grantedTTL"])

    async def compact(self):
        revision = int((await self.ask("kv/range", key=b64("x")))["header"]["revision"])
        await self.ask("kv/compaction", revision=revision, physical=True)

    async def enable_auth(self):
        """Create root/secret with all permissions, and flannel/pass for the prefix."""
        for user, password in (("root", "secret"), ("flannel", "pass")):
            await self.ask("auth/user/add", name=user, password=password)
            await self.ask("auth/role/add", name=user)
            await self.ask("auth/user/grant", user=user, role=user)
        await self.ask("auth/role/grant", name="flannel", perm={
            "permType": "READWRITE", "key": b64(f"{PREFIX}/"), "range_end": b64(f"{PREFIX}0"),
        })
        await self.ask("auth/enable")
        await self.log_in()

    async def forget_tokens(self):
        """Invalidate all tokens permanently."""
        await self.ask("auth/disable")
        self.headers = {}
        await self.ask("auth/enable")
        await self.log_in()

    async def log_in(self):
        self.headers = {}
        answer = await self.ask("auth/authenticate", name="root", password="secret")
        self.headers = {"Authorization": answer["token"]}


def cluster(folder, count):
    """Start the members of one cluster."""
    ports = [free_ports(3) for _ in range(count)]
    peers = ",".join(f"m{i}=http://127.0.0.1:{peer}" for i, (_, _, peer) in enumerate(ports))
    members = [Etcd(folder, f"m{i}", ports[i], peers) for i in range(count)]
    for member in members:
        member.start(wait=False)
    for member in members:
        member.wait_healthy()
    return members


class Relay:
    """A TCP relay between a client and a member; cut() disconnects only the client."""

    def __init__(self, url):
        self._port_behind = int(url.rpartition(":")[2])
        (self._port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self._port}"
        self._server, self._links = None, set()

    async def open(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)

    async def cut(self):
        self._server.close()
        for task in [*self._links]:
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader, writer):
        self._links.add(asyncio.current_task())
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port_behind)
        try:
            await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))
        except (asyncio.CancelledError, OSError):
            pass
        finally:
            self._links.discard(asyncio.current_task())
            for end in (writer, far_writer):
                end.close()
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    @staticmethod
    async def _copy(reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()
