"""The facade: one method per thing a program can do to names, attributes and content. Contract: `storage.interfaces.Namespace`."""

from __future__ import annotations

import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, cast

from storage import interfaces
from storage.errors import BadArgument, Corrupt, Exists, IsADirectory, NameTooLong, NotADirectory, NotEmpty, NotFound, TooManyLinks
from storage.interfaces import Attributes, Batch, Buffer, Entry, Listed, MetadataStore, Values
from storage.metadata.counters import Counter
from storage.metadata.keys import COUNTER, u64
from storage.namespace.content import Content
from storage.namespace.directories import Directories, check_name, show
from storage.namespace.filemap import FileMap
from storage.namespace.handing_down import HandingDown
from storage.namespace.inheritance import Inheritance
from storage.namespace.inodes import CACHE_LIMIT, Change, Inode, InodeTable
from storage.namespace.lifetime import Lifetime
from storage.namespace.records import (
    COUNTS_KEY,
    MAX_DIRECTORY_LINKS,
    MAX_LINKS,
    MAX_OFFSET,
    MAX_TARGET,
    MAX_U32,
    ROOT,
    CountsRecord,
    Dirent,
    InodeRecord,
    Places,
    encode_counts,
    encode_inode,
    inode_key,
)
from storage.namespace.rename import Renamer
from storage.namespace.stored import Survey
from storage.namespace.xattrs import Xattrs
from storage.replication import parse_replication
from storage.seams import Seams
from storage.status import ReplicationStatus

INODE_COUNTER = b"inode"
COOKIE_COUNTER = b"cookie"
#: Numbers reserved at a time; what a crash leaves of a range is never used.
_RANGE = 1024
#: What a directory shows as its size; it has none.
_DIRECTORY_SIZE = 4096
_PERMISSIONS = 0o7777


class Namespace:
    """Names, inodes, attributes and the file map over one MetadataStore and its Values.

    Access times are as with noatime: only `set_attributes` moves them.
    `check_replication` (from the volume) raises where hosts are too few for a spec somebody asks for.
    """

    def __init__(
        self,
        store: MetadataStore,
        values: Values,
        seams: Seams,
        *,
        default_replication: str,
        check_replication: Callable[[str], None] | None = None,
        cache_limit: int = CACHE_LIMIT,
    ) -> None:
        self._values = values
        self._check_replication = check_replication
        self._numbers = Counter(store, INODE_COUNTER, _RANGE)
        self._inodes = InodeTable(store, values, seams.clock, cache_limit)
        self._directories = Directories(store, self._inodes, Counter(store, COOKIE_COUNTER, _RANGE))
        self._inheritance = Inheritance(store, self._inodes, self._directories, default_replication)
        self._filemap = FileMap(store, self._inodes)
        self._xattrs = Xattrs(store, self._inodes)
        self._handing_down = HandingDown(store, self._inodes, self._directories, values, seams.failpoints)
        self._lifetime = Lifetime(store, self._inodes, values, self._filemap, self._xattrs)
        self._renamer = Renamer(self._inodes, self._directories, self._inheritance, self._lifetime, values)
        self._content = Content(store, values, self._inodes, self._filemap, self._directories, self._inheritance, self._numbers)

    @staticmethod
    def format(batch: Batch, now: int, uid: int, gid: int) -> None:
        """Put the root directory of a new volume into `batch`."""
        root = _new_record(stat.S_IFDIR | 0o755, 2, uid, gid, now, parent=ROOT, name=b"")
        batch.put(inode_key(ROOT), encode_inode(root))
        batch.put(COUNTS_KEY, encode_counts(CountsRecord(inodes=1, files=0, bytes=0)))
        batch.put(COUNTER + INODE_COUNTER, u64(ROOT + 1))

    # ---- names

    def lookup(self, parent: int, name: bytes) -> int:
        return self._met(parent, name, self._directories.lookup(parent, name))

    def find(self, parent: int, name: bytes) -> int | None:
        entry = self._directories.look(parent, name)
        return None if entry is None else self._met(parent, name, entry)

    def _met(self, parent: int, name: bytes, entry: Dirent) -> int:
        rec = self._inodes.get(entry.ino).rec
        if rec.parent == 0 and not rec.is_dir:
            # The name it remembered is gone: this one is as good. Not dirty: should it be forgotten, the next lookup repairs it again.
            rec.parent, rec.name = parent, name
        return entry.ino

    def attributes(self, ino: int) -> Attributes:
        return self._attributes(self._inodes.get(ino))

    def _attributes(self, inode: Inode) -> Attributes:
        rec = inode.rec
        if rec.value:
            stored = self._inodes.stored(inode)
            return _attributes(inode.ino, rec, self._filemap.size(inode, stored) if rec.map else stored, stored)
        return _attributes(inode.ino, rec, _DIRECTORY_SIZE if rec.is_dir else len(rec.target), 0)

    def set_attributes(
        self,
        ino: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        ctime_ns: int | None = None,
    ) -> None:
        inode = self._inodes.get(ino)
        if uid is not None or gid is not None:
            _check_owner(uid, gid)
        for when in (atime_ns, mtime_ns, ctime_ns):
            if when is not None and not -(2**63) <= when < 2**63:
                raise BadArgument(f"inode {ino}: a time of {when} ns cannot be recorded")
        self._inodes.check_writable()
        # All checks are done: from here nothing is half set.
        rec = inode.rec
        if mode is not None:
            rec.mode = rec.type | (mode & _PERMISSIONS)
        if uid is not None:
            rec.uid = uid
        if gid is not None:
            rec.gid = gid
        if atime_ns is not None:
            rec.atime = atime_ns
        if mtime_ns is not None:
            rec.mtime = mtime_ns
        rec.ctime = self._inodes.now() if ctime_ns is None else ctime_ns
        self._inodes.mark_dirty(inode)

    def create(self, parent: int, name: bytes, mode: int, uid: int, gid: int, rdev: int = 0, replication: str | None = None) -> int:
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
            raise BadArgument(f"{show(name)}: create cannot make an inode of mode {mode:o}")
        if not 0 <= rdev <= MAX_OFFSET:
            raise BadArgument(f"{show(name)}: device number {rdev} cannot be recorded")
        directory = self._room_for(parent, name)
        spec = ""
        if kind == stat.S_IFREG:
            spec = self._checked(replication) or self._inheritance.replication_below(parent)
        rec = _new_record(kind | mode & _PERMISSIONS, 1, uid, self._group(directory, gid), self._inodes.now(), parent, name)
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            rec.rdev = rdev
        change = Change(self._inodes)
        ino = self._numbers.next_now()
        if kind == stat.S_IFREG:
            rec.value = self._values.create(change.batch, ino, spec)
        return self._enter(change, directory, name, ino, rec)

    async def hold_back(self) -> None:
        await self._values.hold_back()

    async def keep_pace(self, removing: bool = False) -> None:
        await self._values.keep_pace(removing)

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> int:
        directory = self._room_for(parent, name)
        if directory.rec.nlink >= MAX_DIRECTORY_LINKS:
            raise TooManyLinks(f"{self._directories.describe(parent)}: has as many subdirectories as a directory can")
        mode = stat.S_IFDIR | mode & _PERMISSIONS | directory.rec.mode & stat.S_ISGID
        rec = _new_record(mode, 2, uid, self._group(directory, gid), self._inodes.now(), parent, name)
        change = Change(self._inodes)
        change.edit(directory).nlink += 1
        return self._enter(change, directory, name, self._numbers.next_now(), rec)

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> int:
        if len(target) > MAX_TARGET:
            raise NameTooLong(f"{show(name)}: a symlink's target has at most {MAX_TARGET} bytes, not {len(target)}")
        if not target or b"\0" in target:
            raise BadArgument(f"{show(name)}: {show(target)!r} cannot be a symlink's target")
        directory = self._room_for(parent, name)
        rec = _new_record(stat.S_IFLNK | 0o777, 1, uid, self._group(directory, gid), self._inodes.now(), parent, name)
        rec.target = target
        return self._enter(Change(self._inodes), directory, name, self._numbers.next_now(), rec)

    def readlink(self, ino: int) -> bytes:
        rec = self._inodes.get(ino).rec
        if not stat.S_ISLNK(rec.mode):
            raise BadArgument(f"inode {ino} is not a symlink")
        return rec.target

    def link(self, ino: int, parent: int, name: bytes) -> None:
        inode = self._inodes.get(ino)
        if inode.rec.is_dir:
            raise IsADirectory(f"{self._directories.describe(ino)}: a directory has one name only")
        if inode.rec.nlink == 0:
            raise NotFound(f"inode {ino} has lost its last name and cannot get another")
        directory = self._room_for(parent, name)
        if inode.rec.nlink >= MAX_LINKS:
            raise TooManyLinks(f"{self._directories.describe(ino)}: has {MAX_LINKS} names already")
        now = self._inodes.now()
        change = Change(self._inodes)
        rec = change.edit(inode)
        rec.nlink += 1
        rec.ctime = now
        if rec.parent == 0 or self._inheritance.worm_above(parent) is not None:
            rec.parent, rec.name = parent, name
        self._directories.put(change, parent, name, ino, rec.type)
        change.touch(directory, now)
        change.apply()

    def unlink(self, parent: int, name: bytes) -> int:
        entry = self._directories.lookup(parent, name)
        inode = self._inodes.get(entry.ino)
        if inode.rec.is_dir:
            raise IsADirectory(f"{self._directories.describe(parent, name)} is a directory")
        self._inheritance.refuse_below(parent, name, "removed")
        now = self._inodes.now()
        change = Change(self._inodes)
        rec = change.edit(inode)
        if rec.parent == parent and rec.name == name:
            rec.parent, rec.name = 0, b""
        self._lifetime.lost_name(change, inode, now)
        self._directories.remove(change, parent, name, entry)
        change.touch(self._inodes.directory(parent), now)
        change.apply()
        return inode.ino

    def rmdir(self, parent: int, name: bytes) -> int:
        entry = self._directories.lookup(parent, name)
        inode = self._inodes.get(entry.ino)
        if not inode.rec.is_dir:
            raise NotADirectory(f"{self._directories.describe(parent, name)} is not a directory")
        self._inheritance.refuse_below(parent, name, "removed")
        self._inheritance.refuse_itself(inode, "removed")
        if not self._directories.is_empty(inode.ino):
            raise NotEmpty(f"{self._directories.describe(parent, name)}: directory not empty")
        now = self._inodes.now()
        directory = self._inodes.directory(parent)
        change = Change(self._inodes)
        change.edit(directory).nlink -= 1
        change.touch(directory, now)
        self._lifetime.lost_directory(change, inode, now)
        self._directories.remove(change, parent, name, entry)
        change.apply()
        return inode.ino

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, noreplace: bool = False, exchange: bool = False
    ) -> None:
        """As rename(2). A name that is replaced keeps its place in the directory, a new name gets a new one; `exchange` moves neither."""
        await self._renamer.rename(parent, name, new_parent, new_name, noreplace, exchange)

    def entries(self, ino: int, after: int, limit: int) -> list[Entry]:
        return self._directories.entries(ino, after, limit)

    @property
    def version(self) -> int:
        return self._inodes.version

    def listing(self, ino: int, after: int, limit: int) -> Listed:
        places = self._directories.places(ino, after, limit)
        # Straight files that are not in memory are most of what there is.
        straight = self._inodes.peek_straight(places.inos)
        if straight is not None:
            sizes = self._values.sizes_of([rec.value for rec in straight])
            if None not in sizes:
                found = cast("list[int]", sizes)
                return Listed(*places, straight, found, found)
        return self._mixed(ino, places)

    def _mixed(self, ino: int, places: Places) -> Listed:
        inodes = self._directories.peek(ino, places)
        records = [what.rec if isinstance(what, Inode) else what for what in inodes]
        straight = [what.value for what in inodes if isinstance(what, InodeRecord) and what.value and not what.map]
        fetched = iter(self._values.sizes_of(straight))
        sizes: list[int] = []
        stored: list[int] = []
        for number, what in zip(places.inos, inodes, strict=True):
            if isinstance(what, Inode) or what.map or not what.value:
                attributes = self._attributes(what if isinstance(what, Inode) else self._inodes.get(number))
                sizes.append(attributes.size)
                stored.append(attributes.stored)
                continue
            size = next(fetched)
            if size is None:
                raise Corrupt(f"inode {number}: its value {what.value} does not exist; check the volume's metadata")
            sizes.append(size)
            stored.append(size)
        return Listed(*places, records, sizes, stored)

    def names(self, ino: int, prefix: bytes, after: bytes | None, limit: int) -> list[tuple[bytes, Dirent]]:
        """At most `limit` entries of the directory whose name starts with `prefix` and stands after `after`, in order of names."""
        return self._directories.names(ino, prefix, after, limit)

    def parent_of(self, ino: int) -> int:
        return self._inodes.directory(ino).rec.parent

    def path_of(self, ino: int) -> bytes | None:
        """Of a file with several names, the one it remembers; once that is gone None, until a lookup by another."""
        return self._directories.path_of(ino)

    # ---- lifetime

    def pin(self, ino: int) -> None:
        self._lifetime.pin(ino)

    def pin_seen(self, ino: int) -> None:
        self._lifetime.pin_seen(ino)

    def pin_listed(self, inos: Sequence[int]) -> None:
        self._lifetime.pin_listed(inos)

    def unpin(self, ino: int, count: int = 1) -> None:
        self._lifetime.unpin(ino, count)

    async def reap_orphans(self) -> int:
        """Remove what earlier processes left without a name, in slices; returns how many. Safe beside everything else, at any time."""
        return await self._lifetime.reap()

    def counts(self) -> tuple[int, int]:
        """(inodes, bytes that files store, holes excluded) as of now, without looking at anything.

        Exact, except that a crash leaves what it lost of a file's tail in the bytes until that file changes next.
        """
        counts = self._inodes.counts
        return counts.inodes, counts.bytes

    def regular_files(self) -> int:
        """How many of the inodes are regular files."""
        return self._inodes.counts.files

    # ---- content

    async def write(self, ino: int, offset: int, data: Buffer) -> None:
        await self._content.write(ino, offset, data)

    def write_now(self, ino: int, offset: int, data: bytes) -> bool:
        return self._content.write_now(ino, offset, data)

    async def append(self, ino: int, data: Buffer) -> int:
        return await self._content.append(ino, data)

    async def read(self, ino: int, offset: int, size: int) -> Buffer:
        return await self._content.read(ino, offset, size)

    def read_now(self, ino: int, offset: int, size: int) -> Buffer | None:
        return self._content.read_now(ino, offset, size)

    def truncate(self, ino: int, size: int) -> None:
        self._content.truncate(ino, size)

    def commit(self, ino: int) -> Coroutine[Any, Any, None]:
        # Its coroutine: not one more for each fsync.
        return self._content.commit(ino)

    def last_page_local(self, ino: int) -> bool:
        return self._content.last_page_local(ino)

    # ---- what only fusefs knows

    def replication_of(self, ino: int) -> str:
        """Of a file: its own. Of a directory: what new files in it get. Of anything else: ""."""
        rec = self._inodes.get(ino).rec
        if rec.value:
            return self._values.replication_of(rec.value)
        return self._inheritance.replication_below(ino) if rec.is_dir else ""

    def set_replication(self, ino: int, spec: str) -> None:
        """New files below this directory get `spec`; "" inherits again. Files that exist keep theirs. BadArgument: see below."""
        inode = self._inodes.get(ino)
        if not inode.rec.is_dir:
            raise BadArgument(f"{self._directories.describe(ino)} is no directory: what is there already changes by --now alone")
        change = Change(self._inodes)
        rec = change.edit(inode)
        rec.replication = self._checked(spec)
        rec.ctime = self._inodes.now()
        change.apply()

    async def give_replication(self, ino: int, spec: str) -> None:
        """As `set_replication`, and everything that is below the directory, or the file `ino`, has `spec` when it returns, or what it
        inherits where that is "". Directories below have none of their own any more.

        What is stored already is moved in the background (`Values.set_replication`). A crash does not stop it from the next commit on.
        BadArgument, and nothing was changed: no such replication, too few hosts, neither a directory nor a file.
        """
        spec = self._checked(spec)
        # Two at a time could each undo a part of the other.
        await self.hand_down()
        # No await from here on.
        inode = self._inodes.get(ino)
        if not (inode.rec.is_dir or inode.rec.is_regular):
            raise BadArgument(f"{self._directories.describe(ino)}: only directories and regular files have a replication")
        self._inodes.check_writable()
        change = Change(self._inodes)
        if inode.rec.is_dir:
            rec = change.edit(inode)
            rec.replication = spec
            rec.ctime = self._inodes.now()
            self._handing_down.begin(change, ino, spec or self._inherited(inode))
        else:
            self._values.set_replication(change.batch, inode.rec.value, spec or self._inherited(inode))
        change.apply()
        await self.hand_down()

    async def hand_down(self) -> None:
        """At open, go on with what a crash left of `give_replication`. Fenced."""
        await self._handing_down.finish()

    def handing_down(self) -> int:
        """Directories whose files `give_replication` has yet to come to."""
        return self._handing_down.pending()

    async def stored(self, ino: int) -> ReplicationStatus:
        """What holds for the inode, who says so, and how what is below it is stored. BadArgument: neither a directory nor a file."""
        rec = self._inodes.get(ino).rec
        if not (rec.is_dir or rec.is_regular):
            raise BadArgument(f"{self._directories.describe(ino)}: only directories and regular files have a replication")
        source = self._inheritance.replication_source(ino) if rec.is_dir else None
        return ReplicationStatus(
            path=self._directories.describe(ino),
            replication=self.replication_of(ino),
            own=rec.replication if rec.is_dir else self.replication_of(ino),
            source=self._directories.describe(source) if source is not None else "",
            below=await Survey(self._inodes, self._directories, self._values).below(ino),
        )

    def _inherited(self, inode: Inode) -> str:
        """What it has without a replication of its own. A file whose name is not known gets the volume's."""
        if inode.ino == ROOT or (not inode.rec.is_dir and not inode.rec.parent):
            return self._inheritance.default
        return self._inheritance.replication_below(inode.rec.parent)

    def set_worm(self, ino: int) -> None:
        self._inheritance.set_worm(ino)

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """NotFound also where only the attribute is missing."""
        return self._xattrs.get(ino, name)

    def setxattr(self, ino: int, name: bytes, value: bytes, *, create: bool = False, replace: bool = False) -> None:
        self._xattrs.set(ino, name, value, create, replace)

    def listxattr(self, ino: int) -> list[bytes]:
        return self._xattrs.list(ino)

    def removexattr(self, ino: int, name: bytes) -> None:
        self._xattrs.remove(ino, name)

    # ---- helpers

    def _room_for(self, parent: int, name: bytes) -> Inode:
        """The directory, if `name` is free in it."""
        check_name(name)
        self._values.check_room()
        directory = self._inodes.directory(parent)
        if directory.rec.nlink == 0:
            raise NotFound(f"inode {parent}: the directory was removed")
        if self._directories.find(parent, name) is not None:
            raise Exists(f"{self._directories.describe(parent, name)} exists already")
        return directory

    def _enter(self, change: Change, directory: Inode, name: bytes, ino: int, rec: InodeRecord) -> int:
        """A new inode under a new name. NO AWAIT between `_room_for` and this."""
        change.add(ino, rec)
        self._directories.put(change, directory.ino, name, ino, rec.type)
        change.touch(directory, rec.mtime)
        change.apply()
        return ino

    def _group(self, directory: Inode, gid: int) -> int:
        return directory.rec.gid if directory.rec.mode & stat.S_ISGID else gid

    def _checked(self, spec: str | None) -> str:
        """The spec as it is written down; BadArgument, or what `check_replication` raises."""
        if not spec:
            return ""
        spec = str(parse_replication(spec))
        if self._check_replication is not None:
            self._check_replication(spec)
        return spec


def _attributes(ino: int, rec: InodeRecord, size: int, stored: int) -> Attributes:
    # By place: with names it takes twice as long.
    return Attributes(ino, rec.mode, rec.nlink, rec.uid, rec.gid, rec.rdev, size, stored, rec.atime, rec.mtime, rec.ctime)


def _check_owner(uid: int | None, gid: int | None) -> None:
    for number in (uid, gid):
        if number is not None and not 0 <= number <= MAX_U32:
            raise BadArgument(f"{number} is not a user or group number")


def _new_record(mode: int, nlink: int, uid: int, gid: int, now: int, parent: int, name: bytes) -> InodeRecord:
    _check_owner(uid, gid)
    return InodeRecord(
        mode=mode,
        nlink=nlink,
        uid=uid,
        gid=gid,
        rdev=0,
        value=0,
        map=0,
        size=0,
        map_bound=0,
        counted=0,
        atime=now,
        mtime=now,
        ctime=now,
        parent=parent,
        name=name,
        flags=0,
        replication="",
        target=b"",
    )


if TYPE_CHECKING:

    def _conforms(namespace: Namespace) -> interfaces.Namespace:
        return namespace
