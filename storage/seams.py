"""Seams: everything of the outside world that a test must be able to bend.

Wall clock, monotonic clock, randomness, work in threads and named failpoints are reached only through a
`Seams` value handed down from `open_volume`. So a year of contracts runs in a second of test, and a crash
can be put between any two durable steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import trio

T = TypeVar("T")


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

    async def run(self, fn: Callable[..., T], *args: object) -> T:
        """Run `fn(*args)` off the event loop; its result or exception comes back here.

        Not abandoned on cancellation: the thread finishes first, so that a caller that is cancelled never
        leaves a half-known write behind.
        """
        ...


class Failpoints(Protocol):
    """Named places at which a test may crash, fail or pause the program."""

    def hit(self, name: str) -> None:
        """Called at the place called `name`, from the event loop or a thread. Usually does nothing."""
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

    def __init__(self, limit: int = 16) -> None:
        self._limiter = trio.CapacityLimiter(limit)

    async def run(self, fn: Callable[..., T], *args: object) -> T:
        return await trio.to_thread.run_sync(fn, *args, limiter=self._limiter)


class NoFailpoints:
    """Production: nothing ever fails on purpose."""

    def hit(self, name: str) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Seams:
    """The bundle that is handed down."""

    clock: Clock = field(default_factory=SystemClock)
    random: Randomness = field(default_factory=SystemRandomness)
    threads: Threads = field(default_factory=WorkerThreads)
    failpoints: Failpoints = field(default_factory=NoFailpoints)
