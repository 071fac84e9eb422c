"""Errors come out of nurseries by their kind, whatever else happens at the same moment."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from storage.errors import Fenced, Unavailable
from storage.nurseries import plain_nursery


async def test_of_several_errors_the_first_comes_out_as_itself() -> None:
    async def fails(error: Exception) -> None:
        raise error

    with pytest.raises(Unavailable, match="one"):
        async with plain_nursery() as nursery:
            nursery.start_soon(fails, Unavailable("one"))
            await trio.sleep_forever()


async def test_an_error_at_the_moment_of_a_cancellation_is_still_one_of_ours() -> None:
    """A volume that is being closed: tasks end with what they met, others are cancelled from outside."""

    async def fails_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            raise Fenced("the volume can be written no more") from cancelled

    with trio.CancelScope() as scope, pytest.raises(Fenced):
        async with plain_nursery() as nursery:
            nursery.start_soon(fails_when_cancelled)
            nursery.start_soon(trio.sleep_forever)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep_forever()


async def test_a_cancellation_is_not_lost_with_an_error_that_is_caught() -> None:
    async def fails_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            raise Unavailable("gone") from cancelled

    went_on = False
    with trio.CancelScope() as scope:
        try:
            async with plain_nursery() as nursery:
                nursery.start_soon(fails_when_cancelled)
                nursery.start_soon(trio.sleep_forever)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        except Unavailable:
            await trio.lowlevel.checkpoint()
            went_on = True
    assert scope.cancelled_caught and not went_on


async def test_a_bug_among_the_errors_is_raised_with_all_of_them() -> None:
    async def fails(error: Exception) -> None:
        raise error

    with pytest.raises(ExceptionGroup):
        async with plain_nursery() as nursery:
            nursery.start_soon(fails, Unavailable("one"))
            nursery.start_soon(fails, ZeroDivisionError())
