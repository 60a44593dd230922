"""The host's network: UDP sockets, their options, and netlink.

Owns every use of pyroute2. Does not depend on the forwarder's routes or on packets.
"""
