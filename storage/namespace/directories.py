"""Directory entries: name -> inode, place -> name and inode; and the way back up, from an inode to a path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from storage.errors import BadArgument, Corrupt, NameTooLong, NotFound
from storage.interfaces import Entry, MetadataStore
from storage.metadata.counters import Counter
from storage.metadata.keys import COOKIE, NAME, prefix_end, u64
from storage.namespace.inodes import Change, Inode, InodeTable
from storage.namespace.records import (
    MAX_NAME,
    MAX_OFFSET,
    NOWHERE,
    ROOT,
    Dirent,
    InodeRecord,
    Places,
    cookie_key,
    decode_dirent,
    decode_place,
    decode_places,
    encode_dirent,
    encode_place,
    name_key,
)

#: A chain of parents longer than this is a circle.
_MAX_DEPTH = 1_000_000


def check_name(name: bytes) -> None:
    """NameTooLong, or BadArgument for what cannot be a name."""
    if len(name) > MAX_NAME:
        raise NameTooLong(f"name {show(name[:40])}... has {len(name)} bytes; at most {MAX_NAME}")
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise BadArgument(f"{show(name)!r} cannot be the name of a directory entry")


def show(path: bytes) -> str:
    """For messages: whatever bytes there are, in one line of text."""
    text = path.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


class Directories:
    """Entries in the store. Every method is synchronous."""

    def __init__(self, store: MetadataStore, inodes: InodeTable, cookies: Counter) -> None:
        self._store = store
        self._inodes = inodes
        self._cookies = cookies

    # ---- down

    def find(self, parent: int, name: bytes) -> Dirent | None:
        """The entry, or None."""
        raw = self._store.get(name_key(parent, name))
        return None if raw is None else decode_dirent(parent, raw)

    def lookup(self, parent: int, name: bytes) -> Dirent:
        """NotFound, NotADirectory (of `parent`)."""
        entry = self.look(parent, name)
        if entry is None:
            raise NotFound(f"{self.describe(parent, name)}: no such file or directory")
        return entry

    def look(self, parent: int, name: bytes) -> Dirent | None:
        """As `lookup`, without an error where there is no such name: it would take longer than looking."""
        check_name(name)
        self._inodes.directory(parent)
        return self.find(parent, name)

    def is_empty(self, ino: int) -> bool:
        start = COOKIE + u64(ino)
        return not self._store.scan(start, prefix_end(start), 1)

    def entries(self, ino: int, after: int, limit: int) -> list[Entry]:
        """In cookie order, from the first cookie above `after`. Cookies only grow, so none appears twice or is skipped."""
        self._inodes.directory(ino)
        if not 0 <= after < MAX_OFFSET:
            return []
        entries = [decode_place(key, raw) for key, raw in self._places(ino, after, limit)]
        return [Entry(cookie=entry.cookie, name=name, ino=entry.ino, mode=entry.type) for name, entry in entries]

    def _places(self, ino: int, after: int, limit: int) -> list[tuple[bytes, bytes]]:
        return self._store.scan(cookie_key(ino, after + 1), prefix_end(COOKIE + u64(ino)), limit)

    def places(self, ino: int, after: int, limit: int) -> Places:
        """As `entries`, in columns."""
        self._inodes.directory(ino)
        return decode_places(self._places(ino, after, limit)) if 0 <= after < MAX_OFFSET else NOWHERE

    def peek(self, ino: int, places: Places) -> Sequence[Inode | InodeRecord]:
        """What they stand for: inodes where they are in memory, else their records as they are stored."""
        try:
            return self._inodes.peek(places.inos)
        except NotFound as error:
            raise Corrupt(f"{self.describe(ino)}: has an entry of which {error}; check the volume's metadata") from error

    def names(self, ino: int, prefix: bytes, after: bytes | None, limit: int) -> list[tuple[bytes, Dirent]]:
        """At most `limit` entries whose name starts with `prefix` and stands after `after`, in order of names."""
        start = name_key(ino, prefix if after is None else max(prefix, after + b"\0"))
        stop = prefix_end(NAME + u64(ino) + prefix)
        skip = 1 + 8
        return [(key[skip:], decode_dirent(ino, raw)) for key, raw in self._store.scan(start, stop, limit)]

    # ---- changing

    def put(self, change: Change, parent: int, name: bytes, ino: int, kind: int, cookie: int | None = None) -> None:
        """A new name, or what an existing one stands for; a new place unless `cookie` says which."""
        if cookie is None:
            cookie = self._cookies.next_now()
        change.batch.put(cookie_key(parent, cookie), encode_place(name, ino, kind))
        change.batch.put(name_key(parent, name), encode_dirent(Dirent(ino=ino, type=kind, cookie=cookie)))

    def remove(self, change: Change, parent: int, name: bytes, entry: Dirent) -> None:
        change.batch.delete(name_key(parent, name))
        change.batch.delete(cookie_key(parent, entry.cookie))

    # ---- up

    def ancestors(self, ino: int) -> Iterator[Inode]:
        """The directory itself, its parent, and so on to the root (or to where a removed directory hangs in the air)."""
        for _ in range(_MAX_DEPTH):
            inode = self._inodes.directory(ino)
            yield inode
            if ino == ROOT or inode.rec.nlink == 0:
                return
            ino = inode.rec.parent
        raise Corrupt(f"directory inode {ino}: its parents form a circle; check the volume's metadata")

    def path_of(self, ino: int) -> bytes | None:
        """Some path from the root; None without a name (any more, or until a lookup by another of its names)."""
        parts: list[bytes] = []
        for _ in range(_MAX_DEPTH):
            if ino == ROOT:
                return b"/".join(reversed(parts))
            rec = self._inodes.get(ino).rec
            if rec.nlink == 0 or rec.parent == 0:
                return None
            entry = self.find(rec.parent, rec.name)
            if entry is None or entry.ino != ino:
                return None
            parts.append(rec.name)
            ino = rec.parent
        raise Corrupt(f"inode {ino}: its parents form a circle; check the volume's metadata")

    def describe(self, ino: int, name: bytes | None = None) -> str:
        """For messages: the path of the inode, or of `name` in it."""
        path = self.path_of(ino)
        if path is None:
            path = b"(removed)" if name is not None else f"(inode {ino})".encode()
        if name is not None:
            path = path + b"/" + name if path else name
        return show(path) or "/"
