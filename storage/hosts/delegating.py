"""A tree that has the coprocess do what is large: put what stands in the arena, and read what is to be opened there.

Where it cannot, and where it has not said what became of it, it is done here, as by any tree. What the coprocess has flushed is known to
be durable here, too; what it has not said anything of is in doubt (see `root`).
"""

from __future__ import annotations

import os
from contextlib import suppress

from storage.abandoned import Tell, Wanted
from storage.coprocess.client import Gone
from storage.coprocess.pair import DISKS
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
        size = DISKS.read(self._root.told, parts, offset, length, step, opening) if self._delegates else None
        return size if size is not None else self.get_range_in(parts, offset, length, step, opening.take)

    def put(self, parts: list[str], data: Buffer, temporary: str, wanted: Wanted, tell: Tell | None = None) -> str:
        """As `Tree.put`; failpoints have it done here."""
        tag = self._put_there(parts, data, temporary, wanted, tell) if self._delegates else None
        return tag if tag is not None else super().put(parts, data, temporary, wanted)

    def _put_there(self, parts: list[str], data: Buffer, temporary: str, wanted: Wanted, tell: Tell | None) -> str | None:
        """By the coprocess, out of the arena; None: it is to be done here."""
        name, root = "/".join(parts), self._root
        self._held.drop(name)
        # As where it is done here: until it is known to be flushed, what is listed there may not be durable.
        root.doubt(parts[:-1])
        told = root.told
        try:
            tag = DISKS.put(told, parts, data, temporary, wanted, tell)
        except Gone:
            # Nobody works on it any more.
            root.unsure(parts[:-1])
            with suppress(FusefsError, OSError), root.opened() as fd:
                os.unlink(f"{TEMPORARY}/{temporary}", dir_fd=fd)
            return None
        except BaseException:
            root.unsure(parts[:-1])
            raise
        if tag is not None and told is not root.told:
            # Directories were removed, or missing, meanwhile: what it knew to be durable may have been made anew.
            root.unsure(parts[:-1])
            with root.errors(f"writing {name}"), root.opened() as fd:
                directory = root.make(fd, parts[:-1])
                try:
                    root.flush(parts[:-1], directory)
                finally:
                    os.close(directory)
        elif tag is not None:
            root.settled(parts[:-1])
            self._held.drop(name)
        return tag
