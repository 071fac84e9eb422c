"""A process that appends to a value, commits, says so, appends more and dies by kill -9.

    python -m tests.values_child VOLUME VALUE_ID COMMITTED UNCOMMITTED DELAY      VALUE_ID 0: make one

The bytes are `stream(offset, length)`; standard output gets "VALUE_ID SIZE" once SIZE is committed.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path

import trio

from tests.rig import append, new_value, opened

BLOCK = 64


def stream(offset: int, length: int) -> bytes:
    """Bytes [offset, offset + length) of the one stream all values hold."""
    first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
    raw = b"".join(hashlib.blake2b(str(i).encode(), digest_size=BLOCK).digest() for i in range(first, last))
    return raw[offset - first * BLOCK :][:length]


async def main(volume_path: Path, value: int, committed: int, uncommitted: int, delay: float) -> None:
    async with opened(volume_path) as volume:
        value = value or new_value(volume)
        size = volume.values.size_of(value)
        await append(volume, value, stream(size, committed))
        await volume.values.commit(value)
        print(value, size + committed, flush=True)
        await append(volume, value, stream(size + committed, uncommitted))
        await trio.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), *(int(text) for text in sys.argv[2:5]), float(sys.argv[5]))
