"""The worker threads and their supervision: events, lost offloads, kernel errors.

Owns the threads, the eventfd through which workers report, and the periodic tasks of the core.
Does not depend on what a worker does with a packet (the compiled core). Threading: control loop
only. Exception: ``stop`` blocks and may run in any thread. Workers never wait for the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import _core
from ..control.events import EventHub
from ..device.offload import Capabilities
from ..model import Endpoint
from ..text import counted, errno_reason
from .threads import WorkerThread

log = logging.getLogger(__name__)

HOUSEKEEPING_SECONDS = 1.0
DRAIN_SECONDS = 0.5
ANSWER_SECONDS = 10.0  # limit for a sign of life of all workers
ANSWER_POLL_SECONDS = 0.02
OFFLOADS = ("udp-gso", "tcp-merge", "udp-merge")  # offloads that a worker can lose at run time
SEND_ERROR = "send_error"
KERNEL_ERRORS = {SEND_ERROR: "did not send", "tun_write": "did not accept on the TUN"}
NAMED_N = 3  # peers that one log line names


class Workers:
    """All workers of one core.

    notify_fd     the eventfd that the core signals when a worker has an event
    capabilities  updated here when a worker loses an offload
    on_probes     called when a worker has received probes
    on_path_mtus  called once a second, and when a worker has a report about a path MTU
    report        called with a sentence for each error
    tun_gone      called when the TUN was deleted; ``continue_on_new_tun`` continues
    """

    def __init__(
        self, core: _core.Core, notify_fd: int, capabilities: Capabilities, events: EventHub,
        on_probes: Callable[[], None], on_path_mtus: Callable[[], None],
        report: Callable[[str], None], tun_gone: Callable[[], None],
    ) -> None:
        self._core = core
        self._notify_fd = notify_fd
        self._capabilities = capabilities
        self._events = events
        self._on_probes = on_probes
        self._on_path_mtus = on_path_mtus
        self._report = report
        self._tun_gone = tun_gone
        self._threads: list[WorkerThread] = []
        self._own_socket_errors: set[int] = set()  # reported errnos
        self._refused: dict[str, int] = {}  # packets that the kernel has refused, by drop reason
        self._send_errors: dict[int, int] = {}  # refused sends, by errno

    # -- start and stop ---------------------------------------------------------------------------

    def start(
        self, tun_fds: Sequence[int], udp_fds: Sequence[Mapping[int, int]],
        batons: Sequence[int] = (),
    ) -> None:
        """Start one worker per TUN queue. ``udp_fds`` has each worker's sockets by IP version.

        batons  an eventfd for each worker: the worker begins when it is readable; empty: at once
        Call ``stop`` later, also if ``start`` raises.
        """
        for index, (tun_fd, fds) in enumerate(zip(tun_fds, udp_fds, strict=True)):
            worker = _core.Worker(
                self._core, tun_fd, fds.get(4, -1), fds.get(6, -1), self._capabilities.in_use
            )
            self._threads.append(WorkerThread(worker, index, batons[index] if batons else None))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop all threads, then send the queued packets."""
        active = [thread for thread in self._threads if thread.active]
        for thread in self._threads:
            thread.stop()
        for thread in active:
            thread.worker.drain(DRAIN_SECONDS)

    def hand_over(self, batons: Sequence[int]) -> None:
        """Let each worker stop after its present turn, and then write to its baton, an eventfd.

        A baton of -1 is not written to.
        """
        for thread, baton in zip(self._threads, batons, strict=True):
            thread.hand_over(baton)

    def finish_hand_over(self) -> None:
        """Wait until all workers have stopped, and send their queued packets. Blocks.

        Afterwards the counters do not change.
        """
        for thread in self._threads:
            thread.wait_handed_over()
        for thread in self._threads:
            thread.worker.drain_send_queue(DRAIN_SECONDS)

    def go_on(self) -> None:
        """Let the workers work again after ``hand_over``."""
        for thread in self._threads:
            thread.go_on()

    async def rebind(
        self, udp_fds: Sequence[Mapping[int, int]], former: Sequence[Mapping[int, int]]
    ) -> None:
        """Let each worker stop after its present turn, send what is queued, and go on with these
        sockets. The worker no longer uses the former ones. Both arguments as ``udp_fds`` of
        ``start``. Raises OSError; then all workers use the former sockets.
        """
        self.hand_over([-1] * len(self._threads))
        try:
            await asyncio.shield(asyncio.to_thread(self.finish_hand_over))
            try:
                self._use_sockets(udp_fds)
            except OSError:
                with contextlib.suppress(OSError):
                    self._use_sockets(former)
                raise
        finally:
            self.go_on()
        self._core.close_spares()

    def _use_sockets(self, udp_fds: Sequence[Mapping[int, int]]) -> None:
        """Raises the first OSError, after all workers have got their sockets."""
        errors = []
        for thread, fds in zip(self._threads, udp_fds, strict=True):
            try:
                thread.worker.rebind(fds.get(4, -1), fds.get(6, -1))
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def renew_options(self) -> None:
        """Let all datagrams have the mark and the DSCP that the sockets have now."""
        for thread in self._threads:
            thread.worker.renew_options()
        self._core.close_spares()

    def inherit(self, counters: Sequence[Mapping[str, Any]]) -> None:
        """Continue the counters of the workers of an earlier process."""
        for thread, had in zip(self._threads, counters, strict=False):
            thread.worker.inherit(dict(had))
            thread.former_cpu = had.get("cpu_seconds", 0.0)
        # The core has inherited these, and the earlier process has reported them.
        self._refused, self._send_errors = self._kernel_refused(), self._core.send_errors()

    def continue_on_new_tun(self) -> None:
        """Let the workers use the new device behind the descriptors of the TUN's queues.

        A worker whose TUN is gone waits only for a wake-up, and no longer watches its descriptors.
        """
        for thread in self._threads:
            thread.worker.wake()
            thread.worker.resume()

    async def answer(self) -> bool:
        """Ask all workers for a sign of life. Return whether all have answered in time."""
        before = [thread.worker.answers() for thread in self._threads]
        for thread in self._threads:
            thread.worker.ask()
        end = time.monotonic() + ANSWER_SECONDS
        while any(thread.worker.answers() == n
                  for thread, n in zip(self._threads, before, strict=True)):
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(ANSWER_POLL_SECONDS)
        return True

    async def supervise(self) -> None:
        """Handle events and run the core's periodic tasks, until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._notify_fd, self._on_notify)
        try:
            while True:
                await asyncio.sleep(HOUSEKEEPING_SECONDS)
                self._core.collect()
                self._take_events()
                self._on_path_mtus()
                self._report_kernel_errors()
                for thread in self._threads:
                    thread.worker.look()
        finally:
            loop.remove_reader(self._notify_fd)

    # -- supervision ------------------------------------------------------------------------------

    def _on_notify(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._notify_fd)
        self._take_events()

    def _take_events(self) -> None:
        for thread in self._threads:
            for event in thread.worker.take_events():
                if event == "tun_gone":
                    self._tun_gone()
                elif event == "own_socket":
                    self._report_own_socket(thread.worker.own_socket_error())
                elif event == "probe":
                    self._on_probes()
                elif event == "path_mtu":
                    self._on_path_mtus()
                elif event in OFFLOADS:
                    self._lose(event)

    def _report_own_socket(self, error: int) -> None:
        """Report the errno with which an own socket could not be opened, each errno once."""
        if error not in self._own_socket_errors:
            self._own_socket_errors.add(error)
            self._report(
                f"cannot open a socket for a slow peer: {errno_reason(error)}; "
                "slow peers can cost packets to other peers"
            )

    def _lose(self, feature: str) -> None:
        cause = "the kernel refused it at run time"
        for name in self._capabilities.lose(feature, cause):
            log.warning("%s is off from now on: %s", name, self._capabilities.off[name])
            self._events.emit("capability_lost", capability=name, cause=cause)

    def _report_kernel_errors(self) -> None:
        """Report packets that the kernel refused to send or to accept on the TUN.

        Called at most once a second.
        """
        refused, errors = self._kernel_refused(), self._core.send_errors()
        for reason, packets in refused.items():
            new = packets - self._refused.get(reason, 0)
            if new > 0:
                why = self._why_refused(errors) if reason == SEND_ERROR else ""
                self._report(f"the kernel {KERNEL_ERRORS[reason]} {counted(new, 'packet')}{why}; "
                             "see `udptun drops --last`")
        self._refused, self._send_errors = refused, errors

    def _kernel_refused(self) -> dict[str, int]:
        return {reason: packets for reason, _, packets in self._core.drops()
                if reason in KERNEL_ERRORS}

    def _why_refused(self, errors: Mapping[int, int]) -> str:
        """Return the new errnos of sends, and some of the peers whose last error is one of them."""
        new = [number for number, n in errors.items() if n > self._send_errors.get(number, 0)]
        if not new:
            return ""
        since = time.monotonic_ns() - 2 * int(HOUSEKEEPING_SECONDS * 1e9)
        peers = [
            str(Endpoint(ipaddress.ip_address(peer.address), peer.port))
            for peer in self._core.peers()
            if (last := peer.last_error) and last.origin == "send" and last.time_ns > since
            and last.errno in new]
        to = f" to {', '.join(peers[:NAMED_N])}" + (
            f" and {counted(len(peers) - NAMED_N, 'more peer')}" if len(peers) > NAMED_N else "")
        return (to if peers else "") + f": {', '.join(map(errno_reason, new))}"

    # -- reading ----------------------------------------------------------------------------------

    def counters(self) -> list[dict[str, Any]]:
        """Return the counters of each worker, with the CPU time of the workers in earlier
        processes from which this one has taken over."""
        return [{**thread.worker.counters(), "cpu_seconds": round(thread.total_cpu_seconds(), 6)}
                for thread in self._threads]

    def status(self) -> list[dict[str, Any]]:
        """Return the counters of each worker, and the CPU time of its thread."""
        return [{**thread.worker.counters(), "cpu_seconds": thread.cpu_seconds()}
                for thread in self._threads]
