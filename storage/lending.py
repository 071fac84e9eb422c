"""Large buffers whose memory is used again.

Memory that the kernel has just handed out is what costs: to touch it takes 300 us per MiB, and 1,500 in a virtual machine that reports its
free pages to its host (virtio_balloon), which then has to find them again; the same bytes go into memory that is at hand in 90.

What is lent comes back by itself, when the last object that refers to it is gone: a view of it, however it was made (`memoryview`, a slice,
`toreadonly`), keeps it from being lent to another. So whoever has bytes of it has them for as long as he keeps the view.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import deque
from contextlib import suppress

#: A buffer is lent for what takes most of it, so that what is counted is about what is held.
MOST = 0.75


class Buffers:
    """Those that came back: up to `keep` bytes, the last one first out. From any thread."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        # Only single operations of the deque, which need no lock: an object's end may come in the middle of anything, in any thread.
        self._free: deque[mmap.mmap] = deque()

    def lend(self, size: int) -> memoryview:
        """`size` bytes, at least one, to be written to; what is in them is anything."""
        memory = self._find(size)
        # An object of its own for each loan: views hold on to it, and its end is the end of the loan.
        loan = (ctypes.c_char * size).from_buffer(memory)
        weakref.finalize(loan, self._back, memory).atexit = False
        return memoryview(loan).cast("B")

    def _find(self, size: int) -> mmap.mmap:
        for _ in range(len(self._free)):
            try:
                memory = self._free.pop()
            except IndexError:
                break  # another thread took it
            if size <= len(memory) and len(memory) * MOST <= size:
                return memory
            self._free.appendleft(memory)
        return huge(size)

    def _back(self, memory: mmap.mmap) -> None:
        self._free.append(memory)
        while self.kept > self._keep:
            with suppress(IndexError):  # another thread took it
                self._free.popleft()

    @property
    def kept(self) -> int:
        """Bytes of those that are back."""
        return sum(map(len, list(self._free)))


def huge(size: int) -> mmap.mmap:
    """Private memory of at least one byte, in pages as large as the kernel gives: it then takes two faults instead of a thousand."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        # A kernel that knows no such pages says so.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
