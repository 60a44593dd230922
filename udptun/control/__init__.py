"""Talking to a running forwarder: HTTP on a Unix socket, and flannel's own 20-byte messages.

``protocol`` holds what both ends agree on, ``client`` the calling end, ``server`` and ``flannel``
the forwarder's ends, ``sockets`` how a socket file is made, guarded and removed. Nothing is
imported here: the client must not pay for the server.
"""
