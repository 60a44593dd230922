"""Wire formats: parse, cut, fragment and merge IP packets, and build ICMP errors.

The functions take pointers and lengths. They do not depend on workers, routes or sockets.
"""
