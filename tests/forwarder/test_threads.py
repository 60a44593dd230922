"""A worker's thread: its CPU time."""

import os
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from udptun.forwarder.threads import WorkerThread


class Busy:
    """Has the methods of a worker that its thread calls. Each call of ``run`` uses the CPU."""

    def __init__(self) -> None:
        self._wakes = os.eventfd(1)

    def fileno(self) -> int:
        return self._wakes

    def run(self, linger_ms: int) -> None:
        end = time.thread_time() + 0.01
        while time.thread_time() < end:
            pass

    def wake(self) -> None: ...

    def resume(self) -> None: ...


@pytest.fixture
def thread() -> Iterator[WorkerThread]:
    worker = Busy()
    running = WorkerThread(cast(Any, worker), 0)
    running.start()
    yield running
    running.stop()
    os.close(worker.fileno())


def test_the_cpu_time_of_a_thread_is_its_own(thread: WorkerThread) -> None:
    assert WorkerThread(thread.worker, 1).cpu_seconds() is None  # it was not started
    before = thread.cpu_seconds()
    assert before is not None
    deadline = time.monotonic() + 60
    while (now := thread.cpu_seconds()) is not None and now < before + 0.1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert now is not None and now <= time.process_time() - time.thread_time()
    thread.stop()
    assert thread.cpu_seconds() is None
