"""Private directories for read-only mounts: control socket, and metadata that were restored from hosts. Names and sizes, no contents.

    $XDG_CACHE_HOME/fusefs/                     or TMPDIR/fusefs-<uid>/ where that variable is not set; mode 0700, ours
        lock                                    flock: held while a directory is made or swept
        read-only-<random>/                     one per mount; mode 0700
            lock                                flock: held as long as its process lives

What a process left that was killed is removed by the next read-only mount.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import BadArgument, FusefsError, IOFailure, NoSpace

PREFIX = "read-only-"
LOCK = "lock"


class Scratch:
    """A directory of this process's own; blocking."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def make(cls) -> Scratch:
        """Also removes what dead processes left. BadArgument: the place is not ours, or cannot be used; NoSpace."""
        base = _base()
        try:
            with _locked(base):
                _sweep(base)
                path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
                lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _failure(base, error) from error
        return cls(path, lock)

    def remove(self) -> None:
        """Everything in it is gone. What cannot be removed now is swept later."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _failure(path: Path, error: OSError) -> FusefsError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{path}: {error.strerror}; free some space, or set XDG_CACHE_HOME to a directory elsewhere")
    if error.errno == errno.EIO:
        return IOFailure(f"{path}: {error.strerror}; check the disk")
    return BadArgument(f"{path} cannot be used: {error.strerror}; set XDG_CACHE_HOME to a directory of your own")


def _base() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # Relative ones are to be ignored, says the XDG base directory specification.
    base = Path(cache) / "fusefs" if cache.startswith("/") else Path(tempfile.gettempdir()) / f"fusefs-{os.geteuid()}"
    try:
        base.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        base.mkdir(mode=0o700, exist_ok=True)
        info = os.lstat(base)
    except OSError as error:
        raise _failure(base, error) from error
    # In a directory that everybody can write to, somebody else may have made it, or a link, for us to walk into.
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise BadArgument(f"{base} is not a directory that only this user can enter: remove it, or set XDG_CACHE_HOME to another place")
    return base


@contextmanager
def _locked(base: Path) -> Iterator[None]:
    fd = os.open(base / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # Held by others for as long as a sweep takes.
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _sweep(base: Path) -> None:
    for path in base.iterdir():
        if not path.name.startswith(PREFIX):
            continue
        try:
            fd = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            fd = -1  # made, and killed before it had a lock: nobody makes one now, that takes the lock we hold
        try:
            if fd >= 0:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            if fd >= 0:
                os.close(fd)
