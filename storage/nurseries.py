"""Nurseries whose errors can be caught by kind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from storage.errors import FusefsError


@asynccontextmanager
async def plain_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery out of which an error of storage.errors comes as itself; of several, the first. trio alone raises a group of them, which no
    `except Fenced` around it catches. With anything else among them (a bug) the group is raised. Where it is being cancelled from outside
    at the same moment, an error is raised all the same, and whoever catches it is cancelled at the next checkpoint."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        # Cancellations go on by themselves: the next checkpoint raises them again.
        rest = group.split(trio.Cancelled)[1]
        error = _first(rest) if rest is not None else None
        if error is None:
            raise
        raise error from group


def _first(group: BaseExceptionGroup[BaseException]) -> FusefsError | None:
    """None if there is anything else in it."""
    first: FusefsError | None = None
    for error in group.exceptions:
        inner = _first(error) if isinstance(error, BaseExceptionGroup) else error
        if not isinstance(inner, FusefsError):
            return None
        first = first or inner
    return first
