"""Records of sectors in the metadata store.

Sector record (key `s` + sector id), msgpack array:

| # | field | type | meaning |
|---|---|---|---|
| 0 | version | uint | 1 |
| 1 | replication | str | as asked for when it was written |
| 2 | length | uint | bytes given to write_sector |
| 3 | data | uint | most bytes that were ever live |
| 4 | live | uint | bytes that extents point to |
| 5 | shards | array | one per distinct sealed shard: [shard id, plaintext length, root (32 bytes), [host number, ...]] |
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from storage.errors import BadArgument, Corrupt
from storage.replication import parse_replication
from storage.sealing import MAX_PLAINTEXT
from storage.sectors.redundancy import Layout, layout_of

VERSION = 1

_U32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
_Number = Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]


class ShardRecord(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """One distinct sealed shard and the hosts that hold it."""

    # Up to 2^64 - 1: msgspec takes no bound above 2^63 - 1, and MessagePack has no larger integers.
    shard_id: Annotated[int, msgspec.Meta(ge=1)]
    length: Annotated[int, msgspec.Meta(ge=0, le=MAX_PLAINTEXT)]
    root: bytes
    hosts: list[_Number]


class SectorRecord(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What the volume knows of a sector. See the table above."""

    version: int
    replication: str
    length: _U32
    data: _U32
    live: _U32
    shards: list[ShardRecord]

    def encode(self) -> bytes:
        return _encoder.encode(self)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(SectorRecord)


def decode_sector(raw: bytes, sector_id: int) -> SectorRecord:
    """Parse a record; Corrupt names the sector."""
    try:
        record = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Corrupt(f"metadata of sector {sector_id} is damaged ({error}); run fusefs check") from error
    if record.version != VERSION or not record.shards or any(len(shard.root) != 32 for shard in record.shards):
        raise Corrupt(f"metadata of sector {sector_id} has an unknown layout; run fusefs check")
    try:
        parse_replication(record.replication)
    except BadArgument as error:
        raise Corrupt(f"metadata of sector {sector_id} is damaged ({error}); run fusefs check") from error
    return record


def layout_for(record: SectorRecord, sector_id: int) -> Layout:
    """How the sector is laid out; Corrupt unless its shards are as many and as long as that says."""
    layout = layout_of(record.replication, record.length)
    if len(record.shards) != layout.shards or any(shard.length != layout.shard_length for shard in record.shards):
        raise Corrupt(f"metadata of sector {sector_id} is damaged: its shards are not those of {record.replication!r}; run fusefs check")
    return layout
