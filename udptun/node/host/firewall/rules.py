"""The wanted firewall rules, and how a tool of the host is run to apply them.

Does not depend on a tool: ``nft`` and ``iptables`` write the rules in their own language. Asyncio,
any loop.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from ....errors import UdptunError
from ....model import IPNetwork
from ....text import os_reason

MULTICAST = {4: ipaddress.ip_network("224.0.0.0/4"), 6: ipaddress.ip_network("ff00::/8")}
KUBE_PROXY_MARK = 0x4000  # kube-proxy's own rules masquerade packets with this mark
TOOL_TIMEOUT_S = 10.0


class FirewallError(UdptunError):
    """The rules could not be read or set. The text is the tool's error, or why the tool failed."""


@dataclass(frozen=True, slots=True)
class FirewallRules:
    """The wanted rules. An IP version without a network has no rules.

    network     the overlay's IPv4 network
    subnet      this node's IPv4 subnet
    network6    the overlay's IPv6 network
    subnet6     this node's IPv6 subnet
    masquerade  the value of --ip-masq
    forward     the value of --iptables-forward-rules
    devices     the overlay's devices on this host
    """

    network: ipaddress.IPv4Network | None = None
    subnet: ipaddress.IPv4Network | None = None
    network6: ipaddress.IPv6Network | None = None
    subnet6: ipaddress.IPv6Network | None = None
    masquerade: bool = False
    forward: bool = False
    devices: frozenset[str] = frozenset()

    def of(self, version: int) -> tuple[IPNetwork | None, IPNetwork | None]:
        """Return the overlay's network and this node's subnet of an IP version."""
        return (self.network, self.subnet) if version == 4 else (self.network6, self.subnet6)


async def run_tool(argv: Sequence[str], package: str, stdin: str = "") -> str:
    """Run a tool and return its output. Raises FirewallError.

    package  Debian's package that has the tool
    The tool runs in a thread, so that cancelling the caller does not interrupt the tool.
    """
    command = " ".join(argv)
    try:
        done = await asyncio.to_thread(
            subprocess.run, argv, input=stdin, text=True,
            capture_output=True, check=False, timeout=TOOL_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},  # we recognise errors by their English text
        )
    except subprocess.TimeoutExpired:
        raise FirewallError(f"{command}: no answer within {TOOL_TIMEOUT_S:g} s") from None
    except OSError as error:
        hint = f" (Debian has it in the package {package})" \
            if isinstance(error, FileNotFoundError) else ""
        raise FirewallError(f"{argv[0]} does not run: {os_reason(error)}{hint}") from None
    if done.returncode != 0:
        # The first line is the error. The other lines quote the input.
        why = done.stderr.strip().partition("\n")[0] or f"exit code {done.returncode}"
        raise FirewallError(f"{command}: {why}")
    return str(done.stdout)
