"""Wire formats: parse, cut, fragment and merge IP packets, and build ICMP errors.

Every function takes pointers and lengths. Nothing here depends on a worker, a route or a socket.
"""
