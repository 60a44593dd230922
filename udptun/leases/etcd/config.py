"""The configuration of an etcd source, validated.

The command line imports this module at every start, so it imports only small modules.
Frozen dataclasses; any thread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import normpath
from typing import ClassVar, NamedTuple
from urllib.parse import urlsplit

from ...errors import FieldError
from ...text import without_user

DEFAULT_ENDPOINTS = ("http://127.0.0.1:4001", "http://127.0.0.1:2379")  # as in flannel
DEFAULT_PREFIX = "/coreos.com/network"
DEFAULT_PORT = 2379  # used for an endpoint without a port
TTL_S = 86400


class Target(NamedTuple):
    """An endpoint in the form that gRPC expects."""

    address: str  # "192.0.2.1:2379", "[2001:db8::1]:2379", "etcd.example:2379"
    secure: bool

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")


@dataclass(frozen=True, slots=True)
class EtcdConfig:
    """The etcd cluster, our credentials, and the lifetime of a lease. Raises FieldError if invalid.

    endpoints             http:// or https:// URLs of members of one cluster, in any order. A URL
                          without a scheme is https if certfile or cafile is given, else http
    prefix                flannel's keys are ``<prefix>/config`` and ``<prefix>/subnets/...``
    keyfile, certfile     PEM files with the key and the certificate of this client. Give both files
                          or none
    cafile                PEM file with the CA that signed the members' certificates; empty: use the
                          system's CAs
    username, password    the name and password of an etcd user; empty: no authentication
    renew_margin_minutes  a lease is renewed this long before it expires; flannel accepts 1 to 1439
    ttl_seconds           lifetime of a lease. flannel's leases live for a day; tests use shorter
                          values
    """

    kind: ClassVar[str] = "etcd"
    no_node_data: ClassVar[str] = ""

    endpoints: tuple[str, ...] = DEFAULT_ENDPOINTS
    prefix: str = DEFAULT_PREFIX
    keyfile: str = ""
    certfile: str = ""
    cafile: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    renew_margin_minutes: float = 60
    ttl_seconds: int = TTL_S

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise FieldError("etcd-endpoints", "", "at least one URL")
        _ = self.targets
        if not self.prefix.strip("/"):
            raise FieldError("etcd-prefix", self.prefix, f"a key such as {DEFAULT_PREFIX}")
        if bool(self.keyfile) != bool(self.certfile):
            missing = "etcd-certfile" if self.keyfile else "etcd-keyfile"
            raise FieldError(missing, "", "a file: give both the certificate and its key")
        if self.password and not self.username:
            raise FieldError("etcd-username", "", "a user name, since a password is given")
        if not 0 < self.renew_margin < self.ttl_seconds:
            raise FieldError("subnet-lease-renew-margin", self.renew_margin_minutes,
                             f"minutes above 0 and below {self.ttl_seconds / 60:g}, the lease TTL")

    @property
    def store_id(self) -> str:
        """The store whose leases are cached. It has the prefix but not the endpoints, because the
        members of a cluster change over time."""
        return f"etcd {self.root}"

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(Path(name) for name in (self.keyfile, self.certfile, self.cafile) if name)

    @property
    def renew_margin(self) -> float:
        """How long before its expiry a lease is renewed, in seconds."""
        return self.renew_margin_minutes * 60

    @property
    def root(self) -> str:
        """The prefix of all keys, normalized as flannel's path.Join normalizes it."""
        return normpath(re.sub("/+", "/", self.prefix))

    @property
    def targets(self) -> tuple[Target, ...]:
        tls = bool(self.certfile or self.cafile)
        found = dict.fromkeys(_target(url.strip(), tls) for url in self.endpoints)
        if len({target.secure for target in found}) > 1:
            raise FieldError("etcd-endpoints", ",".join(self.endpoints),
                             "all of them http or all of them https")
        return tuple(found)


def _target(url: str, tls: bool) -> Target:
    text = url if "://" in url else f"{'https' if tls else 'http'}://{url}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if (parts.scheme not in ("http", "https") or not host or parts.username is not None
            or parts.path not in ("", "/") or parts.query or parts.fragment):
        raise FieldError("etcd-endpoints", without_user(url), "a URL such as http://192.0.2.1:2379")
    host = f"[{host}]" if ":" in host else host
    return Target(f"{host}:{DEFAULT_PORT if port is None else port}", parts.scheme == "https")
