"""The benchmarks: compare udptun with other tunnels, and report the results.

    python -m bench quick      TCP and round trips, at most 8 minutes (make bench)
    python -m bench full       all metrics, about an hour, at most 88 minutes (make bench-full)
    python -m bench tcp        a single metric; --help lists them
    python -m bench resume F   the rest of an interrupted run, whose folder is F

The modules, in the order in which a result passes through them:

    cli           options, and the life of a run
    session       the lab, the paths under test, the time limit, the progress line
    contenders/   the tunnels; each sets up a path between its own two hosts
    profiles      the offload profiles of the wire, P1 to P4: where super-packets are cut
    metrics/      the measurement in one slot; load starts the generators, udpload and iperf3
    blocks        the order of the slots, and the rules that reject a block
    proof         counters on the wire: the measured bytes went through the tunnel under test
    record        raw results as JSON lines, in bench/out/<time>-<command>/
    summary       figures from these lines; stats has medians, ratios within blocks, intervals
    goals         the required value and the target of some figures
    report        Markdown and terminal output. It uses units, plots and readme (README.md's table)

Some other modules:

    nodes         the cost of a node daemon with many nodes (scale); probes, probe_peers and
                  responder: the cost of many probes
    takeover      the gap of a take-over, and of a kill
    timeline      where a single request spends its time
    floods        floods of ICMP errors
    micro/        times single steps of the core
    instructions  counts the instructions of single steps of the core
    tables        the route tables that micro/, instructions and the look-up metric use
    flame         draws a CPU profile
    system        describes the machine
    tools         builds the C programs

Needs root, because the hosts are network namespaces (udptun.lab). A run removes its hosts at the
end, also after an error and after Ctrl-C.
"""
