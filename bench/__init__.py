"""The benchmarks: compare udptun with other tunnels, and report the results.

    python -m bench quick      TCP and round trips, at most 8 minutes (make bench)
    python -m bench full       all metrics, at most 60 minutes (make bench-full)
    python -m bench tcp        a single metric; --help lists them

The modules, in the order in which a result passes through them:

    cli           options, and the life of a run
    session       the lab, the paths under test, the time limit, the progress line
    contenders/   the tunnels: each sets up a path between two hosts of its own
    profiles      what the wire does with super-packets: P1, P2, P3, P4
    metrics/      what one slot measures; load starts the generators, udpload and iperf3
    blocks        the order of the slots, and the rules that reject a block
    proof         counters on the wire: the measured bytes went through the tunnel under test
    record        raw results as JSON lines, in bench/out/<time>-<command>/
    summary       figures from these lines; stats has medians, ratios within blocks, intervals
    goals         the required value and the target of some figures
    report        Markdown and terminal output; units, plots and readme (README.md's table)

In addition: micro/ times single steps of the core, instructions counts their instructions; tables
is their input. flame draws a CPU profile, system describes the machine, tools builds the C
programs.

Needs root, because hosts are network namespaces (udptun.lab). They are removed at the end, also
after an error and after Ctrl-C.
"""
