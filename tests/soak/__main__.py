"""The command line: ``python -m tests.soak``; the docstring of the package has an example."""

import argparse
import random
import sys
from pathlib import Path

from tests.chaos.world import ACCELERATED
from udptun.lab import LabError
from udptun.lab.cluster import etcd_obstacle

from .run import Soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", default=str(random.randrange(10**6)), metavar="TEXT")
    parser.add_argument("--accelerate", choices=ACCELERATED, default="mixed",
                        help="the nodes with the express path; mixed, the default: n2 and n3")
    parser.add_argument("--out", type=Path, metavar="DIR", help="save the logs of a failed run")
    options = parser.parse_args()
    if obstacle := etcd_obstacle():
        print(f"soak: {obstacle}", file=sys.stderr)
        return 2
    print(f"soak: {options.seconds:g} s, seed {options.seed}, accelerate {options.accelerate}",
          flush=True)
    try:
        wrong = Soak(options.seed, options.seconds, lambda line: print(line, flush=True),
                     options.out, options.accelerate).run()
    except LabError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    for line in wrong:
        print(f"WRONG {line}")
    print(f"soak: {'failed' if wrong else 'passed'}; repeat it with python -m tests.soak "
          f"--seconds {options.seconds:g} --seed {options.seed} --accelerate {options.accelerate}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
