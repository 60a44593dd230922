"""The TUN device: open it, ask the kernel for its offloads, name what it refused.

Owns ``/dev/net/tun`` and the vocabulary of offloads. Refuses to know routes, peers and packets.
"""
