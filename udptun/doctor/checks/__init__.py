"""All checks, in the order in which they run. The checks that compare two samples run last."""

from __future__ import annotations

from ..check import Check
from . import daemon, devices, files, filters, kubernetes, load, peers, programs, routing, underlay

CHECKS: tuple[Check, ...] = (
    *programs.CHECKS, *devices.CHECKS, *underlay.CHECKS, *daemon.CHECKS, *filters.CHECKS,
    *routing.CHECKS, *files.CHECKS, *kubernetes.CHECKS, *peers.CHECKS, *load.CHECKS,
)
