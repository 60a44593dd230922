"""The locks of a daemon: of its instance, and of files that an option can give to two instances.

Owns the list of the locks. If a disk is full or read-only, the daemon runs without the lock that it
cannot get, and tries again, because a node without packets is worse than two daemons. If another
daemon has got the lock first, this one ends.
Threading: one loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from ..files import DISK_ERRORS, make_directory
from ..text import os_reason
from .cleanup import LOCK_FILE
from .config import NodeConfig
from .host import subnet_env

log = logging.getLogger(__name__)

Lock = Callable[[], AbstractContextManager[None]]


class Locks:
    """Held within ``with``. Entering raises InstanceRunning if another daemon holds one of them,
    and OSError for a failure that is none of the disk.

    missing  by name: why this lock is not held; empty: all are held
    """

    def __init__(self, config: NodeConfig) -> None:
        self.missing: dict[str, str] = {}
        self._config = config
        self._locks = _locks_of(config)
        self._held = ExitStack()

    @property
    def names(self) -> Collection[str]:
        return self._locks.keys()

    def __enter__(self) -> Self:
        try:
            for name, lock in self._locks.items():
                self._take(name, lock)
        except BaseException:
            self._held.close()
            raise
        for why in self.missing.values():
            log.warning("%s", why)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def retry(self) -> None:
        """Try again to get the missing locks. Raises InstanceRunning if another daemon has taken
        one of them meanwhile."""
        for name in [*self.missing]:
            try:
                self._take(name, self._locks[name])
            except OSError as exc:
                self.missing[name] = f"{name} is not locked: {exc}"

    def _take(self, name: str, lock: Lock) -> None:
        try:
            self._held.enter_context(lock())
        except OSError as exc:
            if exc.errno not in DISK_ERRORS:
                raise
            self.missing[name] = (
                f"{name} is not locked, so a second daemon would not be refused: "
                f"{os_reason(exc)}")
        else:
            self.missing.pop(name, None)


def _locks_of(config: NodeConfig) -> dict[str, Lock]:
    instance, control, subnets = config.instance, config.control, config.subnet_file

    def claimed(what: str, path: Path, option: str, mode: int | None = None) -> Lock:
        def take() -> AbstractContextManager[None]:
            if mode is not None:
                make_directory(path.parent, mode)
            return instance.claimed(what, path, option)

        return take

    claims = (
        (f"the state directory {config.state_dir}", config.state_dir / LOCK_FILE, "--state-dir"),
        (f"the control socket {control}", control.with_name(f".{control.name}.node.lock"),
         "--control"),
        (f"the subnet file {subnets}", subnets.with_name(f".{subnets.name}.lock"), "--subnet-file",
         subnet_env.DIRECTORY_MODE),
    )
    return {f"the instance {instance.name}": lambda: instance.locked("node")} | {
        claim[0]: claimed(*claim) for claim in claims}
