"""What a metric consists of, and the plan that says how much of it a run measures.

Owns: the two types, and the checks of a user's options. Any thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .. import profiles
from ..contenders import find, program
from ..session import Session

COMPARED = ("direct", "vxlan", "udptun", "udptun --offload off", "onepacket")
NO_PROFILE = "-"  # of a metric that uses no wire


@dataclass(frozen=True)
class Plan:
    """How much of a metric to measure.

    blocks      number of blocks to accept
    seconds     duration of one slot's measurement
    variants    () for all variants of the metric
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
    measure   measure a plan in a session
    variants  the variants that are measured by default
    form      the variants that are possible, for help and error messages
    pattern   regular expression of the possible variants; "" if the metric has none. Group ``n`` is
              a number, group ``unit``, if there is one, selects its limits
    limits    smallest and largest ``n`` by unit; "" without a unit
    programs  the programs that it can measure; () for all contenders
    """

    name: str
    summary: str
    measure: Callable[[Session, Plan], None]
    variants: tuple[str, ...] = ("",)
    form: str = "none"
    pattern: str = ""
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    programs: tuple[str, ...] = ()

    def variant_problem(self, plan: Plan, variant: str) -> str | None:
        """Return why this variant cannot be measured, or None."""
        if self.pattern and (found := re.fullmatch(self.pattern, variant)):
            groups = found.groupdict()
            low, high = self.limits.get(groups.get("unit", ""), (0, 0))
            if "n" not in groups or low <= int(groups["n"]) <= high:
                return None
        return f"{self.name}: variant {variant!r}: expected {self.form}"

    def profile_problem(self, plan: Plan, profile: str) -> str | None:
        """Return why this profile cannot be measured, or None."""
        if plan.profiles != (NO_PROFILE,):
            return None
        return f"{self.name}: profile {profile!r}: expected none, this metric uses no wire"

    def contender_problem(self, plan: Plan, spec: str) -> str | None:
        """Return why this contender cannot be measured on the plan's profiles, or None.

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
