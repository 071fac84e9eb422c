"""Buffers that a disk can take as they are: aligned for direct I/O (open(2), O_DIRECT)."""

from __future__ import annotations

import ctypes
import mmap

#: Of memory, offset and length: what every filesystem and disk is content with (a page; many ask for 512 bytes).
ALIGNMENT = 4096


class Aligned(bytearray):
    """What stands behind an aligned buffer."""


def aligned(size: int) -> memoryview:
    """`size` bytes that may be written to, the first at a multiple of ALIGNMENT. They live as long as a view of them does."""
    whole = Aligned(size + ALIGNMENT)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(whole)) % ALIGNMENT
    return memoryview(whole)[start : start + size]


def is_aligned(data: object) -> bool:
    """Whether `data` is what `aligned` gave, `lending.Buffers`, or the arena (in either process), or a view of it, which may begin
    anywhere."""
    return isinstance(data, memoryview) and isinstance(data.obj, (Aligned, ctypes.Array, mmap.mmap))
