"""The benchmarks: what udptun is compared with, how it is measured, and what is said of it.

    python -m bench quick      TCP and round trips, 8 minutes at most (make bench)
    python -m bench full       everything, 60 minutes at most (make bench-full)
    python -m bench tcp        one metric alone; --help says which there are

The road of a figure through this package, a file a step:

    contenders/   what is measured: two hosts each, and a way between them
    metrics/      what is asked of it: one slot of one contender
    blocks        the slots in an order that is fair to all, and what spoils a block
    proof         whether the bytes took the road they are credited to
    record        raw JSON lines, one a slot, in bench/out/<stamp>/
    stats         medians, ratios within a block, intervals, the noise floor
    summary       the lines of a run as figures; floors holds some of them to a limit
    report        Markdown and the table on the terminal; plots draws, readme fills README.md

Beside it: micro/ times single steps, instructions counts what they take; tables is their input.

Needs root, since hosts are network namespaces (udptun.lab). All of it is removed at the end, on an
error and on Ctrl-C.
"""
