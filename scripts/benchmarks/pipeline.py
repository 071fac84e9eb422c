"""The least that a sealed write can be on pyfuse3: a null filesystem that takes what is written into sectors, which other processes seal
and put on the disk. Run as `python -m scripts.benchmarks.pipeline MOUNTPOINT DIRECTORY`.

    event loop -- number of a slot --> sealing: AES-256-GCM, a block at a time, and BLAKE3 of it all, by storage.sealing
         ^                                |
         |                                v
         +------- the same number -- putting (two): a file past the page cache, fsync

It has the receiver, the blocks and the sectors of fusefs, and keeps off the event loop's core as that does; nothing else: no metadata, no
journal, no hosts, no errors. What this does not reach of a disk's rate, fusefs hardly can.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import trio

from fusefs.receiver import Receiver
from scripts.benchmarks.nullfs import NullOperations
from storage.coprocess.aside import Aside, EventLoop
from storage.sealing import ShardHeader, root_of, seal, sealed_length

SECTOR = 4 << 20
#: Of a sealed one, and of its file: whole pages, for O_DIRECT.
SEALED = -(-sealed_length(SECTOR) // mmap.PAGESIZE) * mmap.PAGESIZE
SLOTS = 8
PUTTING = 2
#: Nothing is protected by it; so a test can see that all of what was written is there.
KEY = bytes(32)


def header(sector: int) -> ShardHeader:
    """Of the one with that number, from 1."""
    return ShardHeader(bytes(16), bytes(16), 1, SECTOR, sector)


class Pipeline(NullOperations):
    """See the module. One program writes, one file after the other."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        #: Plaintext, then what it is sealed into; touched now, since memory that is new costs more than what is done to it.
        self._memory = memoryview(mmap.mmap(-1, SLOTS * (SECTOR + SEALED)))
        for at in range(0, len(self._memory), mmap.PAGESIZE):
            self._memory[at] = 0
        self._free = list(range(SLOTS))
        self._slot, self._at = self._free.pop(), 0
        self._back = trio.Event()
        plain, self._filled = os.pipe()
        sealed, into = os.pipe()
        self._done, done = os.pipe()
        ends = {plain, self._filled, sealed, into, self._done, done}
        _forked(lambda aside: self._seal(plain, into, aside), ends - {plain, into})
        for number in range(PUTTING):
            _forked(lambda aside, number=number: self._put(sealed, done, number, aside), ends - {sealed, done})  # type: ignore[misc]
        for end in (plain, sealed, into, done):
            os.close(end)

    # ---- in the others

    def _slot_of(self, number: int) -> tuple[memoryview, memoryview]:
        """Plaintext, and what it is sealed into."""
        begin = SLOTS * SECTOR + number * SEALED
        return self._memory[number * SECTOR : (number + 1) * SECTOR], self._memory[begin : begin + SEALED]

    def _seal(self, source: int, target: int, aside: Aside) -> None:
        count = 0
        while number := os.read(source, 1):
            aside.step()
            count += 1
            plain, sealed = self._slot_of(number[0])
            root_of(seal(KEY, header(count), [plain], lambda size, sealed=sealed: sealed[:size]))  # type: ignore[misc]
            os.write(target, number)

    def _put(self, source: int, target: int, mine: int, aside: Aside) -> None:
        count = 0
        while number := os.read(source, 1):
            aside.step()
            count += 1
            fd = os.open(self._directory / f"{mine}-{count}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
            try:
                if os.write(fd, self._slot_of(number[0])[1]) != SEALED:
                    raise OSError("a sector was not written whole")
                os.fsync(fd)
            finally:
                os.close(fd)
            os.write(target, number)

    # ---- in the event loop

    async def returned(self) -> None:
        """A task: slots come back. Until cancelled."""
        while True:
            # Ends with the mount.
            await trio.lowlevel.wait_readable(self._done)
            back = os.read(self._done, SLOTS)
            if not back:
                raise RuntimeError("the processes that seal and put have ended")
            self._free += back
            self._back.set()

    async def _wait(self, free: int) -> None:
        while len(self._free) < free:
            self._back = trio.Event()
            await self._back.wait()

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        size = len(buf)
        start = self._slot * SECTOR + self._at
        self._memory[start : start + size] = buf
        self._at += size
        if self._at + size > SECTOR:
            os.write(self._filled, bytes([self._slot]))
            await self._wait(1)
            self._slot, self._at = self._free.pop(0), 0
        return await super().write(fh, off, buf)

    async def fsync(self, fh: int, datasync: bool) -> None:  # noqa: ARG002
        await self._wait(SLOTS - 1)

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        for path in self._directory.iterdir():
            path.unlink()
        await super().unlink(parent_inode, name, ctx)


def _forked(work: Callable[[Aside], None], not_its: set[int]) -> None:
    """In a process of its own, which ends when nobody can send to it any more. If it fails, so does the mount: nobody waits for it."""
    parent = os.getpid()
    if os.fork():
        return
    try:
        for end in not_its:
            os.close(end)
        work(Aside(EventLoop(parent), os.getpid()))
    except BaseException:  # noqa: BLE001  a forked child goes no further, whatever it is
        traceback.print_exc()
        os.kill(parent, signal.SIGKILL)
    finally:
        os._exit(0)


async def _served(operations: Pipeline) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(operations.returned)
        with Receiver().receiving():
            await pyfuse3.main()
        nursery.cancel_scope.cancel()


def main() -> None:
    """Serve until it is unmounted."""
    mountpoint, directory = sys.argv[1], Path(sys.argv[2])
    directory.mkdir(exist_ok=True)
    operations = Pipeline(directory)
    pyfuse3.init(operations, mountpoint, {"default_permissions", "fsname=pipeline", "subtype=null", "allow_other"})
    try:
        trio.run(_served, operations)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
