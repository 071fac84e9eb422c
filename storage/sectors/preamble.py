"""The preamble: 32 bytes before a shard's bytes, inside its sealed plaintext, that say which part of which sector it is. Big-endian:

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
from dataclasses import dataclass

from storage.errors import Corrupt
from storage.interfaces import Buffer

PREAMBLE_SIZE = 32

_VERSION = 1
_PREAMBLE = struct.Struct(">4sHBBHHIQ8s")
_MAGIC = b"fsSH"


@dataclass(frozen=True, slots=True)
class Preamble:
    """What a shard says of itself. `length`: bytes of the whole sector."""

    sector_id: int
    length: int
    k: int = 1
    m: int = 0
    number: int = 0

    def encode(self) -> bytes:
        return _PREAMBLE.pack(_MAGIC, _VERSION, self.k, self.m, self.number, 0, self.length, self.sector_id, bytes(8))


def parse_preamble(plain: Buffer) -> Preamble:
    """Of a shard's plaintext. Corrupt if it does not begin with one."""
    raw = bytes(memoryview(plain)[:PREAMBLE_SIZE])
    if len(raw) == PREAMBLE_SIZE:
        _, _, k, m, number, _, length, sector_id, _ = _PREAMBLE.unpack(raw)
        found = Preamble(sector_id, length, k, m, number)
        coded = m > 0 and k > 0 and number < k + m <= 255
        if found.encode() == raw and (coded or (k, m, number) == (1, 0, 0)):
            return found
    raise Corrupt("a shard's plaintext does not begin with a preamble")


def encode_preamble(sector_id: int, sector_length: int, *, k: int = 1, m: int = 0, number: int = 0) -> bytes:
    """The 32 bytes that stand before a shard's bytes."""
    return Preamble(sector_id, sector_length, k, m, number).encode()


def check_preamble(raw: bytes, sector_id: int, sector_length: int, *, k: int = 1, m: int = 0, number: int = 0) -> None:
    """Corrupt unless `raw` starts with exactly the preamble expected."""
    if raw[:PREAMBLE_SIZE] != encode_preamble(sector_id, sector_length, k=k, m=m, number=number):
        raise Corrupt(f"sector {sector_id}: the shard's preamble is not the one expected")
