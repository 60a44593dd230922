"""The metrics: one module each, which defines a ``METRIC`` (see ``metric``) and its slot.

Owns: what one slot does, and the check that the measured operation took place. Does not know: the
order of the slots, the proof on the wire, the report. Main thread only, like udptun.lab.
"""
