"""The root of a directory host and the directories below it: how they are reached, and which names are known to be durable. For threads.

Every call walks down from the root with O_NOFOLLOW, so no symbolic link in an object's path leads out of it (the root itself may be
reached through links), and looks whether the root is still the directory it was: a disk unmounted under us shows an empty one, into
which nothing must be written.

What a listing shows may not be durable: a process may have died, or a flush have failed, between rename and fsync. So a conditional put,
which is what a superblock is put with, first flushes the directory of its object and those directly below, where they were listed, or had a
flush fail, since this process last flushed them: what was relied on is durable before what relies on it (I4).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from storage.coprocess.wire import directory as directory_of
from storage.errors import BadArgument, FusefsError, NoSpace, NotFound, Unavailable
from storage.failpoints import Failpoints

#: Digits of the directories that a volume's shards are spread over: all there are become known as durable with one flush of their parent.
FAN_DIGITS = 2

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Root:
    """Safe for several threads at a time. Where a method takes `root`, it is the descriptor that `opened` gives."""

    def __init__(self, path: str, url: str, failpoints: Failpoints, identity: tuple[int, int]) -> None:
        """`identity`: device and inode it must have."""
        self.path = path
        self.url = url
        self._hit = failpoints.hit
        self._identity = identity
        #: As the coprocess is told of it: another one where directories may have gone, of which it knows that they are durable.
        self.told = directory_of(path, url, identity)
        #: Directories ("a/b/") whose names are known to be durable in their parents: flushed once by this process.
        self._durable: set[str] = set()
        #: How often something was taken out of it.
        self._removed = 0
        #: Directories that may have names which are not durable, though this process has listed them or made them.
        self._doubtful: set[str] = set()
        #: Directories this process has flushed since it last renamed something into them.
        self._flushed: set[str] = set()

    # ----------------------------------------------------------------------------------------------------------------
    # The way there

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise translate(error, self.url, doing) from error

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the root, which is still the directory it was when the host was opened."""
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

    def open_object(self, parts: list[str]) -> tuple[int, int]:
        """(descriptor, size) of a regular file; NotFound for anything else. OSError."""
        name = "/".join(parts)
        with self.opened() as root:
            try:
                directory = self.walk(root, parts[:-1])
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

    def walk(self, root: int, parts: list[str]) -> int:
        """A descriptor of the directory `parts` below the root. FileNotFoundError; NotADirectoryError for a symbolic link, too."""
        fd = os.dup(root)
        for part in parts:
            try:
                child = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            finally:
                os.close(fd)
            fd = child
        return fd

    def make(self, root: int, parts: list[str]) -> int:
        """As `walk`, making what is missing. Each name on the way is durable in its parent when it returns."""
        fd, path = os.dup(root), ""
        for part in parts:
            path += part + "/"
            try:
                try:
                    child = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                except FileNotFoundError:
                    self._removed += 1
                    self._durable.discard(path)
                    self.told = self.told.after_removal()
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
                        sync_directory(fd)
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

    def tidy(self, parts: list[str]) -> None:
        """Remove empty directories below, and this one, as far as they are. A put that walks there meanwhile makes them again, or fails."""
        with self.errors(f"tidying {'/'.join(parts)}"), self.opened() as root:
            try:
                above = self.walk(root, parts[:-1])
            except (FileNotFoundError, NotADirectoryError):
                return
            try:
                self.told = self.told.after_removal()
                for _, _, _, directory in os.fwalk(parts[-1], topdown=False, dir_fd=above):
                    for name in os.listdir(directory):
                        with suppress(OSError):
                            os.rmdir(name, dir_fd=directory)
                with suppress(OSError):
                    os.rmdir(parts[-1], dir_fd=above)
                self._removed += 1
                self._durable.clear()
                self.told = self.told.after_removal()
                sync_directory(above)
            finally:
                os.close(above)

    # ----------------------------------------------------------------------------------------------------------------
    # What is durable

    def doubt(self, parts: list[str], *, seen: bool = False) -> None:
        """Names in that directory may not be durable: it is renamed into, or it was `seen` and never flushed here."""
        path = "/".join(parts)
        if not seen:
            self._flushed.discard(path)
        elif path in self._flushed:
            return
        self._doubtful.add(path)

    def unsure(self, parts: list[str]) -> None:
        """The coprocess has not said what became of its change: it may have made directories that are not durable, and renamed."""
        self.doubt(parts)
        self._removed += 1
        self._durable.clear()

    def flush(self, parts: list[str], directory: int) -> None:
        """Its names are durable when it returns. OSError: they are in doubt, whoever else flushed it meanwhile."""
        try:
            self._hit("host.put.before_dirsync")
            sync_directory(directory)
        except BaseException:
            self.doubt(parts)
            raise
        self.settled(parts)

    def settled(self, parts: list[str]) -> None:
        """That directory was flushed, by whichever process."""
        path = "/".join(parts)
        self._doubtful.discard(path)
        self._flushed.add(path)

    def settle(self, root: int, parts: list[str]) -> None:
        """Flush what is in doubt of the directory and of those directly below."""
        path = "/".join(parts)
        for doubtful in sorted(self._doubtful):
            if doubtful != path and doubtful.rpartition("/")[0] != path:
                continue
            try:
                directory = self.walk(root, doubtful.split("/") if doubtful else [])
            except FileNotFoundError:
                self._doubtful.discard(doubtful)
                continue
            try:
                self.flush(doubtful.split("/"), directory)
            finally:
                os.close(directory)


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


def make_root(path: str) -> None:
    """`path` and its parents, durable in theirs. OSError."""
    missing: list[str] = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for each in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(each, 0o700)
        fd = os.open(os.path.dirname(each), _DIRECTORY)
        try:
            sync_directory(fd)
        finally:
            os.close(fd)


def sync_directory(fd: int) -> None:
    """The names in it are durable when it returns. OSError."""
    try:
        os.fsync(fd)
    except OSError as error:
        # A filesystem that knows no fsync of directories keeps names in its own way.
        if error.errno != errno.EINVAL:
            raise
