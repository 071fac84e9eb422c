"""What a directory hands down to all that is below it: worm, and replication.

*worm*: nothing below the directory can be removed, replaced, renamed or truncated to 0; the directory itself cannot be
removed or renamed either. New names and appends are fine, so are chmod, chown and times. A directory *above* a worm directory
may be renamed: what it holds stays whole and reachable, and is no one's to remove, since a directory with entries cannot be.
A file with several names is protected through the name it remembers; a link made into a worm directory becomes that name.
"""

from __future__ import annotations

from storage.errors import NotADirectory, NotPermitted
from storage.interfaces import MetadataStore
from storage.namespace.directories import Directories
from storage.namespace.inodes import Change, Inode, InodeTable
from storage.namespace.records import ROOT, WORM, WORM_KEY


class Inheritance:
    """Walks up the parents. Where a volume has no worm directory, one flag in memory says so and nothing is walked."""

    def __init__(self, store: MetadataStore, inodes: InodeTable, directories: Directories, default_replication: str) -> None:
        self._inodes = inodes
        self._directories = directories
        self._default = default_replication
        self._any_worm = store.get(WORM_KEY) is not None

    # ---- worm

    def worm_above(self, directory: int) -> Inode | None:
        """The nearest worm directory among `directory` and its ancestors."""
        if not self._any_worm:
            return None
        for inode in self._directories.ancestors(directory):
            if inode.rec.flags & WORM:
                return inode
        return None

    def refuse_below(self, parent: int, name: bytes, what: str) -> None:
        """NotPermitted if `parent` is, or is below, a worm directory."""
        worm = self.worm_above(parent)
        if worm is not None:
            path = self._directories.describe(parent, name)
            raise NotPermitted(f"{path}: cannot be {what}, {self._directories.describe(worm.ino)} is a worm directory")

    def refuse_itself(self, inode: Inode, what: str) -> None:
        """NotPermitted if it is a worm directory."""
        if inode.rec.flags & WORM:
            raise NotPermitted(f"{self._directories.describe(inode.ino)}: a worm directory cannot be {what}")

    def refuse_truncation(self, inode: Inode) -> None:
        """NotPermitted if the file is below a worm directory."""
        if self._any_worm and inode.rec.nlink and inode.rec.parent:
            self.refuse_below(inode.rec.parent, inode.rec.name, "emptied")

    def set_worm(self, ino: int) -> None:
        inode = self._inodes.get(ino)
        if not inode.rec.is_dir:
            raise NotADirectory(f"{self._directories.describe(ino)}: only a directory can be a worm directory")
        if inode.rec.flags & WORM:
            return
        change = Change(self._inodes)
        rec = change.edit(inode)
        rec.flags |= WORM
        rec.ctime = self._inodes.now()
        change.batch.put(WORM_KEY, b"1")
        change.apply()
        self._any_worm = True

    # ---- replication

    @property
    def default(self) -> str:
        """The volume's."""
        return self._default

    def replication_below(self, directory: int) -> str:
        """What a new file in `directory` gets: of the nearest directory that says, else the volume's."""
        source = self.replication_source(directory)
        return self._default if source is None else self._inodes.directory(source).rec.replication

    def replication_source(self, directory: int) -> int | None:
        """The nearest directory that says; None where that is the volume."""
        for inode in self._directories.ancestors(directory):
            if inode.rec.replication:
                return inode.ino
            if inode.ino == ROOT:
                break
        return None
