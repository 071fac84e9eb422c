"""A tree that has the coprocess do what is large: put what stands in the arena, and read what is to be opened there.

Where it cannot, and where it has not said what became of it, it is done here, as by any tree. What the coprocess has flushed is known to
be durable here, too; what it has not said anything of is in doubt (see `root`).
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial

from storage.abandoned import Tell, Wanted
from storage.coprocess.asked import Asked, Gone
from storage.coprocess.pair import DISKS
from storage.coprocess.wire import Directory
from storage.errors import FusefsError
from storage.failpoints import Failpoints, NoFailpoints
from storage.hosts.tree import TEMPORARY, Tree
from storage.interfaces import Buffer, RangeOpening


class DelegatingTree(Tree):
    """See the module. In the coprocess itself they are plain ones."""

    def __init__(self, path: str, url: str, failpoints: Failpoints, identity: tuple[int, int]) -> None:
        super().__init__(path, url, failpoints, identity)
        #: Not where a test wants to be there at each step.
        self._delegates = isinstance(failpoints, NoFailpoints)

    def get_range_opened(self, parts: list[str], offset: int, length: int, step: int, opening: RangeOpening) -> int:
        """As `get_range_in`, opened."""
        if self._delegates:
            DISKS.start_for(length)
        begun = self.begin_reading(parts, offset, length, step, opening)
        return self.get_range_in(parts, offset, length, step, opening.take) if begun is None else begun.end()

    def begin_reading(self, parts: list[str], offset: int, length: int, step: int, opening: RangeOpening) -> Reading | None:
        """As `get_range_opened`, up to where it is to be waited for; also for the event loop. None: it is to be done here."""
        asked = DISKS.begin_read(self._root.told, parts, offset, length, step, opening) if self._delegates else None
        return None if asked is None else Reading(self, asked, parts, offset, length, step, opening)

    def put(self, parts: list[str], data: Buffer, temporary: str, wanted: Wanted, tell: Tell | None = None) -> str:
        """As `Tree.put`; failpoints have it done here."""
        self._held.drop("/".join(parts))
        if self._delegates:
            DISKS.start_for(len(data))
        begun = self.begin_put(parts, data, temporary, wanted, tell)
        return self.put_here(parts, data, temporary, wanted) if begun is None else begun.end()

    def begin_put(self, parts: list[str], data: Buffer, temporary: str, wanted: Wanted, tell: Tell | None) -> Putting | None:
        """As `put`, up to where it is to be waited for; also for the event loop. None: it is to be done here."""
        if not self._delegates or "/".join(parts) in self._held:
            # It is to be let go of, which may take a while.
            return None
        # As where it is done here: until it is known to be flushed, what is listed there may not be durable.
        self._root.doubt(parts[:-1])
        told = self._root.told
        asked = DISKS.begin_put(told, parts, data, temporary, wanted, tell)
        return None if asked is None else Putting(self, asked, told, parts, data, temporary, wanted, tell)

    def put_here(self, parts: list[str], data: Buffer, temporary: str, wanted: Wanted) -> str:
        """By this process."""
        return super().put(parts, data, temporary, wanted)

    def put_there(self, parts: list[str], told: Directory) -> None:
        """It has been put by the coprocess, and flushed."""
        name, root = "/".join(parts), self._root
        if told is not root.told:
            # Directories were removed, or missing, meanwhile: what it knew to be durable may have been made anew.
            root.unsure(parts[:-1])
            with root.errors(f"writing {name}"), root.opened() as fd:
                directory = root.make(fd, parts[:-1])
                try:
                    root.flush(parts[:-1], directory)
                finally:
                    os.close(directory)
        else:
            root.settled(parts[:-1])
            self._held.drop(name)

    def put_nowhere(self, parts: list[str], temporary: str | None) -> None:
        """The coprocess has not said what became of it. `temporary`: nobody works on it any more, and it may be there."""
        root = self._root
        root.unsure(parts[:-1])
        if temporary is not None:
            with suppress(FusefsError, OSError), root.opened() as fd:
                os.unlink(f"{TEMPORARY}/{temporary}", dir_fd=fd)

    def is_simple(self, parts: list[str], told: Directory) -> bool:
        """Is there nothing that takes a while in `put_there`?"""
        return told is self._root.told and "/".join(parts) not in self._held


class Reading:
    """A read that the coprocess does. `end` is called exactly once, by a thread or, after `soon`, by the event loop."""

    def __init__(
        self, tree: DelegatingTree, asked: Asked, parts: list[str], offset: int, length: int, step: int, opening: RangeOpening
    ) -> None:
        self._tree, self._asked, self._opening = tree, asked, opening
        self._here = partial(tree.get_range_in, parts, offset, length, step, opening.take)
        #: See `Asked`.
        self.soon, self.forsake = asked.soon, asked.forsake

    def end(self) -> int:
        """As `DelegatingTree.get_range_opened`."""
        try:
            size = self._asked.answer().size
        except Gone:
            return self._here()
        self._opening.done()
        return size


class Putting:
    """A put that the coprocess does. `end` is called exactly once, by a thread or, after `soon`, by the event loop."""

    def __init__(
        self,
        tree: DelegatingTree,
        asked: Asked,
        told: Directory,
        parts: list[str],
        data: Buffer,
        temporary: str,
        wanted: Wanted,
        tell: Tell | None,
    ) -> None:
        self._tree, self._asked, self._told, self._parts, self._temporary = tree, asked, told, parts, temporary
        self._tell = tell
        self._here = partial(tree.put_here, parts, data, temporary, wanted)

    async def soon(self) -> bool:
        """See `Asked.soon`."""
        return await self._asked.soon() and self._tree.is_simple(self._parts, self._told)

    def forsake(self) -> None:
        """See `Asked.forsake`."""
        self._asked.forsake()
        self._tree.put_nowhere(self._parts, None)
        if self._tell is not None:
            self._tell(None)

    def end(self) -> str:
        """As `DelegatingTree.put`."""
        tree, parts = self._tree, self._parts
        try:
            (tag,) = self._asked.answer().names
        except Gone:
            # Nobody works on it any more.
            tree.put_nowhere(parts, self._temporary)
            return self._here()
        except BaseException:
            tree.put_nowhere(parts, None)
            raise
        finally:
            if self._tell is not None:
                # Before another gets the flag.
                self._tell(None)
        tree.put_there(parts, self._told)
        return tag
