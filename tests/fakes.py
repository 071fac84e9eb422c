"""Stand-ins for the outside world, shared by all tests: a store in memory, seams that can be bent, crashes on order.

clock = VirtualClock()  # under trio's MockClock: wall clock and timers move together
seams = make_seams(clock=clock)  # threads inline, randomness seeded, failpoints recorded
store = MemoryStore(); store.apply(batch); await store.commit(); later = store.crash()
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import trio
from sortedcontainers import SortedDict

from storage.errors import Fenced, FusefsError
from storage.interfaces import Batch, TailPiece
from storage.metadata.no_journal import NoJournal
from storage.seams import Clock, DedicatedThread, Failpoints, InlineWorker, Randomness, Seams, Threads, WorkerThreads

T = TypeVar("T")

#: Wall clock at the start of every test: 2025-01-01T00:00:00Z.
BASE_NS = 1_735_689_600 * 10**9


class Crash(BaseException):
    """The process died here. Not an Exception: nothing in the program may survive it by catching errors."""


class MemoryStore(NoJournal):
    """A MetadataStore without a disk. What a crash would keep is kept apart, so `crash()` can show it.

    `commit_error`: raised by the next commits until it is None again (NoSpace: nothing is lost, Fenced: the store has failed).
    """

    def __init__(self, content: dict[bytes, bytes] | None = None, sequence: int = 0) -> None:
        self._now: SortedDict = SortedDict(content or {})
        self._durable: dict[bytes, bytes] = dict(content or {})
        self._pending: list[tuple[Batch, tuple[TailPiece, ...]]] = []
        self._hooks: list[Callable[[], None]] = []
        self._sequence = sequence
        #: Tail pieces of durable commits, oldest first.
        self.durable_tails: list[TailPiece] = []
        self.commit_error: FusefsError | None = None
        self.failed = False
        self.commits = 0
        self.fill = 0.0
        self.pinned: list[tuple[int, int]] = []

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._now.get(bytes(key))
        return value

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.get(key) for key in keys]

    def row(self, first: bytes, last: bytes, count: int) -> list[bytes] | None:
        pairs = self.scan(first, last + b"\0", count + 1)
        return [value for _, value in pairs] if len(pairs) == count and (pairs[0][0], pairs[-1][0]) == (first, last) else None

    def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        if start >= stop:
            return found
        for key in self._now.irange(start, stop, inclusive=(True, False), reverse=reverse):
            if len(found) >= limit:
                break
            found.append((key, self._now[key]))
        return found

    def apply(self, batch: Batch, tails: Sequence[TailPiece] = ()) -> None:
        if self.failed:
            raise Fenced("the metadata store has failed; mount again")
        copy = Batch([(bytes(key), None if value is None else bytes(value)) for key, value in batch.ops])
        for key, value in copy.ops:
            if not 1 <= len(key) <= 500:
                raise AssertionError(f"key of {len(key)} bytes")
            if value is None:
                self._now.pop(key, None)
            else:
                self._now[key] = value
        self._pending.append((copy, tuple(tails)))

    async def commit(self, urgent: bool = False) -> int:
        await trio.lowlevel.checkpoint()
        if self.failed:
            raise Fenced("the metadata store has failed; mount again")
        for hook in self._hooks:
            hook()
        if self.commit_error is not None:
            self.failed = isinstance(self.commit_error, Fenced)
            raise self.commit_error
        if self._pending:
            self._sequence += 1
        for batch, tails in self._pending:
            for key, value in batch.ops:
                if value is None:
                    self._durable.pop(key, None)
                else:
                    self._durable[key] = value
            self.durable_tails.extend(TailPiece(t.value_id, t.offset, tuple(bytes(d) for d in t.data)) for t in tails)
        self._pending.clear()
        self.commits += 1
        return self._sequence

    def add_commit_hook(self, hook: Callable[[], None]) -> None:
        self._hooks.append(hook)

    @property
    def durable_sequence(self) -> int:
        return self._sequence

    @property
    def applied_sequence(self) -> int:
        return self._sequence + (1 if self._pending else 0)

    @property
    def failure(self) -> str | None:
        return "the metadata store has failed; mount again" if self.failed else None

    def pinned_tails(self) -> list[tuple[int, int]]:
        return list(self.pinned)

    async def make_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> bool:
        return True

    async def clear(self) -> bool:
        await self.commit(urgent=True)
        return False

    @property
    def journal_fill(self) -> float:
        return self.fill

    def crash(self) -> MemoryStore:
        """What the next process finds: the durable commits, nothing that was only applied."""
        survivor = MemoryStore(self._durable, self._sequence)
        survivor.durable_tails = list(self.durable_tails)
        return survivor

    def content(self) -> dict[bytes, bytes]:
        """Everything visible now."""
        return dict(self._now)


class InlineThreads:
    """Runs the work at once, in the event loop: no real time passes, so MockClock's autojump cannot overtake it."""

    apart = False

    def __init__(self) -> None:
        self.calls = 0

    async def run(self, fn: Callable[..., T], *args: object) -> T:
        await trio.lowlevel.checkpoint()
        self.calls += 1
        return fn(*args)

    async def run_abandonable(self, place: str, fn: Callable[..., T], *args: object) -> T:
        return await self.run(fn, *args)


class SeededRandom:
    """Deterministic, and different for every call: SHA-256 of seed and a counter."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._count = 0

    def token_bytes(self, n: int) -> bytes:
        out = b""
        while len(out) < n:
            self._count += 1
            out += hashlib.sha256(f"{self._seed}/{self._count}".encode()).digest()
        return out[:n]


class ManualClock:
    """Moves only by `advance`, and by `sleep`, which advances it at once. Needs no running trio except for `sleep`."""

    def __init__(self, base_ns: int = BASE_NS) -> None:
        self._base_ns = base_ns
        self._passed = 0.0

    def time_ns(self) -> int:
        return self._base_ns + round(self._passed * 1e9)

    def monotonic(self) -> float:
        return self._passed

    def advance(self, seconds: float) -> None:
        self._passed += seconds

    async def sleep(self, seconds: float) -> None:
        await trio.lowlevel.checkpoint()
        self._passed += max(0.0, seconds)


class VirtualClock:
    """Follows trio's clock, for tests under `trio.testing.MockClock`: wall clock = base + trio's time (+ `jump`s)."""

    def __init__(self, base_ns: int = BASE_NS) -> None:
        self._base_ns = base_ns

    def time_ns(self) -> int:
        return self._base_ns + round(trio.current_time() * 1e9)

    def monotonic(self) -> float:
        return trio.current_time()

    def jump(self, seconds: float) -> None:
        """The wall clock is set; monotonic time does not notice."""
        self._base_ns += round(seconds * 1e9)

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(max(0.0, seconds))


class RecordingFailpoints:
    """Writes down every name that was hit, in order; `actions` may raise or count at one of them."""

    def __init__(self) -> None:
        self.hits: list[str] = []
        self.actions: dict[str, Callable[[], None]] = {}

    def hit(self, name: str) -> None:
        self.hits.append(name)
        action = self.actions.get(name)
        if action is not None:
            action()


class CrashAt:
    """Crash at the `nth` (from 1) hit of `name`, or at the nth hit of anything if `name` is None. `hits` is kept as well."""

    def __init__(self, name: str | None, nth: int = 1, error: BaseException | None = None) -> None:
        self.hits: list[str] = []
        self._name = name
        self._left = nth
        self._error = error

    @property
    def crashed(self) -> bool:
        return self._left <= 0

    def hit(self, name: str) -> None:
        self.hits.append(name)
        if self._name is None or name == self._name:
            self._left -= 1
            if self._left == 0:
                raise self._error if self._error is not None else Crash(name)


def make_seams(
    *,
    clock: Clock | None = None,
    seed: int = 0,
    random: Randomness | None = None,
    threads: Threads | None = None,
    failpoints: Failpoints | None = None,
    real_threads: bool = False,
) -> Seams:
    """Seams for a test: VirtualClock, seeded randomness, inline threads (or real ones), recording failpoints."""
    return Seams(
        clock=clock or VirtualClock(),
        random=random or SeededRandom(seed),
        threads=threads or (WorkerThreads() if real_threads else InlineThreads()),
        failpoints=failpoints or RecordingFailpoints(),
        worker=DedicatedThread if real_threads else InlineWorker,
    )
