"""Hand a running forwarder over to another process: the messages, and the socket that carries them.

The forwarder uses this package on both sides. Owns nothing of a forwarder itself.
"""
