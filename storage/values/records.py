"""Records of values in the metadata store.

Value record (key `v` + value id), msgpack array: version (1), owner inode, replication, sealed (bytes in committed extents).

Extent (key `x` + value id + offset in value), 16 bytes big-endian: sector id u64, offset in the sector u32, length u32.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from storage.errors import BadArgument, Corrupt, NotFound
from storage.interfaces import MetadataReader
from storage.metadata.keys import EXTENT, VALUE, read_u64, u64
from storage.metadata.together import as_array
from storage.replication import parse_replication

VERSION = 1

_EXTENT = struct.Struct(">QII")
_U63 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class ValueRecord(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """What is durable of a value besides its extents and tail."""

    version: int
    owner: _U63
    replication: str
    sealed: _U63

    def encode(self) -> bytes:
        return _encoder.encode(self)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ValueRecord)
_rows_decoder = msgspec.msgpack.Decoder(list[tuple[int, _U63, str, _U63]])


def decode_value(raw: bytes, value_id: int) -> ValueRecord:
    """Parse; Corrupt names the value."""
    try:
        record = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Corrupt(f"metadata of value {value_id} is damaged ({error}); run fusefs check") from error
    if record.version != VERSION:
        raise Corrupt(f"metadata of value {value_id} has an unknown layout; run fusefs check")
    try:
        parse_replication(record.replication)
    except BadArgument as error:
        raise Corrupt(f"metadata of value {value_id} is damaged ({error}); run fusefs check") from error
    return record


def find_value(store: MetadataReader, value_id: int) -> ValueRecord:
    """NotFound if there is no such value; Corrupt."""
    raw = store.get(value_key(value_id))
    if raw is None:
        raise NotFound(f"value {value_id} does not exist")
    return decode_value(raw, value_id)


def decode_sealed(raws: Sequence[bytes], value_ids: Sequence[int]) -> list[int]:
    """`sealed` of each, of records that are right in all they say. Corrupt names the first that is not."""
    try:
        rows = _rows_decoder.decode(as_array(raws))
        versions, _, replications, sealed = zip(*rows, strict=True) if rows else ((), (), (), ())
        if versions.count(VERSION) == len(raws) == len(rows):
            for replication in set(replications):
                parse_replication(replication)
            return list(sealed)
    except (msgspec.DecodeError, UnicodeDecodeError, BadArgument):
        pass
    return [decode_value(raw, value_id).sealed for raw, value_id in zip(raws, value_ids, strict=True)]


def value_key(value_id: int) -> bytes:
    return VALUE + u64(value_id)


@dataclass(frozen=True, slots=True)
class Extent:
    """(value, offset) -> (sector, position in it, length)."""

    value_id: int
    offset: int
    sector_id: int
    position: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def key(self) -> bytes:
        return EXTENT + u64(self.value_id) + u64(self.offset)

    def encode(self) -> bytes:
        return _EXTENT.pack(self.sector_id, self.position, self.length)


def decode_extent(key: bytes, raw: bytes) -> Extent:
    """Parse a pair as `scan` gives it; Corrupt if it is none."""
    if len(key) != 17 or key[:1] != EXTENT or len(raw) != _EXTENT.size:
        raise Corrupt(f"an extent record is damaged (key {key[:20].hex()}); run fusefs check")
    sector_id, position, length = _EXTENT.unpack(raw)
    return Extent(read_u64(key, 1), read_u64(key, 9), sector_id, position, length)


def extents_between(reader: MetadataReader, value_id: int, start: int, stop: int, limit: int) -> list[Extent]:
    """The extents that hold bytes of [start, stop), in order, at most `limit`."""
    prefix = EXTENT + u64(value_id)
    first = reader.scan(prefix, prefix + u64(start + 1), 1, reverse=True)
    found = [decode_extent(*first[0])] if first else []
    if found and found[0].end <= start:
        found = []
    if (not found or found[0].end < stop) and len(found) < limit:
        more = reader.scan(prefix + u64(start + 1), prefix + u64(stop), limit - len(found))
        found.extend(decode_extent(key, raw) for key, raw in more)
    return found


def tail_needed(reader: MetadataReader, value_id: int, end: int) -> bool:
    """For the journal: is the tail up to `end` needed, going by what is durable without the journal? (I3)"""
    raw = reader.get(value_key(value_id))
    return raw is not None and decode_value(raw, value_id).sealed < end


def sealed_end(reader: MetadataReader, value_id: int) -> int | None:
    """How much of the value is in sectors; None if there is no such value."""
    raw = reader.get(value_key(value_id))
    return None if raw is None else decode_value(raw, value_id).sealed
