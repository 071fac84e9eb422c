"""Parity by ISA-L's own call, straight from where the pieces are to where it is wanted.

pyeclib clears fragments, copies the data into them, and copies all of them out again, data included: of a sector of 4 MiB that is five
sixths of the 1.9 ms of CPU that "4+2" took. Its wheel brings ISA-L along, whose `ec_encode_data` (erasure_code.h) takes pointers; calling
that takes 0.3 ms. What comes out is the same, which is looked at once; where the library is not to be found, or differs, pyeclib goes on.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
from collections.abc import Callable, Sequence
from ctypes.util import find_library
from functools import cache

from storage.buffers import address_of
from storage.interfaces import Buffer

log = logging.getLogger("fusefs.sectors")

_DISTRIBUTION = "pyeclib"
#: Bytes of ISA-L's tables for each coefficient.
_TABLE = 32
#: What the two are compared with: pieces of so many bytes.
_SAMPLE = 96


class Encoder:
    """Of one k and m: Reed-Solomon with the Cauchy matrix that pyeclib's `isa_l_rs_cauchy` has, too. From any thread."""

    def __init__(self, library: ctypes.CDLL, k: int, m: int) -> None:
        self._call = library.ec_encode_data
        self._k, self._m = k, m
        matrix = (ctypes.c_ubyte * (k * (k + m)))()
        library.gf_gen_cauchy1_matrix(matrix, k + m, k)
        self._tables = (ctypes.c_ubyte * (_TABLE * k * m))()
        # Its first k rows are the data themselves.
        library.ec_init_tables(k, m, ctypes.byref(matrix, k * k), self._tables)

    def encode(self, data: Sequence[Sequence[Buffer]], parity: memoryview) -> None:
        """`data`: the buffers that make up each of k pieces of one length; `parity`: room for m of them, one after the other. Blocking;
        without the GIL.

        A byte of parity is made of the bytes at the same place of all pieces, so they are taken in ranges in which each is one buffer.
        """
        piece = sum(map(len, data[0]))
        if len(data) != self._k or any(sum(map(len, buffers)) != piece for buffers in data) or parity.nbytes != self._m * piece:
            raise RuntimeError(f"{len(data)} pieces of {piece} bytes and {parity.nbytes} of parity are not {self._k} and {self._m} pieces")
        target = address_of(parity)
        #: Of each piece: where its buffers begin and how long they are, the next one last.
        left = [[(address_of(buffer), len(buffer)) for buffer in reversed(buffers) if len(buffer)] for buffers in data]
        sources, targets = (ctypes.c_void_p * self._k)(), (ctypes.c_void_p * self._m)()
        at = 0
        while at < piece:
            step = min(buffers[-1][1] for buffers in left)
            for number, buffers in enumerate(left):
                begin, length = buffers.pop()
                sources[number] = begin
                if length > step:
                    buffers.append((begin + step, length - step))
            for number in range(self._m):
                targets[number] = target + number * piece + at
            self._call(step, self._k, self._m, self._tables, sources, targets)
            at += step


def encoder(k: int, m: int, reference: Callable[[bytes], list[bytes]]) -> Encoder | None:
    """None where it cannot be had. `reference`: the m pieces of parity of k pieces, as they have to be."""
    library = _library()
    if library is None:
        return None
    made = Encoder(library, k, m)
    sample, parity = bytearray(os.urandom(k * _SAMPLE)), bytearray(m * _SAMPLE)
    made.encode([[memoryview(sample)[number * _SAMPLE : (number + 1) * _SAMPLE]] for number in range(k)], memoryview(parity))
    if bytes(parity) != b"".join(reference(bytes(sample))):
        log.warning('ISA-L and pyeclib do not agree on "%d+%d"; pyeclib encodes', k, m)
        return None
    return made


@cache
def _library() -> ctypes.CDLL | None:
    try:
        brought = importlib.metadata.files(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        brought = []
    paths = [str(file.locate()) for file in brought if file.name.startswith("libisal")]
    # The wheel's own; where pyeclib was built here, the system's, which takes looking for.
    for path in paths or filter(None, [find_library("isal")]):
        try:
            library = ctypes.CDLL(path)
            library.gf_gen_cauchy1_matrix.restype = library.ec_init_tables.restype = library.ec_encode_data.restype = None
            library.gf_gen_cauchy1_matrix.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
            library.ec_init_tables.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
            library.ec_encode_data.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 3
        except (OSError, AttributeError) as error:
            log.debug("no ISA-L in %s: %s", path, error)
            continue
        return library
    return None
