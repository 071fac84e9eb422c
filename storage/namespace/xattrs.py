"""Extended attributes: `t` + inode + name -> the value's bytes."""

from __future__ import annotations

from storage.errors import BadArgument, Exists, NameTooLong, NoSpace, NotFound
from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import XATTR, prefix_end, u64
from storage.namespace.directories import show
from storage.namespace.inodes import Change, InodeTable
from storage.namespace.records import HAS_XATTRS, xattr_key

MAX_XATTR_NAME = 255
#: XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux.
MAX_XATTR_VALUE = 65_536
MAX_XATTR_LIST = 65_536


class Xattrs:
    """A missing attribute is NotFound: the mount answers that with ENODATA."""

    def __init__(self, store: MetadataStore, inodes: InodeTable) -> None:
        self._store = store
        self._inodes = inodes

    def get(self, ino: int, name: bytes) -> bytes:
        _check(name)
        inode = self._inodes.get(ino)
        raw = self._store.get(xattr_key(ino, name)) if inode.rec.flags & HAS_XATTRS else None
        if raw is None:
            raise _missing(ino, name)
        return raw

    def list(self, ino: int) -> list[bytes]:
        if not self._inodes.get(ino).rec.flags & HAS_XATTRS:
            return []
        start = XATTR + u64(ino)
        return [key[len(start) :] for key, _ in self._store.scan(start, prefix_end(start), MAX_XATTR_LIST)]

    def set(self, ino: int, name: bytes, value: bytes, create: bool, replace: bool) -> None:
        _check(name)
        if create and replace:
            raise BadArgument("an extended attribute cannot be both created and replaced")
        if len(value) > MAX_XATTR_VALUE:
            raise NoSpace(f"extended attribute {show(name)}: {len(value)} bytes, at most {MAX_XATTR_VALUE}")
        inode = self._inodes.get(ino)
        there = self._store.get(xattr_key(ino, name)) is not None
        if there and create:
            raise Exists(f"inode {ino} has an extended attribute {show(name)} already")
        if not there:
            if replace:
                raise _missing(ino, name)
            if sum(len(other) + 1 for other in self.list(ino)) + len(name) + 1 > MAX_XATTR_LIST:
                raise NoSpace(f"inode {ino} has too many extended attributes; remove some")
        change = Change(self._inodes)
        rec = change.edit(inode)
        rec.flags |= HAS_XATTRS
        rec.ctime = self._inodes.now()
        change.batch.put(xattr_key(ino, name), value)
        change.apply()

    def remove(self, ino: int, name: bytes) -> None:
        self.get(ino, name)
        change = Change(self._inodes)
        rec = change.edit(self._inodes.get(ino))
        if self.list(ino) == [name]:
            rec.flags &= ~HAS_XATTRS
        rec.ctime = self._inodes.now()
        change.batch.delete(xattr_key(ino, name))
        change.apply()

    def drop_all(self, batch: Batch, ino: int) -> None:
        """With the inode. MAX_XATTR_LIST bounds how many there are."""
        for name in self.list(ino):
            batch.delete(xattr_key(ino, name))


def _check(name: bytes) -> None:
    if len(name) > MAX_XATTR_NAME:
        raise NameTooLong(f"extended attribute name of {len(name)} bytes; at most {MAX_XATTR_NAME}")
    if not name or b"\0" in name:
        raise BadArgument(f"{show(name)!r} cannot be the name of an extended attribute")


def _missing(ino: int, name: bytes) -> NotFound:
    return NotFound(f"inode {ino} has no extended attribute {show(name)}")
