"""The host's network seen from outside the packet path: UDP sockets and netlink.

Owns socket options and every use of pyroute2. Refuses to know routes of the overlay and packets.
"""
