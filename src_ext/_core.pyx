"""The compiled core as Python sees it: RouteTable, Core, Worker and Capture.

Owns nothing itself: the classes are in the four files that are included below. The code that
processes packets is in the .pxd files. README.md lists these files in reading order.

Threading: the control thread uses ``Core`` and ``RouteTable``; a worker's thread calls
``Worker.run``. A thread may read another thread's counters without a lock, because each counter is
one aligned word that only one thread writes.
"""

include "table/route_table.pxi"

cdef class Core  # a forward declaration: Worker and Core refer to each other

include "worker.pxi"
include "capture.pxi"
include "core.pxi"
