"""The compiled core as Python sees it: RouteTable, Core and Worker.

Owns nothing itself: the classes are in the three files included below. What happens to a packet is
in the .pxd files, in the order given by README.md.

Threading: the control thread uses ``Core`` and ``RouteTable``; a worker's thread calls
``Worker.run``. Counters are read across threads without locks: each is one aligned word that one
thread writes.
"""

include "table/route_table.pxi"

cdef class Core  # a forward declaration: Worker and Core refer to each other

include "worker.pxi"
include "core.pxi"
