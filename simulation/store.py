"""A metadata store in memory, and seams over trio's clock: what the real code stands on here."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import trio
from sortedcontainers import SortedDict

from storage.interfaces import Batch, TailPiece
from storage.metadata.no_journal import NoJournal
from storage.seams import Clock, InlineWorker, NoFailpoints, Randomness, Seams, Threads

T = TypeVar("T")

#: Wall clock at the beginning: 2025-01-01T00:00:00Z.
BASE_NS = 1_735_689_600 * 10**9


class MemoryStore(NoJournal):
    """`storage.interfaces.MetadataStore` without a disk: a commit only counts."""

    def __init__(self) -> None:
        self._content: SortedDict = SortedDict()
        self._sequence = 0

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._content.get(key)
        return value

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.get(key) for key in keys]

    def row(self, first: bytes, last: bytes, count: int) -> list[bytes] | None:  # noqa: ARG002 - the Protocol's
        """Walking would not be quicker here."""
        return None

    def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        for key in self._content.irange(start, stop, inclusive=(True, False), reverse=reverse):
            if len(found) >= limit:
                break
            found.append((key, self._content[key]))
        return found

    def apply(self, batch: Batch, tails: Sequence[TailPiece] = ()) -> None:  # noqa: ARG002 - there are none here
        for key, value in batch.ops:
            if value is None:
                self._content.pop(key, None)
            else:
                self._content[key] = value

    async def commit(self, urgent: bool = False) -> int:  # noqa: ARG002 - the Protocol's
        await trio.lowlevel.checkpoint()
        self._sequence += 1
        return self._sequence

    def add_commit_hook(self, hook: Callable[[], None]) -> None:
        """Nobody here has one."""

    @property
    def durable_sequence(self) -> int:
        return self._sequence

    @property
    def applied_sequence(self) -> int:
        return self._sequence + 1

    @property
    def failure(self) -> str | None:
        return None

    async def make_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> bool:  # noqa: ARG002 - the Protocol's
        await trio.lowlevel.checkpoint()
        return True

    async def clear(self) -> bool:
        await self.commit(urgent=True)
        return False


class VirtualClock:
    """Both clocks are trio's, from a fixed date."""

    def time_ns(self) -> int:
        return BASE_NS + round(trio.current_time() * 1e9)

    def monotonic(self) -> float:
        return trio.current_time()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(max(0.0, seconds))


class SeededRandom:
    """The same bytes for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def token_bytes(self, n: int) -> bytes:
        return self._random.randbytes(n)


class NoThreads:
    """The clock would jump while a thread works: everything happens on the event loop."""

    apart = False

    async def run(self, fn: Callable[..., T], *args: object) -> T:
        await trio.lowlevel.checkpoint()
        return fn(*args)

    async def run_abandonable(self, place: str, fn: Callable[..., T], *args: object) -> T:  # noqa: ARG002 (the Protocol's)
        return await self.run(fn, *args)


def virtual_seams(seed: int) -> Seams:
    clock: Clock = VirtualClock()
    source: Randomness = SeededRandom(seed)
    threads: Threads = NoThreads()
    return Seams(clock=clock, random=source, threads=threads, failpoints=NoFailpoints(), worker=InlineWorker)
