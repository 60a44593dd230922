"""The control API: HTTP on a Unix socket, and flannel's own 20-byte messages.

``protocol`` has the names and limits that client and server share. ``server`` and ``flannel`` are
the servers, ``client`` is the client. ``events`` delivers events. ``sockets`` creates, protects and
removes the socket files. This module imports nothing, so that the client does not load the server.
"""
