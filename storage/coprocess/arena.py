"""The arena: large buffers in memory that the coprocess sees, too. Lent, and used again, as in storage/lending.py.

One memory file (memfd_create(2)), mapped once by each process. It is cut into slots of one size; only pages that were written to take
memory. A slot that comes back is the next to be lent, since its pages are at hand; beyond `keep` bytes of those, the pages of the one that
waited longest go back to the kernel.

Where there is no such memory, or no slot left, what is lent is private, and is sealed and opened by threads of this process.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from storage.buffers import address_of
from storage.interfaces import Buffer
from storage.lending import Buffers

log = logging.getLogger("fusefs.coprocess")

#: Bytes: a sealed sector of the usual size, with room for reading it in whole blocks of a disk; and a quarter of one, as "4+2" has it.
SLOT, SMALL_SLOT = 4 * 1024 * 1024 + 64 * 1024, 1024 * 1024 + 64 * 1024
#: Of each; 680 MB of address space, not of memory.
SLOTS = 128
#: Bytes of pages that are kept at hand, of each: about what is in use while somebody writes as quickly as it goes, appended and sealed.
#: With half of it pages were given back and taken anew all the time, for a tenth of all CPU.
KEEP = 112 * 1024 * 1024
#: Flags, a page of them.
FLAGS = 4096
#: Buffers that one pwritev(2) takes (IOV_MAX).
_PIECES = 1024

#: Where something stands in the memory file: offset and length in bytes.
Place = tuple[int, int]


class _Slots:
    """Of one size, one after the other from `begin` on."""

    def __init__(self, begin: int, size: int, count: int) -> None:
        self.size, self.end = size, begin + size * count
        # Only single operations of the deques, which need no lock: an object's end may come in the middle of anything, in any thread.
        #: Where those begin whose pages are at hand, the last one back last; and those that have none.
        self.warm: deque[int] = deque()
        self.cold: deque[int] = deque(range(begin, self.end, size))
        #: The fewest that were warm since `idle` was asked last.
        self._fewest = 0

    def free(self) -> int | None:
        """Where one begins that nobody has."""
        for slots in (self.warm, self.cold):
            try:
                at = slots.pop()
            except IndexError:
                continue
            self._fewest = min(self._fewest, len(self.warm))
            return at
        return None

    def idle(self) -> int:
        """How many were warm all the time since this was asked last."""
        fewest, self._fewest = self._fewest, len(self.warm)
        return min(fewest, len(self.warm))


class _Memory:
    """A memory file and its slots."""

    def __init__(self, slots: int) -> None:
        """OSError: there is no such thing here, it is forbidden, or there is not enough address space."""
        if not hasattr(os, "memfd_create"):
            raise OSError("this Python knows no memfd_create")
        if _strict():
            # Pages of a file are accounted for when they are written to, and whoever gets none is killed.
            raise OSError("vm.overcommit_memory is 2")
        #: Another process's: this one has come from it by fork.
        self.foreign = False
        small = _Slots(0, SMALL_SLOT, slots)
        #: Smallest first.
        self.kinds = (small, _Slots(small.end, SLOT, slots))
        #: One byte each, to tell the other process something while it is at work.
        self.flags: deque[int] = deque(range(self.kinds[-1].end, self.kinds[-1].end + FLAGS))
        self.size = self.kinds[-1].end + FLAGS
        self.fd = os.memfd_create("fusefs", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, self.size)
            self.mapped = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED)
        except BaseException:
            os.close(self.fd)
            raise
        self.begin = ctypes.addressof(ctypes.c_char.from_buffer(self.mapped))

    def free(self, size: int) -> tuple[_Slots, int] | None:
        """A slot for so many bytes that nobody has, and where it begins."""
        for slots in self.kinds:
            if size <= slots.size and (at := slots.free()) is not None:
                return slots, at
        return None

    def back(self, slots: _Slots, at: int, keep: int) -> None:
        """Nobody has it any more."""
        if self.foreign:
            # The other may have lent it again.
            return
        slots.warm.append(at)
        while len(slots.warm) * slots.size > keep:
            if not self.let_go(slots):
                break

    def let_go(self, slots: _Slots) -> bool:
        """Give the kernel the pages of the slot that was not used for longest. False: there is none."""
        try:
            oldest = slots.warm.popleft()
        except IndexError:
            return False  # another thread took it
        # Refused where memory is locked (mlockall(2)): then it stays, and does no harm.
        with suppress(OSError):
            self.mapped.madvise(mmap.MADV_REMOVE, oldest, slots.size)
        slots.cold.append(oldest)
        return True


class Flag:
    """One byte of the memory file, to tell the other process something while it is at work."""

    def __init__(self, memory: _Memory, at: int) -> None:
        #: Where it stands.
        self.at = at
        self._mapped = memory.mapped
        self._mapped[at] = 0
        weakref.finalize(self, memory.flags.append, at).atexit = False

    def set(self) -> None:
        """The other process sees it from now on."""
        self._mapped[self.at] = 1


class Arena:
    """See the module. From any thread."""

    def __init__(self, keep: int = KEEP, slots: int = SLOTS) -> None:
        """`keep`: bytes, and `slots`: how many, of each size."""
        self._keep = keep
        self._slots = slots
        self._private = Buffers(keep)
        self._making = threading.Lock()
        self._memory: _Memory | None = None
        self._tried = False

    @property
    def file(self) -> Place | None:
        """Descriptor and size of the memory file; None: there is none."""
        memory = self._made()
        return None if memory is None else (memory.fd, memory.size)

    def _made(self) -> _Memory | None:
        if not self._tried:
            with self._making:
                if not self._tried and self._slots:
                    try:
                        self._memory = _Memory(self._slots)
                    except OSError as error:
                        log.info("no memory to share with a second process (%s): threads seal and open sectors", error)
                self._tried = True
        return self._memory

    def lend(self, size: int) -> memoryview:
        """`size` bytes, at least one, to be written to; what is in them is anything."""
        memory = self._made()
        found = memory.free(size) if memory is not None else None
        if memory is None or found is None:
            return self._private.lend(size)
        slots, at = found
        # An object of its own for each loan: views hold on to it, and its end is the end of the loan.
        loan = (ctypes.c_char * size).from_buffer(memory.mapped, at)
        weakref.finalize(loan, memory.back, slots, at, self._keep).atexit = False
        return memoryview(loan).cast("B")

    def lend_private(self, size: int) -> memoryview:
        """As `lend`, of memory that only this process sees."""
        return self._private.lend(size)

    def spare(self, size: int) -> memoryview | None:
        """As `lend`, of the memory file, for what can as well be elsewhere. None: half of it is in use, or there is none."""
        return self.lend(size) if 2 * self.free_slots >= self._slots > 0 else None

    def place(self, data: Buffer) -> Place | None:
        """Where `data` stands in the memory file; None: it does not."""
        memory = self._memory
        if memory is None or not len(data):
            return None
        at = address_of(data) - memory.begin
        return (at, len(data)) if 0 <= at <= memory.size - len(data) else None

    def fill(self, target: memoryview, pieces: Sequence[Buffer]) -> bool:
        """Copy `pieces` to the beginning of what was lent, letting go of the interpreter's lock once for many of them. False: it does not
        stand in the memory file, or there is no memory left."""
        memory, place = self._memory, self.place(target)
        if memory is None or place is None:
            return False
        at = place[0]
        for start in range(0, len(pieces), _PIECES):
            some = pieces[start : start + _PIECES]
            wanted = sum(map(len, some))
            try:
                if os.pwritev(memory.fd, some, at) != wanted:
                    return False
            except OSError as error:
                log.debug("the memory file takes no more: %s", error)
                return False
            at += wanted
        return True

    def flag(self) -> Flag | None:
        """Of the memory file, not set; lent as memory is. None: there is none left."""
        memory = self._memory
        try:
            at = None if memory is None else memory.flags.pop()
        except IndexError:
            return None
        return None if memory is None or at is None else Flag(memory, at)

    def trim(self) -> None:
        """Give the kernel the pages nobody has used since this was called last. Blocking, for some milliseconds."""
        memory = self._memory
        if memory is not None:
            for slots in memory.kinds:
                for _ in range(slots.idle()):
                    memory.let_go(slots)
                    # Whoever else wants the interpreter gets it in between.
                    time.sleep(0)

    def forget(self) -> None:
        """In a forked child: what was lent before stays as it is, and belongs to both; what is lent from now on is its own."""
        memory, self._memory = self._memory, None
        self._making, self._tried = threading.Lock(), False
        if memory is not None:
            memory.foreign = True
            os.close(memory.fd)

    @property
    def free_slots(self) -> int:
        """For the largest, that nobody has."""
        memory = self._made()
        return 0 if memory is None else len(memory.kinds[-1].warm) + len(memory.kinds[-1].cold)


def _strict() -> bool:
    """Does the kernel promise no more memory than it has (proc(5), overcommit_memory)?"""
    try:
        with open("/proc/sys/vm/overcommit_memory", "rb") as file:
            return file.read().strip() == b"2"
    except OSError:
        return False
