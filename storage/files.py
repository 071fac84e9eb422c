"""Files: key-value storage with append-only values, by name, for Python programs. Contract: `storage.interfaces.Files`.

Names are paths from the root of the volume ("logs/app/today"): components joined by "/", UTF-8, other bytes as surrogate
escapes (as `os.fsdecode` gives them). What a mount puts the Files sees, and the other way round. Symlinks are not followed:
a name here means one thing. What is not a regular file (fifo, device, symlink) is neither listed nor opened.
"""

from __future__ import annotations

import math
import os
import stat
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from storage import interfaces
from storage.errors import BadArgument, Exists, IsADirectory, NotADirectory, NotFound, NotPermitted
from storage.interfaces import Buffer
from storage.namespace import Namespace
from storage.namespace.records import ROOT, Dirent
from storage.replication import parse_replication
from storage.seams import Seams

DIRECTORY_MODE = 0o755
FILE_MODE = 0o644
#: Entries looked at between two checkpoints of a walk.
_SLICE = 256
#: Calls between two checkpoints where a call need not wait for anything: a checkpoint costs as much as a small append.
_BREATH = 32
#: Descriptors closed by the collector that still get the clear message.
_REMEMBERED = 10_000


@dataclass(slots=True)
class _Open:
    """One descriptor."""

    name: str
    ino: int
    readable: bool
    writable: bool
    last_used: float
    #: Calls under way: the collector leaves it alone meanwhile.
    busy: int = 0


class Files:
    """Descriptors over a Namespace. `run` is the collector: start it in the volume's nursery.

    uid, gid: owner of what is made here; default: the process's.
    """

    def __init__(
        self, namespace: Namespace, seams: Seams, *, idle_timeout: float = 600.0, uid: int | None = None, gid: int | None = None
    ) -> None:
        if not idle_timeout > 0:
            raise BadArgument(f"idle_timeout of {idle_timeout} s: it must be more than 0")
        self._namespace = namespace
        self._clock = seams.clock
        self._idle_timeout = idle_timeout
        self._uid = os.getuid() if uid is None else uid
        self._gid = os.getgid() if gid is None else gid
        self._open: dict[int, _Open] = {}
        self._next_fd = 1
        #: fd -> name of what the collector closed, the latest last.
        self._collected: OrderedDict[int, str] = OrderedDict()
        self._calls = 0

    def __repr__(self) -> str:
        return f"<Files open={len(self._open)}>"

    # ---- descriptors

    async def open(
        self, name: str, existing: bool | None = None, write: bool = False, read: bool = True, replication: str | None = None
    ) -> int:
        """NotFound, Exists, IsADirectory, NotADirectory (a component of the name), BadArgument. Modes and owners are not checked."""
        if not read and not write:
            raise BadArgument(f"{name!r}: opened for neither reading nor writing")
        parts = _split(name)
        await trio.lowlevel.checkpoint()
        if not existing and self._find(parts, name) is None:
            await self._namespace.hold_back()
        # NO AWAIT from here on: the file is found or made, and pinned, in one step.
        ino = self._find(parts, name)
        if ino is None:
            if existing:
                raise NotFound(f"{name!r}: no such file")
            ino = self._make(parts, replication or None)
        else:
            self._check_existing(ino, name, existing, replication)
        self._namespace.pin(ino)
        fd = self._next_fd
        self._next_fd += 1
        self._open[fd] = _Open(name, ino, read, write, self._clock.monotonic())
        return fd

    async def close(self, fd: int) -> None:
        """NotFound if it is not open. What was appended becomes durable as always: closing is no `commit`."""
        self._shut(fd, self._get(fd))
        await self._breathe()

    async def size_of(self, fd: int) -> int:
        size = self._namespace.attributes(self._get(fd).ino).size
        await self._breathe()
        return size

    async def append(self, fd: int, data: Buffer) -> None:
        handle = self._get(fd)
        if not handle.writable:
            raise NotPermitted(f"{handle.name!r}: descriptor {fd} was not opened for writing")
        handle.busy += 1
        try:
            await self._namespace.append(handle.ino, data)
            await self._breathe()
        finally:
            handle.busy -= 1

    async def read_at(self, fd: int, offset: int, size: int) -> bytes:
        handle = self._get(fd)
        if not handle.readable:
            raise NotPermitted(f"{handle.name!r}: descriptor {fd} was not opened for reading")
        handle.busy += 1
        try:
            data = bytes(await self._namespace.read(handle.ino, offset, size))
            await self._breathe()
            return data
        finally:
            handle.busy -= 1

    async def commit(self, fd: int) -> None:
        handle = self._get(fd)
        handle.busy += 1
        try:
            await self._namespace.commit(handle.ino)
            await self._breathe()
        finally:
            handle.busy -= 1

    def _get(self, fd: int) -> _Open:
        handle = self._open.get(fd)
        if handle is None:
            name = self._collected.get(fd)
            if name is not None:
                raise NotFound(f"descriptor {fd} ({name!r}) was closed after {self._idle_timeout:g} s without use; open the file again")
            raise NotFound(f"descriptor {fd} is closed" if 0 < fd < self._next_fd else f"descriptor {fd} was never opened")
        handle.last_used = self._clock.monotonic()
        return handle

    def _shut(self, fd: int, handle: _Open) -> None:
        del self._open[fd]
        self._namespace.unpin(handle.ino)

    async def _breathe(self) -> None:
        self._calls += 1
        if self._calls % _BREATH == 0:
            await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        """The collector: closes descriptors that were not used for `idle_timeout` seconds. Until cancelled."""
        while True:
            next_due = min((handle.last_used for handle in self._open.values()), default=math.inf) + self._idle_timeout
            wait = min(next_due - self._clock.monotonic(), self._idle_timeout)
            await self._clock.sleep(max(wait, self._idle_timeout / 100))
            self._collect()

    def _collect(self) -> None:
        """NO AWAIT inside: none of them can be used between being found idle and being closed."""
        now = self._clock.monotonic()
        for fd, handle in list(self._open.items()):
            if handle.busy:
                handle.last_used = now
            elif now - handle.last_used >= self._idle_timeout:
                self._collected[fd] = handle.name
                if len(self._collected) > _REMEMBERED:
                    self._collected.popitem(last=False)
                self._shut(fd, handle)

    # ---- names

    async def list(self) -> dict[str, int]:
        return {name: size async for name, size in self.entries()}

    async def entries(self, prefix: str = "") -> AsyncIterator[tuple[str, int]]:
        """Depth first, each directory in order of names. What comes or goes meanwhile may be seen or not; all else is seen exactly once."""
        whole = _encode(prefix)
        above, slash, start = whole.rpartition(b"/")
        root = self._find_directory(above) if slash else ROOT
        if root is None:
            return
        #: (directory, its path, prefix its names must have, last name seen)
        stack: list[tuple[int, bytes, bytes, bytes | None]] = [(root, above, start, None)]
        while stack:
            ino, path, start, after = stack.pop()
            await trio.lowlevel.checkpoint()
            page = self._namespace.names(ino, start, after, _SLICE)
            for name, entry in page:
                full = path + b"/" + name if path else name
                after = name
                if stat.S_ISDIR(entry.type):
                    # This directory goes on after the one below it is done.
                    stack.append((ino, path, start, after))
                    stack.append((entry.ino, full, b"", None))
                    break
                size = self._size(entry)
                if size is not None:
                    yield os.fsdecode(full), size
            else:
                if len(page) == _SLICE:
                    stack.append((ino, path, start, after))

    def _size(self, entry: Dirent) -> int | None:
        """None for what is not a regular file, or is gone since its name was read."""
        if not stat.S_ISREG(entry.type):
            return None
        try:
            return self._namespace.attributes(entry.ino).size
        except NotFound:
            return None

    async def delete(self, name: str) -> None:
        parts = _split(name)
        await trio.lowlevel.checkpoint()
        await self._namespace.keep_pace(removing=True)
        # NO AWAIT from here on.
        parent = self._walk(parts[:-1], name)
        ino = None if parent is None else self._child(parent, parts[-1])
        if parent is None or ino is None:
            raise NotFound(f"{name!r}: no such file")
        self._check_regular(ino, name)
        self._namespace.unlink(parent, parts[-1])

    # ---- paths: all synchronous

    def _walk(self, parts: Sequence[bytes], name: str) -> int | None:
        """The directory at `parts`; None if one of them is missing; NotADirectory if one is something else."""
        ino = ROOT
        for part in parts:
            found = self._child(ino, part)
            if found is None:
                return None
            ino = found
            if not stat.S_ISDIR(self._namespace.attributes(ino).mode):
                raise NotADirectory(f"{name!r}: {os.fsdecode(part)!r} in it is not a directory")
        return ino

    def _find(self, parts: Sequence[bytes], name: str) -> int | None:
        """What is at `parts`; as `_walk`."""
        parent = self._walk(parts[:-1], name)
        return None if parent is None else self._child(parent, parts[-1])

    def _child(self, parent: int, part: bytes) -> int | None:
        try:
            return self._namespace.lookup(parent, part)
        except NotFound:
            return None

    def _find_directory(self, path: bytes) -> int | None:
        """For a prefix: None where no file can have such a name."""
        parts = path.split(b"/")
        try:
            return self._walk(parts, os.fsdecode(path))
        except BadArgument:
            return None

    def _make(self, parts: Sequence[bytes], replication: str | None) -> int:
        """The file, and what is missing above it. A refused file leaves the directories made for it, as mkdir -p would."""
        if replication is not None:
            parse_replication(replication)
        parent = ROOT
        for part in parts[:-1]:
            found = self._child(parent, part)
            parent = self._namespace.mkdir(parent, part, DIRECTORY_MODE, self._uid, self._gid) if found is None else found
        return self._namespace.create(parent, parts[-1], stat.S_IFREG | FILE_MODE, self._uid, self._gid, replication=replication)

    def _check_existing(self, ino: int, name: str, existing: bool | None, replication: str | None) -> None:
        if existing is False:
            raise Exists(f"{name!r} exists already")
        self._check_regular(ino, name)
        if replication:
            own = self._namespace.replication_of(ino)
            if str(parse_replication(replication)) != own:
                raise BadArgument(f"{name!r} has replication {own}, not {replication}; it cannot be changed for a file that exists")

    def _check_regular(self, ino: int, name: str) -> None:
        mode = self._namespace.attributes(ino).mode
        if stat.S_ISDIR(mode):
            raise IsADirectory(f"{name!r} is a directory")
        if not stat.S_ISREG(mode):
            raise BadArgument(f"{name!r} is not a regular file")


def _encode(name: str) -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise BadArgument(f"{name!r} cannot be a name: {error.reason}") from error


def _split(name: str) -> Sequence[bytes]:
    """Components; the namespace itself refuses those that cannot be names."""
    raw = _encode(name)
    if not raw or raw.startswith(b"/") or raw.endswith(b"/"):
        raise BadArgument(f"{name!r} cannot be the name of a file: write it without a leading or trailing '/'")
    parts = raw.split(b"/")
    for part in parts:
        if part in (b"", b".", b".."):
            raise BadArgument(f"{name!r} cannot be the name of a file: {os.fsdecode(part)!r} stands in it")
    return parts


if TYPE_CHECKING:

    def _conforms(files: Files) -> interfaces.Files:
        return files
