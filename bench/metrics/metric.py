"""The parts of a metric, and the plan for a metric: how much of the metric a run measures.

Owns: the two types, and the checks of a user's options. Any thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from .. import profiles
from ..blocks import Job, LocalJob
from ..contenders import find, program

ACCELERATED = "udptun --accelerate auto"
COMPARED = ("direct", "vxlan", "udptun", ACCELERATED, "udptun --offload off", "onepacket")
NO_PROFILE = "-"  # the profile of a metric that uses no wire


@dataclass(frozen=True)
class Plan:
    """How much of a metric to measure.

    blocks      the number of accepted blocks to reach
    seconds     the duration of the measurement in one slot
    variants    the variants to measure; () for the metric's default variants
    congestion  TCP congestion control; None for the system's default
    """

    blocks: int
    seconds: int
    profiles: tuple[str, ...] = profiles.DEFAULT
    contenders: tuple[str, ...] = COMPARED
    variants: tuple[str, ...] = ()
    congestion: str | None = None


@dataclass(frozen=True)
class Metric:
    """One metric.

    summary   one line for the help text
    jobs      the series that a plan measures, in order
    variants  the variants that are measured by default
    form      a description of the possible variants, for help and error messages
    pattern   a regular expression that matches the possible variants; "" if the metric has no
              variants. Group ``n`` is a number. Group ``unit`` is optional and selects the limits
              of ``n``
    limits    the smallest and the largest ``n``, by unit; the unit is "" if there is no such group
    programs  the programs that the metric can measure; () for all contenders
    """

    name: str
    summary: str
    jobs: Callable[[Plan], Iterable[Job | LocalJob]]
    variants: tuple[str, ...] = ("",)
    form: str = "none"
    pattern: str = ""
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    programs: tuple[str, ...] = ()

    def variant_problem(self, plan: Plan, variant: str) -> str | None:
        """Return the reason if this variant cannot be measured, else None."""
        if self.pattern and (found := re.fullmatch(self.pattern, variant)):
            groups = found.groupdict()
            low, high = self.limits.get(groups.get("unit", ""), (0, 0))
            if "n" not in groups or low <= int(groups["n"]) <= high:
                return None
        return f"{self.name}: variant {variant!r}: expected {self.form}"

    def profile_problem(self, plan: Plan, profile: str) -> str | None:
        """Return the reason if this profile cannot be measured, else None."""
        if plan.profiles != (NO_PROFILE,):
            return None
        return f"{self.name}: profile {profile!r}: expected none, this metric uses no wire"

    def contender_problem(self, plan: Plan, spec: str) -> str | None:
        """Return the reason if this contender cannot be measured on the plan's profiles, else None.

        ValueError if there is no such contender.
        """
        possible = find(spec).profiles
        if self.programs and program(spec) not in self.programs:
            return f"{self.name}: contender {spec!r}: expected {' or '.join(self.programs)}"
        if plan.profiles == (NO_PROFILE,) or set(plan.profiles) & set(possible):
            return None
        return (
            f"{self.name}: contender {spec!r} on profile {', '.join(plan.profiles)}: "
            f"expected profile {', '.join(possible)}"
        )
