"""`storage.turn`: a lock that costs next to nothing while nobody waits for it."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from storage.turn import Turn


async def test_one_at_a_time_in_the_order_of_asking() -> None:
    turn, order, inside = Turn(), list[int](), 0

    async def take(number: int) -> None:
        nonlocal inside
        await turn.acquire()
        try:
            inside += 1
            assert inside == 1
            await trio.lowlevel.checkpoint()
            order.append(number)
            inside -= 1
        finally:
            turn.release()

    turn.acquire_nowait()
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(take, number)
            await trio.testing.wait_all_tasks_blocked()
        assert order == []
        turn.release()
        # It was handed over: nobody comes in between.
        assert turn.locked()
        with pytest.raises(trio.WouldBlock):
            turn.acquire_nowait()
    assert order == [0, 1, 2, 3, 4]
    assert not turn.locked()


async def test_who_is_cancelled_while_waiting_does_not_have_it_and_holds_up_nobody() -> None:
    turn = Turn()
    turn.acquire_nowait()
    with trio.move_on_after(0) as scope:
        await turn.acquire()
    assert scope.cancelled_caught
    turn.release()
    assert not turn.locked()
    await turn.acquire()
    turn.release()


def test_giving_back_what_nobody_has_is_a_bug() -> None:
    with pytest.raises(RuntimeError):
        Turn().release()
