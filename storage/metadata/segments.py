"""The journal's files: made, prepared, recycled. All functions block and belong in a thread.

    spare-<number>      nobody needs its content; never read
    segment-<number>    in use, or prepared: a header of zeros

The number in the name is the one in the header (16 hex digits). Files are filled with zeros and flushed when they are made, so that the
fdatasync of a later write has no metadata to write. Every rename is durable before anything relies on it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from storage.durable import from_os_error, fsync_dir
from storage.errors import Corrupt, IOFailure, NotFound, NotPermitted
from storage.interfaces import Buffer
from storage.metadata.records import HEADER_SIZE
from storage.seams import Failpoints

_NAME = re.compile(r"(segment|spare)-([0-9a-f]{16})\Z", re.ASCII)
#: More than any segment has; a limit for what is read into memory.
MAX_SEGMENT = 1 << 30
_ZEROS = bytes(1 << 20)
#: Buffers per system call; the kernel's IOV_MAX is 1024.
_IOV = 1000
#: Below this one copy is quicker than a long list of buffers.
_JOIN = 64 * 1024
#: Spares kept for reuse; more are unlinked.
SPARES = 4


@dataclass(slots=True)
class Held:
    """What a segment holds of one value's tail."""

    #: The largest end offset of any piece.
    end: int
    #: The run of pieces written last that join: a tail that was written once more begins a new one.
    run_start: int
    run_end: int


@dataclass(slots=True, eq=False)
class Segment:
    """One open segment file. The journal thread alone writes to it, and changes `used` to `salt` only while a commit is being written."""

    number: int
    path: Path
    fd: int
    #: Bytes of the file.
    size: int
    #: Bytes up to the end of the last record; 0: prepared.
    used: int = 0
    #: Of the last record in it.
    last_sequence: int = 0
    epoch: int = 0
    salt: bytes = b""
    #: What is written goes past the page cache, see `blocks`. Of the one that writes.
    past_cache: bool = False
    #: Of values whose tails in here were not found unneeded yet, durable pieces only. The event loop's.
    tails: dict[int, Held] = field(default_factory=dict)

    def hold(self, value_id: int, start: int, end: int) -> None:
        """A piece of a tail is durable in here."""
        held = self.tails.get(value_id)
        if held is None:
            self.tails[value_id] = Held(end, start, end)
            return
        if held.run_start <= start <= held.run_end:
            held.run_end = max(held.run_end, end)
        else:
            held.run_start, held.run_end = start, end
        held.end = max(held.end, end)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(frozen=True, slots=True)
class Listing:
    """What the journal's directory holds: (number, path) of segments and spares, by number."""

    segments: list[tuple[int, Path]]
    spares: list[tuple[int, Path]]


def segment_path(directory: Path, number: int) -> Path:
    return directory / f"segment-{number:016x}"


def list_files(directory: Path) -> Listing:
    """Files with other names are left alone. IOFailure."""
    found: dict[str, list[tuple[int, Path]]] = {"segment": [], "spare": []}
    try:
        for name in os.listdir(directory):
            match = _NAME.match(name)
            if match:
                found[match[1]].append((int(match[2], 16), directory / name))
    except OSError as error:
        raise from_os_error(error, f"reading the journal {directory}") from error
    return Listing(sorted(found["segment"]), sorted(found["spare"]))


def open_segment(number: int, path: Path, *, writable: bool = True) -> Segment:
    """An existing segment, for reading and (`writable`) writing. Corrupt if it cannot be one."""
    try:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        size = os.fstat(fd).st_size
    except OSError as error:
        raise from_os_error(error, f"opening journal segment {path}") from error
    segment = Segment(number, path, fd, size)
    if size > MAX_SEGMENT:
        segment.close()
        raise Corrupt(f"journal segment {path} has {size} bytes, which no segment has; recover the volume from its hosts")
    return segment


def read_all(segment: Segment) -> bytes:
    """The file's bytes. IOFailure."""
    parts, at = [], 0
    try:
        while part := os.pread(segment.fd, segment.size - at, at):
            parts.append(part)
            at += len(part)
    except OSError as error:
        raise from_os_error(error, f"reading journal segment {segment.path}") from error
    return b"".join(parts)


def prepare(directory: Path, number: int, size: int, spare: Path | None, failpoints: Failpoints, zeros: bool = True) -> Segment:
    """A segment ready to be written, durable as such: from `spare` if there is one of that size, else new.

    Its room on the disk is its own from then on. `zeros`: filled, so that a later fdatasync has nothing else to write; otherwise only
    allocated, which is quicker to make. NoSpace, IOFailure: nothing was changed but that the spare may be gone.
    """
    path = segment_path(directory, number)
    origin = spare if spare is not None else directory / f"spare-{number:016x}"
    fd = -1
    try:
        failpoints.hit("journal.segment.create")
        fd = os.open(origin, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.fstat(fd).st_size == size:
            # Filled before; only the header must not say anything.
            write_at(fd, [bytes(HEADER_SIZE)], 0)
        else:
            os.ftruncate(fd, 0)
            if zeros:
                for at in range(0, size, len(_ZEROS)):
                    write_at(fd, [memoryview(_ZEROS)[: size - at]], at)
            else:
                allocate(fd, size)
        failpoints.hit("journal.segment.before_fsync")
        os.fsync(fd)
        failpoints.hit("journal.segment.before_rename")
        os.rename(origin, path)
        fsync_dir(directory)
        failpoints.hit("journal.segment.prepared")
    except BaseException as error:
        if fd >= 0:
            with suppress(OSError):  # Closing can fail too, on a network's filesystem.
                os.close(fd)
        # Whatever stage it was at: a file under neither name is none, and the error that brought us here is the one to tell. After a
        # (simulated) crash it stays.
        for name in (origin, path) if isinstance(error, Exception) else ():
            with suppress(OSError):
                os.unlink(name)
        if isinstance(error, OSError):
            raise from_os_error(error, f"making journal segment {path}; free some space on the local disk or check it") from error
        if isinstance(error, (NotFound, NotPermitted)):
            raise IOFailure(str(error)) from error
        raise
    return Segment(number, path, fd, size)


def allocate(fd: int, size: int) -> None:
    """Give a file `size` bytes of the disk. OSError; where the filesystem cannot do that alone, zeros are written."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        for at in range(0, size, len(_ZEROS)):
            write_at(fd, [memoryview(_ZEROS)[: size - at]], at)


def retire(directory: Path, segment: Segment, keep: bool, failpoints: Failpoints) -> Path | None:
    """The segment's content is not needed any more: make it a spare (`keep`), whose path is returned, or unlink it. Durable. IOFailure.

    Durable one by one, so that after a crash what is left of the log has no hole.
    """
    try:
        failpoints.hit("journal.segment.recycle")
        spare = directory / f"spare-{segment.number:016x}" if keep else None
        # What an attempt that failed halfway has done is done.
        if spare is None:
            segment.path.unlink(missing_ok=True)
        elif segment.path.exists() or not spare.exists():
            os.rename(segment.path, spare)
        failpoints.hit("journal.segment.before_dirsync")
        fsync_dir(directory)
    except OSError as error:
        raise from_os_error(error, f"recycling journal segment {segment.path}") from error
    segment.close()
    return spare


def unlink_all(paths: Sequence[Path]) -> None:
    """Files nobody needs go. IOFailure."""
    try:
        for path in paths:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise from_os_error(error, f"removing spare journal segments such as {paths[0]}") from error


def write_at(fd: int, pieces: Sequence[Buffer], at: int) -> None:
    """Write `pieces` one after the other from `at`. OSError as it comes: how much was written is not known then."""
    queue: list[Buffer]
    if sum(map(len, pieces)) <= _JOIN:
        whole = b"".join(pieces)
        written = os.pwritev(fd, [whole], at)
        if written == len(whole):
            return
        # The rest as what is large; a disk that takes nothing is met there.
        at += written
        queue = [memoryview(whole)[written:]]
    else:
        queue = list(reversed(pieces))
    while queue:
        some: list[Buffer] = queue[: -_IOV - 1 : -1]
        written = os.pwritev(fd, some, at)
        if written <= 0:
            raise OSError(errno.EIO, "the disk takes no bytes")
        at += written
        while queue and written >= len(queue[-1]):
            written -= len(queue.pop())
        if written:
            queue[-1] = memoryview(queue[-1])[written:]
