"""The least that an append with fsync can be on pyfuse3: a null filesystem whose fsync seals what was written since the one before, and
writes and flushes that, as `storage.metadata.journal` does. Run as `python -m scripts.benchmarks.sealedlog MOUNTPOINT DIRECTORY`.

    WRITE   what is new of the page is kept in memory
    FSYNC   AES-256-GCM of it, BLAKE3 of the record, the block that it ends in past the page cache, and fdatasync

It has the receiver of fusefs, and keeps cores from halting as that does; nothing else: no inodes in a database, no sizes or times on the
disk, no room to be looked after, no errors, no group commit. It writes over the same log again and again.
"""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pyfuse3
import trio
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fusefs.awake import Awake
from fusefs.receiver import Receiver
from scripts.benchmarks.nullfs import NullOperations
from storage.buffers import ALIGNMENT

#: Bytes of the log, filled before: a flush has no other metadata to write.
LOG = 16 << 20
#: Bytes that are kept without a flush, for appends that want none. A WRITE has a mebibyte at most.
MOST = 256 << 10
#: A record beside what is sealed, about as the journal's: head, place, nonce.
HEAD = 96
#: Nothing is protected by it; so a test can see that all of what was written is there.
KEY = bytes(32)


class SealedLog(NullOperations):
    """See the module. What several programs write is one stream to it."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        path = directory / "log"
        with open(path, "wb") as log:
            log.write(bytes(LOG))
            os.fsync(log.fileno())
        self._fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
        #: What is not in the log yet, and its bytes.
        self._pending: list[bytes] = []
        self._bytes = 0
        #: The last block as it stands there, and up to where it is used.
        self._blocks = memoryview(mmap.mmap(-1, 2 << 20))
        self._end = 0
        self._encrypt, self._count = AESGCM(KEY).encrypt, 0
        self.awake = Awake(True)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        size = self._inodes[fh].size
        if off + len(buf) > size:
            # The kernel sends the page again that it ends in.
            self._pending.append(buf[max(0, size - off) :])
            self._bytes += len(self._pending[-1])
            if self._bytes > MOST:
                self._flush()
        return await super().write(fh, off, buf)

    async def fsync(self, fh: int, datasync: bool) -> None:  # noqa: ARG002
        self.awake.asked()
        self._flush()

    def _flush(self) -> None:
        self._count += 1
        sealed = self._encrypt(self._count.to_bytes(12, "big"), b"".join(self._pending), None)
        self._pending.clear()
        self._bytes = 0
        record = bytes(HEAD) + sealed
        record += blake3(record).digest()
        record += bytes(-len(record) % 8)
        used = self._end % ALIGNMENT
        start, length = self._end - used, used + len(record)
        whole = -(-length // ALIGNMENT) * ALIGNMENT
        self._blocks[used:length] = record
        os.pwrite(self._fd, self._blocks[:whole], start)
        os.fdatasync(self._fd)
        self._end += len(record)
        last = self._end % ALIGNMENT
        self._blocks[:last] = self._blocks[length - last : length]
        if self._end > LOG - len(self._blocks):
            self._end = 0


async def _served(log: SealedLog) -> None:
    with Receiver(log.awake).receiving():
        await pyfuse3.main()


def main() -> None:
    """Serve until it is unmounted."""
    mountpoint, directory = sys.argv[1], Path(sys.argv[2])
    directory.mkdir(exist_ok=True)
    log = SealedLog(directory)
    pyfuse3.init(log, mountpoint, {"default_permissions", "fsname=sealedlog", "subtype=null", "allow_other"})
    try:
        trio.run(_served, log)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
