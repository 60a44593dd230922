"""The stores of the chaos: a real etcd, or the small Kubernetes API server of the tests.

Owns: how each of them is started, stopped and changed, and what a node needs in order to use it.
The acts do not depend on which one it is. Main thread only; the API server has a thread of its own.
"""

import asyncio
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import yaml

from tests.leases.kube_api import KubeApi, node
from tests.leases.kube_cluster import deployed_rules
from udptun.lab import Host
from udptun.lab.cluster import PREFIX, Etcd, Member

TOKEN = "agent"
STRAY = "10.244.250.0"  # the base of a subnet of no node


class Store(ABC):
    """A store on a host. ``options`` and ``environment`` are those of a node's daemon."""

    title: str
    stray: str  # the key of the lease that ``add_garbage`` writes

    def __init__(self, host: Host) -> None:
        self.host = host

    @abstractmethod
    def options(self, member: Host) -> Sequence[str]: ...

    def environment(self, member: Host) -> dict[str, str]:
        return {}

    @abstractmethod
    def stop(self) -> None:
        """End at once, as after kill -9. The data stay."""

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def compact(self) -> None: ...

    @abstractmethod
    def key(self, member: Member) -> str:
        """Return the key of a node's lease, by which its peers name it."""

    @abstractmethod
    def delete_lease(self, member: Member) -> None: ...

    @abstractmethod
    def publish_clone(self, member: Member, address: str) -> None:
        """Publish the node's lease with another public address."""

    @abstractmethod
    def add_garbage(self) -> None: ...

    @abstractmethod
    def delete_garbage(self) -> None: ...


class EtcdStore(Store):
    title = "etcd"
    stray = f"{STRAY}-24"

    def __init__(self, host: Host, members: Sequence[Host], config: dict[str, Any]) -> None:
        super().__init__(host)
        self.etcd = Etcd(host)
        self.etcd.put(f"{PREFIX}/config", json.dumps(config))

    def options(self, member: Host) -> list[str]:
        return [f"--etcd-endpoints={self.etcd.url}"]

    def stop(self) -> None:
        self.etcd.stop()

    def start(self) -> None:
        self.etcd.start()

    def close(self) -> None:
        return

    def compact(self) -> None:
        self.etcd.compact()

    def key(self, member: Member) -> str:
        found = str(member.subnet).replace("/", "-")
        six = member.subnet6
        return found if six is None else f"{found}&{six}".replace("/", "-")

    def delete_lease(self, member: Member) -> None:
        self.etcd.delete(f"{PREFIX}/subnets/{self.key(member)}")

    def publish_clone(self, member: Member, address: str) -> None:
        key = self.key(member)
        lease = self.etcd.leases()[key] | {"PublicIP": address}
        self.etcd.put(f"{PREFIX}/subnets/{key}", json.dumps(lease))

    def add_garbage(self) -> None:
        self.etcd.put(f"{PREFIX}/subnets/{self.stray}", "{not json")

    def delete_garbage(self) -> None:
        self.etcd.delete(f"{PREFIX}/subnets/{self.stray}")


class KubeStore(Store):
    title = "the API server"
    stray = "stray"

    def __init__(self, host: Host, members: Sequence[Host], config: dict[str, Any]) -> None:
        super().__init__(host)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._api = KubeApi(address=str(host.v4))
        self._api.allow(TOKEN, "system:serviceaccount:kube-udptun:udptun", deployed_rules())
        self.start()
        self._networks = [config["Network"], config.get("IPv6Network")]
        for number, member in enumerate(members, 1):
            self._do(self._api.put(node(member.name, *self._cidrs(number))))
        self._files(config)

    def _cidrs(self, number: int) -> list[str]:
        four, six = self._networks
        found = [f"{four.rsplit('.', 2)[0]}.{number}.0/24"]
        return found if six is None else [*found, f"{six.partition('::')[0]}:{number:x}::/64"]

    def _files(self, config: dict[str, Any]) -> None:
        folder = self.host.lab.folder
        (folder / "net-conf.json").write_text(json.dumps(config))
        (folder / "kubeconfig").write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": {"server": self._api.url}}],
            "users": [{"name": "me", "user": {"token": TOKEN}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "me"}}],
        }))

    def _run(self) -> None:
        with self.host.inside():  # the sockets that this thread opens are in the namespace
            self._loop.run_forever()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def options(self, member: Host) -> list[str]:
        folder = self.host.lab.folder
        return ["--kube-subnet-mgr", f"--kubeconfig-file={folder / 'kubeconfig'}",
                f"--net-config-path={folder / 'net-conf.json'}"]

    def environment(self, member: Host) -> dict[str, str]:
        return {"NODE_NAME": member.name}

    def stop(self) -> None:
        self._do(self._api.stop())

    def start(self) -> None:
        self._do(self._api.start())

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)

    def compact(self) -> None:
        self._loop.call_soon_threadsafe(self._api.compact)

    def key(self, member: Member) -> str:
        return member.host.name

    def delete_lease(self, member: Member) -> None:
        """Delete flannel's annotations. The node keeps its pod CIDR."""
        self._do(self._api.annotate(
            member.host.name, public_ip=None, backend_type=None, backend_data=None))

    def publish_clone(self, member: Member, address: str) -> None:
        self._do(self._api.annotate(member.host.name, public_ip=address))

    def add_garbage(self) -> None:
        self._do(self._api.put(node(self.stray, f"{STRAY}/24", annotations={
            f"flannel.alpha.coreos.com/{key}": value for key, value in {
                "kube-subnet-manager": "true", "public-ip": "203.0.113.1",
                "backend-type": "vxlan", "backend-data": "{not json"}.items()})))

    def delete_garbage(self) -> None:
        self._do(self._api.delete(self.stray))


STORES: dict[str, Callable[[Host, Sequence[Host], dict[str, Any]], Store]] = {
    "etcd": EtcdStore, "kubernetes": KubeStore,
}
