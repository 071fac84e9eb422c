"""Rule R1: nothing but FUSEError and Cancelled leaves a handler."""

from __future__ import annotations

import errno
import logging

import pyfuse3
import pytest
import trio

from fusefs.errno_map import ERRNO_OF_KIND, errno_of
from fusefs.guard import guarded
from fusefs.operations import Operations
from fusefs.receiver import Receiver
from storage import errors
from storage.errors import FusefsError, NoSpace, NotFound, NotPermitted


class Handlers:
    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.receiver = Receiver()
        self.refusals: list[tuple[str, tuple[object, ...]]] = []

    @guarded
    async def read(self, ino: int) -> bytes:
        await trio.lowlevel.checkpoint()
        raise self.error

    def refused(self, name: str, args: tuple[object, ...], error: NotPermitted) -> None:
        self.refusals.append((name, args))


def kinds() -> list[type[FusefsError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, FusefsError)]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_has_its_own_line_in_the_table(kind: type[FusefsError]) -> None:
    assert kind in ERRNO_OF_KIND


def test_a_kind_made_later_gets_the_errno_of_the_kind_above() -> None:
    class Fuller(NoSpace):
        pass

    assert errno_of(Fuller("x")) == errno.ENOSPC


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (NotFound("x"), errno.ENOENT),
        (NoSpace("x"), errno.ENOSPC),
        (ZeroDivisionError(), errno.EIO),
        (KeyError("x"), errno.EIO),
        (OSError(5, "x"), errno.EIO),
    ],
)
async def test_a_handler_answers_with_an_errno(error: Exception, number: int) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await Handlers(error).read(1)
    assert caught.value.errno == number


async def test_a_bug_leaves_a_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(pyfuse3.FUSEError):
        await Handlers(ZeroDivisionError("the bug")).read(1)
    assert "the bug" in caplog.text
    assert "Traceback" in caplog.text


async def test_a_refusal_is_told() -> None:
    handlers = Handlers(NotPermitted("no"))
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await handlers.read(7)
    assert caught.value.errno == errno.EPERM
    assert handlers.refusals == [("read", (7,))]


async def test_cancellation_passes() -> None:
    with trio.move_on_after(0) as scope:
        await Handlers(ZeroDivisionError()).read(1)
    assert scope.cancelled_caught


def test_every_handler_is_guarded() -> None:
    """forget has its own way: it must not even raise FUSEError."""
    free = {"init", "stacktrace", "forget", "poll"}
    for name in dir(pyfuse3.Operations):
        if name.startswith("_") or name in free or not callable(getattr(Operations, name)):
            continue
        assert hasattr(getattr(Operations, name), "__wrapped__"), name


class Waiting:
    """A handler that waits twice, then answers."""

    def __init__(self) -> None:
        self.receiver = Receiver()
        self.passed = 0
        self.receiver.pass_on = self._pass_on

    def _pass_on(self) -> None:
        self.passed += 1

    @guarded
    async def read(self, waits: int) -> int:
        for _ in range(waits):
            await trio.lowlevel.checkpoint()
        return waits


async def test_the_turn_is_passed_on_by_a_handler_that_waits_and_by_no_other() -> None:
    handlers = Waiting()
    assert await handlers.read(0) == 0
    assert handlers.passed == 0
    assert await handlers.read(2) == 2
    assert handlers.passed == 1
