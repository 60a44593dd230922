"""The metrics. Each module defines one ``METRIC`` (see ``metric``) and the slot of this metric.

Owns: the measurement in a slot, and the check that the measured operation took place. A slot is one
measurement of one contender. ``blocks`` orders the slots, and ``proof`` checks the counters on the
wire. Main thread only, like udptun.lab.
"""
