"""The node daemon: makes a machine a member of an overlay, and keeps it one.

Owns the machine's side of a lease: interface, addresses, host routes, masquerade, subnet.env, and
what the forwarder is told. Refuses to know how a packet moves or how a store keeps its leases.
"""
