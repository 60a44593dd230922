"""The TUN device: opening, offloads and their probing, steering of flows to queues.

Owns ``/dev/net/tun`` and the names of the offloads. Does not depend on routes, peers or packets.
"""
