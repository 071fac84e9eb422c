"""The key space of the metadata store: one prefix byte per kind of record, handed out here and nowhere else.

| prefix | key after the prefix (big-endian, fixed width) | value | owner |
|---|---|---|---|
| `c` | counter name (ASCII) | u64: next unreserved number | metadata.counters |
| `e` | epoch u32 | epoch record | epochs |
| `h` | host number u32 | host record | hosts.registry |
| `k` | contract id (32 ASCII hex digits) | contract record | contractor |
| `r` | root 32 bytes, host number u32 | holders of a shard | host_io |
| `q` | host number u32 | host statistics | hosts.hostdb |
| `s` | sector id u64 | sector record | sectors |
| `f` | sector id u64 | written, nothing points to it yet | sectors |
| `p` | class u8, sector id u64 | partly filled sector, for merging | sectors |
| `u` | sector id u64 | below full replication | sectors |
| `y` | sector id u64, host number u32 | a place on record that may hold nothing any more | sectors.doubts |
| `z` | commit sequence u64, sector id u64 | freed sector, waiting for deletion on its hosts | sectors |
| `v` | value id u64 | value record | values |
| `x` | value id u64, offset u64 | extent | values |
| `g` | value id u64 | freed value whose extents are still to be walked | values |
| `a` | value id u64 | some of its bytes are in sectors of another replication than its own: how many, u64 | values |
| `i` | inode u64 | inode record | namespace |
| `n` | parent inode u64, name | directory entry | namespace |
| `l` | parent inode u64, cookie u64 | place of that entry: its name, inode and type | namespace |
| `o` | inode or map u64 | orphan: no name, still pinned; or the rest of a dropped file map | namespace |
| `m` | map u64 (taken from the inode numbers), file offset u64 | file map entry | namespace |
| `t` | inode u64, name | extended attribute | namespace |
| `j` | directory inode u64 | what is below it is being given a replication | namespace |
| `d` | host number u32 | the host is lost: when somebody said so, nanoseconds u64 | history |
| `b` | host number u32 | the host is being left: since when, nanoseconds u64 | standing |
| `w` | ASCII name | settings of the volume that can change | volume |
| `J` | ASCII name | the store's own: last sequence LMDB holds | metadata.store |
| `L` | ASCII name | of this copy of the directory alone: never on a host, not part of its history | history, sectors |
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from storage.errors import Corrupt

COUNTER = b"c"
EPOCH = b"e"
HOST = b"h"
CONTRACT = b"k"
HOLDERS = b"r"
HOST_STATS = b"q"
SECTOR = b"s"
FRESH = b"f"
PARTIAL = b"p"
UNDERREPLICATED = b"u"
DOUBTED = b"y"
FREED = b"z"
VALUE = b"v"
EXTENT = b"x"
GARBAGE = b"g"
MISPLACED = b"a"
INODE = b"i"
NAME = b"n"
COOKIE = b"l"
ORPHAN = b"o"
MAP = b"m"
XATTR = b"t"
HANDING_DOWN = b"j"
LOST = b"d"
LEAVING = b"b"
SETTING = b"w"
STORE = b"J"
LOCAL = b"L"
#: What hosts never get: it says something about this directory, not about the volume.
NEVER_SHIPPED = (STORE, LOCAL)
#: What alone is no reason to send anything: an idle volume is silent.
NO_REASON_TO_SHIP = (HOST_STATS,)

_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")

u32 = _U32.pack
u64 = _U64.pack


def numbered(prefix: bytes, numbers: Sequence[int]) -> list[bytes]:
    """`prefix + u64(number)` for each of them."""
    return [prefix + number for number in map(u64, numbers)]


def read_u32(raw: bytes, at: int = 0) -> int:
    """The big-endian u32 at `at`. Corrupt if it ends before."""
    return _read(_U32, raw, at)


def read_u64(raw: bytes, at: int = 0) -> int:
    """The big-endian u64 at `at`. Corrupt if it ends before."""
    return _read(_U64, raw, at)


def _read(layout: struct.Struct, raw: bytes, at: int) -> int:
    try:
        return int(layout.unpack_from(raw, at)[0])
    except struct.error:
        raise Corrupt(f"metadata: {raw[:24].hex()} is too short for what it is; run fusefs check") from None


def prefix_end(prefix: bytes) -> bytes:
    """The smallest key above every key that starts with `prefix` (prefixes here never end in 0xff only)."""
    body = prefix.rstrip(b"\xff")
    if not body:
        raise ValueError("a prefix of 0xff bytes only has no end")
    return body[:-1] + bytes([body[-1] + 1])
