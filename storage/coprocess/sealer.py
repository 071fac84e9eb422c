"""Sealing and opening by a coprocess, in the arena; and in the thread that asks, where there is none, it is gone, or it is not worth it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from storage.buffers import aligned
from storage.coprocess.arena import Arena, Place
from storage.coprocess.asked import Asked, Gone
from storage.coprocess.client import LEAST, TIMEOUT, Coprocess
from storage.coprocess.wire import Open, Seal, Shard
from storage.interfaces import Buffer
from storage.sealing import ShardHeader, open_blocks_into, root_of, seal, sealed_length

log = logging.getLogger("fusefs.coprocess")

#: Pieces of a sector's plaintext that are told one by one, where they stand in the arena already.
PIECES = 64
#: Bytes of a piece that is told as it is.
TOLD = 256
#: Key, header and plaintext in pieces.
Job = tuple[bytes, ShardHeader, Sequence[Buffer]]


class Sealing:
    """Shards that are being sealed. `end` is called exactly once, by a thread or, after `soon`, by the event loop."""

    def __init__(self, asked: Asked, sealed: Sequence[memoryview]) -> None:
        self._asked, self._sealed = asked, sealed
        #: See `Asked`.
        self.soon, self.forsake = asked.soon, asked.forsake

    def end(self) -> list[tuple[Buffer, str]] | None:
        """Sealed shards and their roots. None: it is to be done here."""
        try:
            roots = self._asked.answer().names
        except Gone as error:
            log.debug("sealed here: %s", error)
            return None
        return [(sealed.toreadonly(), root) for sealed, root in zip(self._sealed, roots, strict=True)]


class Sealer(Coprocess):
    """See the module. From any thread."""

    name = "sealing"
    work = "seals sectors"

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena)
        #: For what is opened here: each thread wants the interpreter's lock for each block, and the event loop wants it, too.
        self._opening = threading.Lock()

    def forget(self) -> None:
        """See `Coprocess.forget`."""
        self._opening = threading.Lock()
        super().forget()

    def seal(self, key: bytes, header: ShardHeader, data: Sequence[Buffer]) -> tuple[Buffer, str]:
        """The sealed shard of `data`, and its root. As `sealing.seal`."""
        return self.seal_all([(key, header, data)])[0]

    def seal_all(self, jobs: Sequence[Job]) -> list[tuple[Buffer, str]]:
        """As `seal`, of each."""
        total = sum(header.plaintext_length for _, header, _ in jobs)
        if total >= LEAST and self.start():
            made = self._sealed_there(jobs)
            if made is not None:
                return made
        return [self._sealed_here(*job) for job in jobs]

    def _sealed_there(self, jobs: Sequence[Job]) -> list[tuple[Buffer, str]] | None:
        begun = self._begin(jobs, copying=True)
        return None if begun is None else begun.end()

    def begin_sealing(self, jobs: Sequence[Job]) -> Sealing | None:
        """For the event loop: as `seal_all`, up to where it is to be waited for. None: a thread is to do it, as it is not there, it is not
        worth it, or plaintext would have to be copied."""
        total = sum(header.plaintext_length for _, header, _ in jobs)
        return self._begin(jobs, copying=False) if total >= LEAST and self.there else None

    def _begin(self, jobs: Sequence[Job], *, copying: bool) -> Sealing | None:
        """None: it is to be done here."""
        held: list[tuple[memoryview, memoryview | None]] = []
        shards = []
        for key, header, data in jobs:
            plain = self._places(data, copying=copying)
            sealed = self.arena.lend(sealed_length(header.plaintext_length))
            target = self.arena.place(sealed)
            if plain is None or target is None or sum(map(len, data)) != header.plaintext_length:
                return None
            # What was lent for it is held until the other process is done.
            held.append((sealed, plain[1]))
            shards.append(Shard(plain[0], target, key, header.encode()))
        try:
            # Plaintext, too: it is not to be lent to another while it is read there.
            return Sealing(self.begin(Seal(shards), (held, jobs), limit=TIMEOUT), [sealed for sealed, _ in held])
        except Gone as error:
            log.debug("sealed here: %s", error)
            return None

    def _sealed_here(self, key: bytes, header: ShardHeader, data: Sequence[Buffer]) -> tuple[Buffer, str]:
        made = seal(key, header, data, self.arena.lend_private if header.plaintext_length >= LEAST else aligned)
        return made, root_of(made)

    def _places(self, data: Sequence[Buffer], *, copying: bool = True) -> tuple[list[Place | bytes], memoryview | None] | None:
        """Where the pieces of `data` stand in the arena, in order; what stands elsewhere is copied there, into what is lent for it, to be
        held for as long as the places are used; or is told, if it is small. None: there is no room, or some would have to be copied and
        is not to be."""
        found = [self._place(piece) for piece in data] if len(data) <= PIECES else [None] * len(data)
        missing = [piece for piece, place in zip(data, found, strict=True) if place is None]
        at, copy = 0, None
        if missing and not copying:
            return None
        if missing:
            copy = self.arena.lend(sum(map(len, missing)))
            if not self.arena.fill(copy, missing):
                return None
            at, _ = self.arena.place(copy) or (0, 0)
        places: list[Place | bytes] = []
        for piece, place in zip(data, found, strict=True):
            if place is None:
                place = at, len(piece)
                at += len(piece)
            last = places[-1] if places else b""
            if isinstance(place, bytes) or isinstance(last, bytes) or sum(last) != place[0]:
                places.append(place)
            else:
                places[-1] = last[0], last[1] + place[1]
        return places, copy

    def _place(self, piece: Buffer) -> Place | bytes | None:
        return bytes(piece) if len(piece) <= TOLD else self.arena.place(piece)

    def open_into(self, key: bytes, expected: ShardHeader, first: int, blocks: memoryview, plain: memoryview) -> None:
        """As `sealing.open_blocks_into`."""
        if len(blocks) >= LEAST and (target := self.arena.place(plain)) is not None and self.start():
            source = self._places([blocks])
            if source is not None:
                try:
                    (place,) = source[0]
                    self.ask(Open(place, target, first, key, expected.encode()), (source, plain), limit=TIMEOUT)  # type: ignore[arg-type]
                    return
                except Gone as error:
                    log.debug("opened here: %s", error)
        with self._opening:
            open_blocks_into(key, expected, first, blocks, plain)
