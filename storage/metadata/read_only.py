"""The metadata of a volume for reading only: LMDB as it is now, the journal's later commits over it in memory, and nothing written.

Nobody needs to keep away meanwhile. LMDB's table of readers (metadata/lock.mdb, which is no part of what is stored) keeps a writer that
comes later from reusing the pages this snapshot is made of; of the journal nothing is needed any more once `let_go_of_journal` was called.
Until then the caller sees to it that there is no writer. The price: as long as the snapshot is held, the writer's database grows by what
is replaced in it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from storage.errors import Fenced, NotFound
from storage.interfaces import Batch, TailPiece
from storage.metadata.journal import KeyOf
from storage.metadata.keys import u64
from storage.metadata.lmdb_base import MAP_SIZE, LmdbBase
from storage.metadata.memtable import Memtable
from storage.metadata.no_journal import NoJournal
from storage.metadata.replay import RecoveredTails, Replayed, replay
from storage.metadata.store import RESTORED_KEY
from storage.metadata.takeover import TailNeeded
from storage.seams import Seams


class ReadOnlyStore(NoJournal):
    """A MetadataStore in which nothing changes: `apply` raises Fenced, `commit` has nothing to do. `reason`: why, as people read it."""

    def __init__(
        self, base: LmdbBase, memtable: Memtable, replayed: Replayed, reason: str, journal_key: KeyOf, tail_needed: TailNeeded
    ) -> None:
        self._base, self._memtable, self._replayed = base, memtable, replayed
        self._journal_key, self._tail_needed = journal_key, tail_needed
        self.failure: str | None = reason

    def get(self, key: bytes) -> bytes | None:
        """See MetadataReader."""
        return self._memtable.get(key)

    def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        """See MetadataReader."""
        return self._memtable.scan(start, stop, limit, reverse)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See MetadataStore."""
        return self._memtable.get_many(keys)

    def row(self, first: bytes, last: bytes, count: int) -> list[bytes] | None:
        """See MetadataStore."""
        return self._memtable.row(first, last, count)

    def apply(self, batch: Batch, tails: Sequence[TailPiece] = ()) -> None:  # noqa: ARG002 - the Protocol's
        """Fenced, always."""
        raise Fenced(self.failure or "opened for reading only")

    async def commit(self, urgent: bool = False) -> int:  # noqa: ARG002 - the Protocol's
        """Nothing can be pending: what is here is as durable as it is."""
        await trio.lowlevel.checkpoint()
        return self.durable_sequence

    def add_commit_hook(self, hook: Callable[[], None]) -> None:
        """There are no commits to run it before."""

    @property
    def durable_sequence(self) -> int:
        """The commit that is shown."""
        return self._replayed.sequence

    @property
    def applied_sequence(self) -> int:
        return self._replayed.sequence

    async def make_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> bool:  # noqa: ARG002 - the Protocol's
        """Fenced: nothing is ever to be written."""
        raise Fenced(self.failure or "opened for reading only")

    async def clear(self) -> bool:
        """Fenced: nothing is ever to be written."""
        raise Fenced(self.failure or "opened for reading only")

    def can_spare(self, ops_bytes: int) -> bool:  # noqa: ARG002 (the Protocol's)
        """Nothing is ever to be written."""
        return False

    def recovered_tails(self) -> RecoveredTails:
        """Tails that are in no sector. Look before `let_go_of_journal`."""
        return RecoveredTails(self._replayed.tails, lambda value_id, end: self._tail_needed(self, value_id, end), self._journal_key)

    def let_go_of_journal(self) -> None:
        """Its files may be written, recycled and removed from now on."""
        segments, self._replayed.live, self._replayed.tails = self._replayed.live, [], []
        for segment in segments:
            segment.close()


def _load(directory: Path, map_size: int) -> tuple[LmdbBase, Memtable, Replayed]:
    """Blocking."""
    journal, metadata = directory / "journal", directory / "metadata"
    if not (metadata / "data.mdb").exists():
        raise NotFound(f"{directory} has no metadata database: recover the volume from its hosts")
    base = LmdbBase(metadata, map_size, read_only=True)
    try:
        memtable = Memtable(base)
        restored = base.get(RESTORED_KEY) == u64(base.sequence)
        if restored and not journal.is_dir():
            return base, memtable, Replayed(sequence=base.sequence, chain=base.chain)
        replayed = replay(journal, base.sequence, base.chain, memtable.load, base.oldest_segment, restored=restored, settle=False)
        return base, memtable, replayed
    except BaseException:
        base.close()
        raise


@asynccontextmanager
async def open_read_only_store(
    directory: Path,
    seams: Seams,
    *,
    reason: str,
    journal_key: KeyOf,
    tail_needed: TailNeeded,
    map_size: int = MAP_SIZE,
) -> AsyncIterator[ReadOnlyStore]:
    """What `directory` durably holds, tails that only the journal has included. For whoever knows that nobody writes until
    `let_go_of_journal`. See `open_store` for `journal_key` and `tail_needed`. NotFound, Corrupt, BadArgument, IOFailure.
    """
    base, memtable, replayed = await seams.threads.run(_load, directory, map_size)
    store = ReadOnlyStore(base, memtable, replayed, reason, journal_key, tail_needed)
    try:
        yield store
    finally:
        store.let_go_of_journal()
        base.close()
