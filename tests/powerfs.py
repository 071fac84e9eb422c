"""A filesystem whose power can be cut: over a directory, in a process of its own. See `power_model` for what a cut leaves.

    python -m tests.powerfs BACKING MOUNTPOINT

BACKING holds what is durable when nothing is mounted: it is read at the start and replaced at a cut or at the end. Commands come as
lines on standard input, answers go to standard output as lines:

    ready                       first of all
    cut drop | cut random SEED  everything fails with EIO from now on and reaches nothing; BACKING is what survived  ->  cut VOLATILE
    arm COUNT drop | arm COUNT random SEED
                                the same by itself, right before the COUNT-th change or sync from now; told by the same line, once
    fail sync | fail write | fail read | fail nothing
    fail sync NAME | ...        from now on these fail with EIO, on all files or on those called NAME; of `read` nothing stays cached
                                  ->  failing
    full NAME | full            writes to files called NAME (all files) fail with ENOSPC, as `fail write` does with EIO
    end, or the end of input    all is made durable, unless it was cut; unmounted; the process ends

A request is one moment: nothing awaits in the middle of one, so a cut falls between two.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import stat
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pyfuse3
import trio

from tests.power_model import Disk, Node

_FOREVER = 3600.0
#: Requests that are answered after a cut, too: they change nothing.
_ALWAYS = {"forget", "release", "releasedir", "init", "stacktrace"}
#: What an armed cut counts.
_CHANGES = {"write", "fsync", "fsyncdir", "create", "mknod", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "setattr"}

Class = TypeVar("Class", bound="type[Any]")


def _guarded(cls: Class) -> Class:
    """Each handler of the class fails once the power is cut; those that change something count."""

    def guard(name: str, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(handler)
        async def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.before(name)
            return await handler(self, *args, **kwargs)

        return guarded

    for name in dir(pyfuse3.Operations):
        if name in vars(cls) and not name.startswith("_") and name not in _ALWAYS:
            setattr(cls, name, guard(name, vars(cls)[name]))
    return cls


def _error(number: int) -> pyfuse3.FUSEError:
    return pyfuse3.FUSEError(number)


@_guarded
class PowerFs(pyfuse3.Operations):
    """The handlers. File handles are inode numbers."""

    def __init__(self, disk: Disk, on_cut: Callable[[random.Random | None], None]) -> None:
        super().__init__()
        self.disk = disk
        self.dead = False
        #: (sync, write, read or "", what the files are called or b"" for all, error)
        self.failing: tuple[str, bytes, int] = ("", b"", 0)
        #: Changes left until the cut; 0: not armed.
        self.armed = 0
        self.armed_with: random.Random | None = None
        self._on_cut = on_cut
        self._lists: dict[int, list[tuple[bytes, Node]]] = {}
        self._last_list = 0

    def before(self, name: str) -> None:
        if self.armed and name in _CHANGES:
            self.armed -= 1
            if not self.armed:
                self.cut(self.armed_with)
        if self.dead:
            raise _error(errno.EIO)

    def fail(self, what: str, inode: int) -> None:
        """An error, if `what` is to fail on that file."""
        failing, name, number = self.failing
        if failing == what and (not name or inode in self.called(name)):
            raise _error(number)

    def called(self, name: bytes) -> set[int]:
        """Inodes that have this name in some directory."""
        return {node.names[name].number for node in self.disk.nodes.values() if name in node.names}

    def cut(self, rng: random.Random | None) -> None:
        if not self.dead:
            self.dead = True
            self._on_cut(rng)

    # ---- looking

    def _node(self, inode: int) -> Node:
        try:
            return self.disk.nodes[inode]
        except KeyError:
            raise _error(errno.ESTALE) from None

    def _child(self, parent: int, name: bytes) -> Node:
        child = self._node(parent).names.get(name)
        if child is None:
            raise _error(errno.ENOENT)
        return child

    @staticmethod
    def _attributes(node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.number
        entry.st_mode = node.mode
        entry.st_nlink = node.nlink
        entry.st_uid, entry.st_gid = node.uid, node.gid
        entry.st_size = len(node.data) if node.is_file else len(node.target)
        entry.st_blksize = 4096
        entry.st_blocks = -(-entry.st_size // 512)
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = node.times
        # Nobody but the kernel changes anything here.
        entry.entry_timeout = entry.attr_timeout = _FOREVER
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        node = self._node(parent_inode)
        if name == b".":
            return self._attributes(node)
        if name == b"..":
            return self._attributes(node.parent or node)
        return self._attributes(self._child(parent_inode, name))

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._attributes(self._node(inode))

    async def readlink(self, inode: int, ctx: Any) -> bytes:
        return self._node(inode).target

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = 4096
        found.f_blocks = 4 << 20
        found.f_bfree = found.f_bavail = 3 << 20
        found.f_files = found.f_ffree = found.f_favail = 1 << 20
        found.f_namemax = 255
        return found

    async def opendir(self, inode: int, ctx: Any) -> int:
        self._last_list += 1
        # No fsyncdir without the directory: both are in the handle.
        self._lists[self._last_list] = []
        return self._last_list << 32 | inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        if start_id == 0:
            self._lists[fh >> 32] = list(self._node(fh & 0xFFFFFFFF).names.items())
        for position, (name, node) in enumerate(self._lists[fh >> 32][start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, name, self._attributes(node), position):
                break

    async def releasedir(self, fh: int) -> None:
        self._lists.pop(fh >> 32, None)

    # ---- names

    def _made(self, parent: int, name: bytes, mode: int, ctx: Any) -> Node:
        directory = self._node(parent)
        if name in directory.names:
            raise _error(errno.EEXIST)
        if not directory.nlink:
            raise _error(errno.ENOENT)
        now = time.time_ns()
        node = self.disk.new(mode, ctx.uid, ctx.gid, [now, now, now])
        if node.is_dir:
            node.nlink = 1
        self.disk.set_names((directory, name, node))
        directory.times[1:] = [now, now]
        return node

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> tuple[Any, Any]:
        node = self._made(parent_inode, name, stat.S_IFREG | stat.S_IMODE(mode & ~ctx.umask), ctx)
        return pyfuse3.FileInfo(fh=node.number, keep_cache=True), self._attributes(node)

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._attributes(self._made(parent_inode, name, mode & ~ctx.umask, ctx))

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._attributes(self._made(parent_inode, name, stat.S_IFDIR | stat.S_IMODE(mode & ~ctx.umask), ctx))

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        node = self._made(parent_inode, name, stat.S_IFLNK | 0o777, ctx)
        node.target = target
        return self._attributes(node)

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        directory, node = self._node(new_parent_inode), self._node(inode)
        if new_name in directory.names:
            raise _error(errno.EEXIST)
        self.disk.set_names((directory, new_name, node))
        return self._attributes(node)

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        node = self._child(parent_inode, name)
        if node.is_dir:
            raise _error(errno.EISDIR)
        self.disk.set_names((self._node(parent_inode), name, None))

    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        node = self._child(parent_inode, name)
        if not node.is_dir:
            raise _error(errno.ENOTDIR)
        if node.names:
            raise _error(errno.ENOTEMPTY)
        self.disk.set_names((self._node(parent_inode), name, None))
        node.nlink = 0

    async def rename(self, parent_old: int, name_old: bytes, parent_new: int, name_new: bytes, flags: int, ctx: Any) -> None:
        node = self._child(parent_old, name_old)
        there = self._node(parent_new).names.get(name_new)
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise _error(errno.EINVAL)
        if there is not None:
            if flags & pyfuse3.RENAME_NOREPLACE:
                raise _error(errno.EEXIST)
            if there is node:
                return
            if there.is_dir != node.is_dir:
                raise _error(errno.EISDIR if there.is_dir else errno.ENOTDIR)
            if there.names:
                raise _error(errno.ENOTEMPTY)
        self.disk.set_names((self._node(parent_new), name_new, node), (self._node(parent_old), name_old, None))
        if there is not None and there.is_dir:
            there.nlink = 0

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        self.fail("sync", fh & 0xFFFFFFFF)
        self.disk.sync_names(self._node(fh & 0xFFFFFFFF))

    # ---- content

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        node = self._node(inode)
        if flags & os.O_TRUNC:
            node.truncate(0)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        self.fail("read", fh)
        return bytes(memoryview(self._node(fh).data)[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        self.fail("write", fh)
        node = self._node(fh)
        node.write(off, buf)
        now = time.time_ns()
        node.times[1:] = [now, now]
        return len(buf)

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> pyfuse3.EntryAttributes:
        node, now = self._node(inode), time.time_ns()
        if fields.update_size:
            if not node.is_file:
                raise _error(errno.EINVAL)
            node.truncate(attr.st_size)
            node.times[1] = now
        if fields.update_mode:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            node.uid = attr.st_uid
        if fields.update_gid:
            node.gid = attr.st_gid
        if fields.update_atime:
            node.times[0] = attr.st_atime_ns
        if fields.update_mtime:
            node.times[1] = attr.st_mtime_ns
        node.times[2] = now
        return self._attributes(node)

    async def flush(self, fh: int) -> None:
        return None

    async def fsync(self, fh: int, datasync: bool) -> None:
        self.fail("sync", fh)
        self._node(fh).sync()

    async def release(self, fh: int) -> None:
        return None

    async def forget(self, inode_list: Any) -> None:
        # Nothing is let go of: the process lives for seconds, and a cut may bring back what was removed.
        return None


def _say(text: str) -> None:
    print(text, flush=True)


async def _obey(powerfs: PowerFs) -> None:
    """Commands, until `end` or the end of input."""
    buffer = b""
    stream = trio.lowlevel.FdStream(os.dup(0))
    while True:
        while b"\n" not in buffer:
            some = await stream.receive_some(4096)
            if not some:
                return
            buffer += some
        line, _, buffer = buffer.partition(b"\n")
        words = line.decode().split()
        if words[0] == "end":
            return
        if words[0] in ("fail", "full"):
            what = words.pop(1) if words[0] == "fail" else "write"
            name = words[1].encode() if len(words) > 1 else b""
            powerfs.failing = (what, name, errno.EIO if words[0] == "fail" else errno.ENOSPC)
            if what == "read":
                # From a thread: the kernel may have to ask us first.
                for inode in powerfs.called(name):
                    await trio.to_thread.run_sync(pyfuse3.invalidate_inode, inode)
            _say("failing")
            continue
        count = int(words.pop(1)) if words[0] == "arm" else 0
        rng = random.Random(int(words[2])) if words[1] == "random" else None
        if count:
            powerfs.armed, powerfs.armed_with = count, rng
        else:
            powerfs.cut(rng)


async def _serve(powerfs: PowerFs) -> None:
    async with trio.open_nursery() as nursery:

        async def obey() -> None:
            await _obey(powerfs)
            nursery.cancel_scope.cancel()

        nursery.start_soon(obey)
        _say("ready")
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def main() -> int:
    backing, mountpoint = Path(sys.argv[1]), sys.argv[2]
    disk = Disk.load(backing)

    def on_cut(rng: random.Random | None) -> None:
        volatile = disk.volatile
        disk.cut(rng)
        disk.store(backing)
        _say(f"cut {volatile}")

    powerfs = PowerFs(disk, on_cut)
    pyfuse3.init(powerfs, mountpoint, {"fsname=powerfs", "subtype=powerfs", "default_permissions", "allow_other"})
    try:
        trio.run(_serve, powerfs)
    finally:
        pyfuse3.close(unmount=True)
    if not powerfs.dead:
        disk.sync_all()
        disk.store(backing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
