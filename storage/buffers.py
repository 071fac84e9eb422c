"""Buffers that a disk can take as they are: aligned for direct I/O (open(2), O_DIRECT); and where any buffer stands."""

from __future__ import annotations

import ctypes
import mmap

from storage.interfaces import Buffer

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


class _View(ctypes.Structure):
    """`Py_buffer` (Python's C API, stable since 3.11)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of(data: Buffer) -> int:
    """Where it begins in memory; also of what cannot be written to, of which ctypes tells nothing."""
    view = _View()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(view), 0)
    try:
        return view.buf or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
