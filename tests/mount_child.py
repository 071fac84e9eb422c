"""The process that serves a mount in tests: `fusefs.mount.serve`, with places to look in and to put faults.

    python -m tests.mount_child VOLUME MOUNTPOINT OPTIONS DIRECTORY [--without RULE]...

DIRECTORY holds what the test and this process tell each other:
    ready          made once the mount is usable
    names          one line per name that was looked for
    trace          one line per WRITE that came: "inode offset length outcome"; and per commit, rename, truncation
    faults/NAME    as long as the file exists, the fault NAME happens (see `Tapped`)

--without takes one rule of fusefs out, so that a test can show that it would notice.
"""

from __future__ import annotations

import argparse
import errno
import functools
import os
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pyfuse3
import trio

import fusefs.mount
import fusefs.options
from fusefs import coherence, contents, directories, kernel
from fusefs.daemon import setup_logging
from fusefs.options import MountOptions
from storage import VolumeOptions, open_volume
from storage.errors import FusefsError, IOFailure, NoSpace, NotPermitted, Unavailable
from storage.hosts import root, tree
from storage.metadata import journal
from storage.metadata.journal import Journal
from storage.metadata.store import Store
from storage.namespace.content import Content

PASSPHRASE = "correct horse"


class Tapped:
    """A namespace (or the values) as the mount sees it, with faults in front."""

    def __init__(self, inner: Any, directory: Path) -> None:
        self._inner = inner
        self._faults = directory / "faults"
        self._trace = open(directory / "trace", "a", buffering=1)  # noqa: SIM115
        self._names = open(directory / "names", "ab", buffering=0)  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _fault(self, name: str) -> str | None:
        try:
            return (self._faults / name).read_text()
        except FileNotFoundError:
            return None

    def accepting(self) -> bool:
        return self._fault("not-accepting") is None and bool(self._inner.accepting())

    def last_page_local(self, ino: int) -> bool:
        return self._fault("not-local") is None and bool(self._inner.last_page_local(ino))

    def lookup(self, parent: int, name: bytes) -> int:
        if name.startswith(b"bug"):
            raise ZeroDivisionError("a bug, on purpose")
        return int(self._inner.lookup(parent, name))

    def find(self, parent: int, name: bytes) -> int | None:
        if name.startswith(b"bug"):
            raise ZeroDivisionError("a bug, on purpose")
        self._names.write(name + b"\n")
        found: int | None = self._inner.find(parent, name)
        return found

    async def read(self, *args: Any) -> bytes:
        if self._fault("read-unavailable") is not None:
            raise Unavailable("no host answers, on purpose")
        return bytes(await self._inner.read(*args))

    def read_now(self, *_: Any) -> None:
        """Nothing is at hand, so that every read is seen here."""
        return

    def write_now(self, *_: Any) -> bool:
        """Nothing is taken at once, so that every write is seen here."""
        return False

    async def write(self, ino: int, offset: int, data: bytes) -> None:
        delay = self._fault("slow-write")
        if delay is not None:
            await trio.sleep(float(delay))
        outcome = "ok"
        try:
            if self._fault("no-space") is not None:
                raise NoSpace("hosts are full, on purpose")
            if self._fault("io-failure") is not None:
                raise IOFailure("the disk is broken, on purpose")
            if self._fault("write-bug") is not None:
                raise ZeroDivisionError("a bug, on purpose")
            await self._inner.write(ino, offset, data)
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            self._trace.write(f"{ino} {offset} {len(data)} {outcome}\n")

    async def commit(self, *args: Any) -> None:
        await self._inner.commit(*args)
        self._trace.write(f"commit {args[0] if args else ''}\n")

    def truncate(self, ino: int, size: int) -> None:
        self._inner.truncate(ino, size)
        self._trace.write(f"truncate {ino} {size}\n")

    async def rename(self, *args: Any, **kwargs: Any) -> None:
        await self._inner.rename(*args, **kwargs)
        self._trace.write("rename\n")


async def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def take_out(rule: str) -> None:
    """Replace a rule by nothing."""
    match rule:
        case "write-back-before-rename":
            directories.DirectoryHandlers._write_back = _nothing  # type: ignore[method-assign]
        case "taint":
            coherence.Coherence.write_refused = lambda self, *args: None  # type: ignore[method-assign]
        case "repair":
            coherence.Coherence.schedule_repair = lambda self, inode: None  # type: ignore[method-assign]
        case "direct":
            # Every writer is cached, as far as the kernel is concerned.
            real = contents.ContentHandlers._file_info

            def cached(self: Any, *args: Any, **kwargs: Any) -> pyfuse3.FileInfo:
                info = real(self, *args, **kwargs)
                info.direct_io = False
                return info

            contents.ContentHandlers._file_info = cached  # type: ignore[method-assign]
        case "careful-repair":
            real_truncate = kernel.MountCalls.truncate_to_stored

            async def careless(self: Any, ino: int, path: bytes | None, *, force: bool) -> bool:
                return await real_truncate(self, ino, path, force=True)

            kernel.MountCalls.truncate_to_stored = careless  # type: ignore[method-assign]
        case "mtime":
            coherence.Coherence.settle_times = lambda self, inode: None  # type: ignore[method-assign]
        case "accepting":
            Tapped.accepting = lambda self: True  # type: ignore[method-assign]
        case "periodic":
            coherence.Coherence.periodic = _nothing  # type: ignore[method-assign]
        case "unmount-while-serving":
            fusefs.mount.Stopper._unmount = _terminate  # type: ignore[method-assign]
        case "guard":
            directories.DirectoryHandlers.lookup = directories.DirectoryHandlers.lookup.__wrapped__  # type: ignore[attr-defined, method-assign]
        case "flush-enosys":
            contents.ContentHandlers.flush = _nothing  # type: ignore[method-assign]
        case "mapping":
            # WRITEs are stored one behind the other as they come.
            Content._make_mapped = lambda self, inode, stored: None  # type: ignore[method-assign]
        case "overlap":
            # What is written already is refused, the same or not.
            Content._same = _refuse  # type: ignore[method-assign, assignment]
            Content._repeats = lambda _self, _value, offset, stored, _data: offset == stored  # type: ignore[method-assign]
        case "compare":
            # What is written already is taken for the same.
            Content._same = _yes  # type: ignore[method-assign, assignment]
            Content._repeats = lambda _self, *_: True  # type: ignore[method-assign]
        case "gaps":
            # Every WRITE is stored as it is, whatever of it is there already.
            Content._try_write = _append_all  # type: ignore[method-assign]
        case "late-writes-fill":
            Content._lengthen = _append_zeros  # type: ignore[method-assign]
        case "commit-after-truncation":
            contents.ContentHandlers._commit_truncated = _nothing  # type: ignore[method-assign]
        case "nowriteback":
            fusefs.options._FLAGS["nowriteback"] = ("writeback", True)
        case "last-page-local":
            Tapped.last_page_local = lambda self, ino: True  # type: ignore[method-assign]
        case "room-ahead":
            # Appends are accepted whether the journal has room for them on the disk or not.
            Store.has_room = lambda self, *args: True  # type: ignore[method-assign]
        case "old-kernel":
            # Not a rule: pretend the kernel does not drop pages under direct writes.
            contents.ContentHandlers.kernel_drops_pages = False
        case "journal-fdatasync":
            _replace(journal, "fdatasync", _no_sync)
        case "host-fsync":
            _replace(tree, "os", _OsWithoutFsync(of_directories=False))
        case "host-dirsync":
            _replace(root, "os", _OsWithoutFsync(of_directories=True))
        case "small-journal":
            # Not a rule: segments that are begun, and recycled, many times a second.
            options = functools.partial(VolumeOptions, journal_segment=256 * 1024, journal_limit=8 * 1024 * 1024)
            _replace(fusefs.mount, "VolumeOptions", options)
        case _:
            raise SystemExit(f"no rule {rule}")


def _replace(module: ModuleType, name: str, value: object) -> None:
    if name not in vars(module):
        raise SystemExit(f"{module.__name__} does not use {name} any more: the rule would take nothing out")
    vars(module)[name] = value


def _no_sync(fd: int) -> None:
    return


class _OsWithoutFsync:
    """The module `os`, in which fsync of directories, or of all else, does nothing."""

    def __init__(self, *, of_directories: bool) -> None:
        self._of_directories = of_directories

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) != self._of_directories:
            os.fsync(fd)


async def _terminate(self: Any, *, lazy: bool) -> None:
    pyfuse3.terminate()


async def _refuse(*args: Any) -> bool:
    raise NotPermitted("written already")


async def _yes(*args: Any) -> bool:
    return True


async def _append_all(self: Any, ino: int, offset: int, data: bytes) -> bool:
    inode = self._inodes.regular(ino)
    if not await self._reserved(inode, inode.rec.value, len(data)):
        return False
    self._values.append_now(inode.rec.value, data)
    self._inodes.written(inode, len(data))
    return True


def _append_zeros(self: Any, inode: Any, size: int) -> None:
    length = size - self.size(inode)
    self._values.append_now(inode.rec.value, bytes(length))
    self._inodes.written(inode, length)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("volume", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("options")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--without", action="append", default=[])
    arguments = parser.parse_args()
    for rule in arguments.without:
        take_out(rule)
    directory = arguments.directory

    @asynccontextmanager
    async def tapped(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with open_volume(*args, **kwargs) as volume:
            inner = volume.namespace
            volume.namespace = Tapped(inner, directory)  # type: ignore[assignment]
            volume.values = Tapped(volume.values, directory)  # type: ignore[assignment]
            yield volume

    real_flush = Journal._flush

    def flush(self: Any, *args: Any) -> None:
        if (directory / "faults" / "journal-eio").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_flush(self, *args)

    Journal._flush = flush  # type: ignore[method-assign, assignment]
    fusefs.mount.open_volume = tapped  # type: ignore[attr-defined]
    setup_logging(foreground=True, log_file=None)
    try:
        options = MountOptions.parse([arguments.options])
        trio.run(
            fusefs.mount.serve,
            arguments.volume,
            arguments.mountpoint,
            os.environ.get("TEST_PASSPHRASE", PASSPHRASE),
            options,
            (directory / "ready").touch,
        )
    except FusefsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
