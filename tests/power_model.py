"""A filesystem in memory that knows what a power cut may leave of it.

Visible is everything that was done, at once. Durable is, read as strictly as POSIX may be:

| done | durable with |
|---|---|
| bytes and size of a file | fsync or fdatasync of that file; not its name |
| names made, removed, renamed, linked | fsync of the directory (a rename between two: of either) |
| permissions, owner | fsync |

A cut leaves the durable, and of the rest nothing (`drop`) or a random part (`random`): of a file any of the sizes it had since, and of
each page written since the old content, the newest, one in between, or a mixture of 512-byte sectors; of names any changes, so long as each
change is whole (rename is atomic), changes of one name stay in order, and no directory is removed before what was moved out of it.
Directories choose at random between a beginning of their changes and any of them.

What was cut off is gone for good: what is left *is* the disk. No I/O but `load` and `store`.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path

PAGE = 4096
SECTOR = 512
#: Contents of one page kept between what is durable and what is newest.
_VERSIONS = 3
ROOT = 1


@dataclass(eq=False)
class Node:
    """An inode. Directories have `names`, files `data`; the rest is `mode` and `target`."""

    number: int
    mode: int
    uid: int
    gid: int
    times: list[int]
    nlink: int = 0
    target: bytes = b""
    # Files
    data: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    #: Pages written since the last sync: their contents before the newest, without the durable one.
    dirty: dict[int, list[bytes]] = field(default_factory=dict)
    #: Sizes since the last sync.
    sizes: list[int] = field(default_factory=list)
    durable_mode: int = 0
    # Directories
    names: dict[bytes, Node] = field(default_factory=dict)
    durable_names: dict[bytes, Node] = field(default_factory=dict)
    #: Changes of names in here that are not durable, in order.
    pending: list[Change] = field(default_factory=list)
    parent: Node | None = None

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    def __repr__(self) -> str:
        return f"<Node {self.number} {stat.filemode(self.mode)} {len(self.data)}>"

    # ---- content

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        size = len(self.data)
        # A page that holds the end of the file and the gap behind it change too.
        self._touch(min(offset, size), end)
        if end > size:
            self.data.extend(bytes(end - size))
            self.sizes.append(end)
        self.data[offset:end] = data

    def truncate(self, size: int) -> None:
        old = len(self.data)
        if size == old:
            return
        self._touch(min(size, old), max(size, old))
        if size < old:
            del self.data[size:]
        else:
            self.data.extend(bytes(size - old))
        self.sizes.append(size)

    def _touch(self, start: int, end: int) -> None:
        for page in range(start // PAGE, -(-end // PAGE)):
            versions = self.dirty.get(page)
            if versions is None:
                self.dirty[page] = []
            elif len(versions) < _VERSIONS:
                versions.append(bytes(self.data[page * PAGE : (page + 1) * PAGE]))

    def sync(self) -> None:
        size = len(self.data)
        if len(self.durable) < size:
            self.durable.extend(bytes(size - len(self.durable)))
        del self.durable[size:]
        for page in self.dirty:
            at = page * PAGE
            if at < size:
                self.durable[at : at + PAGE] = self.data[at : at + PAGE]
        self.dirty.clear()
        self.sizes.clear()
        self.durable_mode = self.mode

    def cut(self, rng: random.Random) -> None:
        """The random part of a cut: what comes out is durable."""
        if not (self.dirty or self.sizes):
            return
        chance = rng.choice((0.0, 0.3, 0.7, 1.0))
        size = rng.choice([len(self.durable), len(self.data), *self.sizes])
        result = bytearray(self.durable[:size])
        result.extend(bytes(size - len(result)))
        for page, versions in self.dirty.items():
            if rng.random() >= chance:
                continue
            at = page * PAGE
            newest = bytes(self.data[at : at + PAGE])
            content = bytearray(rng.choice([*versions, newest]) if rng.random() < 0.3 else newest)
            if rng.random() < 0.2:
                # Torn: a disk writes its sectors in the order it likes.
                old = bytes(self.durable[at : at + PAGE])
                for sector in range(0, len(content), SECTOR):
                    if rng.random() < 0.5:
                        part = old[sector : sector + SECTOR]
                        content[sector : sector + SECTOR] = part.ljust(len(content[sector : sector + SECTOR]), b"\0")
            content = content.ljust(PAGE, b"\0")
            result[at : at + PAGE] = content[: max(0, size - at)]
        self.durable = result[:size]


@dataclass(eq=False)
class Change:
    """One atomic change of names: (directory, name, what it names then)."""

    number: int
    sets: list[tuple[Node, bytes, Node | None]]
    #: Must be durable before.
    after: list[Change]
    done: bool = False


class Disk:
    """The filesystem. All calls are one moment; errors are OSError's business: the caller looks first."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self._last = 0
        self._changes = 0
        self.root = self.new(stat.S_IFDIR | 0o755, 0, 0, [0, 0, 0])
        self.root.nlink = 2
        self.root.parent = self.root

    def new(self, mode: int, uid: int, gid: int, times: list[int]) -> Node:
        """Without a name yet."""
        self._last += 1
        node = Node(self._last, mode, uid, gid, times, durable_mode=mode)
        self.nodes[node.number] = node
        return node

    # ---- names

    def set_names(self, *sets: tuple[Node, bytes, Node | None]) -> None:
        """Change names, atomically; link counts of files follow."""
        after: list[Change] = []
        for directory, name, node in sets:
            old = directory.names.get(name)
            for earlier in directory.pending:
                if any(one is directory and its == name for one, its, _ in earlier.sets):
                    after.append(earlier)
            for other in (old, node):
                if other is None or not other.is_dir:
                    continue
                if other is old:
                    # Removed: after all that concerns what was in it.
                    after.extend(other.pending)
                elif other.parent is not None:
                    # Moved: no order of such changes may make a circle.
                    after.extend(self._all_pending())
            if old is not None:
                old.nlink -= 1
                del directory.names[name]
            if node is not None:
                node.nlink += 1
                directory.names[name] = node
                if node.is_dir:
                    node.parent = directory
        self._changes += 1
        change = Change(self._changes, list(sets), list(dict.fromkeys(after)))
        for directory in {id(one): one for one, _, _ in sets}.values():
            directory.pending.append(change)

    def sync_names(self, directory: Node) -> None:
        for change in list(directory.pending):
            self._settle(change)
        directory.durable_mode = directory.mode

    def sync_all(self) -> None:
        for node in self.nodes.values():
            if node.is_dir:
                self.sync_names(node)
            else:
                node.sync()

    def _settle(self, change: Change) -> None:
        if change.done:
            return
        change.done = True
        for earlier in sorted(change.after, key=lambda one: one.number):
            self._settle(earlier)
        for directory, name, node in change.sets:
            if node is None:
                directory.durable_names.pop(name, None)
            else:
                directory.durable_names[name] = node
            if change in directory.pending:
                directory.pending.remove(change)
        # The chain need not be kept.
        change.after.clear()

    def _all_pending(self) -> list[Change]:
        found = {id(change): change for node in self.nodes.values() for change in node.pending}
        return sorted(found.values(), key=lambda one: one.number)

    # ---- the cut

    @property
    def volatile(self) -> int:
        """Pages and changes of names that a cut would take."""
        return sum(len(node.dirty) for node in self.nodes.values()) + len(self._all_pending())

    def cut(self, rng: random.Random | None) -> None:
        """Decide what is durable: without `rng` nothing more than is already."""
        if rng is None:
            return
        chances: dict[int, tuple[bool, float]] = {}
        stopped: set[int] = set()
        for change in self._all_pending():
            directory = change.sets[0][0].number
            in_order, chance = chances.setdefault(directory, (rng.random() < 0.5, rng.choice((0.0, 0.3, 0.7, 1.0))))
            if directory not in stopped and rng.random() < chance:
                self._settle(change)
            elif in_order:
                stopped.add(directory)
        for node in list(self.nodes.values()):
            if node.is_file:
                node.cut(rng)
            if rng.random() < 0.5:
                node.durable_mode = node.mode

    # ---- to and from real directories

    def store(self, path: Path) -> None:
        """Put the durable state where `path` is, in place of what is there."""
        shutil.rmtree(path, ignore_errors=True)
        made: dict[int, Path] = {}

        def put(node: Node, at: Path) -> None:
            if node.number in made and not node.is_dir:
                os.link(made[node.number], at, follow_symlinks=False)
                return
            made[node.number] = at
            if node.is_dir:
                at.mkdir()
                for name, child in node.durable_names.items():
                    put(child, at / os.fsdecode(name))
            elif node.is_file:
                at.write_bytes(node.durable)
            elif stat.S_ISLNK(node.mode):
                os.symlink(node.target, at)
                return
            else:
                os.mknod(at, node.mode)
            os.chmod(at, stat.S_IMODE(node.durable_mode))
            os.chown(at, node.uid, node.gid)
            os.utime(at, ns=(node.times[0], node.times[1]))

        put(self.root, path)

    @classmethod
    def load(cls, path: Path) -> Disk:
        """All that is below `path`; all of it is durable."""
        disk = cls()
        known: dict[int, Node] = {}

        def take(node: Node, at: Path) -> None:
            for entry in os.scandir(at):
                status = entry.stat(follow_symlinks=False)
                child = known.get(status.st_ino)
                if child is None:
                    times = [status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns]
                    child = known[status.st_ino] = disk.new(status.st_mode, status.st_uid, status.st_gid, times)
                    if child.is_dir:
                        child.nlink = 1
                        take(child, Path(entry.path))
                    elif child.is_file:
                        child.data = bytearray(Path(entry.path).read_bytes())
                        child.durable = bytearray(child.data)
                    elif stat.S_ISLNK(child.mode):
                        child.target = os.readlink(os.fsencode(entry.path))
                disk.set_names((node, os.fsencode(entry.name), child))

        status = path.stat()
        disk.root.mode = disk.root.durable_mode = status.st_mode
        disk.root.uid, disk.root.gid = status.st_uid, status.st_gid
        disk.root.times = [status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns]
        take(disk.root, path)
        disk.sync_all()
        return disk
