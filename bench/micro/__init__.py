"""Micro benchmarks of single steps of the core, with pytest-benchmark: ``make bench-micro``.

They need neither root nor hosts. Each compares the result of the step with the reference
implementation or with a known result. To compare with an earlier state of the code::

    make bench-micro ARGS=--benchmark-save=before
    make bench-micro ARGS=--benchmark-compare
"""
