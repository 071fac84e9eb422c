"""What the mount asks of the kernel (rule R2: always from a thread, because the kernel may first ask us).

A file is reached by a *file handle* in the sense of open_by_handle_at(2), built from its inode number: that also finds files without a
name,
and cannot hit another file that took the name. It needs CAP_DAC_READ_SEARCH; without it the file is reached by its path, and the SETATTR
that
follows is checked against the inode that was meant (`own_request`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyfuse3
import trio

from storage.errors import BadArgument

#: Threads that may wait in the kernel at once. A limiter of our own: while they wait, WRITEs need the volume's threads.
KERNEL_THREADS = 40
#: FILEID_INO64_GEN of <linux/exportfs.h>: fuse encodes (inode number high, low, generation) as three 32-bit words.
_FILEID_INO64_GEN = 0x81


def writes_pages_in_place(release: str) -> bool:
    """Linux 6.16 and later: a page stays under writeback until its WRITE is answered, so that invalidation waits for it. Before, the kernel
    sent a copy and knew nothing of it afterwards, so only what invalidation itself sends, page by page, is waited for."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return match is not None and (int(match[1]), int(match[2])) >= (6, 16)


SYNCFS_BEGINS = writes_pages_in_place(os.uname().release)

_libc = ctypes.CDLL(None, use_errno=True)


class _FileHandle(ctypes.Structure):
    """struct file_handle of <fcntl.h>, with room for fuse's 12 bytes."""

    _fields_ = (("handle_bytes", ctypes.c_uint), ("handle_type", ctypes.c_int), ("f_handle", ctypes.c_ubyte * 12))


@dataclass(frozen=True, slots=True)
class OwnRequest:
    """A SETATTR that a thread of ours is about to cause."""

    ino: int
    #: The modification time that must still be the stored one when the request arrives; None: the request sets the size.
    expected_mtime_ns: int | None = None
    #: Set the size even if somebody wrote to the file since the thread looked at its size.
    forced: bool = False


class KernelCalls(Protocol):
    """The calls. In tests a stand-in records them."""

    def own_request(self, pid: int) -> OwnRequest | None:
        """What the thread with this id is doing, if it is one of ours."""
        ...

    async def invalidate(self, ino: int) -> None:
        """The kernel writes the inode's dirty pages, waits for that, and drops all its pages. Never while handling SETATTR(size) of it."""
        ...

    async def truncate_to_stored(self, ino: int, path: bytes | None, *, force: bool) -> bool:
        """The kernel writes the dirty pages there are, then takes over the stored size (the SETATTR handler answers it) and drops all
        beyond.

        False: somebody appended between the two, and nothing was dropped. With `force` it is dropped nevertheless. OSError where it
        cannot be done at all.
        """
        ...

    async def set_mtime(self, ino: int, path: bytes | None, mtime_ns: int, expected_ns: int) -> None:
        """Set the modification time as a program would, unless the stored one is not `expected_ns` by then. OSError where it cannot be
        done."""
        ...

    async def write_back(self, inos: Sequence[int]) -> None:
        """The dirty pages of these inodes have been written when it returns, and all their pages are dropped. OSError with the error of a
        refused WRITE."""
        ...


class MountCalls:
    """The calls on the one mount of this process."""

    def __init__(self, mountpoint: Path) -> None:
        self._mountpoint = os.fsencode(mountpoint)
        self._limiter = trio.CapacityLimiter(KERNEL_THREADS)
        self._own: dict[int, OwnRequest] = {}

    def own_request(self, pid: int) -> OwnRequest | None:
        return self._own.get(pid)

    async def invalidate(self, ino: int) -> None:
        def call() -> None:
            try:
                pyfuse3.invalidate_inode(ino)
            except FileNotFoundError:
                pass  # the kernel does not know the inode (any more): nothing is cached, nothing dirty

        await trio.to_thread.run_sync(call, limiter=self._limiter)

    async def truncate_to_stored(self, ino: int, path: bytes | None, *, force: bool) -> bool:
        # The kernel adds its time to SETATTR(size) if and only if the length differs from the size it has, which it compares under the
        # lock that
        # appends take. So: look at its size, have what is dirty written, truncate to the size seen. Without a time in the request there was
        # no append since, and no dirty page is dropped; with one, the handler answers EAGAIN.
        done = True

        def shorten(proc_path: str) -> None:
            nonlocal done
            size = os.stat(proc_path).st_size
            pyfuse3.invalidate_inode(ino)
            try:
                os.truncate(proc_path, size)
            except BlockingIOError:
                done = False

        await self._on_inode(OwnRequest(ino, forced=force), path, shorten)
        return done

    async def set_mtime(self, ino: int, path: bytes | None, mtime_ns: int, expected_ns: int) -> None:
        def touch(proc_path: str) -> None:
            atime_ns = os.stat(proc_path).st_atime_ns
            try:
                os.utime(proc_path, ns=(atime_ns, mtime_ns))
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise  # ESTALE is our own handler's word for "somebody set it meanwhile"

        await self._on_inode(OwnRequest(ino, expected_mtime_ns=expected_ns), path, touch)

    async def write_back(self, inos: Sequence[int]) -> None:
        def call() -> None:
            refused: OSError | None = None
            if SYNCFS_BEGINS:
                # All of it at once, in large requests; but on FUSE it may return before they are answered (Linux 6.18.44 does).
                refused = self._syncfs()
            for ino in inos:
                with suppress(FileNotFoundError):  # the kernel does not know the inode (any more): nothing is dirty
                    # Waits for each page, whoever began to write it.
                    pyfuse3.invalidate_inode(ino)
            if refused is not None:
                raise refused

        await trio.to_thread.run_sync(call, limiter=self._limiter)

    def _syncfs(self) -> OSError | None:
        fd = os.open(self._mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if _libc.syncfs(fd) != 0:
                number = ctypes.get_errno()
                return OSError(number, os.strerror(number))
            return None
        finally:
            os.close(fd)

    async def _on_inode(self, request: OwnRequest, path: bytes | None, work: Callable[[str], None]) -> None:
        def call() -> None:
            fd = self._reach(request.ino, path)
            try:
                tid = threading.get_native_id()
                self._own[tid] = request
                try:
                    work(f"/proc/self/fd/{fd}")
                finally:
                    del self._own[tid]
            finally:
                os.close(fd)

        await trio.to_thread.run_sync(call, limiter=self._limiter)

    def _reach(self, ino: int, path: bytes | None) -> int:
        """An O_PATH descriptor of the inode: no OPEN reaches us, and nothing is written through it."""
        handle = _FileHandle(12, _FILEID_INO64_GEN, (ctypes.c_ubyte * 12)(*struct.pack("=III", ino >> 32, ino & 0xFFFFFFFF, 0)))
        mount_fd = os.open(self._mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fd = _libc.open_by_handle_at(mount_fd, ctypes.byref(handle), os.O_PATH | os.O_CLOEXEC)
            if fd >= 0:
                return int(fd)
            number = ctypes.get_errno()
        finally:
            os.close(mount_fd)
        if path is None:
            raise OSError(number, f"inode {ino} has no name, and file handles cannot be used: {os.strerror(number)}")
        return os.open(os.path.join(self._mountpoint, path), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)


def raise_read_ahead(device: str, kib: int = 1024) -> bool:
    """Let the kernel read ahead `kib` KiB on the mount with device number "major:minor": needs root. False where it may not be done."""
    if not device.replace(":", "").isdigit():
        raise BadArgument(f"{device!r} is not a device number")
    try:
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(kib))
    except OSError:
        return False
    return True
