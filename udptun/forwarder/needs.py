"""What a forwarder needs of the host: capabilities, and files that it reads and writes later.

Owns the list. ``privileges`` gives up the rest. Pure functions: any thread.
"""

from __future__ import annotations

from pathlib import Path

from ..privileges import Capability, Needs, program_files
from .config import ForwarderConfig

PRIVILEGED_PORTS = 1024  # net.ipv4.ip_unprivileged_port_start, by default


def needs_of(config: ForwarderConfig, log_file: Path | None) -> Needs:
    """Return what a forwarder with this configuration needs during its whole life.

    NET_ADMIN         to make and repair the TUN, also after it was deleted; socket options
    BPF               to steer flows to the queues of several workers; for the express path
    NET_BIND_SERVICE  for sockets on a low port: those of slow peers, and a TCP socket for metrics
                      whose address does not exist yet, are opened later
    """
    use = {Capability.NET_ADMIN}
    if config.workers_n > 1 or config.accelerate != "off":
        use.add(Capability.BPF)
    endpoints = (*config.listen, *(() if config.metrics is None else (config.metrics,)))
    if any(endpoint.port < PRIVILEGED_PORTS for endpoint in endpoints):
        use.add(Capability.NET_BIND_SERVICE)
    write = (
        config.control, config.takeover, config.flannel_control, config.state_file, log_file)
    read = () if config.routes_file is None else (config.routes_file,)
    return Needs(
        use=frozenset(use),
        children=frozenset(use),  # for the forwarder that takes over after SIGUSR2
        read=(*read, *program_files()),
        write=tuple(path for path in write if path is not None),
    )
