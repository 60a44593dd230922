"""Reads the credentials for the API server from their files, and notices that a file has changed.

Owns: the TLS context and the headers that an Access results in, and the time at which they must be
read again. Certificates, CAs and tokens rotate while the daemon runs. Sends no request. Asyncio,
one loop.
"""

from __future__ import annotations

import base64
import os
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from ...errors import FieldError
from ...model import IPAddress
from ...text import without_user
from ..base import StoreRefused
from . import plugin
from .access import find_access, source_of
from .config import KubeConfig
from .kubeconfig import PROXY_SCHEMES, Access, Pem

_Stamp = tuple[int, int, int] | None  # None: there is no such file


@dataclass(frozen=True, slots=True)
class Credentials:
    """All that a connection to the API server needs. Equal credentials have the same content.

    server   URL without user name and password, and without a slash at the end
    proxy    URL of the HTTP proxy; "": none
    tls_server_name  the name in the server's certificate; "": the host in ``server``
    headers  of each request
    material  the content of all files that ``tls`` is made of
    tls      None: no TLS
    expires  time.time() from which they must be read again; None: they do not expire
    """

    server: str
    proxy: str
    tls_server_name: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    material: tuple[bytes | None, ...] = field(repr=False)
    tls: ssl.SSLContext | None = field(compare=False)
    expires: float | None = field(compare=False)


class Reader:
    """Reads the credentials that ``config`` names."""

    def __init__(self, config: KubeConfig) -> None:
        self._config = config
        self._stamps: dict[Path, _Stamp] = {}

    def changed(self) -> bool:
        """Return whether a file has changed since the last ``read``."""
        return any(_stamp(path) != stamp for path, stamp in self._stamps.items())

    async def read(self) -> Credentials:
        """Read all files, and run the credential plugin.

        Raises StoreRefused. Also then, ``changed`` compares with the present files.
        """
        self._stamps = {}
        source = source_of(self._config)
        try:
            if self._config.kubeconfig_file is not None:
                self._watch(self._config.kubeconfig_file)
            access = find_access(self._config)
            issued = None if access.plugin is None else await plugin.run(access.plugin)
            return self._credentials(access, issued)
        except OSError as e:  # ssl.SSLError is one
            where = f"{e.filename}: " if e.filename else ""
            why = f"{where}{e.strerror or e}"
        except (FieldError, UnicodeDecodeError) as e:
            why = str(e)
        raise StoreRefused(f"no access to the Kubernetes API from {source}: {why}")

    def _credentials(self, access: Access, issued: plugin.Issued | None) -> Credentials:
        certificate, key = access.certificate, access.key
        if issued is not None and issued.certificate:
            certificate, key = issued.certificate, issued.key
        url = urlsplit(access.server)
        ca, certificate_pem, key_pem = map(self._pem, (access.ca, certificate, key))
        return Credentials(
            server=url._replace(netloc=url.netloc.rpartition("@")[2]).geturl().rstrip("/"),
            proxy=access.proxy_url or _environment_proxy(url),
            tls_server_name=access.tls_server_name,
            headers=self._headers(access, issued, url),
            material=(ca, certificate_pem, key_pem),
            tls=_tls(access, ca, certificate_pem, key_pem) if url.scheme == "https" else None,
            expires=None if issued is None else issued.expires,
        )

    def _headers(
        self, access: Access, issued: plugin.Issued | None, url: SplitResult
    ) -> tuple[tuple[str, str], ...]:
        token = access.token if issued is None else issued.token
        if access.token_file is not None:
            token = self._content(access.token_file).decode("ascii").strip()
        user, password = access.username, access.password
        if not user and url.username:
            user, password = unquote(url.username), unquote(url.password or "")
        headers = list(access.impersonation)
        if not access.compression:
            headers.append(("Accept-Encoding", "identity"))
        if token:
            headers.append(("Authorization", f"Bearer {token}"))
        elif user:
            pair = base64.b64encode(f"{user}:{password}".encode()).decode()
            headers.append(("Authorization", f"Basic {pair}"))
        return tuple(headers)

    def _pem(self, pem: Pem | None) -> bytes | None:
        return self._content(pem) if isinstance(pem, Path) else pem

    def _content(self, path: Path) -> bytes:
        self._watch(path)
        return path.read_bytes()

    def _watch(self, path: Path) -> None:
        """Note the state of the file before it is read."""
        self._stamps[path] = _stamp(path)


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _tls(
    access: Access, ca: bytes | None, certificate: bytes | None, key: bytes | None
) -> ssl.SSLContext:
    """Return the TLS context. It accepts the same certificates as Go, on each version of Python.

    ssl.create_default_context() would refuse a CA without the extension keyUsage since Python 3.13.
    """
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN  # ``ca`` may be an intermediate
    if access.insecure:
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    elif ca is None:
        tls.load_default_certs()
    else:
        try:
            tls.load_verify_locations(cadata=ca.decode("ascii"))
        except (ssl.SSLError, UnicodeDecodeError) as e:
            raise FieldError("certificate-authority", _name(access.ca), f"certificates ({e})") \
                from None
    if certificate is not None and key is not None:
        with _as_file(certificate + b"\n" + key) as path:
            try:
                tls.load_cert_chain(path, password=_refuse_password)
            except (ssl.SSLError, ValueError) as e:
                raise FieldError("client-certificate", _name(access.certificate),
                                 f"a certificate and its key ({e})") from None
    return tls


def _name(pem: Pem | None) -> str:
    return str(pem) if isinstance(pem, Path) else "<data>"


def _refuse_password() -> str:
    raise ValueError("the key needs a password")


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """Return the path of a file in memory: the ssl module reads certificates from files only."""
    fd = os.memfd_create("udptun-client-certificate", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{fd}"


def _environment_proxy(url: SplitResult) -> str:
    """Return the proxy that HTTPS_PROXY and similar variables name; "" if there is none.

    As in Go, the entries of NO_PROXY can also be networks, and loopback needs no proxy.
    """
    host = url.hostname or ""
    proxy = getproxies().get(url.scheme, "")
    if not proxy or host == "localhost" or proxy_bypass(host):
        return ""
    with suppress(ValueError):
        address = ip_address(host)
        entries = getproxies().get("no", "").split(",")
        if address.is_loopback or any(map(partial(_contains, address), entries)):
            return ""
    if not proxy.startswith(PROXY_SCHEMES):
        raise FieldError(f"{url.scheme.upper()}_PROXY", without_user(proxy),
                         "an http or https proxy")
    return proxy


def _contains(address: IPAddress, entry: str) -> bool:
    try:
        return address in ip_network(entry.strip(), strict=False)
    except ValueError:  # a name
        return False


def seconds_left(credentials: Credentials) -> float:
    return float("inf") if credentials.expires is None else credentials.expires - time.time()
