"""The reference implementation of the data path: simple and slow, in plain Python.

Owns: the specification of each step. There is one function per step, with the same signature as in
the compiled ``tests.steps``. The tests compare the two packages. Does not depend on system calls.
Of udptun, only the modules ``model`` and ``drops`` are used. The product never imports this
package, even if the compiled core is missing.

Threading: the functions are pure; a ``ReferenceForwarder`` belongs to one thread.

Read the modules in the order in which a packet passes them: packet, checksum, cut, lpm, fragment,
icmp, ecn, finish, merge, probe, capture, forwarder.
"""

from .capture import Record, build_record, parse_records, wants
from .checksum import checksum
from .cut import cut
from .ecn import Taken, take_ecn, traffic_class
from .finish import finish_checksum
from .forwarder import Decapsulated, Encapsulated, ReferenceForwarder
from .fragment import fragment
from .icmp import icmp_error
from .lpm import Lpm
from .merge import merge
from .packet import Dropped, check_packet, decrement_hop_limit
from .probe import Probe, build_probe, parse_probe

__all__ = [
    "Decapsulated",
    "Dropped",
    "Encapsulated",
    "Lpm",
    "Probe",
    "Record",
    "ReferenceForwarder",
    "Taken",
    "build_probe",
    "build_record",
    "check_packet",
    "checksum",
    "cut",
    "decrement_hop_limit",
    "finish_checksum",
    "fragment",
    "icmp_error",
    "merge",
    "parse_probe",
    "parse_records",
    "take_ecn",
    "traffic_class",
    "wants",
]
