"""The command line: ``python -m tests.chaos``; the docstring of the package has examples."""

import argparse
import random
import sys
from pathlib import Path

from udptun.lab import LabError
from udptun.lab.cluster import etcd_obstacle

from .acts import ACTS
from .run import Chaos
from .stores import STORES
from .world import ACCELERATED, MODES, ClusterKind


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--list", action="store_true", help="list the acts")
    parser.add_argument("--mode", choices=MODES, default="mixed")
    parser.add_argument("--store", choices=STORES, default="etcd")
    parser.add_argument("--ipv6", action="store_true", help="the overlay has IPv6 too")
    parser.add_argument("--accelerate", choices=ACCELERATED, default="off",
                        help="the nodes with the express path; mixed: n2 and n3")
    parser.add_argument("--seed", default=str(random.randrange(10**6)),
                        metavar="TEXT")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--act", action="append", choices=ACTS, metavar="NAME",
                        help="this act instead of random ones; can be repeated")
    parser.add_argument("--acts", action="store_true", help="each act of the mode once, in order")
    parser.add_argument("--deadline", type=float, default=15.0, metavar="SECONDS",
                        help="time to repair or report; default 15")
    parser.add_argument("--out", type=Path, metavar="DIR", help="save the evidence of failures")
    options = parser.parse_args()
    if options.list:
        for act in ACTS.values():
            print(f"{act.name:20} {act.text} ({', '.join(m for m in MODES if m in act.modes)})")
        return 0
    if options.store == "etcd" and (obstacle := etcd_obstacle()):
        print(f"chaos: {obstacle}", file=sys.stderr)
        return 2
    cluster = ClusterKind(options.mode, options.store, options.ipv6, options.accelerate)
    chosen = None
    if options.act:
        chosen = [ACTS[name] for name in options.act]
    elif options.acts:
        chosen = [act for act in ACTS.values() if act.suits(cluster)]
    print(f"chaos: {cluster}, seed {options.seed}", flush=True)
    chaos = Chaos(cluster, options.seed, options.deadline, options.out,
                  lambda line: print(line, flush=True))
    try:
        failed = chaos.run(chosen, options.minutes * 60)
    except (LabError, RuntimeError) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 1
    names = sorted({verdict.name for verdict in chaos.verdicts if verdict.wrong})
    print(f"chaos: {len(chaos.verdicts)} acts of {len({v.name for v in chaos.verdicts})} kinds, "
          f"{failed} failed{': ' if names else ''}{', '.join(names)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
