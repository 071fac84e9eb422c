"""The label: 32 bytes after a shard's bytes, inside its sealed plaintext, that say which part of which sector it is. Big-endian:

| bytes | field |
|---|---|
| 4 | magic `fsSH` |
| 2 | version, 2 |
| 1 | k: data shards (1 for copies) |
| 1 | m: parity shards (0 for copies) |
| 2 | shard number, from 0 |
| 2 | zero |
| 4 | length of the whole sector |
| 8 | sector id |
| 8 | zero |

It stands at the end, so that a shard's bytes begin where its first block does, and no aligned page of them stands in two blocks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from storage.errors import Corrupt
from storage.interfaces import Buffer

LABEL_SIZE = 32

_VERSION = 2
_LABEL = struct.Struct(">4sHBBHHIQ8s")
_MAGIC = b"fsSH"


@dataclass(frozen=True, slots=True)
class Label:
    """What a shard says of itself. `length`: bytes of the whole sector."""

    sector_id: int
    length: int
    k: int = 1
    m: int = 0
    number: int = 0

    def encode(self) -> bytes:
        return _LABEL.pack(_MAGIC, _VERSION, self.k, self.m, self.number, 0, self.length, self.sector_id, bytes(8))


def parse_label(plain: Buffer) -> Label:
    """Of a shard's plaintext. Corrupt if it does not end with one."""
    raw = bytes(memoryview(plain)[-LABEL_SIZE:])
    if len(raw) == LABEL_SIZE:
        _, _, k, m, number, _, length, sector_id, _ = _LABEL.unpack(raw)
        found = Label(sector_id, length, k, m, number)
        coded = m > 0 and k > 0 and number < k + m <= 255
        if found.encode() == raw and (coded or (k, m, number) == (1, 0, 0)):
            return found
    raise Corrupt("a shard's plaintext does not end with a label")


def encode_label(sector_id: int, sector_length: int, *, k: int = 1, m: int = 0, number: int = 0) -> bytes:
    """The 32 bytes that stand after a shard's bytes."""
    return Label(sector_id, sector_length, k, m, number).encode()


def check_label(raw: bytes, sector_id: int, sector_length: int, *, k: int = 1, m: int = 0, number: int = 0) -> None:
    """Corrupt unless `raw` ends with exactly the label expected."""
    if raw[-LABEL_SIZE:] != encode_label(sector_id, sector_length, k=k, m=m, number=number):
        raise Corrupt(f"sector {sector_id}: the shard's label is not the one expected")
