"""The lock of a directory host, `~lock`: exclusive for a conditional put, shared around every other rename and unlink (flock(2))."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from storage.errors import Unavailable

LOCK = "~lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Locked(Exception):
    """Another process is in the middle of a change; ask again shortly. Does not leave the directory host."""


@contextmanager
def shared_lock(root: int) -> Iterator[None]:
    """Keeps conditional puts out; where the filesystem has no locks there are none to keep out. `root`: descriptor. OSError."""
    fd = _open(root)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(fd)


@contextmanager
def exclusive_lock(root: int, url: str) -> Iterator[None]:
    """Locked if anybody has it. Unavailable where the filesystem has no locks. OSError."""
    fd = _open(root)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise Unavailable(f"host {url}: its filesystem has no locks (flock), so it cannot do conditional puts") from error
            raise
        yield
    finally:
        os.close(fd)


def _open(root: int) -> int:
    # A description of its own for every call: threads that shared one would share the lock.
    return os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=root)
