"""The metrics: one module each, which defines a ``METRIC`` (see ``metric``) and its slot.

Owns: the measurement in one slot (one measurement of one contender), and the check that the
measured operation took place. ``blocks`` orders the slots, ``proof`` checks the counters on the
wire. Main thread only, like udptun.lab.
"""
