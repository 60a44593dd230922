"""A container runtime for the tests: it starts the plugin as a process, as containerd does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.own_netns import sh

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-S", "-c", "from udptun.cni.plugin import main; main()"]
PLACES = ("/usr/lib/cni", "/opt/cni/bin")
PLUGINS = next((place for place in PLACES if (Path(place) / "host-local").exists()), "")

needs_plugins = pytest.mark.skipif(
    not PLUGINS,
    reason="no CNI plugins in " + " or ".join(PLACES) + " (apt-get install "
    "containernetworking-plugins)")


@dataclass
class Answer:
    code: int
    output: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.output)

    @property
    def error(self) -> tuple[int, str]:
        """The code and the text of an error."""
        assert self.code != 0
        value = self.json
        return value["code"], value["msg"]


class Runtime:
    """Calls the plugin for one container, with files below ``directory``.

    config   the network configuration; tests change it
    program  the command line of the plugin
    """

    def __init__(self, directory: Path, path: str = PLUGINS) -> None:
        self.directory = directory
        self.program = PROGRAM
        self.path = path
        self.container_id = f"c{uuid.uuid4().hex}"
        self.netns = "/run/netns/none"
        self.subnet_file = directory / "subnet.env"
        self.data = directory / "data"
        self.addresses = directory / "networks"
        self.config: dict[str, Any] = {
            "cniVersion": "1.1.0", "name": "net1", "type": "udptun",
            "subnetFile": str(self.subnet_file),
            "nodeSocket": str(directory / "run" / "node.sock"),
            "dataDir": str(self.data), "waitSeconds": 0,
            "ipam": {"dataDir": str(self.addresses)},
        }

    def write_subnet(
        self, subnet: str = "10.244.1.1/24", subnet6: str = "", mtu: int = 1450,
        masq: bool = True,
    ) -> None:
        text = f"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={subnet}\n" if subnet else ""
        if subnet6:
            text += (f"FLANNEL_IPV6_NETWORK=fd00:10:244::/56\n"
                     f"FLANNEL_IPV6_SUBNET={subnet6}\n")
        text += f"FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={str(masq).lower()}\n"
        fresh = self.subnet_file.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.subnet_file)

    def run(
        self, command: str | None, config: dict[str, Any] | bytes | None = None,
        environ: dict[str, str | None] | None = None, **changes: Any,
    ) -> Answer:
        """Run one command.

        config   what the plugin reads; None: our configuration
        environ  variables that differ; None: the variable is not set
        changes  keys of the configuration that differ
        """
        with self.start(command, config, environ, **changes) as process:
            output, stderr = process.communicate(timeout=60)
        return Answer(process.returncode, output, stderr)

    def start(
        self, command: str | None, config: dict[str, Any] | bytes | None = None,
        environ: dict[str, str | None] | None = None, **changes: Any,
    ) -> subprocess.Popen[str]:
        variables: dict[str, str | None] = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "CNI_COMMAND": command,
            "CNI_PATH": self.path, "CNI_CONTAINERID": self.container_id, "CNI_IFNAME": "eth0",
            "CNI_NETNS": self.netns, **(environ or {})}
        text = config if isinstance(config, bytes) else json.dumps(
            {**(self.config if config is None else config), **changes}).encode()
        stdin = self.directory / "stdin"
        stdin.write_bytes(text)
        with stdin.open("rb") as source:
            return subprocess.Popen(
                self.program, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, env={k: v for k, v in variables.items() if v is not None})

    def attachments(self, *pairs: tuple[str, str]) -> dict[str, Any]:
        """Return the key of the configuration with which GC keeps these attachments."""
        return {"cni.dev/valid-attachments": [
            {"containerID": one, "ifname": ifname} for one, ifname in pairs]}

    def leased(self) -> set[str]:
        """Return the addresses that host-local has given away."""
        return {f"{path.parent.name}/{path.name}" for path in self.addresses.glob("*/*")
                if path.name[0] in "0123456789abcdef" and not path.name.startswith("last")}

    def saved(self) -> list[str]:
        return sorted(path.name for path in self.data.glob("*"))

    @contextmanager
    def pod(self) -> Iterator[str]:
        """Make a network namespace for the container. Yield its name."""
        name = f"cni-{uuid.uuid4().hex[:8]}"
        sh(f"ip netns add {name}")
        self.netns = f"/run/netns/{name}"
        try:
            yield name
        finally:
            sh(f"ip netns del {name}")

    def overlay_device(self, mtu: int, *addresses: str) -> None:
        """Make a TUN device as the forwarder's."""
        sh("ip tuntap add ov0 mode tun", f"ip link set ov0 mtu {mtu}",
           *(f"ip addr add {address} dev ov0" for address in addresses), "ip link set ov0 up")


def fake_plugin(directory: Path, name: str, script: str) -> None:
    """Make a plugin of ``script``, which a shell runs. It answers VERSION by itself."""
    path = directory / name
    shell = shutil.which("sh")
    path.write_text(f"""#!{shell}
if [ "$CNI_COMMAND" = VERSION ]; then
  echo '{{"cniVersion":"1.0.0","supportedVersions":["0.3.1","0.4.0","1.0.0"]}}'
  exit 0
fi
{script}
""")
    path.chmod(0o755)
