"""Blocks: small commits go to a segment in whole blocks, past the page cache.

A commit of some hundred bytes that is flushed at once gains nothing from the page cache: its page is copied, marked, found again and
written, whole. So the writer keeps the last block as it stands on the disk, adds what is new and writes that, which takes less time and CPU
(docs/performance.md). As where the page cache does that, a block is written anew with what is durable in it already, byte for byte the
same, so that a write that is torn changes nothing of it.

    | durable ......... | durable | new | zeros |
                        ^ a block's beginning   ^ a block's end

What is large, and where the filesystem has no such thing, goes through the page cache; then the flush is all the same.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence

from storage.buffers import ALIGNMENT
from storage.interfaces import Buffer
from storage.metadata.segments import Segment

#: Bytes of blocks written at a time, at most: beyond, copying costs what is saved.
ROOM = 64 * 1024
_ZEROS = bytes(ALIGNMENT)


class Blocks:
    """Writes to the newest segment, one at a time, whichever thread does. It knows of all of them: `write`, and where it says no
    `through_cache`."""

    def __init__(self) -> None:
        #: The last block of the segment, up to what is used of it, stands at its beginning.
        self._view = memoryview(mmap.mmap(-1, ROOM))
        #: False once the filesystem has refused.
        self._works = True

    def write(self, segment: Segment, pieces: Sequence[Buffer], end: int) -> bool:
        """Write what goes from `segment.used` up to `end`; it is to be flushed. False: nothing of it was written, or not all. OSError as it
        comes: how much was written is not known then."""
        at = segment.used % ALIGNMENT
        start = segment.used - at
        stop = -(-end // ALIGNMENT) * ALIGNMENT
        length = stop - start
        if length > ROOM or not self._works or stop > segment.size:
            return False
        view = self._view
        view[at : end - start] = b"".join(pieces)
        view[end - start : length] = _ZEROS[: stop - end]
        try:
            self._past_cache(segment, True)
            written = os.pwritev(segment.fd, [view[:length]], start)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            # Not on this filesystem.
            self._works = False
            written = 0
        if written != length:
            self._past_cache(segment, False)
            return False
        last = end % ALIGNMENT
        if length > ALIGNMENT:
            view[:last] = view[end - start - last : end - start]
        return True

    def through_cache(self, segment: Segment, pieces: Sequence[Buffer], end: int) -> tuple[list[Buffer], int]:
        """What `write` has not done is to be written through the page cache, from `segment.used` up to `end`: which pieces, and where.

        With what stands in the first block already: so the page cache never has to have that block as the disk has it. OSError.
        """
        self._past_cache(segment, False)
        at = segment.used % ALIGNMENT
        whole: list[Buffer] = [bytes(self._view[:at]), *pieces]
        wanted = end % ALIGNMENT
        parts: list[Buffer] = []
        for piece in reversed(pieces):
            if wanted <= 0:
                break
            parts.append(memoryview(piece)[max(len(piece) - wanted, 0) :])
            wanted -= len(piece)
        last = b"".join(reversed(parts))
        # What is wanting stands there already: it is the same block.
        self._view[max(wanted, 0) : end % ALIGNMENT] = last
        return whole, segment.used - at

    def _past_cache(self, segment: Segment, past: bool) -> None:
        if segment.past_cache is not past:
            flags = fcntl.fcntl(segment.fd, fcntl.F_GETFL)
            fcntl.fcntl(segment.fd, fcntl.F_SETFL, flags | os.O_DIRECT if past else flags & ~os.O_DIRECT)
            segment.past_cache = past
