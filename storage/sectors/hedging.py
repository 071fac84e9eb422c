"""Hedging: a read that is slow is asked of somebody else as well, and the first good answer wins.

    attempt 1  ────────────┬─ slow ──────────────┬─ hangs ─────────── x cancelled, once another has answered
    attempt 2              └────── good          └ (if there was no second yet)

An attempt is one request to one host, or, for `k+m`, the rebuild out of k others. The next attempt begins when

| one of those begun | bounded by |
|---|---|
| has failed | the number of attempts |
| is *slow*: slower than 95 of 100 reads of that size from that host (`HostDB.slow_after`) | `SHARE` of all requests |
| *hangs*: for 2 s, or four times what is slow for that host (`HostDB.stalled_after`) | the host is asked last for a minute after |

An unknown host is never slow, but it can hang. The share (Dean and Barroso, "The tail at scale", 2013, hedge so, too): each read that could
be hedged earns `SHARE` of a request, a second request costs one, a rebuild k. Nothing is earned beyond `SAVED` requests, and nothing is
there at first, so second requests are never more than that share of reads. Where a second attempt costs k, only what is slower than a share
of 1 - `SHARE` / k is slow: else what is there would be spent on the first that come along, and the slowest would find none. The third row
is failover, as the first is: it is not in the share, because readers have to get past a host that does not answer also where nothing is
saved up, or nothing is known of it yet.

Who is given up is told so by cancellation, and knows it for what it was (`HostDB.gave_up`). Nearly all reads are answered by the first
attempt before it is slow. They take no task: `run`, one for the volume, watches them all, and asks the others for those that are late; what
it has asked ends, cancelled, when the read does. Without it, and where several answers are needed, each read has a nursery of its own.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from storage.errors import FusefsError
from storage.hosts.hostdb import STALL, HostDB, stalled_after
from storage.interfaces import Buffer
from storage.seams import Seams

#: Second requests per read, at most.
SHARE = 0.05
#: Requests that can be saved up: enough for a rebuild.
SAVED = 24.0
#: Seconds below which nothing is slow: nobody notices, and what is slow then is this machine.
SOON = 0.01


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to get some bytes."""

    #: FusefsError where it fails. May be cancelled.
    run: Callable[[], Awaitable[Buffer]]
    #: Bytes it moves, for its time.
    size: int
    #: Whom it asks; None: several.
    host: int | None = None
    #: Requests it takes.
    cost: int = 1


@dataclass(slots=True)
class Outcome:
    """What came of it: good answers by the number of the attempt, and why others failed."""

    found: dict[int, Buffer] = field(default_factory=dict)
    errors: list[FusefsError] = field(default_factory=list)


class Hedging:
    """Of one volume. Counts for people and for tests."""

    def __init__(self, hostdb: HostDB, seams: Seams) -> None:
        self.hostdb = hostdb
        self.clock = seams.clock
        self._saved = 0.0
        #: Reads that could be hedged; requests made because one was slow; how often these were quicker; attempts begun because one hung.
        self.reads = 0
        self.second = 0
        self.won = 0
        self.stalls = 0
        #: Where others are asked for reads that are late; None while `run` does not.
        self._nursery: trio.Nursery | None = None
        self._watched: list[_Watched] = []
        self._order = itertools.count()
        self._wake = trio.Event()

    async def run(self) -> None:
        """Watches reads until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                while True:
                    self._wake = trio.Event()
                    with trio.move_on_at(self._watched[0].deadline if self._watched else math.inf):
                        await self._wake.wait()
                    while self._watched and self._watched[0].deadline <= trio.current_time():
                        read = heapq.heappop(self._watched).read
                        if read is not None:
                            read.late(nursery)
        finally:
            self._nursery = None

    def watch(self, read: _First, after: float) -> _Watched:
        """`read.late` is called after so many seconds, unless the entry's `read` is None by then."""
        entry = _Watched(trio.current_time() + after, next(self._order), read)
        heapq.heappush(self._watched, entry)
        if self._watched[0] is entry:
            self._wake.set()
        return entry

    async def first_good(self, attempts: Sequence[Attempt], needed: int = 1, *, earns: bool = True) -> Outcome:
        """The first `needed` good answers, asked for in the order of `attempts`, as many at a time; fewer: every attempt has failed.

        `earns`: it counts as a read; not for what is a part of one.
        """
        if earns and len(attempts) > needed:
            self.reads += 1
            self._saved = min(SAVED, self._saved + SHARE)
        if len(attempts) == 1:
            # Nobody else to ask.
            outcome = Outcome()
            try:
                outcome.found[0] = await attempts[0].run()
            except FusefsError as error:
                outcome.errors.append(error)
            return outcome
        if needed == 1 and attempts and self._nursery is not None:
            return await _First(self, attempts).run()
        return await self.race(attempts, needed)

    async def race(self, attempts: Sequence[Attempt], needed: int = 1, *, may_hedge: bool = True) -> Outcome:
        """With a nursery of its own. Not `may_hedge`: it is a second request itself."""
        race = _Race(self, attempts, needed, may_hedge)
        await race.run()
        return race.outcome

    def slow_after(self, attempt: Attempt, cost: int) -> float | None:
        """Seconds after which it is worth `cost` requests to ask somebody else; None where that is not known."""
        if attempt.host is None:
            return None
        slow = self.hostdb.slow_after(attempt.host, attempt.size, 1 - SHARE / cost)
        return None if slow is None else max(slow, SOON)

    def stalled_after(self, attempt: Attempt) -> float:
        """Seconds after which it hangs."""
        if attempt.host is None:
            # Those it asks are watched one by one.
            return STALL + stalled_after(attempt.size, None)
        return self.hostdb.stalled_after(attempt.host, attempt.size)

    def late(self, attempt: Attempt) -> None:
        """Another is asked because this one is slow, or hangs."""
        if attempt.host is not None:
            self.hostdb.hedged(attempt.host)

    def overtaken(self, attempt: Attempt) -> None:
        """And the other was quicker."""
        self.won += 1
        if attempt.host is not None:
            self.hostdb.overtaken(attempt.host)

    def spend(self, cost: int) -> bool:
        """May a second attempt of so many requests begin?"""
        if self._saved < cost:
            return False
        self._saved -= cost
        self.second += cost
        return True


@dataclass(order=True, slots=True)
class _Watched:
    """A read that will be late. `read` is None once it is over: until then its answer would be kept."""

    deadline: float
    order: int
    read: _First | None = field(compare=False)


class _First:
    """A call of `first_good` that needs one answer, while its first attempt is under way in the caller's own task."""

    def __init__(self, hedging: Hedging, attempts: Sequence[Attempt]) -> None:
        self._hedging = hedging
        self._attempts = attempts
        self._scope = trio.CancelScope()
        #: Of the others, once the first was late.
        self._others: trio.CancelScope | None = None
        self._others_ended = trio.Event()
        self._found = Outcome()
        self._broken: Exception | None = None
        self._watched: _Watched
        #: What it will be when it is late next; seconds that it had until then.
        self._stalls = False
        self._waited = 0.0

    async def run(self) -> Outcome:
        hedging, first = self._hedging, self._attempts[0]
        outcome = Outcome()
        slow = hedging.slow_after(first, self._attempts[1].cost)
        self._stalls = slow is None
        self._waited = hedging.stalled_after(first) if slow is None else slow
        self._watched = hedging.watch(self, self._waited)
        try:
            with self._scope:
                try:
                    outcome.found[0] = await first.run()
                    return outcome
                except FusefsError as error:
                    outcome.errors.append(error)
            # It failed, or the others were quicker.
            self._watched.read = None
            if self._others is None:
                rest = await hedging.race(self._attempts[1:])
            else:
                await self._others_ended.wait()
                rest = self._found
                if self._broken is not None:
                    raise self._broken
        finally:
            self._watched.read = None
            if self._others is not None:
                self._others.cancel()
        outcome.found |= {number + 1: found for number, found in rest.found.items()}
        outcome.errors += rest.errors
        return outcome

    def late(self, nursery: trio.Nursery) -> None:
        """It is slow, or hangs. No await."""
        hedging, first = self._hedging, self._attempts[0]
        if self._stalls:
            hedging.stalls += 1
        elif not hedging.spend(self._attempts[1].cost):
            self._stalls = True
            self._watched = hedging.watch(self, max(0.0, hedging.stalled_after(first) - self._waited))
            return
        hedging.late(first)
        self._others = trio.CancelScope()
        nursery.start_soon(self._ask_others, self._others)

    async def _ask_others(self, scope: trio.CancelScope) -> None:
        """In a task of the volume's: until one answers, or the read is over."""
        try:
            with scope:
                self._found = await self._hedging.race(self._attempts[1:], may_hedge=False)
        except Exception as error:  # noqa: BLE001 - handed to the reader
            # A defect, which is the reader's to raise: here it would end the volume.
            self._broken = error
            self._scope.cancel()
        finally:
            self._others_ended.set()
        if self._found.found and self._watched.read is not None:
            self._hedging.overtaken(self._attempts[0])
            self._scope.cancel()


class _Race:
    """One call of `race`."""

    def __init__(self, hedging: Hedging, attempts: Sequence[Attempt], needed: int, may_hedge: bool) -> None:
        self._hedging = hedging
        self._attempts = attempts
        self._needed = needed
        self._may_hedge = may_hedge
        self.outcome = Outcome()
        #: The next one to begin.
        self._next = 0
        self._running: set[int] = set()
        self._nursery: trio.Nursery

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for _ in range(1, min(self._needed, len(self._attempts))):
                self._begin(None)
            # The last of the first ones needs no task of its own.
            if self._attempts:
                await self._one(self._take(), None)

    def _begin(self, slow: int | None) -> None:
        """Start the next attempt, because `slow` is, or to begin with."""
        self._nursery.start_soon(self._one, self._take(), slow)

    def _take(self) -> int:
        number, self._next = self._next, self._next + 1
        self._running.add(number)
        return number

    async def _one(self, number: int, slow: int | None) -> None:
        if self._next < len(self._attempts):
            self._nursery.start_soon(self._watch, number, self._may_hedge and slow is None)
        # No await from an answer to the end of this method: each sees what the others have left.
        try:
            self.outcome.found[number] = await self._attempts[number].run()
        except FusefsError as error:
            self.outcome.errors.append(error)
        self._running.discard(number)
        if slow is not None and number in self.outcome.found and slow in self._running:
            self._hedging.overtaken(self._attempts[slow])
        short = len(self._running) + len(self.outcome.found) < self._needed
        if len(self.outcome.found) >= self._needed:
            self._nursery.cancel_scope.cancel()
        elif self._next < len(self._attempts) and (short or slow in self._running):
            self._begin(slow)
        elif not self._running:
            # Only watchers are left.
            self._nursery.cancel_scope.cancel()

    async def _watch(self, number: int, may_hedge: bool) -> None:
        """Begin another attempt while this one is slow, or hangs."""
        hedging, attempt, waited = self._hedging, self._attempts[number], 0.0
        slow = hedging.slow_after(attempt, self._attempts[self._next].cost) if may_hedge and self._next < len(self._attempts) else None
        if slow is not None:
            waited = slow
            await hedging.clock.sleep(waited)
            if number not in self._running or self._next >= len(self._attempts):
                return
            if hedging.spend(self._attempts[self._next].cost):
                hedging.late(attempt)
                self._begin(number)
                return
        await hedging.clock.sleep(max(0.0, hedging.stalled_after(attempt) - waited))
        if number in self._running and self._next < len(self._attempts):
            hedging.stalls += 1
            hedging.late(attempt)
            self._begin(number)
