"""The way to the API server and the credentials for it: one HTTP client, made from a KubeConfig.

Owns flannel's order of precedence. Kubeconfig files, service accounts and TLS are lightkube's:
also that a token that the server refuses is read from its file again. Asyncio, one loop.
"""

from __future__ import annotations

import httpx2
from lightkube.config import kubeconfig
from lightkube.config.client_adapter import AsyncClient, ConnectionParams
from lightkube.config.models import Cluster, User
from msgspec.structs import replace

from ..base import StoreRefused
from .config import KubeConfig

_CONNECT_TIMEOUT = 3.0  # seconds: a server that is there takes a connection at once


def connect(config: KubeConfig) -> httpx2.AsyncClient:
    """No connection is made yet. StoreRefused: there are no credentials, or no usable ones."""
    timeout = httpx2.Timeout(config.request_timeout, connect=_CONNECT_TIMEOUT)
    try:
        return AsyncClient(_access(config), ConnectionParams(timeout=timeout))
    except Exception as e:  # of YAML, of types, of TLS: whatever may stand in those files
        where = config.kubeconfig_file or config.api_url or config.service_account
        raise StoreRefused(f"no way to the Kubernetes API from {where}: {e or repr(e)}") from e


def _access(config: KubeConfig) -> kubeconfig.SingleConfig:
    """The kubeconfig, with api_url for its server; else api_url; else the pod's own.

    An api_url with https, inside a pod, goes with the pod's own credentials. Flannel sends none
    then, which an API server that checks certificates has no use for.
    """
    account = config.service_account
    if config.kubeconfig_file is not None:
        access = kubeconfig.KubeConfig.from_file(config.kubeconfig_file).get()
    elif not config.api_url:
        access = kubeconfig.KubeConfig.from_service_account(account).get()
    elif config.api_url.startswith("https:") and (account / "token").exists():
        cluster = Cluster(certificate_auth=str(account / "ca.crt"))
        user = User(token_file=str(account / "token"))
        access = kubeconfig.KubeConfig.from_one(cluster=cluster, user=user).get()
    else:
        access = kubeconfig.KubeConfig.from_server(config.api_url).get()
    assert access is not None  # without a default, get() returns one or raises
    user = access.user or User()
    if user.token_file is not None:
        user = replace(user, token_file=str(access.abs_file(user.token_file)))
    server = config.api_url or access.cluster.server
    return access._replace(cluster=replace(access.cluster, server=server), user=user)
