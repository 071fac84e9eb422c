"""Slots: a change whose caller has given up is the only one of its object until its thread has ended."""

from __future__ import annotations

import threading

import pytest
import trio
import trio.testing

from storage.errors import Unavailable
from storage.hosts.slots import Slots
from storage.seams import WorkerThreads


async def test_a_change_that_waited_for_a_slot_is_refused_if_an_earlier_one_hangs_by_then() -> None:
    """Else the one that hangs could come last, after all: a deletion after the put that was to replace what it deletes."""
    slots = Slots("test:", 2, WorkerThreads().run_abandonable, "wait")
    hang, busy, done = threading.Event(), threading.Event(), list[str]()
    given_up = trio.CancelScope()

    async def first() -> None:
        with given_up:
            await slots.run(slots.changing("a"), hang.wait, 10)

    async def other() -> None:
        await slots.run(slots.changing("b"), busy.wait, 10)

    async def second() -> None:
        with pytest.raises(Unavailable, match="hangs"):
            await slots.run(slots.changing("a"), done.append, "second")

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            nursery.start_soon(other)
            await trio.testing.wait_all_tasks_blocked(0.05)
            # Asked for while nothing hangs yet, and there is no slot.
            nursery.start_soon(second)
            await trio.testing.wait_all_tasks_blocked(0.05)
            given_up.cancel()
            await trio.testing.wait_all_tasks_blocked(0.05)
            busy.set()
        assert not done
        assert slots.at_work == 1
        hang.set()
        while slots.at_work:
            await trio.sleep(0.01)
        await slots.run(slots.changing("a"), done.append, "third")
        assert done == ["third"]
    finally:
        hang.set()
        busy.set()
