"""docs/troubleshoot.md: each entry names a test that reproduces it, or says why none does."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.docs.blocks import functions_of
from tests.own_netns import in_own_mount_namespace, in_own_netns, sh
from udptun import DeviceError, Endpoint, Forwarder, ForwarderConfig
from udptun.cli import cli
from udptun.model import parse_prefix

pytestmark = pytest.mark.unprivileged

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshoot.md").read_text()
ENTRIES = [
    (title, body) for title, _, body in
    (part.partition("\n") for part in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:])
]
HERE = "192.0.2.1"
# They need a kind of network card, and a container runtime.
NOT_REPRODUCED = {"Data is corrupt on one kind of network card",
                  'failed to find plugin "udptun" in path'}


@pytest.mark.parametrize("entry", ENTRIES, ids=[title for title, _ in ENTRIES])
def test_each_entry_names_a_test_that_exists(entry: tuple[str, str]) -> None:
    if re.search(r"^<!-- not reproduced: .+ -->$", entry[1], re.MULTILINE):
        assert entry[0] in NOT_REPRODUCED
        return
    found = re.findall(r"^<!-- test: ([\w/.]+)::(\w+) -->$", entry[1], re.MULTILINE)
    assert len(found) == 1
    [(file, name)] = found
    assert name in functions_of(ROOT / file)


def config(**changes: object) -> ForwarderConfig:
    return ForwarderConfig(listen=(Endpoint.parse(HERE),), **changes)  # type: ignore[arg-type]


async def refusal(**changes: object) -> str:
    with pytest.raises(DeviceError) as raised:
        await Forwarder(config(**changes)).start()
    return str(raised.value)


def is_a_title(message: str) -> bool:
    """Whether a message has the title of an entry. ``...`` stands for any text."""
    return any(re.search(".*".join(map(re.escape, title.split("..."))), message)
               for title, _ in ENTRIES)


@in_own_netns
async def test_there_is_no_tun_device() -> None:
    in_own_mount_namespace()
    sh(f"ip address add {HERE}/32 dev lo", "mount -t tmpfs none /dev/net")
    assert is_a_title(await refusal())


@in_own_netns
async def test_the_underlay_address_is_not_here() -> None:
    assert is_a_title(await refusal())


@in_own_netns
async def test_the_network_is_routed_elsewhere() -> None:
    sh(f"ip address add {HERE}/32 dev lo", "ip route add 10.244.0.0/16 dev lo")
    message = await refusal(networks=(parse_prefix("network", "10.244.0.0/16"),))
    assert is_a_title(message)


@in_own_netns
async def test_the_port_is_in_use() -> None:
    sh(f"ip address add {HERE}/32 dev lo")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((HERE, 8285))
        assert is_a_title(await refusal())


def test_a_client_without_a_forwarder(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["status", "--socket", str(tmp_path / "udptun.sock")])
    assert result.exit_code == 1
    assert is_a_title(result.output.replace(str(tmp_path), "/run/udptun"))
