"""A real kube-apiserver with an etcd of its own, on loopback ports.

Owns: the processes, their certificates and tokens. The binary is the one that the environment
variable KUBE_APISERVER names; etcd is the one in PATH. A test can stop the server, start it again,
and replace its certificates.
"""

import atexit
import os
import shutil
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.leases.authority import Authority
from tests.leases.etcd_server import Etcd, free_ports

BINARY = os.environ.get("KUBE_APISERVER", "")
URL = os.environ.get("KUBE_APISERVER_URL", "")
TOKEN = os.environ.get("KUBE_APISERVER_TOKEN", "")
ADMIN, AGENT = "real-admin", "real-agent"
SERVICE_ACCOUNT = "system:serviceaccount:kube-udptun:udptun"
START_SECONDS = 120

_SKIP = pytest.mark.skipif(
    not (BINARY or URL), reason="neither KUBE_APISERVER nor KUBE_APISERVER_URL is given")
# A real server, however it was started.
REAL = pytest.param("real", marks=_SKIP)
# A server that the test may stop: not the one of KUBE_APISERVER_URL.
OWN_REAL = [] if URL and not BINARY else [REAL]


class RealApi:
    """One kube-apiserver. ``folder`` has its files, and the CA in ca.pem."""

    def __init__(self, folder, authority=None):
        assert shutil.which("etcd"), "a real API server needs etcd (apt-get install etcd-server)"
        self.folder = folder
        self.authority = authority or Authority(folder)
        self.authority.issue("server")
        self._etcd = Etcd(folder)
        (self.port,) = free_ports(1)
        self.url = f"https://127.0.0.1:{self.port}"
        (folder / "tokens.csv").write_text(
            f"{ADMIN},admin,1,system:masters\n{AGENT},{SERVICE_ACCOUNT},2\n")
        subprocess.run(["openssl", "genrsa", "-out", folder / "sa.key", "2048"], check=True,
                       capture_output=True)
        self._process = None

    @property
    def log(self):
        return self.folder / "kube-apiserver.log"

    def start(self):
        self._etcd.start()
        self.start_server()
        return self

    def start_server(self):
        folder = self.folder
        flags = {
            "etcd-servers": self._etcd.url, "secure-port": self.port, "bind-address": "127.0.0.1",
            "tls-cert-file": folder / "server.pem", "tls-private-key-file": folder / "server.key",
            "client-ca-file": self.authority.cafile, "token-auth-file": folder / "tokens.csv",
            "service-account-key-file": folder / "sa.key",
            "service-account-signing-key-file": folder / "sa.key",
            "service-account-issuer": "https://kubernetes.default.svc",
            "authorization-mode": "Node,RBAC", "service-cluster-ip-range": "10.96.0.0/16",
            "allow-privileged": "true", "endpoint-reconciler-type": "none",
            "cert-dir": folder / "unused", "profiling": "false",
            # without aggregation of other servers, one service less is needed
            "disable-admission-plugins": "ServiceAccount",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [BINARY, *(f"--{name}={value}" for name, value in flags.items())],
                stdout=log, stderr=log)
        self._wait_ready()

    def _wait_ready(self):
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls.load_verify_locations(self.authority.cafile)
        request = urllib.request.Request(
            f"{self.url}/readyz", headers={"Authorization": f"Bearer {ADMIN}"})
        deadline, why = time.monotonic() + START_SECONDS, None
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(request, context=tls, timeout=5):
                    return
            except OSError as error:
                why = error
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
            time.sleep(0.1)
        raise AssertionError(f"{self.url} is not ready: {why}")

    def stop_server(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self):
        self.stop_server()
        self._etcd.kill()


_shared: list[RealApi] = []


def shared():
    """Return (URL, administrator's token) of the server that the tests of this process share."""
    if not BINARY:
        return URL, TOKEN
    if not _shared:
        folder = Path(tempfile.mkdtemp(prefix="udptun-kube-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        api = RealApi(folder)
        atexit.register(api.stop)
        _shared.append(api.start())
    return _shared[0].url, ADMIN
