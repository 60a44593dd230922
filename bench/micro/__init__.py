"""Micro benchmarks of single steps of the core, with pytest-benchmark: ``make bench-micro``.

The benchmarks need neither root nor hosts. Each benchmark compares the result of its step with the
reference implementation or with a known result. To compare the times with the times of an earlier
state of the code, run the first command on the earlier state::

    make bench-micro ARGS=--benchmark-save=before
    make bench-micro ARGS=--benchmark-compare
"""
