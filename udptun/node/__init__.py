"""The node daemon: sets up a machine as a node of an overlay network, and maintains that setup.

``daemon`` composes the parts: ``store`` (our lease), ``peers`` (the other nodes' leases),
``backends`` (paths to the other nodes), ``host`` (interface, firewall, subnet.env), ``process``
(the forwarder) and ``status`` (readiness, metrics). The package does not depend on how packets are
forwarded, or on how a store keeps its leases.
"""
