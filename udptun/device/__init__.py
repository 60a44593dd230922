"""The TUN device: open it, probe and set its offloads, steer flows to its queues.

Owns ``/dev/net/tun`` and the names of the offloads. Does not depend on routes, peers or packets.
"""
