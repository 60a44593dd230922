"""The node daemon: makes a machine a node of an overlay network, and keeps it one.

``daemon`` composes the parts: ``store`` (our lease), ``peers`` (the other nodes' leases),
``backends`` (paths to them), ``host`` (interface, firewall, subnet.env), ``process`` (the
forwarder) and ``status`` (readiness, metrics). It does not depend on how a packet moves, or on how
a store keeps its leases.
"""
