"""A file that only takes up room, so that there is some to give when a full disk would keep the metadata database from being written.

Without it a full disk could stay full for ever: what frees room (deletions, segments nobody needs) has to go into the database first.

    VOLUME/journal/ballast      zeros, or nothing the filesystem has written; never read; its absence only means that it was needed
"""

from __future__ import annotations

import os
from pathlib import Path

from storage.durable import fsync_dir
from storage.errors import FusefsError
from storage.metadata.segments import allocate
from storage.seams import Failpoints

NAME = "ballast"
#: Bytes of it; a quarter of a segment where segments are small.
SIZE = 2 * 1024 * 1024


class Ballast:
    """One file. Its methods block, and belong to the thread that writes the database."""

    def __init__(self, directory: Path, segment_size: int, failpoints: Failpoints) -> None:
        self._path = directory / NAME
        self._size = min(SIZE, segment_size // 4)
        self._failpoints = failpoints
        self.aboard = False

    def take(self) -> bool:
        """True if it is there now, or was. A disk that is too full for it is no error: then there is none."""
        try:
            self._failpoints.hit("journal.ballast.take")
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                allocate(fd, self._size)
                os.fsync(fd)
            finally:
                os.close(fd)
            fsync_dir(self._path.parent)
        except (OSError, FusefsError):
            self.drop()
            return False
        self.aboard = True
        return True

    def drop(self) -> bool:
        """Give its room back. True if that was any, be it what an earlier process took."""
        self.aboard = False
        try:
            os.unlink(self._path)
        except OSError:
            return False
        return True
