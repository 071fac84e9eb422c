"""Seams: everything of the outside world that a test must be able to bend.

Wall clock, monotonic clock, randomness, work in threads and named failpoints are reached only through a
`Seams` value handed down from `open_volume`. So a year of contracts runs in a second of test, and a crash
can be put between any two durable steps.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import outcome
import trio

from storage.failpoints import Failpoints as Failpoints
from storage.failpoints import NoFailpoints as NoFailpoints

T = TypeVar("T")

#: Threads that may work for, or hang in, one place: a little more than what an open host needs for itself (storage/hosts/slots.py).
PER_PLACE = 18


class Clock(Protocol):
    """Time, in the two kinds that must not be mixed up."""

    def time_ns(self) -> int:
        """Wall clock: nanoseconds since the Unix epoch. May jump."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that only goes forward; meaningful as differences."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait; a checkpoint even for 0."""
        ...


class Randomness(Protocol):
    """Source of salts, keys, ids and nonces."""

    def token_bytes(self, n: int) -> bytes:
        """`n` unpredictable bytes."""
        ...


class Threads(Protocol):
    """Where blocking work goes: sealing, file I/O, LMDB commits."""

    @property
    def apart(self) -> bool:
        """Does the event loop go on meanwhile? If not (tests whose clock would jump), nothing else may be waited for instead, either."""
        ...

    async def run(self, fn: Callable[..., T], *args: object) -> T:
        """Run `fn(*args)` off the event loop; its result or exception comes back here.

        Not abandoned on cancellation: the thread finishes first, so that a caller that is cancelled never
        leaves a half-known write behind.
        """
        ...

    async def run_abandonable(self, place: str, fn: Callable[..., T], *args: object) -> T:
        """As `run`, but a caller that is cancelled goes on at once; the thread finishes by itself, and nobody learns how.

        For what a hung disk or network may hold up, where it does not matter whether it happens after all. Each `place`, a host's URL,
        has a limit of its own, however often it is opened: what hangs there keeps no other place from being asked.
        """
        ...


class Worker(Protocol):
    """One thread of its own, running one thing at a time in the order they were asked for: journal, LMDB writes."""

    async def run(self, fn: Callable[..., T], *args: object) -> T:
        """As `Threads.run`: its result or exception comes back here, and a cancelled caller still waits for it."""
        ...

    async def run_briefly(self, patience: float, fn: Callable[..., T], *args: object) -> T:
        """As `run`, for what mostly takes less than `patience` seconds: for so long the event loop itself waits for it, which costs less
        than to leave the caller and come back. Shorter than a step of the event loop may be (1 ms)."""
        ...

    def close(self) -> None:
        """End the thread once it has done what it was asked; nothing may be asked of it afterwards."""
        ...


class SystemClock:
    """The real clocks; `monotonic` and `sleep` are trio's, so trio's MockClock drives them in tests."""

    def time_ns(self) -> int:
        return time.time_ns()

    def monotonic(self) -> float:
        return trio.current_time()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class SystemRandomness:
    """The kernel's random generator."""

    def token_bytes(self, n: int) -> bytes:
        return os.urandom(n)


class WorkerThreads:
    """trio's worker threads, with a limit of their own so that file I/O cannot starve the rest."""

    apart = True

    def __init__(self, limit: int = 16) -> None:
        self._limiter = trio.CapacityLimiter(limit)
        #: By place: apart from the other, so that hung calls cannot starve sealing and the metadata store, and from each other.
        self._places: dict[str, trio.CapacityLimiter] = {}

    async def run(self, fn: Callable[..., T], *args: object) -> T:
        return await trio.to_thread.run_sync(fn, *args, limiter=self._limiter)

    async def run_abandonable(self, place: str, fn: Callable[..., T], *args: object) -> T:
        limiter = self._places.setdefault(place, trio.CapacityLimiter(PER_PLACE))
        return await trio.to_thread.run_sync(fn, *args, limiter=limiter, abandon_on_cancel=True)


class _Job:
    """One thing for a thread to do, and whoever waits for it."""

    __slots__ = ("args", "ended", "fn", "result", "task", "token")

    def __init__(self, fn: Callable[..., Any], args: tuple[object, ...], task: trio.lowlevel.Task | None) -> None:
        self.fn, self.args = fn, args
        #: Who is to be woken; None: the event loop waits, or has not decided yet. Set and read with the thread's `_deciding` held.
        self.task = task
        self.token = trio.lowlevel.current_trio_token()
        #: What came of it.
        self.result: outcome.Outcome[Any] | None = None
        #: Held until `result` is there.
        self.ended = threading.Lock()


class DedicatedThread:
    """A long-lived thread fed by a queue: a hop there and back costs about half of one through `trio.to_thread`."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._deciding = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while (job := self._queue.get()) is not None:
            result = outcome.capture(job.fn, *job.args)
            with self._deciding:
                job.result, task = result, job.task
            if task is None:
                job.ended.release()
                continue
            try:
                job.token.run_sync_soon(trio.lowlevel.reschedule, task, result)
            except trio.RunFinishedError:
                return  # the event loop is gone, and whoever waited with it

    async def run(self, fn: Callable[..., T], *args: object) -> T:
        self._queue.put(_Job(fn, args, trio.lowlevel.current_task()))
        # Abort.FAILED: the job runs to its end and is awaited to its end, cancelled or not.
        result: T = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return result

    async def run_briefly(self, patience: float, fn: Callable[..., T], *args: object) -> T:
        job = _Job(fn, args, None)
        job.ended.acquire()
        self._queue.put(job)
        if not job.ended.acquire(timeout=patience):
            with self._deciding:
                if job.result is None:
                    job.task = trio.lowlevel.current_task()
        # No await since: the thread's wake-up, if there is to be one, comes after this task waits.
        if job.task is not None:
            woken: T = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
            return woken
        if job.result is None:
            raise RuntimeError("a thread has ended its work without a result")
        result: T = job.result.unwrap()
        return result

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()


class InlineWorker:
    """For tests under trio's MockClock, which would let time jump while a thread works: runs everything on the event loop."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    async def run(self, fn: Callable[..., T], *args: object) -> T:
        await trio.lowlevel.cancel_shielded_checkpoint()
        return fn(*args)

    async def run_briefly(self, patience: float, fn: Callable[..., T], *args: object) -> T:  # noqa: ARG002 (the Protocol's)
        return await self.run(fn, *args)

    def close(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Seams:
    """The bundle that is handed down."""

    clock: Clock = field(default_factory=SystemClock)
    random: Randomness = field(default_factory=SystemRandomness)
    threads: Threads = field(default_factory=WorkerThreads)
    failpoints: Failpoints = field(default_factory=NoFailpoints)
    #: Makes a worker of the given name; `InlineWorker` in tests that drive the clock.
    worker: Callable[[str], Worker] = DedicatedThread
