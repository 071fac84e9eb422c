"""`storage.seams.DedicatedThread`: a thread of its own for one thing at a time, awaited, or waited for by the event loop itself."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest
import trio

from storage.seams import DedicatedThread

#: Seconds: longer than anything here takes, unless it waits for something else.
LONG = 20.0


@pytest.fixture
def worker() -> Iterator[DedicatedThread]:
    made = DedicatedThread("test")
    try:
        yield made
    finally:
        made.close()


def broken() -> None:
    raise ValueError("on purpose")


async def test_what_is_done_within_the_patience_keeps_the_event_loop(worker: DedicatedThread) -> None:
    others = 0

    async def other() -> None:
        nonlocal others
        while True:
            others += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await trio.lowlevel.checkpoint()
        before = others
        assert await worker.run_briefly(LONG, threading.get_ident) != threading.get_ident()
        with pytest.raises(ValueError, match="on purpose"):
            await worker.run_briefly(LONG, broken)
        assert others == before
        await worker.run(time.sleep, 0.01)
        assert others > before
        nursery.cancel_scope.cancel()


async def test_what_takes_longer_lets_others_go_on(worker: DedicatedThread) -> None:
    go = threading.Event()

    def wait() -> str:
        assert go.wait(LONG)
        return "done"

    def fail() -> None:
        assert go.wait(LONG)
        broken()

    found: list[str] = []

    async def ask() -> None:
        found.append(await worker.run_briefly(0.001, wait))
        with pytest.raises(ValueError, match="on purpose"):
            await worker.run_briefly(0.0, fail)
        found.append("failed")

    with trio.fail_after(LONG):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.05)
            assert found == []
            go.set()
    assert found == ["done", "failed"]


async def test_a_caller_that_is_cancelled_still_waits_for_the_end(worker: DedicatedThread) -> None:
    ended = threading.Event()

    def work() -> None:
        time.sleep(0.05)
        ended.set()

    with trio.move_on_after(0):
        await worker.run_briefly(0.001, work)
    assert ended.is_set()


async def test_results_that_come_as_the_patience_ends_are_neither_lost_nor_given_to_another(worker: DedicatedThread) -> None:
    dice = random.Random(1)

    def work(number: int, seconds: float) -> int:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            time.sleep(0)
        return number

    async def ask(first: int) -> None:
        for number in range(first, first + 500):
            patience = dice.uniform(0.0, 0.0002)
            assert await worker.run_briefly(patience, work, number, patience * dice.uniform(0.5, 1.5)) == number

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for first in range(0, 2000, 500):
                nursery.start_soon(ask, first)
