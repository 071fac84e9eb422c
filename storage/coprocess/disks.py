"""Large objects put on directory hosts, and read and opened from there, by a coprocess, out of the arena and into it.

What it does not do its caller does, who has the disk at hand.
"""

from __future__ import annotations

from storage.abandoned import Tell, Wanted
from storage.coprocess.asked import Asked, Gone
from storage.coprocess.client import LEAST, Coprocess
from storage.coprocess.wire import Directory, Put, Read
from storage.interfaces import Buffer, RangeOpening


class Disks(Coprocess):
    """See the module. From any thread."""

    name = "disks"
    work = "writes to disks"

    def start_for(self, size: int) -> None:
        """For threads: start it, unless it is there, if it is worth it for so many bytes."""
        if size >= LEAST:
            self.start()

    def begin_put(
        self, directory: Directory, parts: list[str], data: Buffer, temporary: str, wanted: Wanted, tell: Tell | None
    ) -> Asked | None:
        """As `Tree.put`, up to where its tag is to be waited for; also for the event loop. None: it is to be done here. `tell` is to be
        told None once it has answered."""
        place = self.arena.place(data) if len(data) >= LEAST and self.there else None
        if place is None:
            return None
        try:
            flag = None if tell is None else self.arena.flag()
            if flag is None or tell is None:
                return self.begin(Put(directory, parts, place, temporary, -1), [data], wanted=wanted)
            asked = self.begin(Put(directory, parts, place, temporary, flag.at), [data, flag])
        except Gone:
            return None
        tell(flag.set)
        return asked

    def begin_read(
        self, directory: Directory, parts: list[str], offset: int, length: int, step: int, opening: RangeOpening
    ) -> Asked | None:
        """As `Tree.get_range_in` with `opening.take`, up to where it is to be waited for how many bytes there were; `opening.done` is to be
        called then. None: it is to be done here."""
        place = self.arena.place(opening.target) if length >= LEAST and self.there else None
        if place is None:
            return None
        request = Read(directory, parts, offset, length, step, place, opening.offset, opening.key, opening.header)
        try:
            return self.begin(request, opening.target)
        except Gone:
            return None
