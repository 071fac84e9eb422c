"""The metadata of a volume, from its hosts into a new database: checkpoint, then the log on top.

    index of the checkpoint -> its chunks (a few fetched ahead, put into LMDB one after the other) -> log entries, in order
        -> tails of the log that are in no sector -> what the caller amends, and the marker, in the last transaction

Every object is asked of one host after the other until one gives what its name and the key say. An interrupted restore leaves a database
without the marker, which no store opens: it is removed, and the restore started over.

In memory: FETCH_AHEAD objects, and the tail bytes. Measured: 2,000,000 records of 100 bytes take 4 seconds and 60 MiB.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from storage.durable import from_os_error, fsync_dir
from storage.epochs import Epochs
from storage.errors import Corrupt, Exists, FusefsError, NotFound, Unavailable
from storage.history.host_side import SLOWEST, TIMEOUT
from storage.history.objects import CHUNK, INDEX, LOG, Delta, Index, Ref, decode_chunk, decode_delta, decode_index, object_name, open_object
from storage.history.superblock import Body, KnownEpoch, Superblock
from storage.interfaces import Batch, Host, MetadataReader
from storage.keys import Keys
from storage.metadata.keys import NEVER_SHIPPED, u64
from storage.metadata.lmdb_base import MAP_SIZE, LmdbBase
from storage.metadata.records import HASH, Op
from storage.metadata.store import RESTORED_KEY
from storage.seams import Seams

T = TypeVar("T")

#: Objects that are fetched at the same time, and held.
FETCH_AHEAD = 4
#: Tail bytes of the log held before those that are in sectors by now are dropped (I7).
TAILS_HELD = 64 * 1024 * 1024
#: Notes kept of what hosts did wrong.
MAX_NOTES = 50

#: Called with (bytes fetched, bytes to fetch in all).
Progress = Callable[[int, int], None]
#: How much of a value is in sectors, None if there is no such value: `storage.values.records.sealed_end`, which stands above this layer.
SealedOf = Callable[[MetadataReader, int], int | None]
#: What to change before the database comes into use, given what was restored.
Amend = Callable[[MetadataReader, "Restored"], Batch]


@dataclass(slots=True)
class Restored:
    """What came back, besides the database."""

    #: Value id -> (offset, bytes) of what is in no sector: in order, without gaps or overlaps, from where the value's sectors end.
    tails: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    #: Epochs of the superblock the metadata do not have: claimed, and nothing was shipped in them.
    claims: list[KnownEpoch] = field(default_factory=list)
    records: int = 0
    #: Bytes fetched.
    size: int = 0
    #: What hosts did wrong meanwhile, a sentence each.
    notes: list[str] = field(default_factory=list)


def _no_progress(done: int, total: int) -> None:  # noqa: ARG001 - a Progress that shows nothing
    return


def _nothing(reader: MetadataReader, restored: Restored) -> Batch:  # noqa: ARG001 - an Amend that changes nothing
    return Batch()


async def restore(
    directory: Path,
    sources: Sequence[Host],
    keys: Keys,
    block: Superblock,
    body: Body,
    *,
    sealed_of: SealedOf,
    seams: Seams,
    progress: Progress | None = None,
    amend: Amend | None = None,
) -> Restored:
    """The state as of commit `block.sequence`, in a new database in `directory`/metadata; durable there, in one piece, when it returns.

    `sources`: any hosts of the volume, the best first. `open_store` and `open_read_only_store` take the database without a journal.
    Exists: there is a database already. NotFound (the superblock knows no checkpoint), Unavailable, Corrupt: no host has an object that is
    needed, or what it says contradicts itself. NoSpace, IOFailure of the local disk. Whatever it raises, `directory`/metadata may be left
    half made, for the caller to remove.
    """
    path = directory / "metadata"
    await seams.threads.run(_make, path)
    base = await seams.threads.run(LmdbBase, path, MAP_SIZE)
    try:
        run = _Run(base, sources, keys, block, body, sealed_of, seams, progress or _no_progress)
        await run.all(amend or _nothing)
        return run.result
    finally:
        base.close()


def _make(path: Path) -> None:
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        raise Exists(f"{path} exists already: metadata are restored into a new directory only") from None
    except OSError as error:
        raise from_os_error(error, f"making {path}") from error
    fsync_dir(path.parent)


class _Run:
    """One restore. One task; threads only fetch, unpack and write."""

    def __init__(
        self,
        base: LmdbBase,
        sources: Sequence[Host],
        keys: Keys,
        block: Superblock,
        body: Body,
        sealed_of: SealedOf,
        seams: Seams,
        progress: Progress,
    ) -> None:
        self._base, self._hosts, self._block, self._body = base, list(sources), block, body
        self._key = keys.metadata_key()
        self._sealed_of, self._seams, self._progress = sealed_of, seams, progress
        self._chain = seams.random.token_bytes(HASH)
        self._total = sum(ref.size for entry in body.log for ref in entry.parts) + (body.checkpoint.size if body.checkpoint else 0)
        self._tail_bytes = 0
        self.result = Restored()

    async def all(self, amend: Amend) -> None:
        await self._checkpoint()
        for entry in self._body.log:
            decode = partial(_decode_entry, after=entry.after, upto=entry.upto)
            await self._each(entry.parts, LOG, decode, self._take_delta)
        self._prune()
        self.result.tails = {value: _contiguous(value, self._sealed(value), parts) for value, parts in self.result.tails.items()}
        self.result.claims = self._claims()
        batch = amend(self._base, self.result)
        batch.put(RESTORED_KEY, u64(self._block.sequence))
        self._seams.failpoints.hit("restore.before_last")
        await self._write(batch.ops)
        self._seams.failpoints.hit("restore.done")

    # ------------------------------------------------------------------------------------------------------------
    # Checkpoint and log

    async def _checkpoint(self) -> None:
        log, ref = self._body.log, self._body.checkpoint
        name = f"superblock {self._block.generation}"
        if ref is None:
            if not log or log[0].after != 0:
                raise NotFound(f"{name} knows no checkpoint: nothing of the volume can be restored from it")
            return
        indices: list[Index] = []

        async def take(index: Index) -> None:
            indices.append(index)

        await self._each([ref], INDEX, decode_index, take)
        index = indices[0]
        self._total += sum(chunk.size for chunk in index.chunks)
        # The scan saw some records earlier than others: without the log from its beginning on they do not belong together.
        begin, end = (log[0].after, log[-1].upto) if log else (self._block.sequence, self._block.sequence)
        if begin > index.sequence or end < index.sequence:
            raise Corrupt(f"{name}: its log goes from commit {begin} to {end}, its checkpoint is of commit {index.sequence}")
        await self._each(index.chunks, CHUNK, decode_chunk, self._take_chunk)
        if self.result.records != index.records:
            raise Corrupt(f"{name}: its checkpoint has {self.result.records} records instead of {index.records}")

    def _check_keys(self, ops: Sequence[Op]) -> None:
        for key, _ in ops:
            if key[:1] in NEVER_SHIPPED:
                raise Corrupt(f"superblock {self._block.generation}: the metadata on the hosts have a record no host is ever given")

    async def _take_chunk(self, pairs: list[tuple[bytes, bytes]]) -> None:
        self._check_keys(pairs)
        self.result.records += len(pairs)
        await self._write([(key, value) for key, value in pairs])

    async def _take_delta(self, delta: Delta) -> None:
        self._check_keys(delta.ops)
        for tail in delta.tails:
            self.result.tails.setdefault(tail.value_id, []).append((tail.offset, tail.data))
            self._tail_bytes += len(tail.data)
        await self._write(delta.ops)
        if self._tail_bytes > TAILS_HELD:
            self._prune()

    async def _write(self, ops: Sequence[Op]) -> None:
        """Durable when it returns; later operations on a key win."""
        values = dict(ops)
        self._seams.failpoints.hit("restore.before_write")
        # Each its own transaction: the marker in the last one is what makes them one.
        await self._seams.threads.run(self._base.take_over, list(values), values, self._block.sequence, self._chain, False)
        self._base.renew()

    # ------------------------------------------------------------------------------------------------------------
    # Tails

    def _sealed(self, value_id: int) -> int:
        sealed = self._sealed_of(self._base, value_id)
        if sealed is None:
            raise RuntimeError("a tail of no value was kept")
        return sealed

    def _prune(self) -> None:
        """Drop tails of values that are gone, and what is in sectors by now.

        Also before the log's end: what a value has in sectors only grows, and a value that has gone does not come back.
        """
        kept: dict[int, list[tuple[int, bytes]]] = {}
        for value_id, pieces in self.result.tails.items():
            sealed = self._sealed_of(self._base, value_id)
            if sealed is not None:
                needed = [(offset, data) for offset, data in pieces if offset + len(data) > sealed]
                if needed:
                    kept[value_id] = needed
        self.result.tails = kept
        self._tail_bytes = sum(len(data) for pieces in kept.values() for _, data in pieces)

    # ------------------------------------------------------------------------------------------------------------
    # Lineage

    def _claims(self) -> list[KnownEpoch]:
        """The epochs the metadata lack. Corrupt where metadata and superblock tell different histories (I5)."""
        name = f"superblock {self._block.generation}"
        have = {epoch.number: epoch for epoch in Epochs.load(self._base).all()}
        claims: list[KnownEpoch] = []
        for known in self._body.epochs:
            epoch = have.get(known.number)
            if epoch is None:
                claims.append(known)
            elif claims or (epoch.salt, epoch.first_sequence) != (known.salt, known.first_sequence):
                raise Corrupt(f"{name}: its epoch {known.number} is not the one its metadata have")
        named = {known.number for known in self._body.epochs}
        if any(number not in named for number in have if number >= self._body.epochs[0].number):
            raise Corrupt(f"{name}: its metadata have an epoch it does not name")
        return claims

    # ------------------------------------------------------------------------------------------------------------
    # Objects

    async def _each(self, refs: Sequence[Ref], kind: int, decode: Callable[[bytes, str], T], take: Callable[[T], Awaitable[None]]) -> None:
        """Fetch the objects, some ahead; each is given to `take` (async), in order."""
        ready = [trio.Event() for _ in refs]
        found: dict[int, T] = {}

        async def fetch(place: int) -> None:
            found[place] = await self._fetch(refs[place], kind, decode)
            ready[place].set()

        try:
            async with trio.open_nursery() as nursery:
                started = 0
                for place, ref in enumerate(refs):
                    while started < min(place + FETCH_AHEAD, len(refs)):
                        nursery.start_soon(fetch, started)
                        started += 1
                    # Ends: a fetch that fails takes the nursery down.
                    await ready[place].wait()
                    await take(found.pop(place))
                    self.result.size += ref.size
                    self._progress(self.result.size, self._total)
        except BaseExceptionGroup as group:
            raise _first(group) from group

    async def _fetch(self, ref: Ref, kind: int, decode: Callable[[bytes, str], T]) -> T:
        """From the first host that gives the object itself; one that does not answer is asked last from then on."""
        reasons: list[str] = []
        damaged = False
        for host in list(self._hosts):
            where = f"host {host.url}"
            try:
                data = await _get(host, object_name(self._block.volume_id, ref.name), ref.size)
                opened = await self._seams.threads.run(open_object, self._key, self._block.volume_id, ref, kind, data, where)
            except (Unavailable, Corrupt, NotFound) as error:
                damaged = damaged or isinstance(error, Corrupt)
                reasons.append(str(error))
                self._note(str(error))
                if isinstance(error, Unavailable) and self._hosts[0] is host:
                    self._hosts.append(self._hosts.pop(0))
                continue
            return await self._seams.threads.run(decode, opened, where)
        problem = f"superblock {self._block.generation}: no host gives metadata object {ref.name[:26]}"
        raise (Corrupt if damaged else Unavailable)(f"{problem} ({'; '.join(reasons) or 'no host answers'})")

    def _note(self, text: str) -> None:
        if text not in self.result.notes and len(self.result.notes) < MAX_NOTES:
            self.result.notes.append(text)


async def _get(host: Host, name: str, size: int) -> bytes:
    """One object, as stored. Unavailable for a host that hangs, too."""
    seconds = TIMEOUT + size / SLOWEST
    with trio.move_on_after(seconds):
        return await host.get(name, size)
    raise Unavailable(f"host {host.url} did not answer within {seconds:.0f} s")


def _decode_entry(body: bytes, where: str, *, after: int, upto: int) -> Delta:
    delta = decode_delta(body, where)
    if (delta.after, delta.upto) != (after, upto):
        raise Corrupt(f"{where}: an entry of the log is of commits {delta.after} to {delta.upto}, not {after} to {upto}")
    return delta


def _contiguous(value_id: int, sealed: int, pieces: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """The pieces from `sealed` on, in order, cut where they overlap (they agree there). Corrupt if bytes between them are missing."""
    found: list[tuple[int, bytes]] = []
    at = sealed
    for offset, data in sorted(pieces, key=lambda piece: piece[0]):
        end = offset + len(data)
        if end <= at:
            continue
        if offset > at:
            raise Corrupt(f"the log on the hosts lacks bytes {at} to {offset} of value {value_id}")
        found.append((at, data[at - offset :]))
        at = end
    return found


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one to tell: what is no error of ours before what is."""
    leaves: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop()
        if isinstance(error, BaseExceptionGroup):
            stack.extend(error.exceptions)
        else:
            leaves.append(error)
    return min(leaves, key=lambda error: isinstance(error, FusefsError))
