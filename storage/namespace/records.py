"""Codecs of what the namespace keeps in the metadata store.

Every value is one version byte (1) and a MessagePack array. Anything that does not decode, or says what cannot be, raises Corrupt; but a
listing of regular files looks at the first thirteen fields of their records only.

Inode record, `i` + inode u64 (about 70 bytes and the name):

| # | field | type | meaning |
|---|---|---|---|
| 0 | mode | u32 | type and permission bits, as in st_mode |
| 1 | nlink | u32 | names; directories: 2 + subdirectories; 0: an orphan |
| 2, 3 | uid, gid | u32 | owner |
| 4 | rdev | u63 | device number of a device node |
| 5 | value | u63 | regular files: the value with the content; else 0 |
| 6 | map | u63 | 0: straight. Else the number its map entries stand under (taken from the inode numbers, used once) |
| 7 | size | u63 | mapped files: the size is at least this, whatever the map says (a hole at the end) |
| 8 | map_bound | u63 | mapped files: no map entry reaches beyond this offset of the value (N5) |
| 9 | counted | u63 | bytes of this file that are in the volume's total |
| 10-12 | atime, mtime, ctime | i64 | nanoseconds since the Unix epoch |
| 13 | parent | u63 | hint; 0: none known. Directories: the parent (the root's is itself) |
| 14 | name | bytes, at most 255 | hint |
| 15 | flags | u32 | 1: worm directory. 2: has extended attributes |
| 16 | replication | str, at most 15 | directories: for new files below; "" inherits |
| 17 | target | bytes, at most 4095 | symlinks: where to |

Directory entry, `n` + parent u64 + name: inode u63, type bits u32 (`st_mode & S_IFMT`), cookie u63.
Its place, `l` + parent u64 + cookie u64: no MessagePack but version u8 (1), type bits >> 12 u8, inode u64, then the name to the end. It
says what the directory entry says, so that a directory is listed with one scan.
Map entry, `m` + map u64 + file offset u64: length u63 (not 0), offset in value u63.
Orphan, `o` + number u64: one byte, `i` for an inode without a name, `m` for what is left of a map.
Counts, `w` + "namespace.counts": inodes u63, regular files u63, bytes u63 (sum of `counted`).
Handing down, `j` + directory inode u64: replication str, cookie u63 of the last entry done.
Worm, `w` + "namespace.worm": b"1" once the volume has a worm directory.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Sequence
from typing import Annotated, NamedTuple, TypeVar, cast

import msgspec

from storage.errors import BadArgument, Corrupt
from storage.metadata.keys import COOKIE, HANDING_DOWN, INODE, MAP, NAME, ORPHAN, SETTING, XATTR, u64
from storage.metadata.together import as_array, numbers
from storage.replication import parse_replication

VERSION = 1
_VERSION_BYTE = bytes([VERSION])

ROOT = 1
MAX_NAME = 255
MAX_TARGET = 4095
#: Largest file offset, size and number: what off_t can say.
MAX_OFFSET = 2**63 - 1
MAX_U32 = 2**32 - 1
#: Names of one file. As ext4: programs that make millions of links know this limit.
MAX_LINKS = 65_000
#: Subdirectories are limited only by the field.
MAX_DIRECTORY_LINKS = MAX_U32

WORM = 1
HAS_XATTRS = 2

ORPHAN_INODE = b"i"
ORPHAN_MAP = b"m"

COUNTS_KEY = SETTING + b"namespace.counts"
WORM_KEY = SETTING + b"namespace.worm"

#: S_IFMT of <sys/stat.h>.
_IFMT = 0o170000
_TYPES = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFBLK, stat.S_IFCHR})

#: What stands before the name in a place: version, type, inode.
_PLACE = struct.Struct(">BBQ")
_PARENT_COOKIE = struct.Struct(">QQ")
_REGULAR = frozenset({stat.S_IFREG})
_KINDS = frozenset(kind >> 12 for kind in _TYPES)
#: Length of its key.
_PLACE_KEY = 17

U32 = Annotated[int, msgspec.Meta(ge=0, le=MAX_U32)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=MAX_OFFSET)]
I64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class InodeRecord(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """One inode; see the table above."""

    mode: U32
    nlink: U32
    uid: U32
    gid: U32
    rdev: U63
    value: U63
    map: U63
    size: U63
    map_bound: U63
    counted: U63
    atime: I64
    mtime: I64
    ctime: I64
    parent: U63
    name: Annotated[bytes, msgspec.Meta(max_length=MAX_NAME)]
    flags: U32
    replication: Annotated[str, msgspec.Meta(max_length=15)]
    target: Annotated[bytes, msgspec.Meta(max_length=MAX_TARGET)]

    @property
    def type(self) -> int:
        """The type bits of `mode`."""
        return stat.S_IFMT(self.mode)

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)


class StraightRecord(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """As much of an `InodeRecord` as a listing shows, of a file whose content is all of its value: what follows is not looked at."""

    mode: U32
    nlink: U32
    uid: U32
    gid: U32
    rdev: U63
    value: Annotated[int, msgspec.Meta(ge=1, le=MAX_OFFSET)]
    map: Annotated[int, msgspec.Meta(ge=0, le=0)]
    size: U63
    map_bound: U63
    counted: U63
    atime: I64
    mtime: I64
    ctime: I64


class Dirent(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False, frozen=True):
    """What a name stands for."""

    ino: Annotated[int, msgspec.Meta(ge=1, le=MAX_OFFSET)]
    type: U32
    cookie: U63


class MapRecord(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False, frozen=True):
    """Where a run of a file's bytes stands in its value."""

    length: Annotated[int, msgspec.Meta(ge=1, le=MAX_OFFSET)]
    value_offset: U63


class HandingDownRecord(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False, frozen=True):
    """What is below a directory is being given a replication, as far as `after`."""

    replication: Annotated[str, msgspec.Meta(min_length=1, max_length=15)]
    after: U63


class CountsRecord(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """Totals of the volume."""

    inodes: U63
    files: U63
    bytes: U63


_encode = msgspec.msgpack.Encoder().encode
_inode_decoder = msgspec.msgpack.Decoder(InodeRecord)
_dirent_decoder = msgspec.msgpack.Decoder(Dirent)
# The version byte 1 is the number 1 in MessagePack, so that whole records stand in an array side by side.
_inodes_decoder = msgspec.msgpack.Decoder(list[int | InodeRecord])
_straight_decoder = msgspec.msgpack.Decoder(list[int | StraightRecord])
_map_decoder = msgspec.msgpack.Decoder(MapRecord)
_handing_down_decoder = msgspec.msgpack.Decoder(HandingDownRecord)
_counts_decoder = msgspec.msgpack.Decoder(CountsRecord)

S = TypeVar("S", bound=msgspec.Struct)


def _decode(decoder: msgspec.msgpack.Decoder[S], raw: bytes, what: str, *which: int) -> S:
    """`what` may have places for `which`."""
    if raw[:1] != _VERSION_BYTE:
        found = raw[:1].hex() or "missing"
        raise Corrupt(f"{what.format(*which)}: format {found}, this program knows {VERSION}; check the volume's metadata")
    try:
        # UnicodeDecodeError: a str field may hold anything in a damaged record.
        return decoder.decode(raw[1:])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Corrupt(f"{what.format(*which)}: record does not decode ({error}); check the volume's metadata") from error


def _decode_together(decoder: msgspec.msgpack.Decoder[list[int | S]], kind: type[S], raws: Sequence[bytes]) -> list[S] | None:
    """What `_decode` says of each; None: not all of them are records."""
    try:
        found = decoder.decode(as_array(raws, 2))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # the last: where much is to be passed over
        return None
    records = cast("list[S]", found[1::2])
    if found[::2].count(VERSION) != len(raws) or not {kind}.issuperset(map(type, records)):
        return None
    return records


def clone(record: InodeRecord) -> InodeRecord:
    """A copy to change. `copy.copy` takes longer to find out how than this does to copy."""
    return msgspec.structs.replace(record)


def encode_inode(record: InodeRecord) -> bytes:
    return _VERSION_BYTE + _encode(record)


def decode_inode(ino: int, raw: bytes) -> InodeRecord:
    """Corrupt if `raw` is not an inode record."""
    return _consistent(ino, _decode(_inode_decoder, raw, "inode {}", ino))


def decode_inodes(inos: Sequence[int], raws: Sequence[bytes]) -> list[InodeRecord]:
    """As `decode_inode` of each."""
    records = _decode_together(_inodes_decoder, InodeRecord, raws)
    if records is None:
        return [decode_inode(ino, raw) for ino, raw in zip(inos, raws, strict=True)]
    for ino, record in zip(inos, records, strict=True):
        if not record.value or record.mode & _IFMT != stat.S_IFREG:
            _consistent(ino, record)
    return records


def decode_straight(raws: Sequence[bytes]) -> list[StraightRecord] | None:
    """None unless all of them are records of regular files without a map: `decode_inode` says what else they are."""
    records = _decode_together(_straight_decoder, StraightRecord, raws)
    if records is None or not _REGULAR.issuperset([record.mode & _IFMT for record in records]):
        return None
    return records


def _consistent(ino: int, record: InodeRecord) -> InodeRecord:
    """The record. Corrupt if its fields contradict each other."""
    kind = record.mode & _IFMT
    if kind == stat.S_IFREG:
        if record.value:
            return record
    elif kind not in _TYPES:
        raise Corrupt(f"inode {ino}: unknown type in mode {record.mode:o}; check the volume's metadata")
    if kind == stat.S_IFREG or record.value or record.map or (kind == stat.S_IFDIR and not record.parent):
        raise Corrupt(f"inode {ino}: fields contradict its type; check the volume's metadata")
    return record


def encode_dirent(entry: Dirent) -> bytes:
    return _VERSION_BYTE + _encode(entry)


def decode_dirent(parent: int, raw: bytes) -> Dirent:
    """Corrupt if `raw` is not a directory entry."""
    entry = _decode(_dirent_decoder, raw, "an entry of directory inode {}", parent)
    if entry.type not in _TYPES:
        raise Corrupt(f"an entry of directory inode {parent}: unknown type {entry.type:o}; check the volume's metadata")
    return entry


def encode_place(name: bytes, ino: int, kind: int) -> bytes:
    """`kind`: type bits of the mode."""
    return _PLACE.pack(VERSION, kind >> 12, ino) + name


def decode_place(key: bytes, raw: bytes) -> tuple[bytes, Dirent]:
    """A name and what it stands for. Corrupt if the two are no place."""
    if len(key) != _PLACE_KEY:
        raise Corrupt(f"the key {key[:24].hex()} is not that of a place in a directory; check the volume's metadata")
    parent, cookie = _PARENT_COOKIE.unpack_from(key, 1)
    if len(raw) <= _PLACE.size or raw[0] != VERSION:
        raise Corrupt(f"place {cookie} in directory inode {parent}: {raw[:10].hex()} is none; check the volume's metadata")
    _, kind, ino = _PLACE.unpack_from(raw)
    kind <<= 12
    if kind not in _TYPES or not 0 < ino <= MAX_OFFSET or cookie > MAX_OFFSET:
        raise Corrupt(f"place {cookie} in directory inode {parent}: inode {ino} of type {kind:o} cannot be; check the volume's metadata")
    return raw[_PLACE.size :], Dirent(ino=ino, type=kind, cookie=cookie)


class Places(NamedTuple):
    """Places in one directory, in order; columns, because there are thousands of them."""

    names: Sequence[bytes]
    inos: Sequence[int]
    cookies: Sequence[int]


NOWHERE = Places((), (), ())


def decode_places(pairs: Sequence[tuple[bytes, bytes]]) -> Places:
    """As `decode_place` of each."""
    if not pairs:
        return NOWHERE
    count, size = len(pairs), _PLACE.size
    keys, raws = zip(*pairs, strict=True)
    names = [raw[size:] for raw in raws]
    heads = b"".join([raw[:size] for raw in raws])
    if (
        b"" not in names
        and {_PLACE_KEY}.issuperset(map(len, keys))
        and heads[::size].count(VERSION) == count
        and _KINDS.issuperset(heads[1::size])
    ):
        inos = numbers(2, heads)
        cookies = numbers(9, b"".join(keys))
        if min(inos) > 0 and max(inos) <= MAX_OFFSET and max(cookies) <= MAX_OFFSET:
            return Places(names, inos, cookies)
    entries = [decode_place(key, raw)[1] for key, raw in pairs]
    return Places(names, [entry.ino for entry in entries], [entry.cookie for entry in entries])


def encode_map(record: MapRecord) -> bytes:
    return _VERSION_BYTE + _encode(record)


def decode_map(map_id: int, offset: int, raw: bytes) -> MapRecord:
    """Corrupt if `raw` is not a map entry, or reaches beyond what a file can be."""
    record = _decode(_map_decoder, raw, "file map {} at {}", map_id, offset)
    if offset + record.length > MAX_OFFSET or record.value_offset + record.length > MAX_OFFSET:
        raise Corrupt(f"file map {map_id} at {offset}: reaches beyond the largest file; check the volume's metadata")
    return record


def encode_handing_down(record: HandingDownRecord) -> bytes:
    return _VERSION_BYTE + _encode(record)


def decode_handing_down(ino: int, raw: bytes) -> HandingDownRecord:
    """Corrupt if `raw` is no such record."""
    record = _decode(_handing_down_decoder, raw, "the mark of directory inode {}", ino)
    try:
        parse_replication(record.replication)
    except BadArgument as error:
        raise Corrupt(f"the mark of directory inode {ino}: {error}; check the volume's metadata") from error
    return record


def encode_counts(record: CountsRecord) -> bytes:
    return _VERSION_BYTE + _encode(record)


def decode_counts(raw: bytes) -> CountsRecord:
    """Corrupt if `raw` is not a counts record."""
    return _decode(_counts_decoder, raw, "the namespace's counts")


def inode_key(ino: int) -> bytes:
    return INODE + u64(ino)


def name_key(parent: int, name: bytes) -> bytes:
    return NAME + u64(parent) + name


def cookie_key(parent: int, cookie: int) -> bytes:
    return COOKIE + u64(parent) + u64(cookie)


def map_key(map_id: int, offset: int) -> bytes:
    return MAP + u64(map_id) + u64(offset)


def handing_down_key(ino: int) -> bytes:
    return HANDING_DOWN + u64(ino)


def orphan_key(number: int) -> bytes:
    return ORPHAN + u64(number)


def xattr_key(ino: int, name: bytes) -> bytes:
    return XATTR + u64(ino) + name
