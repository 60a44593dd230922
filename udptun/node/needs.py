"""What the node daemon needs of the host: capabilities, and files that it reads and writes later.

Owns the list. ``privileges`` gives up the rest. Pure functions: any thread.
"""

from __future__ import annotations

import os

from ..privileges import Capability, Needs, program_files
from .cleanup import LOCK_FILE
from .config import NodeConfig


def needs_of(config: NodeConfig) -> Needs:
    """Return what a daemon with this configuration needs during its whole life.

    NET_ADMIN  addresses, routes, VXLAN devices, sysctls; nft and iptables need it too
    NET_RAW    echo requests to peers that answer no probes; iptables-legacy needs it too

    Only for a forwarder that the daemon starts:
    NET_BIND_SERVICE  a port below 1024
    BPF               several workers; the express path
    """
    use = frozenset({Capability.NET_ADMIN, Capability.NET_RAW})
    forwarder = set()
    if config.forwarder == "spawn":
        forwarder.add(Capability.NET_BIND_SERVICE)
        # The forwarder inherits this variable.
        if os.environ.get("UDPTUN_FORWARD_WORKERS", "1") != "1" or config.accelerate != "off":
            forwarder.add(Capability.BPF)
    return Needs(
        use=use,
        children=use | forwarder,
        read=(*config.source.files, *program_files()),
        write=(
            config.state_dir / LOCK_FILE, config.control, config.forward_file, config.subnet_file,
            config.instance.run_dir / LOCK_FILE,
        ),
    )
