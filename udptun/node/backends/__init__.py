"""The backends of a node, in one list. Each carries packets to other nodes in its own way.

The daemon and the modules for status, cleanup and the command line depend on the list and on the
contract in ``base``, never on a single backend. CONTRIBUTING.md has the steps to add a backend.
This module imports nothing, because the command line reads the list.
"""

from __future__ import annotations

# name: as text shows it. The name is that of the module here, of Backend.Type in the network's
# configuration, and of the label in metrics. Each line takes precedence over those above it: if
# several backends reach a peer, the last of them carries its packets.
BACKENDS = {
    "udp": "UDP",
    "vxlan": "VXLAN",
}

FLANNEL_DEFAULT = "udp"  # the backend of a lease without a BackendType
AUTO = "auto"  # all backends that this host and the store of leases support
MODES = (AUTO, *BACKENDS)  # values of --backend and of Backend.Type
