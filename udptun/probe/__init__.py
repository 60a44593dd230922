"""Probes: the message, the measured state of a path, and the schedule.

Pure code without I/O, used by the forwarder (UDP paths) and by the node daemon (VXLAN paths, and
peers that answer no probes). Times are seconds of the monotonic clock. Threading: each object
belongs to one thread.
"""
