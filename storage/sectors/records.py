"""Records of sectors in the metadata store, and the preamble inside every shard's plaintext.

Sector record (key `s` + sector id), msgpack array:

| # | field | type | meaning |
|---|---|---|---|
| 0 | version | uint | 1 |
| 1 | replication | str | as asked for when it was written |
| 2 | length | uint | bytes given to write_sector |
| 3 | data | uint | most bytes that were ever live |
| 4 | live | uint | bytes that extents point to |
| 5 | shards | array | one per distinct sealed shard: [shard id, plaintext length, root (32 bytes), [host number, ...]] |

Preamble, 32 bytes, before the sector's (or piece's) bytes inside the sealed plaintext, big-endian:

| bytes | field |
|---|---|
| 4 | magic `fsSH` |
| 2 | version, 1 |
| 1 | k: data shards (1 for copies) |
| 1 | m: parity shards (0 for copies) |
| 2 | shard number, from 0 |
| 2 | zero |
| 4 | length of the whole sector |
| 8 | sector id |
| 8 | zero |
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec

from storage.errors import BadArgument, Corrupt
from storage.replication import parse_replication
from storage.sealing import MAX_PLAINTEXT

VERSION = 1
PREAMBLE_SIZE = 32

_PREAMBLE = struct.Struct(">4sHBBHHIQ8s")
_MAGIC = b"fsSH"


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


def encode_preamble(sector_id: int, sector_length: int, *, k: int = 1, m: int = 0, number: int = 0) -> bytes:
    """The 32 bytes that stand before a shard's bytes."""
    return _PREAMBLE.pack(_MAGIC, VERSION, k, m, number, 0, sector_length, sector_id, bytes(8))


def check_preamble(raw: bytes, sector_id: int, sector_length: int, *, k: int = 1, m: int = 0, number: int = 0) -> None:
    """Corrupt unless `raw` starts with exactly the preamble expected."""
    if raw[:PREAMBLE_SIZE] != encode_preamble(sector_id, sector_length, k=k, m=m, number=number):
        raise Corrupt(f"sector {sector_id}: the shard's preamble is not the one expected")
