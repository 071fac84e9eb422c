"""Small files that are written whole and must survive: what durability on a local disk takes, in one place.

What is promised: after `write_file_atomic` returns, the file has the new content, after kill -9 and power cuts too; while it runs, and
if it raises, every reader and every crash sees the old content or the new, whole. What is not: anything on a disk that lies about
flushes; and an order between two writers of one path at a time (one of them wins, whole; callers hold the volume's lock).
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from contextlib import suppress
from pathlib import Path

from storage.errors import BadArgument, Corrupt, FusefsError, IOFailure, NoSpace, NotADirectory, NotFound, NotPermitted
from storage.interfaces import Buffer
from storage.seams import Failpoints, NoFailpoints

#: Temporary files are `.NAME.PID.N.tmp`; `sweep_temporaries` removes what a crash left.
_SUFFIX = ".tmp"
_numbers = itertools.count()


def from_os_error(error: OSError, doing: str) -> FusefsError:
    """The kind for what the operating system said while `doing` ("writing /v/keys.json")."""
    message = f"{doing}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(message)
    if error.errno == errno.ENOENT:
        return NotFound(message)
    if error.errno == errno.ENOTDIR:
        return NotADirectory(message)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return NotPermitted(message)
    return IOFailure(message)


def write_file_atomic(path: Path, data: Buffer, mode: int = 0o600, failpoints: Failpoints | None = None) -> None:
    """Create or replace `path` with `data`, durably, with exactly the permission bits `mode`. Blocking.

    Temporary file in the same directory, fsync, rename, fsync of the directory. Failpoints, in order: `durable.create`, `durable.written`,
    `durable.synced`, `durable.renamed`. Raises NoSpace, NotFound (the directory), NotPermitted, IOFailure. If it raises, the temporary file
    is gone, unless the failure was a crash.
    """
    hit = (failpoints or NoFailpoints()).hit
    doing = f"writing {path}"
    hit("durable.create")
    try:
        temporary, fd = _create_beside(path)
        try:
            try:
                os.fchmod(fd, mode)
                _write_all(fd, data)
                hit("durable.written")
                os.fsync(fd)
            finally:
                os.close(fd)
            hit("durable.synced")
            os.rename(temporary, path)
        except BaseException:
            # The error that brought us here is the one to tell.
            with suppress(OSError):
                os.unlink(temporary)
            raise
        hit("durable.renamed")
    except OSError as error:
        raise from_os_error(error, doing) from error
    fsync_dir(path.parent)


def fsync_dir(path: Path) -> None:
    """Names made, renamed and removed in the directory are durable when it returns. Blocking. Raises as `write_file_atomic`.

    A filesystem that knows no fsync of directories (EINVAL) keeps names in its own way; there is nothing more to be done.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise from_os_error(error, f"flushing the directory {path}") from error


def read_small_file(path: Path, limit: int) -> bytes:
    """The whole of a regular file. Corrupt, without reading on, if it has more than `limit` bytes; NotFound, NotPermitted, IOFailure."""
    try:
        # O_NONBLOCK: a fifo in place of the file must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BadArgument(f"{path} is not a regular file")
            parts: list[bytes] = []
            room = limit + 1
            while room and (part := os.read(fd, room)):
                parts.append(part)
                room -= len(part)
        finally:
            os.close(fd)
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error
    if not room:
        raise Corrupt(f"{path} is longer than {limit} bytes, which no such file is")
    return b"".join(parts)


def sweep_temporaries(directory: Path) -> list[Path]:
    """Remove the temporary files a crash left in `directory`, and say which. Only for who holds the lock on it: others may be writing."""
    removed = []
    try:
        for path in sorted(directory.glob(f".*.*.*{_SUFFIX}")):
            owner, _, number = path.name.removesuffix(_SUFFIX).rpartition(".")
            if number.isdecimal() and owner.rpartition(".")[2].isdecimal():
                path.unlink(missing_ok=True)
                removed.append(path)
    except OSError as error:
        raise from_os_error(error, f"removing temporary files in {directory}") from error
    return removed


def _create_beside(path: Path) -> tuple[Path, int]:
    """A new, empty file in the directory of `path`, open for writing."""
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{next(_numbers)}{_SUFFIX}")
        try:
            return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            # Left by an earlier process with our number; the next name is as good.
            continue


def _write_all(fd: int, data: Buffer) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]
