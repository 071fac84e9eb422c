"""Rename in all its cases, as rename(2) and renameat2(2) say."""

from __future__ import annotations

from dataclasses import dataclass

from storage.errors import (
    BadArgument,
    Exists,
    IsADirectory,
    NotADirectory,
    NotEmpty,
    NotFound,
    TooManyLinks,
)
from storage.interfaces import TailPiece, Values
from storage.namespace.directories import Directories, check_name
from storage.namespace.inheritance import Inheritance
from storage.namespace.inodes import Change, Inode, InodeTable
from storage.namespace.lifetime import Lifetime
from storage.namespace.records import MAX_DIRECTORY_LINKS, Dirent


@dataclass(slots=True)
class _Plan:
    """A rename that was found possible, as of now."""

    parent: Inode
    name: bytes
    source: Inode
    source_entry: Dirent
    new_parent: Inode
    new_name: bytes
    target: Inode | None
    target_entry: Dirent | None
    exchange: bool

    def contents(self) -> list[int]:
        """Values whose bytes so far must be in the commit of the rename."""
        if self.target is None:
            return []
        sides = [self.source, self.target] if self.exchange else [self.source]
        return [inode.rec.value for inode in sides if inode.rec.value]


class Renamer:
    """Renames; nothing else changes two directories at once."""

    def __init__(self, inodes: InodeTable, directories: Directories, inheritance: Inheritance, lifetime: Lifetime, values: Values) -> None:
        self._inodes = inodes
        self._directories = directories
        self._inheritance = inheritance
        self._lifetime = lifetime
        self._values = values

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, noreplace: bool, exchange: bool) -> None:
        check_name(name)
        check_name(new_name)
        if noreplace and exchange:
            raise BadArgument("a rename cannot both exchange and refuse to replace")
        safe: set[int] = set()
        while True:
            plan = self._plan(parent, name, new_parent, new_name, noreplace, exchange)
            if plan is None:
                return
            waiting = [value for value in plan.contents() if value not in safe]
            if not waiting:
                break
            for value in waiting:
                try:
                    await self._values.settle(value, self._values.size_of(value))
                    # NO AWAIT since `settle`. Not only when all are settled: while another is waited for, this one's may fly (again).
                    self._hand_over(value)
                except NotFound:
                    # Emptied or removed while we waited: the next plan has the value that is there now.
                    continue
                safe.add(value)
        # NO AWAIT since `_plan`: what it checked still holds. The tails up to the settled bytes are applied, so they are durable no later.
        self._carry_out(plan)

    def _hand_over(self, value: int) -> None:
        """The journal gets what it does not have of a value, with the next commit or before."""
        self._inodes.check_writable()
        Change(self._inodes).apply(self._values.uncommitted_tail(value))

    # ---- what is possible

    def _plan(self, parent: int, name: bytes, new_parent: int, new_name: bytes, noreplace: bool, exchange: bool) -> _Plan | None:
        """All checks; None where both names are one file already, which POSIX says does nothing."""
        source_entry = self._directories.lookup(parent, name)
        above, new_above = self._inodes.directory(parent), self._inodes.directory(new_parent)
        source = self._inodes.get(source_entry.ino)
        target_entry = self._directories.find(new_parent, new_name)
        target = None if target_entry is None else self._inodes.get(target_entry.ino)
        plan = _Plan(above, name, source, source_entry, new_above, new_name, target, target_entry, exchange)
        if target is None:
            if exchange:
                raise NotFound(f"{self._directories.describe(new_parent, new_name)}: no such file or directory to exchange with")
            if new_above.rec.nlink == 0:
                raise NotFound(f"inode {new_parent}: the directory was removed")
        elif noreplace:
            raise Exists(f"{self._directories.describe(new_parent, new_name)} exists already")
        if target is source:
            return None
        self._check_loops(plan)
        if target is not None and not exchange:
            self._check_kinds(plan, target)
        self._check_worm(plan)
        for inode, gain in self._link_gains(plan):
            if gain > 0 and inode.rec.nlink + gain > MAX_DIRECTORY_LINKS:
                raise TooManyLinks(f"{self._directories.describe(inode.ino)}: has as many subdirectories as a directory can")
        return plan

    def _check_loops(self, plan: _Plan) -> None:
        """A directory cannot come to lie below itself."""
        if plan.source.rec.is_dir:
            self._refuse_inside(plan.new_parent, plan.source)
        if plan.exchange and plan.target is not None and plan.target.rec.is_dir:
            self._refuse_inside(plan.parent, plan.target)

    def _refuse_inside(self, place: Inode, moved: Inode) -> None:
        if any(inode is moved for inode in self._directories.ancestors(place.ino)):
            raise BadArgument(f"{self._directories.describe(moved.ino)}: a directory cannot be moved into itself")

    def _check_kinds(self, plan: _Plan, target: Inode) -> None:
        if plan.source.rec.is_dir:
            if not target.rec.is_dir:
                where = self._directories.describe(plan.new_parent.ino, plan.new_name)
                raise NotADirectory(f"{where} is not a directory: cannot be replaced by one")
            if not self._directories.is_empty(target.ino):
                raise NotEmpty(f"{self._directories.describe(target.ino)}: directory not empty")
        elif target.rec.is_dir:
            raise IsADirectory(f"{self._directories.describe(target.ino)} is a directory: cannot be replaced by a file")

    def _check_worm(self, plan: _Plan) -> None:
        self._inheritance.refuse_below(plan.parent.ino, plan.name, "renamed")
        self._inheritance.refuse_itself(plan.source, "renamed")
        if plan.target is not None:
            how = "exchanged" if plan.exchange else "replaced"
            self._inheritance.refuse_below(plan.new_parent.ino, plan.new_name, how)
            self._inheritance.refuse_itself(plan.target, how)

    def _link_gains(self, plan: _Plan) -> list[tuple[Inode, int]]:
        """How the link counts of the two parents change; one entry where they are the same."""
        moved = int(plan.source.rec.is_dir)
        met = int(plan.target is not None and plan.target.rec.is_dir)
        if plan.exchange:
            gains = [(plan.parent, met - moved), (plan.new_parent, moved - met)]
        else:
            gains = [(plan.parent, -moved), (plan.new_parent, moved - met)]
        if plan.parent is plan.new_parent:
            return [(plan.parent, sum(gain for _, gain in gains))]
        return gains

    # ---- doing it

    def _carry_out(self, plan: _Plan) -> None:
        """One batch. NO AWAIT inside."""
        self._inodes.check_writable()
        now = self._inodes.now()
        change = Change(self._inodes)
        for inode, gain in self._link_gains(plan):
            if gain:
                change.edit(inode).nlink += gain
            change.touch(inode, now)
        source, target = plan.source_entry, plan.target_entry
        self._move_hint(change, plan.source, plan.parent, plan.name, plan.new_parent, plan.new_name, now)
        if plan.target is not None and target is not None:
            # The name that is replaced keeps its place: a reader of the directory meets it exactly once.
            self._directories.put(change, plan.new_parent.ino, plan.new_name, source.ino, source.type, target.cookie)
        if plan.exchange and plan.target is not None and target is not None:
            self._move_hint(change, plan.target, plan.new_parent, plan.new_name, plan.parent, plan.name, now)
            self._directories.put(change, plan.parent.ino, plan.name, target.ino, target.type, source.cookie)
        else:
            self._directories.remove(change, plan.parent.ino, plan.name, source)
            if plan.target is None:
                self._directories.put(change, plan.new_parent.ino, plan.new_name, source.ino, source.type)
            elif plan.target.rec.is_dir:
                self._lifetime.lost_directory(change, plan.target, now)
            else:
                rec = change.edit(plan.target)
                if rec.parent == plan.new_parent.ino and rec.name == plan.new_name:
                    # As in `unlink`: it may have other names, and must not remember one that is another file's now.
                    rec.parent, rec.name = 0, b""
                self._lifetime.lost_name(change, plan.target, now)
        tails: list[TailPiece] = []
        for value in plan.contents():
            tails += self._values.uncommitted_tail(value)
        change.apply(tails)

    def _move_hint(self, change: Change, inode: Inode, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes, now: int) -> None:
        rec = change.edit(inode)
        rec.ctime = now
        # A directory has one parent; a file with several names keeps remembering the one it remembers, which may be below a worm directory.
        if rec.is_dir or rec.parent == 0 or (rec.parent == parent.ino and rec.name == name):
            rec.parent, rec.name = new_parent.ino, new_name
