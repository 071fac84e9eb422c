"""Objects as files below a directory, durably: the blocking half of the directory host. For threads, but for `read_now` and `holds`.

    root/~tmp/<random>      written, fsync'ed, then renamed to its name; what a crash leaves there is removed when it is a day old
    root/~lock              flock: exclusive for a conditional put, shared around every other rename and unlink; see `tree_lock`
    root/<object name>      "~" is in no object's name, so nothing collides

A put is: directories made and flushed, temporary file written and fsync'ed, rename, fsync of the directory. A crash between any two leaves
the old object or the new one, whole. Not promised: anything on a disk that lies about flushes.

How directories are reached, and what is known of them, is `root`'s. Only parts of what was read within the last second are read without
walking there again (see `held`); what is written, and what is missing, never goes without.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Self

from blake3 import blake3

from storage.abandoned import Abandoned, Wanted
from storage.errors import Busy, Corrupt, FusefsError, NotFound, Unavailable
from storage.failpoints import Failpoints
from storage.hosts.direct import DirectIO
from storage.hosts.held import BriefOpening, Held, HeldFile
from storage.hosts.layout import check_name, is_component
from storage.hosts.root import Root, make_root, sync_directory, translate
from storage.hosts.tree_lock import Locked, exclusive_lock, shared_lock
from storage.interfaces import Buffer, HostSpace

TEMPORARY = "~tmp"
#: Temporary files older than this belong to nobody any more.
STALE_SECONDS = 86400.0
#: Bytes that are read in the event loop at most.
MAX_NOW = 132 * 1024
#: Up to this size an object's tag is its BLAKE3. Above, its inode, size and time, which cost neither reading nor hashing: nobody compares
#: the tags of shards, and superblocks are only ever put where there is none.
MAX_HASHED = 128 * 1024


class Tree:
    """One directory. Safe for several threads at a time, and for several processes on one directory."""

    def __init__(self, path: str, url: str, failpoints: Failpoints, identity: tuple[int, int]) -> None:
        self.path, self.url = path, url
        self._hit = failpoints.hit
        self._root = Root(path, url, failpoints, identity)
        self._direct = DirectIO()
        self._held = Held()
        self._briefly = BriefOpening(self._hold_named)
        #: Until the filesystem is found to know no reading that does not wait.
        self._nowait = True
        #: For `read_now`, which only the event loop calls.
        self._now = memoryview(bytearray(MAX_NOW))

    @classmethod
    def open(cls, path: str, url: str, failpoints: Failpoints, now_ns: int, create: bool) -> Self:
        """The tree at `path`; with `create` a missing directory is made, durably. Unavailable if there is none, or it cannot be used."""
        try:
            if create:
                make_root(path)
            status = os.stat(path)
        except OSError as error:
            raise translate(error, url, "opening it") from error
        if not stat.S_ISDIR(status.st_mode):
            raise Unavailable(f"host {url}: {path} is not a directory")
        tree = cls(path, url, failpoints, (status.st_dev, status.st_ino))
        tree._sweep(now_ns)
        return tree

    # ----------------------------------------------------------------------------------------------------------------
    # Reading

    def get(self, parts: list[str], limit: int) -> bytes:
        with self._object(parts) as (fd, size):
            if size > limit:
                raise Corrupt(f"host {self.url}: {'/'.join(parts)} has {size} bytes, more than the {limit} it can have")
            return _read(fd, 0, size)

    def get_range(self, name: str, parts: list[str], offset: int, length: int) -> bytes:
        """`name`: the parts joined."""
        file = self._held.find(name)
        if file is not None:
            try:
                data = _read(file.fd, offset, length)
                if os.fstat(file.fd).st_nlink:
                    return data
            except OSError:
                # Whatever it is, it is said by whoever walks there.
                pass
            self._held.drop(name)
        with self._root.errors(f"reading {name}"):
            file, size = self._hold(name, parts)
            return _read(file.fd, offset, max(0, min(length, size - offset)))

    def get_range_in(self, parts: list[str], offset: int, length: int, step: int, take: Callable[[memoryview], object]) -> int:
        """`take` is given the range, some steps at a time, which are overwritten afterwards. Returns how many bytes there were."""
        with self._object(parts) as (fd, size):
            # Not a held one: what is read like this is not asked for again soon. And without advice: read as a stream, the kernel reads
            # it ahead in large pieces, which takes half of the time.
            return self._direct.read(fd, offset, max(0, min(length, size - offset)), step, take)

    def read_now(self, name: str, offset: int, length: int) -> memoryview | None:
        """For the event loop: the range, if it takes no waiting, since the file was read a moment ago and what is wanted is in the page
        cache. None: not so, but the disk has been asked for it, if the file is held at all. It is overwritten by the next call."""
        file = self._held.find(name)
        if file is None or length > MAX_NOW:
            return None
        try:
            view = self._now[:length]
            if os.preadv(file.fd, [view], offset, os.RWF_NOWAIT) < length or not os.fstat(file.fd).st_nlink:
                return None
        except OSError as error:
            # EAGAIN; or a disk that fails, which a thread will find out.
            if error.errno == errno.EOPNOTSUPP:
                self._nowait = False
            return None
        return view

    def holds(self, name: str, patience: float = 0.0) -> bool:
        """For the event loop: is it worth asking `read_now`? With `patience`, seconds, a file that is not held may become so meanwhile."""
        if not self._nowait:
            return False
        if self._held.find(name) is not None:
            return True
        return patience > 0 and self._briefly.open(name, patience) and self._held.find(name) is not None

    def _hold_named(self, name: str) -> None:
        with self._root.errors(f"opening {name}"):
            self._hold(name, check_name(name))

    def close(self) -> None:
        """Let go of what is held."""
        self._briefly.close()
        self._held.close()

    def _hold(self, name: str, parts: list[str]) -> tuple[HeldFile, int]:
        self._briefly.start()
        fd, size = self._root.open_object(parts)
        file = HeldFile(fd)
        with suppress(OSError):
            # Else the kernel reads more than what it is asked for, which nobody has asked us for.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._held.hold(name, file)
        return file, size

    def tag(self, parts: list[str]) -> str | None:
        try:
            with self._object(parts) as (fd, size):
                return blake3(_read(fd, 0, size)).hexdigest() if size <= MAX_HASHED else _stat_tag(fd)
        except NotFound:
            return None

    def entries(self, parts: list[str]) -> tuple[list[tuple[str, int]], list[str]]:
        """Of one directory: objects as (name, size), and directories. Empty if there is no such directory."""
        found: list[tuple[str, int]] = []
        directories: list[str] = []
        with self._root.errors(f"listing {'/'.join(parts) or '/'}"), self._root.opened() as root:
            try:
                fd = self._root.walk(root, parts)
            except FileNotFoundError:
                return found, directories
            try:
                self._root.doubt(parts, seen=True)
                with os.scandir(fd) as scan:
                    for entry in scan:
                        if not is_component(entry.name):
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            directories.append(entry.name)
                        elif entry.is_file(follow_symlinks=False):
                            # One that was deleted meanwhile is left out.
                            with suppress(FileNotFoundError):
                                found.append((entry.name, entry.stat(follow_symlinks=False).st_size))
            finally:
                os.close(fd)
        return found, directories

    def tidy(self, parts: list[str]) -> None:
        """See `Root.tidy`."""
        self._root.tidy(parts)

    def space(self) -> HostSpace:
        with self._root.errors("asking for its space"), self._root.opened() as root:
            status = os.fstatvfs(root)
            disk = f"dev {os.fstat(root).st_dev}"
            return HostSpace(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize, disk)

    # ----------------------------------------------------------------------------------------------------------------
    # Changing. Each calls `wanted` right before the step that cannot be taken back: it raises Abandoned if nobody wants it any more, so
    # that what hung somewhere before does not happen long after its caller has gone on.

    def put(self, parts: list[str], data: Buffer, temporary: str, wanted: Wanted) -> str:
        """Failpoints, in order: host.put.before_write, before_fsync, before_rename, before_dirsync, done (and before_parent_sync)."""
        return self._put(parts, data, temporary, wanted, conditional=False, expected=None)

    def put_if(self, parts: list[str], data: Buffer, temporary: str, expected: str | None, wanted: Wanted) -> str:
        """As `put`, with the same failpoints. Locked if another process is in the middle of a change."""
        return self._put(parts, data, temporary, wanted, conditional=True, expected=expected)

    def delete(self, parts: list[str], wanted: Wanted) -> None:
        """Failpoints: host.delete.before_unlink, host.delete.before_dirsync."""
        self._held.drop("/".join(parts))
        with self._root.errors(f"deleting {'/'.join(parts)}"), self._root.opened() as root:
            try:
                directory = self._root.walk(root, parts[:-1])
            except (FileNotFoundError, NotADirectoryError):
                return
            try:
                self._hit("host.delete.before_unlink")
                with shared_lock(root), suppress(FileNotFoundError):
                    wanted()
                    os.unlink(parts[-1], dir_fd=directory)
                # Also where it was gone already: the process that unlinked it may have died before this.
                self._hit("host.delete.before_dirsync")
                sync_directory(directory)
            finally:
                os.close(directory)

    def _put(self, parts: list[str], data: Buffer, temporary: str, wanted: Wanted, *, conditional: bool, expected: str | None) -> str:
        name = "/".join(parts)
        # Before and, below, after: nobody goes on reading what was there.
        self._held.drop(name)
        with self._root.errors(f"writing {name}"), self._root.opened() as root:
            directory = self._root.make(root, parts[:-1])
            try:
                waiting = self._root.make(root, [TEMPORARY])
                try:
                    self._hit("host.put.before_write")
                    fd, temporary = _create(temporary, waiting)
                    try:
                        self._direct.write(fd, data)
                        self._hit("host.put.before_fsync")
                        os.fsync(fd)
                        self._hit("host.put.before_rename")
                        if conditional:
                            self._root.settle(root, parts[:-1])
                            with exclusive_lock(root, self.url):
                                if self.tag(parts) != expected:
                                    raise Busy(f"host {self.url}: {name} was changed by somebody else; read it again")
                                wanted()
                                # Flushed under the lock: the next one to compare sees only what is durable.
                                self._root.doubt(parts[:-1])
                                os.rename(temporary, parts[-1], src_dir_fd=waiting, dst_dir_fd=directory)
                                self._root.flush(parts[:-1], directory)
                        else:
                            with shared_lock(root):
                                wanted()
                                self._root.doubt(parts[:-1])
                                os.rename(temporary, parts[-1], src_dir_fd=waiting, dst_dir_fd=directory)
                            self._root.flush(parts[:-1], directory)
                        self._held.drop(name)
                        self._hit("host.put.done")
                        return blake3(data).hexdigest() if len(data) <= MAX_HASHED else _stat_tag(fd)
                    except (OSError, FusefsError, Locked, Abandoned):
                        # Not after a (simulated) crash: that leaves it, and the sweep removes it one day.
                        with suppress(OSError):
                            os.unlink(temporary, dir_fd=waiting)
                        raise
                    finally:
                        os.close(fd)
                finally:
                    os.close(waiting)
            finally:
                os.close(directory)

    @contextmanager
    def _object(self, parts: list[str]) -> Iterator[tuple[int, int]]:
        """(descriptor, size) of a regular file; NotFound for anything else."""
        with self._root.errors(f"reading {'/'.join(parts)}"):
            fd, size = self._root.open_object(parts)
            try:
                yield fd, size
            finally:
                os.close(fd)

    def _sweep(self, now_ns: int) -> None:
        """Remove temporary files nobody can still be writing. Best effort: what cannot be removed stays, and does no harm."""
        with suppress(OSError), self._root.opened() as root:
            waiting = self._root.walk(root, [TEMPORARY])
            try:
                for name in os.listdir(waiting):
                    if now_ns - os.stat(name, dir_fd=waiting, follow_symlinks=False).st_mtime_ns > STALE_SECONDS * 1e9:
                        os.unlink(name, dir_fd=waiting)
            finally:
                os.close(waiting)


def _create(name: str, directory: int) -> tuple[int, str]:
    """A new, empty file called `name`, or that with a number added, open for writing."""
    number, attempt = 0, name
    while True:
        try:
            return os.open(attempt, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory), attempt
        except FileExistsError:
            number += 1
            attempt = f"{name}.{number}"


def _read(fd: int, offset: int, length: int) -> bytes:
    """Bytes [offset, offset + length), fewer where the file ends before."""
    first = os.pread(fd, length, offset) if length else b""
    if len(first) == length or not first:
        return first
    parts = [first]
    got = len(first)
    while got < length and (part := os.pread(fd, length - got, offset + got)):
        parts.append(part)
        got += len(part)
    return b"".join(parts)


def _stat_tag(fd: int) -> str:
    # Every put makes a new file, and the old one is there until it is renamed over: inode numbers of neighbours in time differ.
    status = os.fstat(fd)
    return f"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"
