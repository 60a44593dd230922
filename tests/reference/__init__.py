"""The reference implementation of the data path: simple and slow, in plain Python.

Owns: the specification of each step, one function per step, with the signatures of the compiled
``tests.steps``. The tests compare the two. Does not depend on system calls or on other modules of
udptun than ``model`` and ``drops``. The product never imports this package, also not when the
compiled core is missing. Threading: functions are pure; a ``ReferenceForwarder`` belongs to one
thread.

Reading order is packet order: packet, checksum, cut, lpm, fragment, icmp, merge, forwarder.
"""

from .checksum import checksum
from .cut import cut
from .forwarder import Decapsulated, Encapsulated, ReferenceForwarder
from .fragment import fragment
from .icmp import icmp_error
from .lpm import Lpm
from .merge import merge
from .packet import Dropped, check_packet, decrement_hop_limit

__all__ = [
    "Decapsulated",
    "Dropped",
    "Encapsulated",
    "Lpm",
    "ReferenceForwarder",
    "check_packet",
    "checksum",
    "cut",
    "decrement_hop_limit",
    "fragment",
    "icmp_error",
    "merge",
]
