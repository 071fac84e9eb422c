"""Writing the journal: commits become records in segments, one flush each.

`Journal` belongs to the event loop's thread and knows which segments there are and how much room is left; what blocks runs on workers it
is given. Commits are written one at a time (`write` is awaited before the next), so the writer's own state (chain, nonce counter, the
fields of the newest segment) is touched by one thread at a time.

A commit is one record; one with more than a chunk of tail bytes begins with records of tails only, and its last record carries all
operations: replay applies them when it has seen that one, or not at all. A segment is durable before the next one is written to, so a
segment whose header verifies proves everything before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os import fdatasync
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import trio
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.errors import BadArgument
from storage.interfaces import Buffer, TailPiece
from storage.metadata.blocks import Blocks
from storage.metadata.flushing import FEW, SMALL, Flushes
from storage.metadata.records import (
    HEADER_SIZE,
    RECORD_HEAD,
    Op,
    SegmentHeader,
    TailEntry,
    encode_body,
    encode_record,
    pack_aad,
    pack_nonce,
    padded,
)
from storage.metadata.segments import SPARES, Segment, prepare, retire, unlink_all, write_at
from storage.seams import Failpoints, Worker

#: Tail bytes in one record, at most.
MAX_CHUNK = 1024 * 1024
MIN_SEGMENT = 4096
#: Segments under the limit that only urgent commits may use.
RESERVED = 2
#: What an epoch's first segment is at least, where the disk has no room for a whole one.
SMALLEST = 64 * 1024
#: Prepared segments kept in hand.
_AHEAD = 1
#: Upper bounds of what stands beside the bytes themselves: an operation is counted by the memtable; a tail entry with its tag; a record.
_ENTRY = 64
_RECORD = RECORD_HEAD + 64
#: The least worth cutting off a piece for; smaller remainders of a chunk stay empty.
_SLIVER = 256


class Group(NamedTuple):
    """One commit on its way into the journal."""

    sequence: int
    ops: list[Op]
    tails: list[TailPiece]
    #: Of all of them together.
    tail_bytes: int


@dataclass(frozen=True, slots=True)
class _Writer:
    """What the epoch seals and signs with."""

    epoch: int
    salt: bytes
    aead: AESGCM


class Journal:
    """See the module. `live`: segments in use, oldest first, as replay found them; `chain`: the hash to go on from."""

    def __init__(
        self,
        directory: Path,
        *,
        segment_size: int,
        limit_bytes: int,
        failpoints: Failpoints,
        live: list[Segment],
        spares: list[Path],
        chain: bytes,
        next_number: int,
    ) -> None:
        if segment_size < MIN_SEGMENT or segment_size % 8 or limit_bytes < (RESERVED + 2) * segment_size:
            raise BadArgument(
                f"journal: segments of {MIN_SEGMENT} bytes or more (multiples of 8), and a limit of {RESERVED + 2} of them or more"
            )
        self.directory = directory
        self.segment_size = segment_size
        self.limit_bytes = limit_bytes
        self._failpoints = failpoints
        self._chunk = min(MAX_CHUNK, segment_size // 4)
        #: # Invariant: oldest first; the last is the newest, which is never recycled.
        self.live = live
        #: Bytes of their files.
        self._in_use = sum(segment.size for segment in live)
        self._prepared: list[Segment] = []
        self._spares = spares
        self._discarded: list[Segment] = []
        self._next_number = next_number
        #: Segments recycled so far.
        self.recycled = 0
        #: The segment being written; None: the next commit begins a new one.
        self._current: Segment | None = None
        self._writer: _Writer | None = None
        #: Bytes of the epoch's first segment.
        self._first = segment_size
        # The journal thread's own while a commit is being written.
        self._chain = chain
        self._nonce = 0
        self._flushes = Flushes()
        self._blocks = Blocks()
        #: Segments are numbered in the order in which they are prepared, so by one task at a time.
        self._preparing = trio.Lock()

    # ---- the epoch

    def begin_epoch(self, epoch: int, salt: bytes, key: bytes) -> None:
        """From the next commit on: a new segment, sealed under `key`. BadArgument for an epoch or salt that was here before (I1)."""
        salts = {segment.salt for segment in self.live}
        # A crash in an epoch's first commit can leave its segment without a whole commit. Then nobody knows of the epoch, and the next
        # process gives the same number to its own: with another salt, so under another key.
        numbers = [segment.epoch for segment in self.live if segment.used > HEADER_SIZE]
        if self._writer is not None:
            salts.add(self._writer.salt)
            numbers.append(self._writer.epoch)
        if salt in salts or any(epoch <= older for older in numbers):
            raise BadArgument(f"journal: epoch {epoch} or its salt was used before")
        if not 0 < epoch < 1 << 32 or len(salt) != 16:
            raise BadArgument(f"journal: epoch {epoch} with a salt of {len(salt)} bytes")
        self._writer = _Writer(epoch, salt, AESGCM(key))
        self._nonce = 0
        self._current = None
        self._first = self.segment_size

    @property
    def beginning(self) -> bool:
        """The epoch has no segment yet."""
        return self._current is None

    def begin_smaller(self) -> bool:
        """The disk has no room for the epoch's first segment: be content with half of it. False: it is as small as can be. What comes
        after it finds whole segments, or no room."""
        if self._first // 2 < min(SMALLEST, self.segment_size):
            return False
        self._first = self._first // 16 * 8
        return True

    @property
    def ready(self) -> bool:
        """An epoch has begun."""
        return self._writer is not None

    # ---- room

    @property
    def free_bytes(self) -> int:
        """Bytes of segments that may still be begun under the limit."""
        return self.limit_bytes - self._in_use

    @property
    def fill(self) -> float:
        """Share of the limit in use."""
        used = sum(segment.size for segment in self.live[:-1]) + (self.live[-1].used if self.live else 0)
        return min(1.0, used / self.limit_bytes)

    def weight(self, tail_bytes: int, tail_count: int) -> int:
        """What tails of that many bytes take in records, operations apart: an upper bound."""
        chunks = tail_bytes // (self._chunk - _SLIVER - _ENTRY) + 1
        return tail_bytes + _ENTRY * (tail_count + chunks) + _RECORD * chunks

    def needed(self, ops_bytes: int, tail_bytes: int, tail_count: int) -> list[int]:
        """Sizes of the segments a commit of that many bytes may have to begin, in order: an upper bound."""
        tails = self.weight(tail_bytes, tail_count)
        if self._current is not None and tails + ops_bytes + _RECORD <= self._current.size - self._current.used:
            return []
        if self.beginning and not tail_count and HEADER_SIZE + ops_bytes + _RECORD <= self._first:
            return [self._first]
        if ops_bytes + self._waste <= self.segment_size - HEADER_SIZE:
            return [self.segment_size] * self._count(tails + ops_bytes + _RECORD)
        # Without tails there is one record alone, in a segment of its own.
        return [self.segment_size] * (self._count(tails) if tail_count else 0) + [
            -(-(HEADER_SIZE + ops_bytes + self._waste) // 4096) * 4096
        ]

    @property
    def _waste(self) -> int:
        """Each segment but the last may stay empty at its end by less than one record of tails, which is this at most."""
        return self._chunk + 2 * _RECORD

    def _count(self, content: int) -> int:
        """Segments to begin, at least one, so that records of `content` bytes find room. The records of operations, which may be larger
        than those of tails, come last in a commit, so the rest of a segment they do not fit into is not in the sum of what is closed."""
        waste = self._waste
        rest = self._current.size - self._current.used if self._current is not None else 0
        # n segments take max(rest - waste, 0) + n * room - (n - 1) * waste.
        content -= max(rest - waste, 0) + waste
        return max(1, -(-content // (self.segment_size - HEADER_SIZE - waste)))

    def wanted(self, ops_bytes: int, tail_bytes: int, tail_count: int, kept: float) -> int:
        """How many segments must be at hand for that to find room, with the share `kept` of a segment left over for what comes besides."""
        content = self.weight(tail_bytes, tail_count) + ops_bytes + _RECORD + int(kept * self.segment_size)
        if self._current is not None and content <= self._current.size - self._current.used:
            return 0
        return self._count(content)

    def holds(self, count: int) -> bool:
        """Are that many segments at hand, durably allocated on the disk?"""
        return len(self._prepared) >= count

    def may_hold(self, count: int) -> bool:
        """Does the limit allow for so many?"""
        return self.free_bytes >= (count + RESERVED) * self.segment_size

    def admits(self, sizes: list[int], urgent: bool, beyond: int = 0) -> bool:
        """May a commit that begins segments of these sizes be written now? `beyond`: so many bytes beyond the limit, if need be."""
        if self.beginning and len(sizes) == 1 and sizes[0] <= self.segment_size:
            # The epoch's first: without it a volume whose journal is full could never be opened again, nor its journal emptied.
            return True
        if urgent and not sizes:
            # It fits where the journal is being written, also if that stands beyond the limit for the reason above.
            return True
        kept = -beyond if beyond else 0 if urgent else RESERVED * self.segment_size
        return self.free_bytes - sum(sizes) >= kept

    def fits(self, ops_bytes: int, tail_bytes: int, tail_count: int, urgent: bool) -> bool:
        """`needed` is nothing, and `admits` says yes to that."""
        current = self._current
        if current is None or current.size - current.used < self.weight(tail_bytes, tail_count) + ops_bytes + _RECORD:
            return False
        return self.admits([], urgent)

    def prepared(self, sizes: list[int]) -> bool:
        """Are they at hand?"""
        return [segment.size for segment in self._prepared[: len(sizes)]] == sizes

    async def prepare(self, sizes: list[int], worker: Worker) -> None:
        """Have them at hand. NoSpace, IOFailure: nothing is lost."""
        async with self._preparing:
            for index, size in enumerate(sizes):
                if index < len(self._prepared) and self._prepared[index].size != size:
                    # Segments are used in the order of their numbers, so what is in the way cannot wait for its turn.
                    self._discarded += self._prepared[index:]
                    del self._prepared[index:]
                if index == len(self._prepared):
                    self._prepared.append(await self._make(size, worker))

    async def grow(self, count: int, worker: Worker) -> None:
        """Have `count` segments at hand. NoSpace, IOFailure: what could be made is there."""
        async with self._preparing:
            while len(self._prepared) < count:
                # The first was filled with zeros: small commits go there, and must not have metadata to flush. These are for bulk.
                self._prepared.append(await self._make(self.segment_size, worker, zeros=not self._prepared))

    @property
    def ample(self) -> bool:
        """`trim` may have something to let go of."""
        return len(self._prepared) > _AHEAD or bool(self._discarded)

    def trim(self, count: int) -> bool:
        """Let go of prepared segments beyond `count`: True if `tidy` has some to put away. Not while a commit is being written. No await
        inside."""
        count = max(count, _AHEAD)
        if not self._preparing.locked() and len(self._prepared) > count:
            self._discarded += self._prepared[count:]
            del self._prepared[count:]
        return bool(self._discarded)

    async def prepare_ahead(self, worker: Worker) -> None:
        """Have the next segment at hand before it is needed. NoSpace, IOFailure."""
        async with self._preparing:
            if self.wants_segment:
                self._prepared.append(await self._make(self.segment_size, worker))

    @property
    def wants_segment(self) -> bool:
        """`prepare_ahead` has something to do."""
        return self._writer is not None and len(self._prepared) < _AHEAD and self.free_bytes >= self.segment_size

    async def _make(self, size: int, worker: Worker, zeros: bool = True) -> Segment:
        number = self._next_number
        self._next_number += 1
        spare = self._spares.pop() if self._spares and size == self.segment_size else None
        return await worker.run(prepare, self.directory, number, size, spare, self._failpoints, zeros)

    # ---- recycling

    def oldest(self) -> Segment | None:
        """The segment that would be recycled next, if it may be one day: the newest never is, it says where the log ends."""
        return self.live[0] if len(self.live) > 1 else None

    @property
    def oldest_number(self) -> int:
        """Number of the oldest segment in use; 0: there is none."""
        return self.live[0].number if self.live else 0

    async def recycle(self, worker: Worker) -> None:
        """The oldest segment is not needed any more. IOFailure: it stays."""
        await self._retire(self.live[0], worker)
        self._in_use -= self.live[0].size
        del self.live[0]
        self.recycled += 1

    async def tidy(self, worker: Worker) -> None:
        """Put away prepared segments that were passed over. IOFailure."""
        while self._discarded:
            await self._retire(self._discarded[0], worker)
            del self._discarded[0]

    async def give_up_spares(self, worker: Worker) -> bool:
        """Unlink the spares: something else needs the room more. True if there were any. IOFailure."""
        spares, self._spares = self._spares, []
        if spares:
            await worker.run(unlink_all, spares)
        return bool(spares)

    async def _retire(self, segment: Segment, worker: Worker) -> None:
        keep = segment.size == self.segment_size and len(self._spares) < SPARES
        spare = await worker.run(retire, self.directory, segment, keep, self._failpoints)
        if spare is not None:
            self._spares.append(spare)

    def close(self) -> None:
        for segment in [*self.live, *self._prepared, *self._discarded]:
            segment.close()

    # ---- writing

    async def write(self, group: Group, worker: Worker) -> bytes:
        """Durable when it returns the chain hash after it. What it needs must be `prepared`.

        OSError or anything else: nobody knows what is on the disk, and nothing may be written any more.
        """
        fresh = list(self._prepared)
        if group.tail_bytes > SMALL or len(group.ops) > FEW:
            chain, used, held = await worker.run(self._write, group, fresh)
        elif self._flushes.quick:
            chain, used, held = self._write_small(group, fresh)
        else:
            chain, used, held = await worker.run_briefly(self._flushes.patience, self._write_small, group, fresh)
        if used:
            taken = fresh.index(used[-1]) + 1
            self._discarded += [segment for segment in fresh[:taken] if segment not in used]
            del self._prepared[:taken]
            self.live += used
            self._in_use += sum(segment.size for segment in used)
            self._current = used[-1]
        for segment, entry in held:
            segment.hold(entry.value_id, entry.offset, entry.offset + entry.length)
        return chain

    def _write_small(self, group: Group, fresh: list[Segment]) -> tuple[bytes, list[Segment], list[tuple[Segment, TailEntry]]]:
        begun = perf_counter()
        written = self._write(group, fresh)
        self._flushes.took(perf_counter() - begun)
        return written

    def _write(self, group: Group, fresh: list[Segment]) -> tuple[bytes, list[Segment], list[tuple[Segment, TailEntry]]]:
        """In the journal thread, or on the event loop. Returns the chain hash, the segments begun, and where tails went."""
        writer = self._writer
        if writer is None:
            raise RuntimeError("a commit before the epoch has begun")
        self._failpoints.hit("journal.append.before_write")
        used: list[Segment] = []
        held: list[tuple[Segment, TailEntry]] = []
        remaining = iter(fresh)
        segment = self._current
        out: list[Buffer] = []
        at = segment.used if segment is not None else 0
        for part, (pieces, last) in enumerate(_records(group, self._chunk)):
            entries, sealed = self._seal(writer, group.sequence, pieces)
            body = encode_body(group.ops if last else [], entries)
            length = padded(RECORD_HEAD + len(body) + sum(map(len, sealed)))
            if segment is None or at + length > segment.size:
                if segment is not None and out:
                    self._flush(segment, out, at)
                # StopIteration cannot be: `needed` is an upper bound, and `prepared` was asked.
                segment = next(candidate for candidate in remaining if HEADER_SIZE + length <= candidate.size)
                used.append(segment)
                header = SegmentHeader(writer.epoch, segment.number, group.sequence, writer.salt, self._chain)
                segment.epoch, segment.salt = writer.epoch, writer.salt
                out, at, self._chain = [header.encode()], HEADER_SIZE, header.checksum
            record, length, self._chain = encode_record(
                last=last, number=segment.number, sequence=group.sequence, part=part, previous=self._chain, body=body, sealed=sealed
            )
            out += record
            at += length
            segment.last_sequence = group.sequence
            held += [(segment, entry) for entry in entries]
        if segment is not None:
            self._flush(segment, out, at)
        return self._chain, used, held

    def _flush(self, segment: Segment, pieces: list[Buffer], end: int) -> None:
        """Write what goes before `end`, durably. What stands before it in the segment is durable already."""
        if not self._blocks.write(segment, pieces, end):
            write_at(segment.fd, *self._blocks.through_cache(segment, pieces, end))
        self._failpoints.hit("journal.append.before_fsync")
        fdatasync(segment.fd)
        self._failpoints.hit("journal.append.after_fsync")
        segment.used = end

    def _seal(self, writer: _Writer, sequence: int, pieces: list[_Piece]) -> tuple[list[TailEntry], list[bytes]]:
        entries, sealed = [], []
        encrypt = writer.aead.encrypt
        for value_id, offset, data in pieces:
            # I1: taken before it is used, and never given back.
            nonce = self._nonce
            self._nonce = nonce + 1
            entries.append(TailEntry(value_id, offset, len(data), nonce))
            sealed.append(encrypt(pack_nonce(nonce), data, pack_aad(sequence, value_id, offset)))
        return entries, sealed


#: value id, offset, bytes
_Piece = tuple[int, int, Buffer]


def _records(group: Group, chunk: int) -> Iterable[tuple[list[_Piece], bool]]:
    """The tails of each record of a commit, and whether it is the last one; large tails are cut."""
    tails = group.tails
    if group.tail_bytes + _ENTRY * len(tails) <= chunk:
        # The usual case: one record.
        return [([(value_id, at, data[0] if len(data) == 1 else b"".join(data)) for value_id, at, data in tails], True)]
    return _cut(tails, chunk)


def _cut(tails: list[TailPiece], chunk: int) -> Iterator[tuple[list[_Piece], bool]]:
    pieces: list[_Piece] = []
    weight = 0
    for tail in tails:
        data: Buffer = tail.data[0] if len(tail.data) == 1 else b"".join(tail.data)
        at, length = 0, len(data)
        if 0 < length <= chunk - weight - _ENTRY:
            # The usual case: whole.
            pieces.append((tail.value_id, tail.offset, data))
            weight += length + _ENTRY
            continue
        while at < length:
            room = chunk - weight - _ENTRY
            if room < min(_SLIVER, length - at):
                yield pieces, False
                pieces, weight = [], 0
                continue
            step = min(room, length - at)
            pieces.append((tail.value_id, tail.offset + at, data if step == length else memoryview(data)[at : at + step]))
            at += step
            weight += step + _ENTRY
    yield pieces, True


#: For the key of an epoch: salt -> 32 bytes.
KeyOf = Callable[[bytes], bytes]
