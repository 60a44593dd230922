"""The command line, and the life of a run: lab, measuring, report, removal.

Owns: which metrics a command runs, and how much of each fits into its time.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from udptun.lab import Lab, LabError, missing_tools
from udptun.lab.tools import install_command

from . import flame, instructions, plots, readme, record, report, system
from .contenders import find
from .contenders.external import installed_names
from .metrics import gap, lookup, memory, pps, rtt, scale, start, tcp
from .metrics.plan import COMPARED, Plan
from .session import OutOfTime, Session
from .summary import load
from .tools import ROOT

_TOOLS = ("ip", "ping", "iperf3", "sysctl", "nft", "ethtool")
_MINUTE = 60.0

Step = tuple[ModuleType, Plan]

_LIMIT = (*COMPARED, "copylimit")
_FEW = ("direct", "vxlan", "udptun", "onepacket")
_TUNNELS = ("vxlan", "udptun", "udptun --offload off", "onepacket")

# (the metrics of a command, seconds it may take)
QUICK: tuple[tuple[Step, ...], float] = (
    (
        (tcp, Plan(4, 2, variants=("1 there",))),
        (rtt, Plan(3, 1, ("P1",), variants=("udp idle", "udp bulk", "tcp idle"))),
    ),
    7.5 * _MINUTE,
)
SINGLE = {
    "tcp": (tcp, Plan(5, 3, contenders=_LIMIT)),
    "cpu": (tcp, Plan(5, 3, ("P1",), _LIMIT, ("1 there",))),
    "rtt": (rtt, Plan(5, 2, ("P1",))),
    "pps": (pps, Plan(3, 1, ("P1",))),
    "gap": (gap, Plan(10, 2, ("P1",), ("udptun",))),
    "memory": (memory, Plan(3, 3, ("P1",), ("udptun",))),
    "start": (start, Plan(10, 1, ("P1",), ("udptun",))),
    "scale": (scale, Plan(3, 1, ("P1",), ("udptun", "onepacket"))),
    "lookup": (lookup, Plan(5, 1, ("-",), ("udptun",))),
}


def full() -> tuple[tuple[Step, ...], float]:
    """The floors' rows come first: should the time run out, they are there."""
    here = installed_names()
    compared = (*_LIMIT, *here)
    return (
        (
            (tcp, Plan(12, 2, contenders=compared, variants=("1 there",))),
            (rtt, Plan(8, 2, ("P1",), (*_FEW, *here), ("udp idle", "udp bulk"))),
            (pps, Plan(6, 1, ("P1",), variants=("64 bytes",))),
            SINGLE["gap"], SINGLE["memory"], SINGLE["start"], SINGLE["lookup"], SINGLE["scale"],
            (pps, Plan(2, 1, ("P1",), _TUNNELS, ("256 bytes", "512 bytes", "1400 bytes"))),
            (rtt, Plan(3, 1, ("P1",), _FEW, ("tcp idle", "tcp bulk"))),
            (tcp, Plan(3, 2, ("P1", "P2", "P3"), _FEW,
                       ("4 there", "16 there", "1 back", "1 both"))),
        ),
        58 * _MINUTE,
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError) as e:
        print(f"bench: {e}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure udptun beside what it is compared with."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    described = {
        "quick": "TCP ratios and round trips, 8 minutes at most",
        "full": "everything, 60 minutes at most",
        **{name: (module.__doc__ or "").split("\n")[0] for name, (module, _) in SINGLE.items()},
    }
    for name, words in described.items():
        text = words.replace("%", "%%")  # argparse formats it
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=_measure, what=name)
        command.add_argument("--blocks", type=int, help="blocks to accept of each series")
        command.add_argument("--seconds", type=int, help="seconds that one slot measures")
        command.add_argument("--profile", action="append", help="P1, P2 or P3; may be repeated")
        command.add_argument(
            "--contender", action="append", metavar="WORDS",
            help="instead of the usual: direct, vxlan, onepacket, copylimit, 'udptun [OPTION]...', "
            "'udptun@CHECKOUT', or the name of a description; may be repeated",
        )
        command.add_argument("--with", action="append", metavar="WORDS", dest="more", default=[],
                             help="a contender beside the usual; may be repeated")
        command.add_argument("--variant", action="append", help="only these; may be repeated")
        command.add_argument("--congestion", help="TCP's congestion control, e.g. cubic")
        command.add_argument("--minutes", type=float, help="stop measuring after that time")
        command.add_argument("--out", type=Path, help="folder of the results")
    command = commands.add_parser("report", help="make the report of recorded lines again")
    command.add_argument("folder", type=Path, help="of the run")
    command.set_defaults(run=_report_again)
    command = commands.add_parser("readme", help="put a run's comparison into README.md")
    command.add_argument("lines", type=Path, help="the run's folder or its lines")
    command.add_argument("--readme", type=Path, default=ROOT / "README.md")
    command.set_defaults(run=lambda a: readme.rewrite(a.readme, load(record.read(a.lines))))
    text = "flame graph of one TCP stream through a contender (perf)"
    command = commands.add_parser("flame", help=text, description=text)
    command.add_argument("--contender", default="udptun", metavar="WORDS")
    command.add_argument("--profile", default="P1", choices=("P1", "P2", "P3"))
    command.add_argument("--seconds", type=int, default=5)
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    command.set_defaults(run=_flame)
    text = "instructions that single steps take on fixed input (valgrind)"
    command = commands.add_parser("instructions", help=text, description=text)
    command.add_argument("--save", type=Path, metavar="FILE", help="write the counts there")
    command.add_argument("--check", type=Path, metavar="FILE",
                         help="fail when a step takes more than it says")
    command.set_defaults(run=lambda a: instructions.run(a.save, a.check))
    return parser


def _steps(arguments: argparse.Namespace) -> tuple[list[Step], float]:
    """What was asked for, changed as the options say."""
    if arguments.what == "quick":
        steps, budget = QUICK
    elif arguments.what == "full":
        steps, budget = full()
    else:
        steps, budget = (SINGLE[arguments.what],), 60 * _MINUTE
    changes = {
        "blocks": arguments.blocks, "seconds": arguments.seconds,
        "profiles": arguments.profile and tuple(arguments.profile),
        "contenders": arguments.contender and tuple(arguments.contender),
        "congestion": arguments.congestion,
        "variants": arguments.variant and tuple(arguments.variant),
    }
    changes = {name: value for name, value in changes.items() if value}
    for words in [*(arguments.contender or ()), *arguments.more]:
        find(words)  # complain before anything is made
    changed = []
    for module, plan in steps:
        asked = replace(plan, **changes)
        more = tuple(words for words in arguments.more if words not in asked.contenders)
        changed.append((module, replace(asked, contenders=(*asked.contenders, *more))))
    return changed, arguments.minutes * _MINUTE if arguments.minutes else budget


def _measure(arguments: argparse.Namespace) -> int:
    if obstacle := _obstacle():
        print(f"bench: {obstacle}", file=sys.stderr)
        return 1
    steps, budget = _steps(arguments)
    folder = arguments.out or record.new_folder(arguments.what)
    folder.mkdir(parents=True, exist_ok=True)
    lab, removed = Lab(), ""
    code = 0
    with record.Recorder(folder) as recorder:
        recorder.write("run", command=_command(), machine=system.facts())
        how = "failed"
        try:
            with lab:
                try:
                    how = _run(steps, Session(lab, recorder, budget))
                finally:
                    removed = lab.close()
        except KeyboardInterrupt:
            how, code = "interrupted", 130
        except LabError as e:
            print(f"bench: {e}", file=sys.stderr)
            code = 1
        finally:
            recorder.write("end", how=how)
        print(f"{how}; removed {removed or 'nothing'}", file=sys.stderr)
        print(finish(folder, recorder.lines))
    return code


def _run(steps: Sequence[Step], session: Session) -> str:
    try:
        for module, plan in steps:
            module.run(session, plan)
    except OutOfTime:
        return "out of time"
    finally:
        session.progress.done()
    return "complete"


def finish(folder: Path, lines: list[record.Line]) -> str:
    """Report and plots into the folder; the text for the terminal."""
    run = load(lines)
    (folder / "report.md").write_text(report.markdown(run, plots.draw(run, folder)))
    hint = "" if plots.available() else " (no plots: pip install matplotlib)"
    return f"\n{report.terminal(run)}\n\n{folder}/report.md{hint}"


def _report_again(arguments: argparse.Namespace) -> int:
    print(finish(arguments.folder, record.read(arguments.folder)))
    return 0


def _flame(arguments: argparse.Namespace) -> int:
    obstacle = _obstacle()
    try:
        if obstacle is None:
            flame.run(arguments.contender, arguments.profile, arguments.seconds, arguments.out)
            return 0
    except LabError as e:
        obstacle = str(e)
    print(f"bench: {obstacle}", file=sys.stderr)
    return 1


def _command() -> str:
    return shlex.join(["python", "-m", "bench", *sys.argv[1:]])


def _obstacle() -> str | None:
    if os.geteuid() != 0:
        return "needs root: it makes hosts as network namespaces (try sudo)"
    if missing := missing_tools(_TOOLS):
        return f"needs {', '.join(t for t, _ in missing)}: {install_command(missing)}"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun: modprobe tun, or give this container the device"
    return None
