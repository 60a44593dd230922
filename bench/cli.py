"""The command line, and the life of a run: set-up, measurement, report, removal.

Owns: the metrics that each command measures, the amount of measurement for each metric, and the
check of all options before the first measurement. Main thread only, like udptun.lab.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from udptun.lab import Lab, LabError, missing_tools
from udptun.lab.cluster import etcd_obstacle
from udptun.lab.tools import install_command

from . import (
    flame,
    floods,
    instructions,
    nodes,
    plots,
    probes,
    profiles,
    readme,
    record,
    report,
    system,
    takeover,
    timeline,
)
from .blocks import Job, LocalJob, duration
from .contenders.external import installed_names
from .metrics import gap, isolation, kill, lookup, memory, pps, rtt, scale, start, tcp
from .metrics.metric import ACCELERATED, COMPARED, NO_PROFILE, Metric, Plan
from .session import OutOfTime, Session
from .summary import load
from .tools import ROOT

_TOOLS = ("ip", "ping", "iperf3", "sysctl", "nft", "ethtool")
_MINUTE = 60.0

Step = tuple[Metric, Plan]

_WITH_LIMIT = (*COMPARED, "copylimit")
_GOALS = ("vxlan", "udptun", ACCELERATED)  # what the goals compare
_FEW = ("direct", *_GOALS, "onepacket")
_BOTH = ("udptun", ACCELERATED)
_FULL_MINUTES = 88

# (the steps of the command, the seconds that the command may take)
QUICK: tuple[tuple[Step, ...], float] = (
    (
        (tcp.METRIC, Plan(3, 2, variants=("1 there",))),
        (rtt.METRIC, Plan(3, 1, ("P1",), variants=("udp idle", "udp bulk", "ping bulk"))),
    ),
    7.5 * _MINUTE,
)
SINGLE = {
    "tcp": (tcp.METRIC, Plan(5, 3, contenders=_WITH_LIMIT)),
    "cpu": (tcp.METRIC, Plan(5, 3, ("P1",), _WITH_LIMIT, ("1 there",))),
    "rtt": (rtt.METRIC, Plan(5, 2, ("P1",))),
    "pps": (pps.METRIC, Plan(3, 1, ("P1",))),
    "gap": (gap.METRIC, Plan(10, 2, ("P1",), ("udptun",))),
    "isolation": (isolation.METRIC, Plan(5, 4, ("P1",), ("udptun",))),
    "memory": (memory.METRIC, Plan(3, 3, ("P1",), ("udptun",))),
    "start": (start.METRIC, Plan(10, 1, ("P1",), ("udptun",))),
    "kill": (kill.METRIC, Plan(3, 2, ("P1",), (ACCELERATED,))),
    "scale": (scale.METRIC, Plan(3, 1, ("P1",), (*_BOTH, "onepacket"))),
    "lookup": (lookup.METRIC, Plan(5, 1, (NO_PROFILE,), ("udptun",))),
}


def full() -> tuple[tuple[Step, ...], float]:
    """Return the steps of ``full``.

    The steps that the goals need come first, because the time may end before the last step. A
    contender that no goal needs is measured in fewer blocks.
    """
    slow = ("udptun --offload off", *installed_names())
    return (
        (
            (tcp.METRIC, Plan(8, 2, ("P1",), (*_FEW, "copylimit"), ("1 there",))),
            (tcp.METRIC, Plan(8, 2, ("P2", "P3", "P4"), _FEW, ("1 there",))),
            (rtt.METRIC, Plan(8, 2, ("P1",), _FEW, ("udp idle", "udp bulk"))),
            (rtt.METRIC, Plan(6, 2, ("P1",), ("direct", *_GOALS), ("ping idle",))),
            (rtt.METRIC, Plan(6, 2, ("P1", "P2"), ("direct", *_GOALS), ("ping bulk",))),
            (rtt.METRIC, Plan(6, 2, ("P2",), ("direct", *_GOALS), ("udp bulk",))),
            (tcp.METRIC, Plan(6, 2, profiles.NAMES, ("direct", *_GOALS), ("4 there",))),
            (tcp.METRIC, Plan(6, 2, contenders=_GOALS, variants=("1 both", "1 there busy"))),
            (pps.METRIC, Plan(6, 1, ("P1",), _FEW, ("64 bytes",))),
            (scale.METRIC, Plan(5, 1, ("P1",), _BOTH, ("1 peers", "100 peers"))),
            SINGLE["kill"], SINGLE["gap"], SINGLE["memory"], SINGLE["start"], SINGLE["lookup"],
            (tcp.METRIC, Plan(3, 2, contenders=("vxlan", "udptun", *slow), variants=("1 there",))),
            (rtt.METRIC, Plan(3, 2, ("P1",), ("vxlan", "udptun", *slow), ("udp idle", "udp bulk"))),
            (pps.METRIC, Plan(2, 1, ("P1",), ("vxlan", "udptun", *slow), ("64 bytes",))),
            (scale.METRIC, Plan(3, 1, ("P1",), ("udptun", "onepacket"),
                                ("1 routes", "10000 routes", "100000 routes"))),
            (pps.METRIC, Plan(2, 1, ("P1",), (*_GOALS, "onepacket"), ("512 bytes", "1400 bytes"))),
            (rtt.METRIC, Plan(3, 1, ("P1",), _FEW, ("tcp idle", "tcp bulk"))),
            (tcp.METRIC, Plan(3, 2, contenders=_GOALS, variants=("16 there", "1 back"))),
        ),
        _FULL_MINUTES * _MINUTE,
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError) as e:
        print(f"bench: {e}", file=sys.stderr)
        return 2


_PROFILES_HELP = f"""\
profiles: what the wire between the two hosts does with super-packets (TSO, USO):
{profiles.legend()}

P1, P2 and P3 are measured by default; P4 by "full", and with --profile P4.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Compare udptun with other tunnels.",
        epilog=_PROFILES_HELP, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    summaries = {
        "quick": "TCP ratios and round trips, at most 8 minutes",
        "full": f"all metrics, at most {_FULL_MINUTES} minutes",
        **{name: metric.summary for name, (metric, _) in SINGLE.items()},
        "cpu": "CPU time of the whole system per gigabyte, and TCP throughput",
    }
    for name, summary in summaries.items():
        _add_measuring_command(commands, name, summary)
    _add_commands_for_recorded_runs(commands)
    text = "flame graph of one TCP stream through a contender (perf)"
    command = commands.add_parser(
        "flame", help=text, description=text, epilog=_PROFILES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--contender", default="udptun", metavar="SPEC")
    command.add_argument("--profile", default="P1", choices=profiles.NAMES)
    command.add_argument("--seconds", type=_positive(int), default=5)
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    command.set_defaults(run=_flame)
    text = "what probes to many idle peers cost one node (etcd)"
    command = commands.add_parser("probes", help=text, description=text)
    command.add_argument("--peers", type=_positive(int), default=5000, metavar="N")
    command.add_argument("--seconds", type=_positive(int), default=120, metavar="N")
    command.add_argument("--backend", choices=nodes.BACKENDS, action="append",
                         help="may be repeated; default all")
    command.set_defaults(run=_probes)

    text = "lost packets and gaps when a forwarder takes over from another one, or is killed"
    command = commands.add_parser("takeover", help=text, description=text)
    command.add_argument("--count", type=int, default=100, help="take-overs  [default: 100]")
    command.add_argument("--kills", type=int, default=100, help="kills  [default: 100]")
    command.add_argument("--rate", type=int, default=0, metavar="PPS",
                         help="datagrams per second  [default: the highest without loss]")
    command.set_defaults(run=_takeover)
    text = "where a request waits: the time between two devices, idle and beside bulk"
    command = commands.add_parser("timeline", help=text, description=text, epilog=_PROFILES_HELP,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--contender", action="append", metavar="SPEC",
                         help="may be repeated  [default: vxlan, udptun]")
    command.add_argument("--profile", default="P1", choices=profiles.NAMES)
    command.add_argument("--seconds", type=_positive(int), default=5, metavar="N")
    command.set_defaults(run=_timeline)
    text = "packets that are lost in a flood of forged ICMP errors"
    command = commands.add_parser("floods", help=text, description=text)
    command.add_argument("--rate", type=_positive(int), default=60_000, metavar="PPS",
                         help="ICMP errors per second  [default: 60000]")
    command.add_argument("--seconds", type=_positive(int), default=5, metavar="N")
    command.set_defaults(run=_floods)
    text = "instruction counts of single steps on fixed input (valgrind)"
    command = commands.add_parser("instructions", help=text, description=text)
    command.add_argument("--save", type=Path, metavar="FILE", help="write the counts to FILE")
    command.add_argument("--check", type=Path, metavar="FILE",
                         help="fail if a step takes more instructions than FILE allows")
    command.set_defaults(run=lambda a: instructions.run(a.save, a.check))
    _add_nodes_command(commands)
    return parser


def _add_commands_for_recorded_runs(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> None:
    text = "continue an interrupted run: measure what its record does not have yet"
    command = commands.add_parser("resume", help=text, description=text)
    command.add_argument("folder", type=Path, help="folder of the run")
    command.set_defaults(run=_resume)
    command = commands.add_parser("report", help="write the report of a recorded run again")
    command.add_argument("folder", type=Path, help="folder of the run")
    command.set_defaults(run=_report_again)
    command = commands.add_parser("readme", help="write a run's comparison into README.md")
    command.add_argument("lines", type=Path, help="folder of the run, or its lines.jsonl")
    command.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    command.set_defaults(run=lambda a: readme.rewrite(a.readme, load(record.read(a.lines))))


def _add_nodes_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "cost of one node in a cluster of N nodes (etcd)"
    command = commands.add_parser("nodes", help=text, description=text)
    command.add_argument("--nodes", type=_nodes, action="append", metavar="N",
                         help="number of other nodes; may be repeated; "
                         f"default {', '.join(str(size) for size in nodes.SIZES)}")
    command.add_argument("--backend", choices=nodes.BACKENDS, default="udp")
    command.add_argument("--changes", type=_positive(int), default=100, metavar="N",
                         help="number of single changes (default 100)")
    command.add_argument("--seconds", type=_positive(float), default=30.0, metavar="N",
                         help="length of the measurement at rest, and of the churn (default 30)")
    command.add_argument("--churn", type=_positive(float), default=10.0, metavar="N",
                         help="changes per second of the churn (default 10)")
    command.add_argument("--out", type=Path, metavar="FILE", help="append the figures as JSON")
    command.set_defaults(run=_nodes_cost)


def _nodes(text: str) -> int:
    value = int(_positive(int)(text))
    if value > nodes.MAX_NODES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected at most {nodes.MAX_NODES}")
    return value


def _nodes_cost(arguments: argparse.Namespace) -> int:
    return _in_lab(lambda: nodes.run(
        arguments.nodes or nodes.SIZES, arguments.backend, arguments.changes, arguments.seconds,
        arguments.churn, arguments.out), etcd_obstacle())


def _add_measuring_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str
) -> None:
    text = summary.replace("%", "%%")  # argparse applies % formatting to the text
    command = commands.add_parser(
        name, help=text, description=f"Measure: {text}.", epilog=_PROFILES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_measure, what=name, resume=False)
    command.add_argument("--blocks", type=_positive(int), metavar="N",
                         help="number of blocks to accept per series")
    command.add_argument("--seconds", type=_positive(int), metavar="N",
                         help="duration of one slot's measurement")
    command.add_argument("--profile", action="append", choices=profiles.NAMES,
                         help="only this profile (see below); may be repeated")
    command.add_argument(
        "--contender", action="append", metavar="SPEC",
        help="replaces the default contenders: direct, vxlan, onepacket, copylimit, "
        "'udptun [OPTION]...', 'udptun@CHECKOUT', the name of a file in bench/contenders, or a "
        "path that ends with .toml (bench/README.md); "
        "may be repeated",
    )
    command.add_argument("--with", action="append", metavar="SPEC", dest="more", default=[],
                         help="a contender in addition to the default ones; may be repeated")
    command.add_argument("--variant", action="append",
                         help=f"only this variant; may be repeated; {_forms(name)}")
    command.add_argument("--congestion", type=_congestion_control, metavar="NAME",
                         help="TCP congestion control, e.g. cubic")
    command.add_argument("--minutes", type=_positive(float), metavar="N",
                         help="stop measuring after this time")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the results")


def _forms(name: str) -> str:
    """Return the variants that are possible for a command, for the help text of the command."""
    if name in SINGLE:
        return SINGLE[name][0].form.replace("%", "%%")
    return "see the help of the single metrics"


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
        return value

    return parse


def _congestion_control(name: str) -> str:
    """Ask the kernel for this congestion control; for root, the kernel loads a missing module."""
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except OSError as e:
            available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text()
            raise argparse.ArgumentTypeError(
                f"{name!r}: {e.strerror}; expected one of {', '.join(available.split())}"
            ) from None
    return name


def _steps(arguments: argparse.Namespace) -> tuple[list[Step], float]:
    """Return the command's steps, changed by the options; ValueError for a wrong option.

    For a command with several metrics, an option value is accepted if at least one metric can
    measure the value. A metric that can measure none of the values of an option is left out.
    """
    if arguments.what == "quick":
        steps, budget = list(QUICK[0]), QUICK[1]
    elif arguments.what == "full":
        steps, budget = list(full()[0]), full()[1]
    else:
        steps, budget = [SINGLE[arguments.what]], 60 * _MINUTE
    given = {
        name: value for name in ("blocks", "seconds", "congestion")
        if (value := getattr(arguments, name)) is not None
    }
    steps = [(metric, replace(plan, **given)) for metric, plan in steps]
    if arguments.profile:
        chosen = _possible(steps, arguments.profile, Metric.profile_problem)
        steps = [
            (metric, replace(plan, profiles=found) if found else plan)
            for (metric, plan), found in zip(steps, chosen, strict=True)
        ]
    if arguments.variant:
        chosen = _possible(steps, arguments.variant, Metric.variant_problem)
        steps = [
            (metric, replace(plan, variants=found))
            for (metric, plan), found in zip(steps, chosen, strict=True) if found
        ]
    if arguments.contender:
        chosen = _possible(steps, arguments.contender, Metric.contender_problem)
        steps = [
            (metric, replace(plan, contenders=found))
            for (metric, plan), found in zip(steps, chosen, strict=True) if found
        ]
    chosen = _possible(steps, arguments.more, Metric.contender_problem)
    steps = [
        (metric, replace(plan, contenders=tuple(dict.fromkeys((*plan.contenders, *more)))))
        for (metric, plan), more in zip(steps, chosen, strict=True)
    ]
    return steps, arguments.minutes * _MINUTE if arguments.minutes else budget


def _possible(
    steps: Sequence[Step], requested: Sequence[str],
    problem: Callable[[Metric, Plan, str], str | None],
) -> list[tuple[str, ...]]:
    """Return, for each step, the requested values that the step can measure.

    ValueError if there is a value that no step can measure.
    """
    possible: list[list[str]] = [[] for _ in steps]
    for value in requested:
        problems = [problem(metric, plan, value) for metric, plan in steps]
        if all(problems):
            raise ValueError("; ".join(dict.fromkeys(text for text in problems if text)))
        for found, text in zip(possible, problems, strict=True):
            if text is None:
                found.append(value)
    return [tuple(found) for found in possible]


def _resume(arguments: argparse.Namespace) -> int:
    """Continue the run with its own command. ValueError if it is not a run of this machine."""
    lines = record.read(arguments.folder)
    first: record.Line = next((line for line in lines if line["kind"] == "run"), {"command": ""})
    words = shlex.split(first["command"])
    if words[:3] != ["python", "-m", "bench"]:
        raise ValueError(f"{arguments.folder}: expected the record of a run")
    before, now = first["machine"], system.facts()
    if other := [f"{key}: {before.get(key)}, now {now.get(key)}"
                 for key in before | now if before.get(key) != now.get(key)]:
        raise ValueError(f"{arguments.folder}: the new figures would not compare with the old ones "
                         f"({'; '.join(other)}); begin a new run")
    recorded = _parser().parse_args(words[3:])
    recorded.out, recorded.resume = arguments.folder, True
    return int(recorded.run(recorded))


def _measure(arguments: argparse.Namespace) -> int:
    steps, budget = _steps(arguments)
    jobs = [job for metric, plan in steps for job in metric.jobs(plan)]
    if missing := _missing_requirement():
        print(f"bench: {missing}", file=sys.stderr)
        return 1
    folder = arguments.out or record.new_folder(arguments.what)
    folder.mkdir(parents=True, exist_ok=True)
    lab, removed = Lab(), ""
    code = 0
    with record.Recorder(folder, arguments.resume) as recorder:
        if arguments.resume:
            recorder.write("resume", machine=system.facts())
        else:
            recorder.write("run", command=_command(), machine=system.facts())
        print(_announcement(jobs, budget, recorder), file=sys.stderr, flush=True)
        how = "failed"
        try:
            with lab:
                try:
                    how = _run(jobs, Session(lab, recorder, budget))
                finally:
                    removed = lab.close()
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C; the lab's handler of SIGTERM
            how, code = "interrupted", 130
        except LabError as e:
            print(f"bench: {e}", file=sys.stderr)
            code = 1
        finally:
            recorder.write("end", how=how)
        print(f"{how}; removed {removed or 'nothing'}", file=sys.stderr)
        print(finish(folder, recorder.lines))
        if how != "complete":
            print(f"bench: to measure the rest: python -m bench resume {folder}", file=sys.stderr)
        if code == 0 and not load(recorder.lines).figures:
            print("bench: nothing was measured", file=sys.stderr)
            code = 1
    return code


def _announcement(jobs: Sequence[Job | LocalJob], budget: float, recorder: record.Recorder) -> str:
    """Say how long the run takes, before it starts."""
    expected = duration(jobs, recorder.lines)
    text = (f"{len(jobs)} series, about {max(1, round(expected / _MINUTE))} min, at most "
            f"{budget / _MINUTE:g} min; Ctrl-C keeps what was measured, in {recorder.folder}")
    return text if expected <= budget else f"{text}; the last series will be left out"


def _run(jobs: Sequence[Job | LocalJob], session: Session) -> str:
    try:
        for job in jobs:
            job.run(session)
    except OutOfTime:
        return "out of time"
    finally:
        session.progress.done()
    return "complete"


def finish(folder: Path, lines: list[record.Line]) -> str:
    """Write the report and the plots into the folder; return the text for the terminal."""
    run = load(lines)
    (folder / "report.md").write_text(report.markdown(run, plots.draw(run, folder)))
    hint = "" if plots.available() else " (no plots: pip install matplotlib)"
    return f"\n{report.terminal(run)}\n\n{folder}/report.md{hint}"


def _report_again(arguments: argparse.Namespace) -> int:
    print(finish(arguments.folder, record.read(arguments.folder)))
    return 0


def _flame(arguments: argparse.Namespace) -> int:
    return _in_lab(lambda: flame.run(
        arguments.contender, arguments.profile, arguments.seconds, arguments.out))


def _probes(arguments: argparse.Namespace) -> int:
    return _in_lab(lambda: print(probes.run(
        arguments.peers, arguments.seconds, arguments.backend or nodes.BACKENDS)))


def _takeover(arguments: argparse.Namespace) -> int:
    return _print_lines(takeover.run(arguments.count, arguments.kills, arguments.rate))


def _floods(arguments: argparse.Namespace) -> int:
    return _print_lines(floods.run(arguments.rate, arguments.seconds))


def _timeline(arguments: argparse.Namespace) -> int:
    return _print_lines(timeline.run(
        arguments.contender or ("vxlan", "udptun"), arguments.profile, arguments.seconds))


def _print_lines(lines: Iterator[str]) -> int:
    def run() -> None:
        for line in lines:
            print(line, flush=True)

    return _in_lab(run)


def _in_lab(run: Callable[[], int | None], obstacle: str | None = None) -> int:
    """Call ``run``, which needs a lab. Return its exit status; None is 0.

    obstacle  a reason why it cannot run, in addition to the reasons of a lab
    """
    problem = _missing_requirement() or obstacle
    try:
        if problem is None:
            return run() or 0
    except LabError as e:
        problem = str(e)
    print(f"bench: {problem}", file=sys.stderr)
    return 1


def _command() -> str:
    return shlex.join(["python", "-m", "bench", *sys.argv[1:]])


def _missing_requirement() -> str | None:
    if os.geteuid() != 0:
        return "needs root to create network namespaces (try sudo)"
    if missing := missing_tools(_TOOLS):
        return f"needs {', '.join(t for t, _ in missing)}: {install_command(missing)}"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun: run modprobe tun, or add the device to this container"
    return None
