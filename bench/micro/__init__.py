"""Micro benchmarks of the core's single steps, with pytest-benchmark: ``make bench-micro``.

Each of them compares what the step answered with the reference or with a known answer. To compare
with an earlier state of the code::

    make bench-micro ARGS=--benchmark-save=before
    make bench-micro ARGS=--benchmark-compare
"""
