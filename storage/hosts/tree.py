"""Objects as files below a directory, durably: the blocking half of the directory host. For threads, but for `read_now` and `holds`.

    root/~tmp/<random>      written, fsync'ed, then renamed to its name; what a crash leaves there is removed when it is a day old
    root/~lock              flock: exclusive for a conditional put, shared around every other rename and unlink
    root/<object name>      "~" is in no object's name, so nothing collides

A put is: directories made and flushed, temporary file written and fsync'ed, rename, fsync of the directory. A crash between any two leaves
the old object or the new one, whole. Not promised: anything on a disk that lies about flushes.

What a listing shows may not be durable: a process may have died, or a flush have failed, between rename and fsync. So a conditional put,
which is what a superblock is put with, first flushes the directory of its object and those directly below, where they were listed, or had a
flush fail, since this process last flushed them: what was relied on is durable before what relies on it (I4).

Every call walks down from the root with O_NOFOLLOW, so no symbolic link in an object's path leads out of it (the root itself may be
reached through links), and looks whether the root is still the directory it was: a disk unmounted under us shows an empty one, into
which nothing must be written. Only parts of what was read within the last second are read without walking there again (see `held`); what
is written, and what is missing, never goes without.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from blake3 import blake3

from storage.abandoned import Abandoned, Tell, Wanted
from storage.buffers import ALIGNMENT, is_aligned
from storage.coprocess.client import DISKS, Gone
from storage.coprocess.wire import directory as directory_of
from storage.errors import BadArgument, Busy, Corrupt, FusefsError, NoSpace, NotFound, Unavailable
from storage.failpoints import Failpoints, NoFailpoints
from storage.hosts.held import BriefOpening, Held, HeldFile
from storage.hosts.layout import check_name, is_component
from storage.interfaces import Buffer, HostSpace, RangeOpening
from storage.lending import Buffers

TEMPORARY = "~tmp"
LOCK = "~lock"
#: Temporary files older than this belong to nobody any more.
STALE_SECONDS = 86400.0
#: Bytes that are read in the event loop at most.
MAX_NOW = 132 * 1024
#: Bytes of buffers to read into that are kept.
STEPS = 2 * 1024 * 1024
#: Up to this size an object's tag is its BLAKE3. Above, its inode, size and time, which cost neither reading nor hashing: nobody compares
#: the tags of shards, and superblocks are only ever put where there is none.
MAX_HASHED = 128 * 1024

T = TypeVar("T")

#: The least that is read or written with direct I/O: below, the page cache gathers and is quicker.
MIN_DIRECT = 256 * 1024
#: The most that is read so at a time, whole: a sealed sector of the usual size. In small pieces a disk gives half of it, for twice the CPU.
MOST_DIRECT = 4 * 1024 * 1024 + 64 * 1024
#: To read into, of all hosts; kept for as many threads as read sectors ahead.
PIECES = Buffers(5 * MOST_DIRECT)
#: Digits of the directories that a volume's shards are spread over: all there are become known as durable with one flush of their parent.
FAN_DIGITS = 2


_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Locked(Exception):
    """Another process is in the middle of a change; ask again shortly. Does not leave the directory host."""


class Tree:
    """One directory. Safe for several threads at a time, and for several processes on one directory."""

    def __init__(self, path: str, url: str, failpoints: Failpoints, identity: tuple[int, int]) -> None:
        self.path = path
        self.url = url
        self._hit = failpoints.hit
        self._identity = identity
        #: What is large and in the arena is put and read by the coprocess; not where a test wants to be there at each step.
        self._outside = isinstance(failpoints, NoFailpoints)
        #: As the coprocess is told of it: another one where directories may have gone, of which it knows that they are durable.
        self._directory = directory_of(path, url, identity)
        #: Until the filesystem refuses it, of a file at least: one may refuse to read what it writes.
        self._direct = self._direct_reads = True
        #: Directories ("a/b/") whose names are known to be durable in their parents: flushed once by this process.
        self._durable: set[str] = set()
        #: How often something was taken out of it.
        self._removed = 0
        #: Directories that may have names which are not durable, though this process has listed them or made them.
        self._doubtful: set[str] = set()
        #: Directories this process has flushed since it last renamed something into them.
        self._flushed: set[str] = set()
        self._held = Held()
        self._briefly = BriefOpening(self._hold_named)
        #: Until the filesystem is found to know no reading that does not wait.
        self._nowait = True
        #: To read into, for `get_range_in`.
        self._steps = Buffers(STEPS)
        #: For `read_now`, which only the event loop calls.
        self._now = memoryview(bytearray(MAX_NOW))

    @classmethod
    def open(cls, path: str, url: str, failpoints: Failpoints, now_ns: int, create: bool) -> Tree:
        """The tree at `path`; with `create` a missing directory is made, durably. Unavailable if there is none, or it cannot be used."""
        try:
            if create:
                _make_root(path)
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
        with self._errors(f"reading {name}"):
            file, size = self._hold(name, parts)
            return _read(file.fd, offset, max(0, min(length, size - offset)))

    def get_range_in(self, parts: list[str], offset: int, length: int, step: int, take: Callable[[memoryview], object]) -> int:
        """`take` is given the range, some steps at a time, which are overwritten afterwards. Returns how many bytes there were."""
        with self._object(parts) as (fd, size):
            # Not a held one: what is read like this is not asked for again soon. And without advice: read as a stream, the kernel reads
            # it ahead in large pieces, which takes half of the time.
            wanted = max(0, min(length, size - offset))
            done = self._take_direct(fd, offset, wanted, step, take) if self._direct_reads and wanted >= MIN_DIRECT else 0
            if done == wanted:
                return done
            view = self._steps.lend(step)
            while done < wanted:
                piece = view[: min(step, wanted - done)]
                got = 0
                while got < len(piece) and (more := os.preadv(fd, [piece[got:]], offset + done + got)):
                    got += more
                if got:
                    take(piece[:got])
                done += got
                if got < len(piece):
                    break  # cut off meanwhile
            return done

    def get_range_opened(self, parts: list[str], offset: int, length: int, step: int, opening: RangeOpening) -> int:
        """As `get_range_in`, opened."""
        size = DISKS.read(self._directory, parts, offset, length, step, opening) if self._outside else None
        return size if size is not None else self.get_range_in(parts, offset, length, step, opening.take)

    def _take_direct(self, fd: int, offset: int, length: int, step: int, take: Callable[[memoryview], object]) -> int:
        """As `get_range_in`, past the page cache: whole steps, and the rest if it got there. Returns how many bytes were taken.

        What is read as a whole stays with whoever reads it, in the clear: in the block cache, or the page cache of a mount. The page cache
        of this disk would have it a second time, and its pages have to be found, filled, copied from and given back.
        """
        done = 0
        # A step at least, and what has to be read before and after it.
        most = max(MOST_DIRECT, (step + 2 * ALIGNMENT) // ALIGNMENT * ALIGNMENT)
        while done < length:
            skip = (offset + done) % ALIGNMENT
            view = PIECES.lend(min(most, -(-(skip + length - done) // ALIGNMENT) * ALIGNMENT))
            got = min(self._read_direct(fd, view, offset + done - skip) - skip, length - done)
            if got < length - done:
                got -= got % step
            if got <= 0:
                break
            take(view[skip : skip + got])
            done += got
        return done

    def _read_direct(self, fd: int, view: memoryview, offset: int) -> int:
        """One preadv(2) past the page cache, all of it aligned; 0 where the filesystem has no such thing."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            return os.preadv(fd, [view], offset)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                # No memory in one piece, maybe; not that this filesystem cannot do it.
                return 0
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._direct_reads = False
            return 0
        finally:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)

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
        with self._errors(f"opening {name}"):
            self._hold(name, check_name(name))

    def close(self) -> None:
        """Let go of what is held."""
        self._briefly.close()
        self._held.close()

    def _hold(self, name: str, parts: list[str]) -> tuple[HeldFile, int]:
        self._briefly.start()
        fd, size = self._open_object(parts)
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
        with self._errors(f"listing {'/'.join(parts) or '/'}"), self._root() as root:
            try:
                fd = self._walk(root, parts)
            except FileNotFoundError:
                return found, directories
            try:
                self._doubt(parts, seen=True)
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
        """Remove empty directories below, and this one, as far as they are. A put that walks there meanwhile makes them again, or fails."""
        with self._errors(f"tidying {'/'.join(parts)}"), self._root() as root:
            try:
                above = self._walk(root, parts[:-1])
            except (FileNotFoundError, NotADirectoryError):
                return
            try:
                self._directory = self._directory.after_removal()
                for _, _, _, directory in os.fwalk(parts[-1], topdown=False, dir_fd=above):
                    for name in os.listdir(directory):
                        with suppress(OSError):
                            os.rmdir(name, dir_fd=directory)
                with suppress(OSError):
                    os.rmdir(parts[-1], dir_fd=above)
                self._removed += 1
                self._durable.clear()
                self._directory = self._directory.after_removal()
                _sync_directory(above)
            finally:
                os.close(above)

    def space(self) -> HostSpace:
        with self._errors("asking for its space"), self._root() as root:
            status = os.fstatvfs(root)
            disk = f"dev {os.fstat(root).st_dev}"
            return HostSpace(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize, disk)

    # ----------------------------------------------------------------------------------------------------------------
    # Changing. Each calls `wanted` right before the step that cannot be taken back: it raises Abandoned if nobody wants it any more, so
    # that what hung somewhere before does not happen long after its caller has gone on.

    def put(self, parts: list[str], data: Buffer, temporary: str, wanted: Wanted, tell: Tell | None = None) -> str:
        """Failpoints, in order: host.put.before_write, before_fsync, before_rename, before_dirsync, done (and before_parent_sync)."""
        tag = self._put_outside(parts, data, temporary, wanted, tell) if self._outside else None
        return tag if tag is not None else self._put(parts, data, temporary, wanted, conditional=False, expected=None)

    def _put_outside(self, parts: list[str], data: Buffer, temporary: str, wanted: Wanted, tell: Tell | None) -> str | None:
        """By the coprocess, out of the arena; None: it is to be done here."""
        name, path = "/".join(parts), "/".join(parts[:-1])
        self._held.drop(name)
        # As where it is done here: until it is known to be flushed, what is listed there may not be durable.
        self._doubt(parts[:-1])
        sent = self._directory
        try:
            tag = DISKS.put(sent, parts, data, temporary, wanted, tell)
        except Gone:
            # Nobody works on it any more.
            self._unsure(parts[:-1])
            with suppress(FusefsError, OSError), self._root() as root:
                os.unlink(f"{TEMPORARY}/{temporary}", dir_fd=root)
            return None
        except BaseException:
            self._unsure(parts[:-1])
            raise
        if tag is not None and sent is not self._directory:
            # Directories were removed, or missing, meanwhile: what it knew to be durable may have been made anew.
            self._unsure(parts[:-1])
            with self._errors(f"writing {name}"), self._root() as root:
                directory = self._make(root, parts[:-1])
                try:
                    self._flush(parts[:-1], directory)
                finally:
                    os.close(directory)
        elif tag is not None:
            self._doubtful.discard(path)
            self._flushed.add(path)
            self._held.drop(name)
        return tag

    def _unsure(self, parts: list[str]) -> None:
        """The coprocess has not said what became of its change: it may have made directories that are not durable, and renamed."""
        self._doubt(parts)
        self._removed += 1
        self._durable.clear()

    def put_if(self, parts: list[str], data: Buffer, temporary: str, expected: str | None, wanted: Wanted) -> str:
        """As `put`, with the same failpoints. Locked if another process is in the middle of a change."""
        return self._put(parts, data, temporary, wanted, conditional=True, expected=expected)

    def delete(self, parts: list[str], wanted: Wanted) -> None:
        """Failpoints: host.delete.before_unlink, host.delete.before_dirsync."""
        self._held.drop("/".join(parts))
        with self._errors(f"deleting {'/'.join(parts)}"), self._root() as root:
            try:
                directory = self._walk(root, parts[:-1])
            except (FileNotFoundError, NotADirectoryError):
                return
            try:
                self._hit("host.delete.before_unlink")
                with self._shared_lock(root), suppress(FileNotFoundError):
                    wanted()
                    os.unlink(parts[-1], dir_fd=directory)
                # Also where it was gone already: the process that unlinked it may have died before this.
                self._hit("host.delete.before_dirsync")
                _sync_directory(directory)
            finally:
                os.close(directory)

    def _put(self, parts: list[str], data: Buffer, temporary: str, wanted: Wanted, *, conditional: bool, expected: str | None) -> str:
        name = "/".join(parts)
        # Before and, below, after: nobody goes on reading what was there.
        self._held.drop(name)
        with self._errors(f"writing {name}"), self._root() as root:
            directory = self._make(root, parts[:-1])
            try:
                waiting = self._make(root, [TEMPORARY])
                try:
                    self._hit("host.put.before_write")
                    fd, temporary = _create(temporary, waiting)
                    try:
                        self._write(fd, data)
                        self._hit("host.put.before_fsync")
                        os.fsync(fd)
                        self._hit("host.put.before_rename")
                        if conditional:
                            self._settle(root, parts[:-1])
                            with self._exclusive_lock(root):
                                if self.tag(parts) != expected:
                                    raise Busy(f"host {self.url}: {name} was changed by somebody else; read it again")
                                wanted()
                                # Flushed under the lock: the next one to compare sees only what is durable.
                                self._doubt(parts[:-1])
                                os.rename(temporary, parts[-1], src_dir_fd=waiting, dst_dir_fd=directory)
                                self._flush(parts[:-1], directory)
                        else:
                            with self._shared_lock(root):
                                wanted()
                                self._doubt(parts[:-1])
                                os.rename(temporary, parts[-1], src_dir_fd=waiting, dst_dir_fd=directory)
                            self._flush(parts[:-1], directory)
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

    def _write(self, fd: int, data: Buffer) -> None:
        """All of `data` into the new file: what is large and aligned goes past the page cache, which spares a copy of it."""
        view = memoryview(data).cast("B")
        if self._direct and len(view) >= MIN_DIRECT and is_aligned(data):
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            try:
                fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
                whole = view[: len(view) // ALIGNMENT * ALIGNMENT]
                while whole:
                    whole = whole[os.write(fd, whole) :]
                    # After a write that stopped short, the rest may begin anywhere.
                    if len(whole) % ALIGNMENT:
                        break
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                # Not on this filesystem.
                self._direct = False
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
            view = view[os.lseek(fd, 0, os.SEEK_CUR) :]
        _write(fd, view)

    def _doubt(self, parts: list[str], *, seen: bool = False) -> None:
        """Names in that directory may not be durable: it is renamed into, or it was `seen` and never flushed here."""
        path = "/".join(parts)
        if not seen:
            self._flushed.discard(path)
        elif path in self._flushed:
            return
        self._doubtful.add(path)

    def _flush(self, parts: list[str], directory: int) -> None:
        """Its names are durable when it returns. OSError: they are in doubt, whoever else flushed it meanwhile."""
        path = "/".join(parts)
        try:
            self._hit("host.put.before_dirsync")
            _sync_directory(directory)
        except BaseException:
            self._doubt(parts)
            raise
        self._doubtful.discard(path)
        self._flushed.add(path)

    def _settle(self, root: int, parts: list[str]) -> None:
        """Flush what is in doubt of the directory and of those directly below."""
        path = "/".join(parts)
        for doubtful in sorted(self._doubtful):
            if doubtful != path and doubtful.rpartition("/")[0] != path:
                continue
            try:
                directory = self._walk(root, doubtful.split("/") if doubtful else [])
            except FileNotFoundError:
                self._doubtful.discard(doubtful)
                continue
            try:
                self._flush(doubtful.split("/"), directory)
            finally:
                os.close(directory)

    # ----------------------------------------------------------------------------------------------------------------
    # Parts

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise translate(error, self.url, doing) from error

    @contextmanager
    def _root(self) -> Iterator[int]:
        """A descriptor of the root, which is still the directory it was when the tree was opened."""
        try:
            fd = os.open(self.path, _DIRECTORY)
        except FileNotFoundError:
            raise Unavailable(f"host {self.url}: the directory {self.path} is missing; bring it back (is its disk mounted?)") from None
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) != self._identity:
                raise Unavailable(f"host {self.url}: {self.path} is another directory than before (was its disk unmounted?)")
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _object(self, parts: list[str]) -> Iterator[tuple[int, int]]:
        """(descriptor, size) of a regular file; NotFound for anything else."""
        with self._errors(f"reading {'/'.join(parts)}"):
            fd, size = self._open_object(parts)
            try:
                yield fd, size
            finally:
                os.close(fd)

    def _open_object(self, parts: list[str]) -> tuple[int, int]:
        """As `_object`; OSError."""
        name = "/".join(parts)
        with self._root() as root:
            try:
                directory = self._walk(root, parts[:-1])
                try:
                    fd = os.open(parts[-1], _READ, dir_fd=directory)
                finally:
                    os.close(directory)
            except FileNotFoundError:
                raise NotFound(f"host {self.url}: there is no {name}") from None
            except OSError as error:
                if error.errno in (errno.ENOTDIR, errno.ELOOP):
                    reason = "its path leads through a symbolic link, which is not followed, or a file"
                    raise NotFound(f"host {self.url}: there is no {name}: {reason}") from None
                raise
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise NotFound(f"host {self.url}: {name} is not a regular file")
        except BaseException:
            os.close(fd)
            raise
        return fd, status.st_size

    def _walk(self, root: int, parts: list[str]) -> int:
        """A descriptor of the directory `parts` below the root. FileNotFoundError; NotADirectoryError for a symbolic link, too."""
        fd = os.dup(root)
        for part in parts:
            try:
                child = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            finally:
                os.close(fd)
            fd = child
        return fd

    def _make(self, root: int, parts: list[str]) -> int:
        """As `_walk`, making what is missing. Each name on the way is durable in its parent when it returns."""
        fd, path = os.dup(root), ""
        for part in parts:
            path += part + "/"
            try:
                try:
                    child = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                except FileNotFoundError:
                    self._removed += 1
                    self._durable.discard(path)
                    self._directory = self._directory.after_removal()
                    with suppress(FileExistsError):
                        os.mkdir(part, 0o700, dir_fd=fd)
                    child = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                try:
                    if path not in self._durable:
                        # One flush is for all that is there by now, where an earlier process made them.
                        above = path[: -len(part) - 1]
                        removed = self._removed
                        there = os.listdir(fd) if len(part) == FAN_DIGITS else []
                        self._hit("host.put.before_parent_sync")
                        _sync_directory(fd)
                        self._durable.add(path)
                        # Not where one of them may have gone, and come back, since the flush.
                        if removed == self._removed:
                            self._durable.update(f"{above}{name}/" for name in there)
                except BaseException:
                    os.close(child)
                    raise
            finally:
                os.close(fd)
            fd = child
        return fd

    @contextmanager
    def _shared_lock(self, root: int) -> Iterator[None]:
        """Keeps conditional puts out; where the filesystem has no locks there are none to keep out."""
        fd = _open_lock(root)
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
    def _exclusive_lock(self, root: int) -> Iterator[None]:
        fd = _open_lock(root)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Locked from None
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    raise Unavailable(f"host {self.url}: its filesystem has no locks (flock), so it cannot do conditional puts") from error
                raise
            yield
        finally:
            os.close(fd)

    def _sweep(self, now_ns: int) -> None:
        """Remove temporary files nobody can still be writing. Best effort: what cannot be removed stays, and does no harm."""
        with suppress(OSError), self._root() as root:
            waiting = self._walk(root, [TEMPORARY])
            try:
                for name in os.listdir(waiting):
                    if now_ns - os.stat(name, dir_fd=waiting, follow_symlinks=False).st_mtime_ns > STALE_SECONDS * 1e9:
                        os.unlink(name, dir_fd=waiting)
            finally:
                os.close(waiting)


def translate(error: OSError, url: str, doing: str) -> FusefsError:
    """The kind for what the operating system said about a host's directory, with what to do where that is known."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"host {url} is full: {doing}: {reason}; free space or add a host")
    if error.errno == errno.ENAMETOOLONG:
        return BadArgument(f"host {url}: {doing}: {reason}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Unavailable(f"host {url}: {doing}: permission denied for user {os.geteuid()}; give it access to the directory")
    if error.errno == errno.ENOENT:
        return Unavailable(f"host {url}: {doing}: a directory is missing (is its disk mounted?)")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Unavailable(f"host {url}: {doing}: {reason}; raise the limit of open files")
    return Unavailable(f"host {url}: {doing}: {reason}")


def _make_root(path: str) -> None:
    """`path` and its parents, durable in theirs."""
    missing: list[str] = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for each in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(each, 0o700)
        fd = os.open(os.path.dirname(each), _DIRECTORY)
        try:
            _sync_directory(fd)
        finally:
            os.close(fd)


def _open_lock(root: int) -> int:
    # A description of its own for every call: threads that shared one would share the lock.
    return os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=root)


def _create(name: str, directory: int) -> tuple[int, str]:
    """A new, empty file called `name`, or that with a number added, open for writing."""
    number, attempt = 0, name
    while True:
        try:
            return os.open(attempt, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory), attempt
        except FileExistsError:
            number += 1
            attempt = f"{name}.{number}"


def _write(fd: int, data: Buffer) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


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


def _sync_directory(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        # A filesystem that knows no fsync of directories keeps names in its own way.
        if error.errno != errno.EINVAL:
            raise
