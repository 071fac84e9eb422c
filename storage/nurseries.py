"""Nurseries whose errors can be caught by kind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from storage.errors import FusefsError


@asynccontextmanager
async def plain_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery out of which an error of storage.errors comes as itself; of several, the first. trio alone raises a group of them, which no
    `except Fenced` around it catches. With anything else among them (a bug) the group is raised."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        error = _first(group)
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
