"""Codec of the journal: segment headers and records. Nothing here touches a disk or a key.

Integers are big-endian. A segment file is a header of 512 bytes, then records, each beginning at a multiple of 8.

Segment header, format 1:

| at | size | field |
|---|---|---|
| 0 | 8 | magic `fusefsJ` NUL |
| 8 | 4 | format version |
| 12 | 4 | epoch whose key seals the tails in this segment |
| 16 | 8 | segment number; grows with time, never used twice |
| 24 | 8 | sequence number of the commit its first record belongs to |
| 32 | 16 | salt of the epoch |
| 48 | 32 | chain hash the segment goes on from: of the last record before it that counts |
| 80 | 32 | BLAKE3 of bytes 0 to 79: checksum, and what the chain goes through |
| 112 | 400 | zero |

A header of zeros only: the segment has not been used yet. Record:

| at | size | field |
|---|---|---|
| 0 | 4 | magic `fJR1` |
| 4 | 4 | flags; bit 0: last record of its commit, the one that carries the operations |
| 8 | 8 | segment number |
| 16 | 8 | sequence number of the commit |
| 24 | 4 | part: number of the record within its commit, from 0 |
| 28 | 4 | length of the body |
| 32 | 4 | length of the sealed tails |
| 36 | 4 | zero |
| 40 | 32 | chain hash before this record: the previous record's, or in the first of a segment the header's checksum |
| 72 | 32 | chain hash of this record: BLAKE3 of bytes 0 to 71, body and sealed tails |
| 104 | | body: MessagePack array [operations, tails] |
| | | sealed tails, one after the other; zeros up to a multiple of 8 |

operations: array of [key, value or nil]. tails: array of [value id, offset, length, nonce counter]; each is sealed as length + 16 bytes:
AES-256-GCM, nonce = 4 zero bytes + counter u64, associated data = sequence u64, value id u64, offset u64. A counter is used once in an
epoch, whether or not what it sealed was ever written (I1). Operations (names, sizes) are in the clear, contents never.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import msgspec
from blake3 import blake3

from storage.errors import BadArgument, Corrupt
from storage.interfaces import Buffer

FORMAT = 1
SEGMENT_MAGIC = b"fusefsJ\x00"
RECORD_MAGIC = b"fJR1"
#: Bytes before the first record of a segment.
HEADER_SIZE = 512
RECORD_HEAD = 104
TAG = 16
HASH = 32
LAST = 1
#: LMDB takes 511; some bytes are kept back.
MAX_KEY = 500
#: Below this one copy is quicker than hashing and writing piece by piece.
_JOIN = 16 * 1024
#: More than any record of this volume; a limit for what is parsed.
MAX_VALUE = 16 * 1024 * 1024

_SEGMENT = struct.Struct(">8sIIQQ16s32s")
_RECORD = struct.Struct(">4sIQQIIII32s")
_AAD = struct.Struct(">QQQ")
_NONCE = struct.Struct(">4xQ")
#: (sequence, value id, offset), and (nonce counter), of a piece: see TailEntry.
pack_aad, pack_nonce = _AAD.pack, _NONCE.pack

#: (key, value or None for a deletion)
Op = tuple[bytes, bytes | None]


def digest(*parts: Buffer) -> bytes:
    """BLAKE3-256 over the parts, one after the other."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """See the table. `checksum` is where the segment's own chain begins."""

    epoch: int
    number: int
    first_sequence: int
    salt: bytes
    previous: bytes

    def _fields(self) -> bytes:
        return _SEGMENT.pack(SEGMENT_MAGIC, FORMAT, self.epoch, self.number, self.first_sequence, self.salt, self.previous)

    @property
    def checksum(self) -> bytes:
        return digest(self._fields())

    def encode(self) -> bytes:
        """All 512 bytes."""
        fields = self._fields()
        return (fields + digest(fields)).ljust(HEADER_SIZE, b"\0")


def decode_segment_header(raw: bytes, name: str) -> SegmentHeader | None:
    """The header in the first bytes of segment `name`; None where they are all zero (never used). Corrupt for anything else.

    BadArgument for a format this program does not know.
    """
    raw = raw[:HEADER_SIZE]
    if len(raw) == HEADER_SIZE and not any(raw):
        return None
    if len(raw) < HEADER_SIZE or raw[:8] != SEGMENT_MAGIC:
        raise Corrupt(f"journal segment {name}: no header of a journal segment")
    _, version, epoch, number, first, salt, previous = _SEGMENT.unpack_from(raw)
    header = SegmentHeader(epoch, number, first, salt, previous)
    if raw[_SEGMENT.size : _SEGMENT.size + HASH] != digest(raw[: _SEGMENT.size]) or any(raw[_SEGMENT.size + HASH :]):
        raise Corrupt(f"journal segment {name}: its header does not verify")
    if version != FORMAT:
        raise BadArgument(f"journal segment {name} has format {version}, this program knows {FORMAT}: use a newer fusefs")
    return header


class TailEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One sealed piece of a tail: `length` bytes of value `value_id` from `offset`."""

    value_id: int
    offset: int
    length: int
    nonce: int

    def aad(self, sequence: int) -> bytes:
        """What the piece is bound to: its commit and its place."""
        return pack_aad(sequence, self.value_id, self.offset)

    def nonce_bytes(self) -> bytes:
        return pack_nonce(self.nonce)


class Body(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a record says in the clear."""

    ops: list[tuple[bytes, bytes | None]]
    tails: list[TailEntry]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Body)


def encode_body(ops: list[Op], tails: list[TailEntry]) -> bytes:
    """The body's bytes."""
    return _encoder.encode((ops, tails))


def decode_body(raw: Buffer, sealed_length: int, where: str) -> Body:
    """The body, every length in it checked against what stands beside it. Corrupt, naming `where`."""
    try:
        body = _decoder.decode(raw)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Corrupt(f"{where}: its body does not decode ({error})") from error
    if any(not 0 < len(key) <= MAX_KEY or (value is not None and len(value) > MAX_VALUE) for key, value in body.ops):
        raise Corrupt(f"{where}: a key or value of impossible length")
    total = 0
    for tail in body.tails:
        if not (0 < tail.value_id < 1 << 64 and tail.offset >= 0 and tail.length > 0 and tail.offset + tail.length < 1 << 63):
            raise Corrupt(f"{where}: a tail in an impossible place")
        if not 0 <= tail.nonce < 1 << 64:
            raise Corrupt(f"{where}: an impossible nonce")
        total += tail.length + TAG
    if total != sealed_length:
        raise Corrupt(f"{where}: tails of {total} sealed bytes where {sealed_length} stand")
    return body


@dataclass(frozen=True, slots=True)
class RecordHead:
    """A record's fixed part, read from `at`; `end` is where the next record begins."""

    at: int
    last: bool
    number: int
    sequence: int
    part: int
    body_length: int
    sealed_length: int
    previous: bytes
    chain: bytes

    @property
    def body_at(self) -> int:
        return self.at + RECORD_HEAD

    @property
    def sealed_at(self) -> int:
        return self.body_at + self.body_length

    @property
    def end(self) -> int:
        return padded(self.sealed_at + self.sealed_length)


def padded(length: int) -> int:
    """Up to a multiple of 8."""
    return -(-length // 8) * 8


def encode_record(
    *, last: bool, number: int, sequence: int, part: int, previous: bytes, body: bytes, sealed: list[bytes]
) -> tuple[list[bytes], int, bytes]:
    """(pieces to write one after the other, their length in all, chain hash)."""
    sealed_length = sum(map(len, sealed))
    content_length = len(body) + sealed_length
    head = _RECORD.pack(RECORD_MAGIC, LAST if last else 0, number, sequence, part, len(body), sealed_length, 0, previous)
    padding = bytes(-(RECORD_HEAD + content_length) % 8)
    pieces: list[bytes]
    if content_length <= _JOIN:
        content = b"".join((body, *sealed))
        chain = blake3(head + content).digest()
        pieces = [head, chain, content, padding]
    else:
        chain = digest(head, body, *sealed)
        pieces = [head, chain, body, *sealed, padding]
    return pieces, RECORD_HEAD + content_length + len(padding), chain


def read_record(view: memoryview, at: int) -> RecordHead | None:
    """The record at `at` if its own hash verifies; None otherwise. Whether it belongs into the chain is the caller's to see."""
    if at % 8 or at + RECORD_HEAD > len(view):
        return None
    fields: tuple[Any, ...] = _RECORD.unpack_from(view, at)
    magic, flags, number, sequence, part, body_length, sealed_length, zero, previous = fields
    if magic != RECORD_MAGIC or flags & ~LAST or zero:
        return None
    stop = at + RECORD_HEAD + body_length + sealed_length
    if stop > len(view):
        return None
    chain = bytes(view[at + _RECORD.size : at + RECORD_HEAD])
    if digest(view[at : at + _RECORD.size], view[at + RECORD_HEAD : stop]) != chain:
        return None
    return RecordHead(at, bool(flags & LAST), number, sequence, part, body_length, sealed_length, previous, chain)


def find_later_record(raw: bytes, start: int, number: int, above: int) -> RecordHead | None:
    """A record of segment `number` at or after `start` of a commit later than `above`, if there is a whole one.

    Only one commit is written at a time, so what a crash tears is never followed by a later one: such a record proves damage.
    """
    view = memoryview(raw)
    at = raw.find(RECORD_MAGIC, start)
    while at >= 0:
        if at + RECORD_HEAD <= len(raw):
            fields: tuple[Any, ...] = _RECORD.unpack_from(raw, at)
            # The numbers first: what a file of an earlier life holds need not be hashed.
            if fields[2] == number and fields[3] > above:
                head = read_record(view, at)
                if head is not None:
                    return head
        at = raw.find(RECORD_MAGIC, at + 1)
    return None
