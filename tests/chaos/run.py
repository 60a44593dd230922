"""A sequence of acts, chosen by a seed: the loop, its output, the report.

A cluster that an act has left broken is replaced by a new one, so that each failure has one cause.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

from udptun.lab import Lab, LabError

from .acts import ACTS, Act
from .judge import Judge, Verdict
from .world import ClusterKind, World

START_SECONDS = 60.0


class Chaos:
    """Runs acts. ``tell`` gets each line of the output.

    deadline  seconds within which everything must be repaired or reported
    folder    gets the evidence of each failure; None: it is not saved
    """

    def __init__(
        self, cluster: ClusterKind, seed: str, deadline: float, folder: Path | None, tell
    ) -> None:
        self._cluster, self._seed, self._deadline = cluster, seed, deadline
        self._folder, self._tell = folder, tell
        self._began = time.monotonic()
        self._lab: Lab | None = None
        self.verdicts: list[Verdict] = []

    def run(self, acts: Sequence[Act] | None, seconds: float) -> int:
        """Do the acts, or random ones for so many seconds. Return the number of failures."""
        chosen, seed = Random(self._seed), self._seed
        number = 0
        try:
            while acts[number:] if acts is not None else self._elapsed() < seconds:
                self._renew()
                number += 1
                if acts is not None:
                    act = acts[number - 1]
                else:
                    act, seed = self._choose(chosen), f"{self._seed}.{number}"
                self._do(act, number, seed)
        finally:
            self._close()
        return sum(bool(verdict.wrong) for verdict in self.verdicts)

    def _choose(self, rng: Random) -> Act:
        return rng.choice([act for act in ACTS.values() if act.suits(self._cluster)])

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _renew(self) -> None:
        """Make a cluster, if there is none."""
        if self._lab is not None:
            return
        self._lab = Lab()
        self._lab.__enter__()
        self._world = World(self._lab, self._cluster)
        self._world.start()
        self._judge = Judge(self._world, self._deadline)
        if wrong := self._judge.steady(START_SECONDS):
            raise RuntimeError(f"the cluster does not come up: {wrong}")

    def _close(self) -> None:
        if self._lab is not None:
            self._world.close()
            self._lab.close()
            self._lab = None

    def _do(self, act: Act, number: int, seed: str) -> None:
        """Do one act. What it chooses depends on the seed and its name alone."""
        rng = Random(f"{seed} {act.name}")
        stamp = f"{time.strftime('%H:%M:%S')} {self._elapsed():5.0f} s"
        try:
            verdict = self._judge.run(
                act, rng, lambda text: self._tell(f"{stamp}  {number:3d} {act.name}: {text}"))
        except (LabError, OSError) as error:
            verdict = Verdict(act.name, "", [f"the act cannot be done: {error}"])
        self.verdicts.append(verdict)
        took = " + ".join(f"{seconds:.1f}" for seconds in verdict.took)
        loaded = ""
        if max(verdict.late, default=0.0):
            late = " + ".join(f"{seconds:.1f}" for seconds in verdict.late)
            loaded = f" (deadline later by {late} s: a process waited so long for a CPU)"
        if not verdict.wrong:
            self._tell(f"                      ok, {took} s{loaded}")
            return
        self._tell(f"                      failed after {took} s{loaded}")
        for line in verdict.wrong:
            self._tell(f"                      WRONG {line}")
        self._tell("                      replay: python -m tests.chaos "
                   f"{self._cluster.options()} --seed {seed} --act {act.name}")
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"{self._cluster.mode}-{seed}-{act.name}.txt"
            (self._folder / name).write_text("\n".join(verdict.wrong) + "\n" + verdict.evidence)
        self._close()
