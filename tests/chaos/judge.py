"""One act: do it, watch what follows, undo it, watch again.

After an act was done, and after it was undone:
- every pair of pods that has a path works again within the deadline;
- if a pair has no path, one of the two nodes reports this, by name or by a failed check;
- a node that the act does not affect stays ready;
- when the act was undone, the host of an affected node has the same configuration as before;
- if the act's scene requires it, the status shows the cause, and the log has a line.

On a loaded machine, the longest time that a process of the cluster waited for a CPU since the act
is added to the deadline (``World.waited``). The verdict has this time.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from udptun.lab import LabError

from .acts import Act, Scene
from .acts.act import Pair
from .world import Health, World

LOOK_SECONDS = 0.5
EVIDENCE_LEN = 20_000  # of each log


@dataclass
class Verdict:
    """What followed from one act.

    wrong  the failures, each one line; empty: the act passed
    took   seconds until everything was as it must be: while the act stood, and after it
    late   seconds by which the deadline was later, because the machine is loaded: the same
    """

    name: str
    text: str
    wrong: list[str] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    evidence: str = ""


@dataclass
class _Found:
    """What was wrong at the deadline, and the times as in ``Verdict``."""

    wrong: list[str]
    took: float
    late: float


class Judge:
    def __init__(self, world: World, deadline: float) -> None:
        self._world, self._deadline = world, deadline
        self._health: dict[str, Health] = {}
        self._logs: dict[str, dict[Path, int]] = {}  # what each node's logs had before the act

    def steady(self, seconds: float) -> list[str]:
        """Wait until all pods reach each other, and all nodes are ready. Return what is missing."""
        self._world.remember()
        rest = Scene("the cluster is up", list(self._world.members), changes=True)
        return self._watch(rest, time.monotonic(), seconds, 0, standing=False).wrong

    def run(self, act: Act, rng: Random, tell: Callable[[str], object]) -> Verdict:
        world = self._world
        world.remember()
        self._logs = {member.host.name: world.log_sizes(member) for member in world.members}
        scene = act.do(world, rng)
        tell(scene.text)
        verdict = Verdict(act.name, scene.text)
        began = time.monotonic()
        is_undone = scene.undo is not None
        deadline = self._deadline + scene.extra_seconds
        found = self._watch(scene, began, deadline, scene.lasts_seconds, is_undone)
        self._note(verdict, "while it lasts: " if is_undone else "", found)
        if scene.undo is not None:
            scene.undo()
            after = Scene(scene.text, scene.touched, changes=scene.changes)
            found = self._watch(after, time.monotonic(), deadline, 2.0, standing=False)
            self._note(verdict, "after it: ", found)
        return verdict

    def _note(self, verdict: Verdict, when: str, found: _Found) -> None:
        verdict.wrong += [when + one for one in found.wrong]
        verdict.took.append(found.took)
        verdict.late.append(found.late)
        if found.wrong:
            world = self._world
            verdict.evidence += "".join(
                f"--- {when}{name}\n{health.text}" for name, health in self._health.items())
            for member in world.members:
                log = world.logged_since(member, self._logs[member.host.name])
                verdict.evidence += f"--- log of {member.host.name}\n{log[:EVIDENCE_LEN]}\n"

    def _watch(
        self, scene: Scene, began: float, deadline: float, least: float, standing: bool,
    ) -> _Found:
        """Look until nothing is wrong, at most until the deadline."""
        world, unready = self._world, {}
        before, late = world.waited(), 0.0
        while True:
            world.tend()
            wrong = self._look(scene, began, standing, unready)
            passed = time.monotonic() - began
            if passed >= max(deadline, least):
                late = max((seconds - before.get(process, 0.0)
                            for process, seconds in world.waited().items()), default=0.0)
            if (not wrong and passed >= least) or passed >= max(deadline + late, least):
                break
            time.sleep(LOOK_SECONDS)
        wrong += unready.values()
        lost = [at for pair, at in world.mesh.last_lost(began).items() if pair not in scene.cut]
        took = passed if wrong else max([0.0, *(at - began for at in lost)])
        return _Found(wrong, took, late)

    def _look(self, scene, began, standing, unready) -> list[str]:
        """Return everything that is wrong now."""
        world = self._world
        touched = {member.host.name for member in scene.touched}
        self._health = {member.host.name: world.health(member) for member in world.members}
        broken = {pair: sizes for pair, sizes in world.mesh.broken(began).items()
                  if pair not in scene.lossy}
        wrong = _by_reason("packets are lost, and a path exists",
                           {pair: sizes for pair, sizes in broken.items() if pair not in scene.cut})
        # A cut pair may still have a path. If it has none, one of the nodes must report this.
        wrong += _by_reason("packets are lost, and neither node reports this",
                            {(a, b): sizes for (a, b), sizes in broken.items()
                             if (a, b) in scene.cut and not self._says(a, b, scene.says)})
        for name, health in self._health.items():
            if name not in touched and not health.ready:
                unready[name] = (f"{name} was not ready, and the act does not concern it: "
                                 f"{', '.join(health.failed()) or health.text.strip()}")
        if scene.says and not any(re.search(scene.says, self._health[name].text)
                                  for name in touched):
            wrong.append(f"no status of {', '.join(sorted(touched))} says /{scene.says}/")
        wrong += self._false_names(scene, broken)
        if not standing:
            wrong += [f"{name} is not ready: {', '.join(health.failed()) or health.text.strip()}"
                      for name, health in self._health.items() if not health.ready]
            if not scene.changes:
                wrong += [f"{member.host.name}: the host differs: {' | '.join(lines)}"
                          for member in scene.touched if (lines := self._differs(member))]
        if scene.must_log:
            wrong += [f"{member.host.name}: nothing was logged" for member in scene.touched
                      if not world.logged_since(member, self._logs[member.host.name])]
        return wrong

    def _differs(self, member) -> list[str]:
        try:
            return self._world.differs(member)
        except (LabError, OSError) as error:
            return [str(error)]

    def _says(self, a: str, b: str, why: str) -> bool:
        """Return whether one of two nodes says that it does not reach the other, or why."""
        for here, there in ((a, b), (b, a)):
            health = self._health[here]
            if (health.failed() or health.names(self._world.subnets[there])
                    or (why and re.search(why, health.text))):
                return True
        return False

    def _false_names(self, scene: Scene, broken: dict[Pair, str]) -> list[str]:
        """Return the peers that a status names as unreachable, although all packets pass."""
        passes = {pair for pair in self._world.mesh.pairs()
                  if pair not in broken and pair not in scene.cut and pair not in scene.lossy}
        return [f"{a} says that it does not reach {b}, and all packets pass"
                for a, b in sorted(passes) if (b, a) in passes
                and self._health[a].names(self._world.subnets[b])]


def _by_reason(why: str, pairs: dict[Pair, str]) -> list[str]:
    """Return one line for all pairs that lose packets of the same sizes."""
    lines = []
    for sizes in sorted(set(pairs.values())):
        names = ", ".join(f"{a} -> {b}" for (a, b), lost in sorted(pairs.items()) if lost == sizes)
        lines.append(f"{names}: {sizes} {why}")
    return lines
