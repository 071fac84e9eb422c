"""Two programs on a mount that must not notice what happens to the hosts behind it: one appends, with fsync; one reads it again.

    python -m tests.steady write FILE NOTES SEED    appends pieces of `content(SEED)`, each followed by fsync
    python -m tests.steady read FILE NOTES SEED     reads pieces anywhere in FILE, the kernel's cache dropped before, and compares

NOTES gets a line per step: the bytes written so far, or read in all. Ended by SIGTERM they end with 0; an error, or a wrong byte, is said
on stderr and ends them with 1. Nothing but the standard library.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from types import FrameType

#: No file becomes longer; the writer waits there.
LONGEST = 48 << 20
PIECE = 40_000
READ = 100_000


def content(seed: str) -> bytes:
    return random.Random(seed).randbytes(LONGEST)


class _Told:
    """SIGTERM, between two steps."""

    def __init__(self) -> None:
        self.now = False
        signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, _number: int, _frame: FrameType | None) -> None:
        self.now = True


def write(path: str, notes: int, seed: str, told: _Told) -> None:
    data, chance = content(seed), random.Random(f"{seed}/write")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    at = os.fstat(fd).st_size
    while not told.now:
        view = memoryview(data)[at : at + chance.randint(1, PIECE)]
        at += len(view)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
        os.write(notes, b"%d\n" % at)
        time.sleep(0.005)
    os.close(fd)


def read(path: str, notes: int, seed: str, told: _Told) -> None:
    data, chance = content(seed), random.Random(f"{seed}/read")
    total = 0
    while not told.now:
        fd = os.open(path, os.O_RDONLY)
        size = os.fstat(fd).st_size
        offset = chance.randrange(size)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        got = os.pread(fd, chance.randint(1, READ), offset)
        os.close(fd)
        if not got or got != data[offset : offset + len(got)]:
            raise OSError(0, f"{len(got)} bytes at {offset} of {size} are not those that were written")
        total += len(got)
        os.write(notes, b"%d\n" % total)
        time.sleep(0.005)


def main() -> int:
    what, path, notes, seed = sys.argv[1:]
    fd = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        (write if what == "write" else read)(path, fd, seed, _Told())
    except OSError as error:
        print(f"{what}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
