"""Days: requests and bytes per day, as people pay for them. UTC, the last `DAYS` in which something was asked.

In the record of a host, one array per day, oldest first:

| # | field | type | meaning |
|---|---|---|---|
| 0 | day | int | days since 1970-01-01 |
| 1 | requests | int | sent, whatever came of them |
| 2, 3 | sent, received | int | bytes of objects, without what protocols add |
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Annotated

import msgspec

#: Days remembered.
DAYS = 30
DAY_NS = 86_400 * 10**9

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Day(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """See the table."""

    day: Annotated[int, msgspec.Meta(ge=0, le=2**20)]
    requests: _Count
    sent: _Count
    received: _Count


DayRecords = Annotated[list[Day], msgspec.Meta(max_length=DAYS)]


def date_of(day: Day) -> str:
    """As in 2025-12-31."""
    return time.strftime("%Y-%m-%d", time.gmtime(day.day * 86_400))


class Days:
    """Of one host."""

    __slots__ = ("_days",)

    def __init__(self, days: Iterable[Day] = ()) -> None:
        self._days = {day.day: day for day in days}

    def add(self, now_ns: int, sent: int, received: int) -> None:
        """A request at that time."""
        today = now_ns // DAY_NS
        day = self._days.get(today)
        if day is None:
            # Later days are of a clock that was wrong: they would keep today's from being remembered.
            kept = sorted(number for number in self._days if number < today)[-(DAYS - 1) :]
            self._days = {number: self._days[number] for number in kept}
            day = self._days[today] = Day(today, 0, 0, 0)
        day.requests += 1
        day.sent += sent
        day.received += received

    def records(self) -> list[Day]:
        """Oldest first."""
        return [Day(*msgspec.structs.astuple(day)) for _, day in sorted(self._days.items())]
