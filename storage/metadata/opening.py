"""Opening the metadata store: LMDB, the journal replayed over it, and the store's two tasks for as long as it is open."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from storage.durable import from_os_error, fsync_dir
from storage.errors import FusefsError
from storage.metadata.changes import Replaying
from storage.metadata.journal import Journal, KeyOf
from storage.metadata.keys import u64
from storage.metadata.lmdb_base import MAP_SIZE, LmdbBase
from storage.metadata.memtable import Memtable
from storage.metadata.replay import Replayed, replay
from storage.metadata.store import RESTORED_KEY, Store
from storage.metadata.takeover import TailNeeded
from storage.seams import Failpoints, Seams

log = logging.getLogger(__name__)

SEGMENT_SIZE = 8 * 1024 * 1024
LIMIT_BYTES = 256 * 1024 * 1024


class _Background:
    """A task that ends when it is told to, not when what is around it is cancelled: a commit may still be wanted."""

    def __init__(self, nursery: trio.Nursery, run: Callable[[], Awaitable[None]]) -> None:
        self._scope = trio.CancelScope(shield=True)
        self._ended = trio.Event()
        nursery.start_soon(self._run, run)

    async def _run(self, run: Callable[[], Awaitable[None]]) -> None:
        try:
            with self._scope:
                await run()
        finally:
            self._ended.set()

    async def stop(self) -> None:
        self._scope.cancel()
        await self._ended.wait()


def _make_directories(directory: Path) -> tuple[Path, Path]:
    """(journal, metadata) below `directory`, durably there."""
    journal, metadata = directory / "journal", directory / "metadata"
    try:
        for path in (journal, metadata):
            path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, f"making {journal} and {metadata}") from error
    fsync_dir(directory)
    return journal, metadata


def _load(
    directory: Path, failpoints: Failpoints, sizes: tuple[int, int], map_size: int
) -> tuple[LmdbBase, Journal, Memtable, Replayed, Replaying]:
    """Open LMDB and replay the journal. Blocking."""
    journal_dir, metadata_dir = _make_directories(directory)
    base = LmdbBase(metadata_dir, map_size)
    try:
        memtable = Memtable(base)
        replaying = Replaying()
        restored = base.get(RESTORED_KEY) == u64(base.sequence)
        replayed = replay(
            journal_dir,
            base.sequence,
            base.chain,
            memtable.load,
            base.oldest_segment,
            failpoints,
            keep=replaying.take,
            restored=restored,
        )
        try:
            journal = Journal(
                journal_dir,
                segment_size=sizes[0],
                limit_bytes=sizes[1],
                failpoints=failpoints,
                live=replayed.live,
                spares=replayed.spares,
                chain=replayed.chain,
                next_number=replayed.next_number,
            )
        except BaseException:
            for segment in replayed.live:
                segment.close()
            raise
    except BaseException:
        base.close()
        raise
    return base, journal, memtable, replayed, replaying


@asynccontextmanager
async def open_store(
    directory: Path,
    seams: Seams,
    *,
    journal_key: KeyOf,
    tail_needed: TailNeeded,
    segment_size: int = SEGMENT_SIZE,
    limit_bytes: int = LIMIT_BYTES,
    map_size: int = MAP_SIZE,
) -> AsyncIterator[Store]:
    """The store in `directory` (journal/ and metadata/ are made if need be), with its tasks; what it had acknowledged is there.

    Only for whoever holds the volume's lock. `journal_key(salt)`: the 32-byte key of an epoch. `tail_needed(reader, value_id, end)`: do the
    value's bytes below `end` need a tail, going by what `reader` shows (I3)? On the way out everything pending is committed and LMDB takes
    over all of it; the error of that commit is raised, unless the block raised one. Corrupt, BadArgument, NoSpace, IOFailure.
    """
    base, journal, memtable, replayed, replaying = await seams.threads.run(
        _load, directory, seams.failpoints, (segment_size, limit_bytes), map_size
    )
    store = Store(base, journal, memtable, replayed, replaying, seams, journal_key, tail_needed)
    failed: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            tasks = [_Background(nursery, store.run_committer), _Background(nursery, store.run_takeover)]
            try:
                yield store
            except BaseException as error:  # noqa: BLE001 (raised below, outside the nursery: it comes out as itself, not in a group)
                failed = error
            with trio.CancelScope(shield=True):
                try:
                    await store.close()
                except FusefsError as error:
                    if failed is None:
                        failed = error
                    else:
                        log.error("closing the metadata store: %s", error)
                except BaseException as error:  # noqa: BLE001 (as above)
                    # A bug, or a crash on order. The tasks, which are shielded, would be waited for for ever.
                    failed = error
                for task in tasks:
                    await task.stop()
    finally:
        with trio.CancelScope(shield=True):
            await store.release()
    if failed is not None:
        raise failed
