"""The table at the end of every sector: whose bytes these are, so that sectors alone can be salvaged.

A sector's bytes:

| bytes | what |
|---|---|
| ... | data: each entry's bytes lie together |
| packed length | zlib of a msgpack array of entries [path, value id, offset in value, length, position in sector, commit] |
| 4 | magic `fsTB` |
| 2 | version, 1 |
| 2 | number of zero bytes (reserved) |
| 4 | packed length |
| 4 | unpacked length |

All integers big-endian. `path` is the file's path when the sector was written (bytes, may be empty), `commit` the sequence number of the
commit that was to come next.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import msgspec

from storage.config import MAX_SECTOR_SIZE
from storage.errors import Corrupt

VERSION = 1
_TRAILER = struct.Struct(">4sHHII")
_MAGIC = b"fsTB"
TRAILER_SIZE = _TRAILER.size

#: What an entry takes at most besides its path: seven msgpack headers of at most 9 bytes; zlib never adds more than the constant below.
ENTRY_BYTES = 56
TABLE_BYTES = TRAILER_SIZE + 128

#: An unpacked table longer than this is refused before it is unpacked: no sector that we write has one (I7, hostile input).
#: Writers count a table's unpacked bytes as part of the sector. Decoded, it takes ten times as much memory at most.
MAX_TABLE = MAX_SECTOR_SIZE


class TableEntry(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """One stretch of one value in the sector."""

    path: bytes
    value_id: int
    offset: int
    length: int
    position: int
    commit: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[TableEntry])


def encode_table(entries: Sequence[TableEntry]) -> bytes:
    """The table and its trailer, to stand at the sector's end."""
    raw = _encoder.encode(entries)
    packed = zlib.compress(raw, 1)
    return packed + _TRAILER.pack(_MAGIC, VERSION, 0, len(packed), len(raw))


def parse_table(sector: bytes | memoryview) -> list[TableEntry]:
    """The entries of a whole sector's bytes; Corrupt where there is no valid table."""
    size = len(sector)
    if size < TRAILER_SIZE:
        raise Corrupt(f"a sector of {size} bytes has no table")
    magic, version, zero, packed, unpacked = _TRAILER.unpack_from(sector, size - TRAILER_SIZE)
    if magic != _MAGIC or version != VERSION or zero != 0:
        raise Corrupt("a sector does not end with a table of a known version")
    # No table is empty; and zlib would take a limit of 0 for none.
    if packed > size - TRAILER_SIZE or not 0 < unpacked <= MAX_TABLE:
        raise Corrupt("a sector's table claims a length that cannot be")
    body = memoryview(sector)[size - TRAILER_SIZE - packed : size - TRAILER_SIZE]
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(body, unpacked)
        # Ask for what is left only to see that nothing is: one byte is enough to tell.
        if not inflater.eof and inflater.decompress(inflater.unconsumed_tail, 1):
            raise Corrupt("a sector's table is longer than it says")
        entries = _decoder.decode(raw)
    except (zlib.error, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Corrupt(f"a sector's table is damaged ({error})") from error
    if len(raw) != unpacked or not inflater.eof:
        raise Corrupt("a sector's table is shorter than it says")
    data = size - TRAILER_SIZE - packed
    for entry in entries:
        if min(entry.value_id, entry.offset, entry.length, entry.position) < 0 or entry.position + entry.length > data:
            raise Corrupt("a sector's table points outside the sector")
    return entries
