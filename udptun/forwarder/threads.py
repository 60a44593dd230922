"""A worker's thread: a uvloop loop that calls the compiled worker when there is work.

Owns the thread and its loop. The loop watches one descriptor, the worker's epoll set. The callback
calls the worker. This call returns when the worker was idle for LINGER_MS, or when it is woken.
During the call the thread needs neither the GIL nor the loop. Threading: call ``start`` and
``stop`` from one other thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import struct
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import uvloop

if TYPE_CHECKING:
    from .._core import Worker

LINGER_MS = 200  # traffic comes in bursts, and to wait in the core is cheaper than to return
SLICE_NS = 100_000  # the shortest slice that Linux accepts

# struct sched_attr, linux/sched/types.h: size, policy, flags, nice, priority, runtime, deadline,
# period. The C library has no function for this system call.
SCHED_ATTR = struct.Struct("=IIQiIQQQ")
SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}

THREAD_CLOCK = 6  # low bits of a clock ID: the CPU time (2) of one thread (4)

PR_SET_TIMERSLACK = 29  # linux/prctl.h
TIMER_SLACK_NS = 1000


def _set_scheduling() -> None:
    """Set the scheduling of this thread, for hosts whose cores are all busy.

    - SCHED_BATCH: the thread does not preempt a program that has just received a packet from the
      thread. Small datagrams then wait in our queues and do not overflow the program's socket.
    - A short slice (Linux 6.12; older kernels ignore it): the thread gets the CPU again sooner. So
      a packet behind bulk traffic waits for a shorter time.
    - A small timer slack: a batching delay ends on time, not up to 50 us late.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0)
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # 0: this thread
    number = SYS_SCHED_SETATTR.get(platform.machine())
    if number is not None:
        nice = os.getpriority(os.PRIO_PROCESS, 0)  # stays; a service manager may have set it
        attr = SCHED_ATTR.pack(SCHED_ATTR.size, os.SCHED_BATCH, 0, nice, 0, SLICE_NS, 0, 0)
        libc.syscall(number, 0, attr, 0)


class WorkerThread:
    """One worker and its thread.

    baton   an eventfd: the worker begins when it is readable; None: it begins at once
    active  the worker uses its descriptors
    """

    def __init__(self, worker: Worker, index: int, baton: int | None = None) -> None:
        self.worker = worker
        self.active = False
        self.former_cpu = 0.0  # of the same worker in an earlier process, in seconds
        self._cpu = 0.0
        self._baton = baton
        self._paused = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._running = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(
            target=self._main, name=f"udptun-worker-{index}", daemon=True
        )

    def start(self) -> None:
        """Start the thread. Return when the loop watches the worker's descriptors."""
        self._thread.start()
        self._running.wait()
        if self._failure is not None:
            raise self._failure

    def cpu_seconds(self) -> float | None:
        """Return the CPU time that the thread has used. None: the thread has ended.

        Not time.pthread_getcpuclockid: it reads freed memory if the thread has ended. With the
        clock ID of the thread, clock_gettime then fails with an error. Source:
        CPUCLOCK_PERTHREAD_MASK and CPUCLOCK_SCHED, linux/include/linux/posix-timers.h.
        """
        tid = self._thread.native_id
        if tid is None or not self._thread.is_alive():  # the kernel's thread can end a bit later
            return None
        try:
            return time.clock_gettime(~tid << 3 | THREAD_CLOCK)
        except OSError:
            return None

    def hand_over(self, baton: int) -> None:
        """Let the worker stop after its present turn, and then write to the eventfd ``baton``."""
        assert self._loop is not None
        self._paused.clear()
        self.worker.hand_over(baton)
        self._loop.call_soon_threadsafe(self._unwatch)

    def wait_handed_over(self) -> None:
        self._paused.wait()

    def go_on(self) -> None:
        """Let the worker work again after ``hand_over``."""
        assert self._loop is not None
        self.worker.resume()
        self._loop.call_soon_threadsafe(self._watch)

    def total_cpu_seconds(self) -> float:
        """Return the CPU time of the worker, also that of the same worker in earlier processes."""
        self._cpu = self.cpu_seconds() or self._cpu
        return self.former_cpu + self._cpu

    def stop(self) -> None:
        """Stop the worker and join the thread. Queued packets stay queued."""
        if self._loop is None:
            return
        self.worker.wake()
        with suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop = None

    def _main(self) -> None:
        _set_scheduling()
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except Exception as error:
            self._failure = error  # raised by start
            if self._running.is_set():
                raise
        finally:
            self._running.set()

    async def _serve(self) -> None:
        self._loop = loop = asyncio.get_running_loop()
        if self._baton is None:
            self._watch()
        else:
            loop.add_reader(self._baton, self._begin, self._baton)
        self._running.set()
        try:
            await self._stop.wait()
        finally:
            if self._baton is not None:
                loop.remove_reader(self._baton)
            loop.remove_reader(self.worker.fileno())
            self.worker.resume()

    def _begin(self, baton: int) -> None:
        asyncio.get_running_loop().remove_reader(baton)
        self._baton = None
        self._watch()

    def _watch(self) -> None:
        self.active = True
        asyncio.get_running_loop().add_reader(self.worker.fileno(), self.worker.run, LINGER_MS)

    def _unwatch(self) -> None:
        """Stop calling the worker, after ``hand_over``. An idle worker has not seen the wake-up
        yet, so run it once."""
        self.worker.run(0)
        asyncio.get_running_loop().remove_reader(self.worker.fileno())
        self.active = False
        self._paused.set()
