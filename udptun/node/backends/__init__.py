"""The list of the node's backends. Each backend carries packets to other nodes by one protocol.

The daemon and the modules for status, cleanup and the command line depend on the list and on the
contract in ``base``, never on a single backend. CONTRIBUTING.md has the steps to add a backend.
This module imports nothing, because the command line reads the list and has to start quickly.
"""

from __future__ import annotations

# Each entry has the backend's name and the text that messages show for the backend. The name is
# also the name of the module in this package, the value of Backend.Type in the network's
# configuration, and the value of the label in metrics.
# If several backends reach a peer, the last of these backends in the list carries the packets to
# the peer.
BACKENDS = {
    "udp": "UDP",
    "vxlan": "VXLAN",
}

FLANNEL_DEFAULT = "udp"  # the backend of a lease without a BackendType
FORWARDERS = "udp"  # the backend whose packets the forwarder carries, and counts for each peer
AUTO = "auto"  # all backends that this host and the store of leases support
MODES = (AUTO, *BACKENDS)  # values of --backend and of Backend.Type
