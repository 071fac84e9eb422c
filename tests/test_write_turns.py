"""WRITEs of one inode are taken one after the other, in the order they came, though one that need not wait takes no lock (R3)."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import trio
import trio.testing

from fusefs.handles import HandleTable
from fusefs.operations import Operations
from fusefs.receiver import Receiver
from storage.errors import NoSpace


class Slow:
    """A namespace in which some writes have to wait for `go`, and some are refused then. `order`: what was taken."""

    def __init__(self) -> None:
        self.order: list[bytes] = []
        self.tried: list[bytes] = []
        self.go = trio.Event()
        self.refused: list[tuple[int, int]] = []

    def write_now(self, ino: int, offset: int, data: bytes) -> bool:
        self.tried.append(data)
        if data.startswith(b"slow"):
            return False
        self.order.append(data)
        return True

    async def write(self, ino: int, offset: int, data: bytes) -> None:
        await self.go.wait()
        if data.endswith(b"refused"):
            raise NoSpace("full, on purpose")
        self.order.append(data)

    def attributes(self, ino: int) -> Any:
        return SimpleNamespace(size=0)


def made(slow: Slow) -> tuple[Operations, int]:
    """Handlers, and a handle on a file that the kernel has dirty pages of."""
    operations = object.__new__(Operations)
    handles = HandleTable()

    def write_refused(inode: Any, offset: int, length: int, number: int) -> None:
        slow.refused.append((offset, number))
        inode.taint = number

    for name, value in {
        "namespace": slow,
        "handles": handles,
        "receiver": Receiver(),
        "kernel_drops_pages": True,
        "coherence": SimpleNamespace(write_refused=write_refused),
    }.items():
        setattr(operations, name, cast("Any", value))
    return operations, handles.open(2, 1, 0, writing=True, cached=True).fh


async def written(operations: Operations, fh: int, data: list[bytes], slow: Slow) -> list[int]:
    """All of them at the same time, in this order; what each was answered: bytes, or an errno below zero."""
    answers = [0] * len(data)

    async def one(number: int, piece: bytes) -> None:
        try:
            answers[number] = await operations.write(fh, number, piece)
        except pyfuse3.FUSEError as error:
            answers[number] = -error.errno

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for number, piece in enumerate(data):
                nursery.start_soon(one, number, piece)
                await trio.testing.wait_all_tasks_blocked()
            slow.go.set()
    return answers


async def test_one_that_could_be_taken_at_once_waits_for_those_before_it() -> None:
    slow = Slow()
    operations, fh = made(slow)
    data = [b"first", b"slow second", b"third", b"slow fourth", b"fifth"]
    assert await written(operations, fh, data, slow) == [len(piece) for piece in data]
    assert slow.order == data
    # And none is tried twice.
    assert slow.tried == data
    assert not operations.handles.get(fh).inode.write_lock.locked()


async def test_those_behind_one_that_is_refused_see_that() -> None:
    slow = Slow()
    operations, fh = made(slow)
    answers = await written(operations, fh, [b"first", b"slow refused", b"third", b"slow fourth"], slow)
    assert answers == [5, -errno.ENOSPC, -errno.ENOSPC, -errno.ENOSPC]
    assert slow.order == [b"first"]
    # What is not taken because of the first was not refused itself.
    assert slow.refused == [(1, errno.ENOSPC)]
    assert not operations.handles.get(fh).inode.write_lock.locked()
