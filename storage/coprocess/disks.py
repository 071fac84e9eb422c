"""Large objects put on directory hosts, and read and opened from there, by a coprocess, out of the arena and into it.

What it does not do its caller does, who has the disk at hand.
"""

from __future__ import annotations

from storage.abandoned import Tell, Wanted
from storage.coprocess.client import LEAST, Coprocess, Gone
from storage.coprocess.wire import Directory, Put, Read
from storage.interfaces import Buffer, RangeOpening


class Disks(Coprocess):
    """See the module. From any thread."""

    name = "disks"
    work = "writes to disks"

    def put(self, directory: Directory, parts: list[str], data: Buffer, temporary: str, wanted: Wanted, tell: Tell | None) -> str | None:
        """As `Tree.put`. None: it is to be done here. Gone: also, and some of it may have been done."""
        place = self.arena.place(data) if len(data) >= LEAST else None
        if place is None or not self.start():
            return None
        flag = None if tell is None else self.arena.flag()
        if flag is None or tell is None:
            (tag,) = self.ask(Put(directory, parts, place, temporary, -1), [data], wanted=wanted).names
            return tag
        tell(flag.set)
        try:
            (tag,) = self.ask(Put(directory, parts, place, temporary, flag.at), [data, flag]).names
        finally:
            # Before another gets the flag.
            tell(None)
        return tag

    def read(self, directory: Directory, parts: list[str], offset: int, length: int, step: int, opening: RangeOpening) -> int | None:
        """As `Tree.get_range_in` with `opening.take`. None: it is to be done here."""
        place = self.arena.place(opening.target) if length >= LEAST else None
        if place is None or not self.start():
            return None
        request = Read(directory, parts, offset, length, step, place, opening.offset, opening.key, opening.header)
        try:
            size = self.ask(request, opening.target).size
        except Gone:
            return None
        opening.done()
        return size
