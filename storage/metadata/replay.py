"""Reading the journal at open: what is in it, where it ends, and whether anything is missing.

Segments are taken in the order of their numbers. In each, records count as long as they verify, follow one another in the chain and go
on with the sequence. Where they stop,

- the next segment's header must go on from there, or from the last whole commit (what stands between them was torn by a crash, and the
  process that followed dropped it); anything else is damage;
- after the last segment the log ends, unless a record of a later commit stands behind: only one commit is written at a time, so a crash
  cannot have left that.

| crash | what is found | what follows |
|---|---|---|
| while a commit is written | records that do not verify, or whole ones without the last | the commit is dropped; it was not acknowledged |
| between its flush and the acknowledgment | the commit | it counts |
| in the first commit of a segment | a header that does not verify, or zeros | the segment counts as unused |
| while a segment is made or retired | a spare, whole or not | never read; made anew where its size is wrong |

The oldest segment in use is on record in LMDB, before any below it is recycled: one that vanished altogether is noticed too.

What is found is flushed again before anything goes on from it: a process that was killed may have left it in the page cache only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.durable import from_os_error, fsync_dir
from storage.errors import Corrupt, IOFailure
from storage.metadata.journal import KeyOf
from storage.metadata.records import (
    HEADER_SIZE,
    TAG,
    Op,
    RecordHead,
    SegmentHeader,
    TailEntry,
    decode_body,
    decode_segment_header,
    find_later_record,
    read_record,
)
from storage.metadata.segments import SPARES, Segment, list_files, open_segment, read_all
from storage.seams import Failpoints, NoFailpoints

log = logging.getLogger(__name__)

_REMEDY = "recover the volume from its hosts"


@dataclass(frozen=True, slots=True)
class StoredTail:
    """A sealed piece as it stands in a segment."""

    segment: Segment
    at: int
    sequence: int
    entry: TailEntry

    @property
    def end(self) -> int:
        return self.entry.offset + self.entry.length

    def open(self, aead: AESGCM) -> bytes:
        """Its bytes. Blocking. Corrupt, IOFailure."""
        try:
            sealed = os.pread(self.segment.fd, self.entry.length + TAG, self.at)
        except OSError as error:
            raise from_os_error(error, f"reading journal segment {self.segment.path}") from error
        try:
            return aead.decrypt(self.entry.nonce_bytes(), sealed, self.entry.aad(self.sequence))
        except InvalidTag as error:
            raise Corrupt(
                f"journal segment {self.segment.path}: the tail of value {self.entry.value_id} "
                f"at {self.entry.offset} does not open; {_REMEDY}"
            ) from error


@dataclass(slots=True)
class Replayed:
    """What the journal holds."""

    #: In order, oldest first; the last has the end of the log.
    live: list[Segment] = field(default_factory=list)
    spares: list[Path] = field(default_factory=list)
    #: The last whole commit, and the chain hash there.
    sequence: int = 0
    chain: bytes = b""
    next_number: int = 1
    tails: list[StoredTail] = field(default_factory=list)


class RecoveredTails(Mapping[int, list[tuple[int, bytes]]]):
    """Value id -> (offset, bytes) of its tails in the order they were committed; pieces may overlap, and then agree.

    Opened when they are looked at, a value at a time (blocking reads of the journal), so that not all of them need be in memory at once.
    Only as long as the journal keeps them: look at open, before the tails can have moved into sectors.
    """

    def __init__(self, tails: list[StoredTail], needed: Callable[[int, int], bool], journal_key: KeyOf) -> None:
        self._pieces: dict[int, list[StoredTail]] = {}
        for tail in tails:
            self._pieces.setdefault(tail.entry.value_id, []).append(tail)
        for value_id, pieces in list(self._pieces.items()):
            kept = [piece for piece in pieces if needed(value_id, piece.end)]
            if kept:
                self._pieces[value_id] = kept
            else:
                del self._pieces[value_id]
        self._journal_key = journal_key
        self._keys: dict[bytes, AESGCM] = {}

    def __getitem__(self, value_id: int) -> list[tuple[int, bytes]]:
        return [(piece.entry.offset, piece.open(self._key(piece.segment.salt))) for piece in self._pieces[value_id]]

    def _key(self, salt: bytes) -> AESGCM:
        if salt not in self._keys:
            self._keys[salt] = AESGCM(self._journal_key(salt))
        return self._keys[salt]

    def __iter__(self) -> Iterator[int]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


def replay(
    directory: Path,
    held: int,
    held_chain: bytes,
    load: Callable[[list[Op]], None],
    oldest: int = 0,
    failpoints: Failpoints | None = None,
    *,
    keep: Callable[[int, list[Op]], None] = lambda _sequence, _ops: None,
    restored: bool = False,
    settle: bool = True,
) -> Replayed:
    """Read it all. Blocking. `held`, `held_chain`: the last commit LMDB has; the operations of each later one go to `load`, in order, those
    of every whole one to `keep`. `restored`: the metadata came from hosts, and may have no journal yet.
    `settle` False: for reading only, nothing on the disk is changed or made durable.
    `oldest`: number of the oldest segment LMDB knows to be in use (0: unknown). It must be there: tails in it may be nowhere else.

    Corrupt: damage or a gap, naming the segment; IOFailure. Nothing acknowledged is ever left out silently.
    """
    listing = list_files(directory)
    reader = _Reader(held, held_chain, load, keep, restored, settle)
    result = reader.result
    try:
        unused = reader.read(listing.segments)
        reader.check_end()
        _check_oldest(directory, result, oldest)
        if settle:
            _settle(directory, result, unused, [path for _, path in listing.spares], failpoints or NoFailpoints())
    except BaseException:
        for segment in result.live:
            segment.close()
        raise
    result.next_number = max([number for number, _ in listing.segments + listing.spares], default=0) + 1
    return result


class _Reader:
    """Goes through the segments once."""

    def __init__(
        self,
        held: int,
        held_chain: bytes,
        load: Callable[[list[Op]], None],
        keep: Callable[[int, list[Op]], None],
        restored: bool,
        writable: bool,
    ) -> None:
        self._held, self._held_chain, self._load = held, held_chain, load
        self._keep, self._restored, self._writable = keep, restored, writable
        self.result = Replayed(sequence=held, chain=held_chain)
        # The commit being read: its number, the next part of it, tails so far, and the chain so far.
        self._sequence = 0
        self._part = 0
        #: Its beginning is not here.
        self._headless = False
        self._tails: list[StoredTail] = []
        self._chain = b""
        #: Where the records of the segment read last stopped.
        self._stopped = ""

    def read(self, files: list[tuple[int, Path]]) -> list[Path]:
        """Take the segments in; returns the files that are not in use."""
        unused: list[Path] = []
        damaged: Corrupt | None = None
        newest: tuple[Segment, bytes, int] | None = None
        for number, path in files:
            segment = open_segment(number, path, writable=self._writable)
            kept = False
            try:
                raw = read_all(segment)
                try:
                    header = decode_segment_header(raw, str(path))
                except Corrupt as error:
                    # Torn by a crash in its first commit, if nothing came after; damage otherwise.
                    damaged, header = error, None
                if header is None:
                    later = find_later_record(raw, 0, number, self._expected)
                    if later is not None:
                        raise Corrupt(f"journal segment {path}: its header is damaged, and it holds commit {later.sequence}; {_REMEDY}")
                    unused.append(path)
                    continue
                if damaged is not None:
                    raise Corrupt(f"{damaged}, and there are later segments; {_REMEDY}")
                if header.number != number:
                    raise Corrupt(f"journal segment {path} says it is number {header.number}; {_REMEDY}")
                self._link(segment, header, first=newest is None)
                kept = True
                self.result.live.append(segment)
                end_at = self._take_records(segment, raw)
                newest = (segment, raw, end_at)
            finally:
                if not kept:
                    segment.close()
        if newest is not None:
            segment, raw, end_at = newest
            later = find_later_record(raw, end_at, segment.number, self._expected)
            if later is not None:
                raise Corrupt(f"{self._stopped}, but commit {later.sequence} stands behind, at {later.at}; {_REMEDY}")
        return unused

    @property
    def _expected(self) -> int:
        """The commit a crash may have torn."""
        return self.result.sequence + 1

    def _link(self, segment: Segment, header: SegmentHeader, first: bool) -> None:
        """Begin the segment: does it go on from what was read?"""
        name = segment.path
        if first:
            if header.first_sequence > self._held + 1:
                raise Corrupt(
                    f"the journal begins with commit {header.first_sequence} ({name}), the metadata end with {self._held}: "
                    f"segments before it are missing; {_REMEDY}"
                )
            self._begin(header.first_sequence)
            self._part = -1  # it may begin amid a commit whose beginning is recycled
            self.result.sequence, self.result.chain = header.first_sequence - 1, header.previous
        elif header.previous == self._chain and header.first_sequence == self._sequence:
            pass
        elif header.previous == self.result.chain and header.first_sequence == self._expected:
            self._begin(self._expected)
        else:
            raise Corrupt(f"{self._stopped}, and the next segment ({name}) does not go on from there; {_REMEDY}")
        segment.epoch, segment.salt = header.epoch, header.salt
        segment.used = HEADER_SIZE
        segment.last_sequence = header.first_sequence
        self._chain = header.checksum

    def _begin(self, sequence: int) -> None:
        self._sequence, self._part, self._tails, self._headless = sequence, 0, [], False

    def _take_records(self, segment: Segment, raw: bytes) -> int:
        """Returns where they stop."""
        view = memoryview(raw)
        at = HEADER_SIZE
        while True:
            head = read_record(view, at)
            if (
                head is None
                or head.number != segment.number
                or head.previous != self._chain
                or head.sequence != self._sequence
                or (self._part >= 0 and head.part != self._part)
            ):
                break
            self._take(segment, view, head)
            at = head.end
        self._stopped = f"journal segment {segment.path}: damaged at {at}, after commit {self.result.sequence}"
        return at

    def _take(self, segment: Segment, view: memoryview, head: RecordHead) -> None:
        where = f"journal segment {segment.path}, record at {head.at}"
        body = decode_body(view[head.body_at : head.sealed_at], head.sealed_length, where)
        at = head.sealed_at
        for entry in body.tails:
            self._tails.append(StoredTail(segment, at, head.sequence, entry))
            at += entry.length + TAG
        self._chain = head.chain
        if self._part < 0:
            self._headless = head.part != 0
        self._part = head.part + 1
        segment.last_sequence = head.sequence
        if not head.last:
            return
        # The commit is whole: it counts.
        if head.sequence > self._held:
            if self._headless:
                raise Corrupt(f"{where}: the beginning of commit {head.sequence} is missing; {_REMEDY}")
            self._load(body.ops)
        elif head.sequence == self._held and head.chain != self._held_chain:
            raise Corrupt(
                f"{where}: commit {head.sequence} is another one than the metadata hold; journal/ and metadata/ do not belong together"
            )
        self._keep(head.sequence, body.ops)
        for tail in self._tails:
            tail.segment.hold(tail.entry.value_id, tail.entry.offset, tail.end)
        self.result.tails += self._tails
        self.result.sequence, self.result.chain = head.sequence, head.chain
        segment.used = head.end
        self._begin(head.sequence + 1)

    def check_end(self) -> None:
        """Everything LMDB holds must have been here, or have been recycled before what is here."""
        live = self.result.live
        if self._held and not live and not self._restored:
            raise Corrupt(f"the journal is gone, and the metadata hold commit {self._held}; {_REMEDY}")
        if live and self.result.sequence < self._held:
            raise Corrupt(f"{self._stopped}, but the metadata hold commit {self._held}; {_REMEDY}")


def _check_oldest(directory: Path, result: Replayed, oldest: int) -> None:
    """A segment is recycled only after LMDB has recorded that it may be: so what is missing from `oldest` on was lost."""
    if oldest and (not result.live or result.live[0].number > oldest):
        raise Corrupt(f"journal {directory}: segment {oldest:x} is missing, and with it maybe the newest bytes of files; {_REMEDY}")


def _settle(directory: Path, result: Replayed, unused: list[Path], spares: list[Path], failpoints: Failpoints) -> None:
    """Make durable what was found, put files away that are not in use, and give back what the newest segment does not need.

    Failpoints, in order: journal.settle.before_flush, before_rename, before_truncate, done.
    """
    try:
        failpoints.hit("journal.settle.before_flush")
        for segment in result.live:
            os.fdatasync(segment.fd)
        failpoints.hit("journal.settle.before_rename")
        for path in unused:
            spare = path.with_name(path.name.replace("segment", "spare"))
            os.rename(path, spare)
            spares.append(spare)
        for path in spares[SPARES:]:
            os.unlink(path)
        fsync_dir(directory)
        if result.live:
            # It will not be written to again: each epoch begins a segment of its own.
            newest = result.live[-1]
            end = -(-newest.used // 4096) * 4096
            if end < newest.size:
                failpoints.hit("journal.settle.before_truncate")
                os.ftruncate(newest.fd, end)
                os.fsync(newest.fd)
                newest.size = end
        failpoints.hit("journal.settle.done")
    except OSError as error:
        raise IOFailure(f"journal {directory}: {error.strerror}; check the disk") from error
    result.spares = spares[:SPARES]
