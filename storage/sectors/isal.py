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
from collections.abc import Callable
from ctypes.util import find_library
from functools import cache

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

    def encode(self, data: memoryview, parity: memoryview) -> None:
        """`data`: k pieces of one length, one after the other; `parity`: room for m of them. Both can be written to. Blocking; without the
        GIL."""
        piece = data.nbytes // self._k
        if data.nbytes != self._k * piece or parity.nbytes != self._m * piece:
            raise RuntimeError(f"{data.nbytes} and {parity.nbytes} bytes are not {self._k} and {self._m} pieces")
        begins = ctypes.addressof(ctypes.c_char.from_buffer(data)), ctypes.addressof(ctypes.c_char.from_buffer(parity))
        sources = (ctypes.c_void_p * self._k)(*(begins[0] + number * piece for number in range(self._k)))
        targets = (ctypes.c_void_p * self._m)(*(begins[1] + number * piece for number in range(self._m)))
        self._call(piece, self._k, self._m, self._tables, sources, targets)


def encoder(k: int, m: int, reference: Callable[[bytes], list[bytes]]) -> Encoder | None:
    """None where it cannot be had. `reference`: the m pieces of parity of k pieces, as they have to be."""
    library = _library()
    if library is None:
        return None
    made = Encoder(library, k, m)
    sample, parity = bytearray(os.urandom(k * _SAMPLE)), bytearray(m * _SAMPLE)
    made.encode(memoryview(sample), memoryview(parity))
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
