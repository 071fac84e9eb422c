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

Who is given up is told so by cancellation, and knows it for what it was (`HostDB.gave_up`). All tasks are in one nursery, which has ended
when `first_good` returns.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from storage.errors import FusefsError
from storage.hosts.hostdb import STALL, HostDB, stalled_after
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
    run: Callable[[], Awaitable[bytes]]
    #: Bytes it moves, for its time.
    size: int
    #: Whom it asks; None: several.
    host: int | None = None
    #: Requests it takes.
    cost: int = 1


@dataclass(slots=True)
class Outcome:
    """What came of it: good answers by the number of the attempt, and why others failed."""

    found: dict[int, bytes] = field(default_factory=dict)
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

    async def first_good(self, attempts: Sequence[Attempt], needed: int = 1, *, earns: bool = True) -> Outcome:
        """The first `needed` good answers, asked for in the order of `attempts`, as many at a time; fewer: every attempt has failed.

        `earns`: it counts as a read; not for what is a part of one.
        """
        if earns and len(attempts) > needed:
            self.reads += 1
            self._saved = min(SAVED, self._saved + SHARE)
        race = _Race(self, attempts, needed)
        await race.run()
        return race.outcome

    def spend(self, cost: int) -> bool:
        """May a second attempt of so many requests begin?"""
        if self._saved < cost:
            return False
        self._saved -= cost
        self.second += cost
        return True


class _Race:
    """One call of `first_good`."""

    def __init__(self, hedging: Hedging, attempts: Sequence[Attempt], needed: int) -> None:
        self._hedging = hedging
        self._attempts = attempts
        self._needed = needed
        self.outcome = Outcome()
        #: The next one to begin.
        self._next = 0
        self._running: set[int] = set()
        self._nursery: trio.Nursery

    async def run(self) -> None:
        if len(self._attempts) == 1:
            # Nobody else to ask: no task needed.
            try:
                self.outcome.found[0] = await self._attempts[0].run()
            except FusefsError as error:
                self.outcome.errors.append(error)
            return
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for _ in range(1, min(self._needed, len(self._attempts))):
                self._begin(None)
            # The first, or the last of the first ones, needs no task of its own: mostly there is but one, and its answer ends it all.
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
            self._nursery.start_soon(self._watch, number, slow is None)
        # No await from an answer to the end of this method: each sees what the others have left.
        try:
            self.outcome.found[number] = await self._attempts[number].run()
        except FusefsError as error:
            self.outcome.errors.append(error)
        self._running.discard(number)
        if number in self.outcome.found and slow in self._running:
            self._overtaken(slow)
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
        slow = self._slow_after(attempt, self._attempts[self._next].cost) if may_hedge and self._next < len(self._attempts) else None
        if slow is not None:
            waited = max(slow, SOON)
            await hedging.clock.sleep(waited)
            if number not in self._running or self._next >= len(self._attempts):
                return
            if hedging.spend(self._attempts[self._next].cost):
                if attempt.host is not None:
                    hedging.hostdb.hedged(attempt.host)
                self._begin(number)
                return
        await hedging.clock.sleep(max(0.0, self._stalled_after(attempt) - waited))
        if number in self._running and self._next < len(self._attempts):
            hedging.stalls += 1
            self._begin(number)

    def _slow_after(self, attempt: Attempt, cost: int) -> float | None:
        return None if attempt.host is None else self._hedging.hostdb.slow_after(attempt.host, attempt.size, 1 - SHARE / cost)

    def _stalled_after(self, attempt: Attempt) -> float:
        if attempt.host is None:
            # Those it asks are watched one by one.
            return STALL + stalled_after(attempt.size, None)
        return self._hedging.hostdb.stalled_after(attempt.host, attempt.size)

    def _overtaken(self, slow: int | None) -> None:
        self._hedging.won += 1
        host = None if slow is None else self._attempts[slow].host
        if host is not None:
            self._hedging.hostdb.overtaken(host)
