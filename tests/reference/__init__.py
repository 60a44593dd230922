"""Slow, obvious twins of the compiled data path: oracles for the tests, and its specification.

Owns: what each step of the road means, one function a step, with the signatures of the compiled
``tests.steps``. Refuses to know: speed, system calls, and everything else of ours but ``model``
and ``drops``. The product never imports this package; a missing extension is an error, not a
reason to fall back to this. Threading: functions are pure; a ``ReferenceForwarder`` belongs to one
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
