"""Large pieces of open files, past the page cache where the filesystem lets them (O_DIRECT). For threads.

What is read as a whole stays with whoever reads it, in the clear: in the block cache, or the page cache of a mount. The page cache of
this disk would have it a second time, and its pages have to be found, filled, copied from and given back. What is large and aligned is
written so, which spares a copy of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable

from storage.buffers import ALIGNMENT, is_aligned
from storage.interfaces import Buffer
from storage.lending import Buffers

#: The least that is read or written so: below, the page cache gathers and is quicker.
MIN_DIRECT = 256 * 1024
#: The most that is read so at a time, whole: a sealed sector of the usual size. In small pieces a disk gives half of it, for twice the CPU.
MOST_DIRECT = 4 * 1024 * 1024 + 64 * 1024
#: To read into, of all hosts; kept for as many threads as read sectors ahead.
PIECES = Buffers(5 * MOST_DIRECT)
#: Bytes of buffers that are kept of each host, to read into through the page cache.
STEPS = 2 * 1024 * 1024


class DirectIO:
    """Of one filesystem: until it refuses, of a file at least. It may refuse to read what it writes."""

    def __init__(self) -> None:
        self._reads = self._writes = True
        self._steps = Buffers(STEPS)

    def read(self, fd: int, offset: int, length: int, step: int, take: Callable[[memoryview], object]) -> int:
        """`take` is given the range, some steps at a time, which are overwritten afterwards. Returns how many bytes there were; fewer than
        `length` where the file was cut off. OSError."""
        done = self._read_past(fd, offset, length, step, take) if self._reads and length >= MIN_DIRECT else 0
        if done == length:
            return done
        view = self._steps.lend(step)
        while done < length:
            piece = view[: min(step, length - done)]
            got = 0
            while got < len(piece) and (more := os.preadv(fd, [piece[got:]], offset + done + got)):
                got += more
            if got:
                take(piece[:got])
            done += got
            if got < len(piece):
                break  # cut off meanwhile
        return done

    def _read_past(self, fd: int, offset: int, length: int, step: int, take: Callable[[memoryview], object]) -> int:
        """As `read`, past the page cache: whole steps, and the rest if it got there. Returns how many bytes were taken."""
        done = 0
        # A step at least, and what has to be read before and after it.
        most = max(MOST_DIRECT, (step + 2 * ALIGNMENT) // ALIGNMENT * ALIGNMENT)
        while done < length:
            skip = (offset + done) % ALIGNMENT
            view = PIECES.lend(min(most, -(-(skip + length - done) // ALIGNMENT) * ALIGNMENT))
            got = min(self._read_aligned(fd, view, offset + done - skip) - skip, length - done)
            if got < length - done:
                got -= got % step
            if got <= 0:
                break
            take(view[skip : skip + got])
            done += got
        return done

    def _read_aligned(self, fd: int, view: memoryview, offset: int) -> int:
        """One preadv(2) past the page cache, all of it aligned; 0 where the filesystem has no such thing."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            return os.preadv(fd, [view], offset)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                # No memory in one piece, maybe; not that this filesystem cannot do it.
                return 0
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._reads = False
            return 0
        finally:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)

    def write(self, fd: int, data: Buffer) -> None:
        """All of `data` into the new file. OSError."""
        view = memoryview(data).cast("B")
        if self._writes and len(view) >= MIN_DIRECT and is_aligned(data):
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            try:
                fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
                whole = view[: len(view) // ALIGNMENT * ALIGNMENT]
                while whole:
                    whole = whole[os.write(fd, whole) :]
                    # After a write that stopped short, the rest may begin anywhere.
                    if len(whole) % ALIGNMENT:
                        break
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                # Not on this filesystem.
                self._writes = False
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
            view = view[os.lseek(fd, 0, os.SEEK_CUR) :]
        while view:
            view = view[os.write(fd, view) :]
