"""Sealed shards: what hosts hold. Any range of one can be read and checked by itself.

A shard is a header, then blocks of 16 KiB of plaintext, each AES-256-GCM with the header as associated data and followed by its tag.

| offset | size | header field |
|---|---|---|
| 0 | 4 | magic `FSSH` |
| 4 | 2 | format, 3 |
| 6 | 2 | codec of the blocks' plaintext: 0, as it is |
| 8 | 16 | volume id |
| 24 | 16 | salt of the epoch that sealed it |
| 40 | 4 | epoch number |
| 44 | 4 | plaintext length in bytes, at most 64 MiB |
| 48 | 8 | sector id, from 1 |
| 56 | 8 | zero |

| offset | size | then, for block b = 0, 1, ... |
|---|---|---|
| 64 + b * 16400 | n | ciphertext of plaintext [b * 16384, b * 16384 + n), n = 16384, less for the last block only |
| ... + n | 16 | tag; key: the epoch's sector key; nonce: sector id (8) + b (4) |

All integers are big-endian. An empty plaintext has one block of 0 bytes, so that it too ends in a tag: nothing unauthenticated verifies.

Readers build the header they expect from metadata and accept no other. Every block is bound to it, the plaintext length included, so a
cut-off, extended, moved, swapped or foreign shard does not verify, nor does a block at another place.

I1: one (key, sector id) seals exactly one (header, plaintext). This module does not know what was sealed before; `HostIO.seal` does.

Speed on one core (AMD EPYC, 2.4 GHz), 4 MiB, page faults of the new buffer included: seal 1.3 ms (3.3 GB/s), open 1.3 ms, root 1.3 ms.
AES-GCM lets go of the GIL once per block: all of this belongs into a thread.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.buffers import aligned
from storage.errors import BadArgument, Corrupt
from storage.interfaces import Buffer

#: Small enough that a random read does not wait for much of the disk; large enough that what each block costs besides its bytes does not
#: count: docs/performance.md has 4 to 64 KiB beside each other.
BLOCK = 16384
HEADER_SIZE = 64
TAG_SIZE = 16
#: Of one shard, in bytes: bounds what a hostile or damaged header can make a reader allocate.
MAX_PLAINTEXT = 64 * 1024 * 1024
#: A shard as long as they get, header and tags included: the limit for fetching one from a host.
MAX_SEALED = HEADER_SIZE + MAX_PLAINTEXT + TAG_SIZE * (MAX_PLAINTEXT // BLOCK)

MAGIC = b"FSSH"
FORMAT = 3
CODEC_NONE = 0

KEY_SIZE = 32
ID_SIZE = 16
_SEALED_BLOCK = BLOCK + TAG_SIZE
_MAX_U32 = 0xFFFF_FFFF
_MAX_U64 = 0xFFFF_FFFF_FFFF_FFFF

_HEADER = struct.Struct(">4sHH16s16sIIQ8s")
_NONCE = struct.Struct(">QI")
_ZERO = bytes(8)


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """Which shard of which volume this is. Always encodable: `BadArgument` if a field is out of its range."""

    #: 16 bytes each.
    volume_id: bytes
    salt: bytes
    epoch: int
    #: Bytes, before sealing.
    plaintext_length: int
    sector_id: int
    codec: int = CODEC_NONE

    def __post_init__(self) -> None:
        if len(self.volume_id) != ID_SIZE or len(self.salt) != ID_SIZE:
            raise BadArgument(f"shard header of sector {self.sector_id}: volume id and salt have {ID_SIZE} bytes each")
        if not 0 <= self.epoch <= _MAX_U32:
            raise BadArgument(f"shard header of sector {self.sector_id}: epoch {self.epoch} does not fit 32 bits")
        if not 0 <= self.plaintext_length <= MAX_PLAINTEXT:
            raise BadArgument(f"shard header of sector {self.sector_id}: {self.plaintext_length} bytes, a shard holds 0 to {MAX_PLAINTEXT}")
        if not 1 <= self.sector_id <= _MAX_U64:
            raise BadArgument(f"shard header: sector id {self.sector_id} is not between 1 and 2^64 - 1")
        if self.codec != CODEC_NONE:
            raise BadArgument(f"shard header of sector {self.sector_id}: unknown codec {self.codec}")

    def encode(self) -> bytes:
        """The 64 bytes."""
        return _HEADER.pack(MAGIC, FORMAT, self.codec, self.volume_id, self.salt, self.epoch, self.plaintext_length, self.sector_id, _ZERO)

    @staticmethod
    def parse(raw: Buffer) -> ShardHeader:
        """The header that `raw` (64 bytes, exactly) encodes; Corrupt if it is none. Nothing in it is authenticated yet."""
        if len(raw) != HEADER_SIZE:
            raise Corrupt(f"shard header: {len(raw)} bytes instead of {HEADER_SIZE}, the shard is cut off")
        magic, version, codec, volume_id, salt, epoch, length, sector_id, zero = _HEADER.unpack(raw)
        if magic != MAGIC:
            raise Corrupt(f"shard header: starts with {magic.hex()}, this is no sealed shard")
        if version != FORMAT:
            raise Corrupt(f"shard header of sector {sector_id}: format {version}, this fusefs reads {FORMAT}")
        if zero != _ZERO:
            raise Corrupt(f"shard header of sector {sector_id}: reserved bytes are not zero")
        try:
            return ShardHeader(volume_id, salt, epoch, length, sector_id, codec)
        except BadArgument as error:
            raise Corrupt(str(error)) from None


# --------------------------------------------------------------------------------------------------------------------
# Where things stand


def block_count(plaintext_length: int) -> int:
    """Blocks of a shard; at least one."""
    return max(1, -(-plaintext_length // BLOCK))


def sealed_length(plaintext_length: int) -> int:
    """Bytes of a shard, header and tags included."""
    return HEADER_SIZE + plaintext_length + TAG_SIZE * block_count(plaintext_length)


def block_range(offset: int, length: int, plaintext_length: int | None = None) -> tuple[int, int, int, int]:
    """(first block, number of blocks, offset in the sealed shard, length there) of plaintext [offset, offset + length).

    With `plaintext_length` the range is clipped to the shard's end, and the last two are exact. Without, the length may reach beyond the
    end of the shard: a host then gives what there is. An empty range has no blocks. BadArgument if offset or length is negative.
    """
    if offset < 0 or length < 0:
        raise BadArgument(f"range of {length} bytes at {offset}: neither can be negative")
    end = offset + length if plaintext_length is None else min(offset + length, plaintext_length)
    first = offset // BLOCK
    at = HEADER_SIZE + first * _SEALED_BLOCK
    if end <= offset:
        return first, 0, at, 0
    count = -(-end // BLOCK) - first
    size = count * _SEALED_BLOCK
    if plaintext_length is not None:
        size = min(size, sealed_length(plaintext_length) - at)
    return first, count, at, size


# --------------------------------------------------------------------------------------------------------------------
# Sealing


def seal(key: bytes, header: ShardHeader, data: Sequence[Buffer], lend: Callable[[int], memoryview] = aligned) -> Buffer:
    """The sealed shard of `data` (pieces, in order; `header.plaintext_length` bytes together), in a buffer for direct I/O that `lend` gives
    for so many bytes and nobody else writes to. Blocking: call it in a thread.

    Pieces (items of one byte each) must not change meanwhile. Plaintext is copied only where a block spans pieces. I1 is the
    caller's: never twice with one key and one sector id unless everything is the same. BadArgument if the length is not the header's.
    """
    total = sum(map(len, data))
    if total != header.plaintext_length:
        raise BadArgument(f"sector {header.sector_id}: {total} bytes to seal, its header says {header.plaintext_length}")
    associated = header.encode()
    cipher = _cipher(key)
    sealed = lend(sealed_length(total))
    sealed[:HEADER_SIZE] = associated
    at = HEADER_SIZE
    for number, plain in enumerate(_blocks(data, total)):
        end = at + len(plain) + TAG_SIZE
        cipher.encrypt_into(_NONCE.pack(header.sector_id, number), plain, associated, sealed[at:end])
        at = end
    return sealed.toreadonly()


def _blocks(data: Sequence[Buffer], total: int) -> Iterator[Buffer]:
    """The plaintext in blocks, all but the last of them full. Each may be overwritten when the next is asked for."""
    if total == 0:
        yield b""
        return
    scratch = memoryview(bytearray(min(BLOCK, total)))
    # Invariant: scratch[:filled] stands before view[at:], and is less than a block.
    filled = 0
    for view in _views(data, total):
        at = 0
        if filled:
            at = min(BLOCK - filled, len(view))
            scratch[filled : filled + at] = view[:at]
            filled += at
            if filled == BLOCK:
                yield scratch
                filled = 0
        while len(view) - at >= BLOCK:
            yield view[at : at + BLOCK]
            at += BLOCK
        rest = len(view) - at
        scratch[filled : filled + rest] = view[at:]
        filled += rest
    if filled:
        yield scratch[:filled]


def _views(data: Sequence[Buffer], total: int) -> Iterator[memoryview]:
    """The pieces; many small ones are joined a block or so at a time, which costs less than handling each of them in Python."""
    group = BLOCK * len(data) // total
    if group < 4:
        for piece in data:
            yield memoryview(piece)
    else:
        for start in range(0, len(data), group):
            yield memoryview(b"".join(data[start : start + group]))


def root_of(sealed: Buffer) -> str:
    """The sector root: BLAKE3-256 of the sealed bytes, 64 hexadecimal digits."""
    return blake3(sealed).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Opening


def open_shard(key: bytes, expected: ShardHeader, sealed: Buffer) -> bytes:
    """The plaintext of a whole shard, once its length, header and every block verify. Corrupt says what does not. Blocking."""
    want = sealed_length(expected.plaintext_length)
    view = memoryview(sealed).cast("B")
    if len(view) != want:
        raise Corrupt(f"sector {expected.sector_id}: the shard has {len(view)} bytes instead of {want}")
    check_header(expected, view[:HEADER_SIZE])
    return _open(key, expected, 0, view[HEADER_SIZE:])


def open_blocks(key: bytes, expected: ShardHeader, first_block: int, sealed_blocks: Buffer) -> bytes:
    """The plaintext of the blocks from `first_block` on that `sealed_blocks` holds: whole ones, the shard's last may be shorter.

    Corrupt if any does not verify or is cut off; a host that gave fewer *whole* blocks than asked for is the caller's to notice (or use
    `open_range`). The header itself is not needed: the blocks verify against the expected one.
    """
    count = block_count(expected.plaintext_length)
    if not 0 <= first_block < count:
        raise BadArgument(f"sector {expected.sector_id}: no block {first_block}, it has {count}")
    rest = sealed_length(expected.plaintext_length) - HEADER_SIZE - first_block * _SEALED_BLOCK
    size = len(sealed_blocks)
    if size > rest or size == 0 or (size < rest and size % _SEALED_BLOCK):
        raise Corrupt(f"sector {expected.sector_id}: {size} bytes from block {first_block} on are no whole blocks (of {rest} bytes there)")
    return _open(key, expected, first_block, memoryview(sealed_blocks).cast("B"))


def open_range(key: bytes, expected: ShardHeader, offset: int, length: int, sealed_blocks: Buffer) -> bytes:
    """Plaintext [offset, offset + length), clipped to the shard's end, from the sealed bytes that `block_range` names for it.

    `sealed_blocks` must be all that the shard has of them, no more and no less: Corrupt otherwise, or where a block does not verify.
    """
    first, count, _, size = block_range(offset, length, expected.plaintext_length)
    if count == 0:
        return b""
    if len(sealed_blocks) != size:
        raise Corrupt(f"sector {expected.sector_id}: {len(sealed_blocks)} bytes for {count} blocks from {first} on instead of {size}")
    plain = open_blocks(key, expected, first, sealed_blocks)
    start = offset - first * BLOCK
    return plain[start : start + length]


def check_header(expected: ShardHeader, raw: Buffer) -> None:
    """Corrupt, saying what differs, unless `raw` is the encoding of `expected`."""
    if bytes(raw) == expected.encode():
        return
    try:
        found = ShardHeader.parse(raw)
    except Corrupt as error:
        raise Corrupt(f"sector {expected.sector_id}: {error}") from None
    names = (field.name for field in fields(found))
    different = ", ".join(name.replace("_", " ") for name in names if getattr(found, name) != getattr(expected, name))
    raise Corrupt(f"sector {expected.sector_id}: this is another shard's header (of sector {found.sector_id}): {different} differ")


def with_length(header: ShardHeader, plaintext_length: int) -> ShardHeader:
    """The same shard with another plaintext length, for readers that learn it from the stored header; the blocks tell if it is true."""
    return replace(header, plaintext_length=plaintext_length)


class Opener:
    """Opens blocks of one shard, again and again: what does not change from one to the next is made once."""

    def __init__(self, key: bytes, expected: ShardHeader) -> None:
        self.expected = expected
        self._decrypt = _cipher(key).decrypt
        self._associated = expected.encode()

    def blocks(self, first_block: int, sealed_blocks: memoryview) -> list[bytes]:
        """The plaintext of each; as `block_range` names them for a range. Corrupt."""
        sector_id, number = self.expected.sector_id, first_block
        found: list[bytes] = []
        try:
            for at in range(0, len(sealed_blocks), _SEALED_BLOCK):
                block = sealed_blocks[at : at + _SEALED_BLOCK]
                found.append(self._decrypt(_NONCE.pack(sector_id, number), block, self._associated))
                number += 1
        except InvalidTag:
            raise _damaged(self.expected, number) from None
        return found


class Opening:
    """As `open_range`, of blocks that are many, a few of them at a time, as they come: into memory that `lend` gives for so many bytes."""

    def __init__(
        self,
        key: bytes,
        expected: ShardHeader,
        offset: int,
        length: int,
        lend: Callable[[int], memoryview],
        open_into: OpenInto | None = None,
    ) -> None:
        """`offset` is where a block begins, within the shard. `open_into`: in place of `open_blocks_into`."""
        first, count, _, self._size = block_range(offset, length, expected.plaintext_length)
        if offset % BLOCK or not count:
            raise BadArgument(f"sector {expected.sector_id}: no blocks begin at {offset}")
        self.key, self.header, self.offset = key, expected.encode(), offset
        self._expected = expected
        self._first, self._length = first, length
        #: What is opened goes there.
        self.target = lend(self._size - count * TAG_SIZE)
        #: Blocks that are open; bytes that were taken.
        self._count = self._taken = 0
        self._open_into = open_into or open_blocks_into

    def take(self, blocks: memoryview) -> None:
        """The next sealed blocks, of which only the shard's last may be short. Corrupt: they are not these."""
        self._taken += len(blocks)
        if self._taken > self._size or (self._taken < self._size and self._taken % _SEALED_BLOCK):
            raise self._incomplete()
        count, begin = -(-len(blocks) // _SEALED_BLOCK), self._count * BLOCK
        plain = self.target[begin : begin + len(blocks) - count * TAG_SIZE]
        self._open_into(self.key, self._expected, self._first + self._count, blocks, plain)
        self._count += count

    def done(self) -> None:
        """Somebody else has opened all of it into `target`."""
        self._taken = self._size

    def plain(self) -> memoryview:
        """Once everything was taken. Corrupt: something is missing."""
        if self._taken != self._size:
            raise self._incomplete()
        return self.target.toreadonly()[: self._length]

    def _incomplete(self) -> Corrupt:
        return Corrupt(f"sector {self._expected.sector_id}: {self._taken} bytes from block {self._first} on instead of {self._size}")


def _open(key: bytes, expected: ShardHeader, first_block: int, blocks: memoryview) -> bytes:
    """Decrypt `blocks`, of which all but the last are full. Returns only if every tag verifies."""
    count = -(-len(blocks) // _SEALED_BLOCK)
    if count == 1:
        # What random reads do: no buffer to be cleared first.
        try:
            return _cipher(key).decrypt(_NONCE.pack(expected.sector_id, first_block), blocks, expected.encode())
        except InvalidTag:
            raise _damaged(expected, first_block) from None
    out = io.BytesIO(bytes(len(blocks) - count * TAG_SIZE))
    with out.getbuffer() as plain:
        open_blocks_into(key, expected, first_block, blocks, plain)
    return out.getvalue()


#: As `open_blocks_into`.
OpenInto = Callable[[bytes, ShardHeader, int, memoryview, memoryview], None]


def open_blocks_into(key: bytes, expected: ShardHeader, first_block: int, blocks: memoryview, plain: memoryview) -> None:
    """As `_open`, into `plain`, of which nothing may be used where it raises Corrupt."""
    # For each block as little Python as there can be: other threads have to wait for it.
    decrypt, nonce_of = _cipher(key).decrypt_into, _NONCE.pack
    associated, sector_id, number = expected.encode(), expected.sector_id, first_block
    at = 0
    try:
        for start in range(0, len(blocks), _SEALED_BLOCK):
            block = blocks[start : start + _SEALED_BLOCK]
            end = at + len(block) - TAG_SIZE
            decrypt(nonce_of(sector_id, number), block, associated, plain[at:end])
            at, number = end, number + 1
    except InvalidTag:
        raise _damaged(expected, number) from None


def _damaged(expected: ShardHeader, number: int) -> Corrupt:
    return Corrupt(f"sector {expected.sector_id}: block {number} does not verify, the shard is damaged or foreign")


def _cipher(key: bytes) -> AESGCM:
    if len(key) != KEY_SIZE:
        raise BadArgument(f"a sector key has {KEY_SIZE} bytes, not {len(key)}")
    return AESGCM(key)
