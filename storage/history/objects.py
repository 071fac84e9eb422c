"""Metadata sectors: what a checkpoint and the log are stored as on hosts. Codec only; nothing here asks a host for anything.

An *object* is sealed once, never changes, and is named `metadata/<epoch, 8 hex digits>-<first 8 hex digits of the epoch's salt>-<root>`,
root being BLAKE3 of its bytes: so whoever lists a host sees at once whose it is, and sweeps only what is of its own history (I5). All
integers big-endian. Format 1:

| at | size | field |
|---|---|---|
| 0 | 4 | magic `fsMD` |
| 4 | 2 | format version |
| 6 | 1 | kind: 1 chunk of a checkpoint, 2 index of a checkpoint, 3 part of the log |
| 7 | 1 | codec of the body: 1 zlib |
| 8 | 16 | volume id |
| 24 | 16 | salt of the epoch that wrote it |
| 40 | 4 | that epoch |
| 44 | 4 | length of the body before compression |
| 48 | 12 | nonce: random (I1) |
| 60 | 4 | zero |
| 64 | | AES-256-GCM (metadata key, nonce above, bytes 0 to 63 as associated data) of the compressed body |

Bodies are MessagePack arrays:

| kind | body |
|---|---|
| chunk | array of [key, value], keys ascending; some of the volume's records, as they were when the scan came by |
| index | [1, sequence the scan began at, records in all, bytes of all bodies, [reference of each chunk, in order]] |
| log | [1, sequence from (exclusive), sequence to (inclusive), [[key, value or nil], ...], [[value id, offset, bytes], ...]] |

A reference is [name's last component, bytes stored]. A log entry brings every record that changed between two cuts, with its newest value,
and the tail bytes that are in no sector as of the second. A checkpoint's chunks are of different moments; with the log since the scan
began, applied in order, they give the exact state: operations put and delete whole records, so applying one twice changes nothing.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.errors import BadArgument, Corrupt
from storage.hosts.layout import VOLUMES
from storage.metadata.records import MAX_KEY, MAX_VALUE, Op
from storage.seams import Randomness

FORMAT = 1
BODY_VERSION = 1
HEADER_SIZE = 64
NONCE_SIZE = 12
CHUNK, INDEX, LOG = 1, 2, 3
_ZLIB = 1

#: Bytes of a body at most; what claims more is refused before it is unpacked (I7, hostile input).
MAX_BODY = 32 * 1024 * 1024
#: Bytes of a stored object at most.
MAX_OBJECT = HEADER_SIZE + MAX_BODY + 65536
#: Bytes of a body that writers aim at.
TARGET_BODY = 4 * 1024 * 1024

_HEADER = struct.Struct(">4sHBB16s16sII12sI")
_MAGIC = b"fsMD"
_NAME = re.compile(r"([0-9a-f]{8})-([0-9a-f]{8})-([0-9a-f]{64})\Z", re.ASCII)

Body = TypeVar("Body")


class Ref(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An object by the last component of its name, and how many bytes are stored."""

    name: Annotated[str, msgspec.Meta(min_length=82, max_length=82)]
    size: Annotated[int, msgspec.Meta(gt=HEADER_SIZE, le=MAX_OBJECT)]

    @property
    def root(self) -> str:
        """BLAKE3 of the stored bytes, 64 hexadecimal digits."""
        return self.name[18:]


@dataclass(frozen=True, slots=True)
class Writer:
    """Whose object it is: the volume, and the epoch that writes."""

    volume_id: bytes
    epoch: int
    salt: bytes


@dataclass(frozen=True, slots=True)
class SealedObject:
    """What goes to hosts."""

    ref: Ref
    data: bytes


@dataclass(frozen=True, slots=True)
class Tail:
    """Bytes of a value that are in no sector: they stand at `offset` of it."""

    value_id: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Delta:
    """What changed between two cuts of the history."""

    after: int
    upto: int
    ops: list[Op]
    tails: list[Tail] = field(default_factory=list)


class Index(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A checkpoint: its chunks in the order of their keys."""

    version: int
    sequence: Annotated[int, msgspec.Meta(ge=0)]
    records: Annotated[int, msgspec.Meta(ge=0)]
    size: Annotated[int, msgspec.Meta(ge=0)]
    chunks: list[Ref]


class _Tail(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    value_id: Annotated[int, msgspec.Meta(ge=1)]
    offset: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    data: Annotated[bytes, msgspec.Meta(min_length=1)]


class _Log(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    after: Annotated[int, msgspec.Meta(ge=0)]
    upto: Annotated[int, msgspec.Meta(ge=0)]
    ops: list[tuple[bytes, bytes | None]]
    tails: list[_Tail]


_encoder = msgspec.msgpack.Encoder()
_chunk_decoder = msgspec.msgpack.Decoder(list[tuple[bytes, bytes]])
_index_decoder = msgspec.msgpack.Decoder(Index)
_log_decoder = msgspec.msgpack.Decoder(_Log)
_raw_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])
_int_decoder = msgspec.msgpack.Decoder(int)


# --------------------------------------------------------------------------------------------------------------------
# Names


def metadata_prefix(volume_id: bytes) -> str:
    """All metadata objects of a volume stand below it."""
    return f"{VOLUMES}/{volume_id.hex()}/metadata/"


def object_name(volume_id: bytes, name: str) -> str:
    """Where the object with this last component stands on a host."""
    return metadata_prefix(volume_id) + name


def writer_of(name: str) -> tuple[int, str] | None:
    """(epoch, first 8 hex digits of its salt) from an object's last component; None if it is not one."""
    match = _NAME.match(name)
    return (int(match[1], 16), match[2]) if match else None


# --------------------------------------------------------------------------------------------------------------------
# Sealing


def seal_object(key: bytes, writer: Writer, kind: int, body: bytes, random: Randomness) -> SealedObject:
    """Compress, seal and name `body`. Blocking: for a thread. `key`: the metadata key. BadArgument for a body above MAX_BODY."""
    if len(body) > MAX_BODY:
        raise BadArgument(f"a metadata object of {len(body)} bytes: at most {MAX_BODY}")
    header = _HEADER.pack(
        _MAGIC, FORMAT, kind, _ZLIB, writer.volume_id, writer.salt, writer.epoch, len(body), random.token_bytes(NONCE_SIZE), 0
    )
    data = header + AESGCM(key).encrypt(header[48:60], zlib.compress(body, 1), header)
    name = f"{writer.epoch:08x}-{writer.salt[:4].hex()}-{blake3(data).hexdigest()}"
    return SealedObject(Ref(name, len(data)), data)


def open_object(key: bytes, volume_id: bytes, ref: Ref, kind: int, data: bytes, where: str) -> bytes:
    """The body, once size, root, header and tag verify. Blocking: for a thread. Corrupt, naming `where`, for anything else.

    BadArgument for a format this program does not know.
    """
    what = f"{where}, metadata object {ref.name[:26]}"
    if len(data) != ref.size or blake3(data).hexdigest() != ref.root:
        raise Corrupt(f"{what}: what is stored is not it ({len(data)} bytes)")
    magic, version, found, codec, volume, salt, epoch, length, nonce, zero = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise Corrupt(f"{what}: no metadata object")
    if version > FORMAT:
        raise BadArgument(f"{what} has format {version}, this fusefs knows up to {FORMAT}: a newer fusefs is needed")
    if (version, found, codec, volume, zero) != (FORMAT, kind, _ZLIB, volume_id, 0) or writer_of(ref.name) != (epoch, salt[:4].hex()):
        raise Corrupt(f"{what}: its header is another object's")
    if length > MAX_BODY:
        raise Corrupt(f"{what}: claims {length} bytes")
    try:
        packed = AESGCM(key).decrypt(nonce, data[HEADER_SIZE:], data[:HEADER_SIZE])
    except InvalidTag:
        raise Corrupt(f"{what} does not verify, it is damaged or of another volume") from None
    inflater = zlib.decompressobj()
    try:
        # One byte more than it says is enough to tell that it is longer.
        body = inflater.decompress(packed, length + 1)
    except zlib.error as error:
        raise Corrupt(f"{what}: does not unpack ({error})") from None
    if len(body) != length or not inflater.eof:
        raise Corrupt(f"{what}: is not as long as it says")
    return body


# --------------------------------------------------------------------------------------------------------------------
# Bodies


def encode_chunk(pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Records in the order of their keys."""
    return _encoder.encode(pairs)


def decode_chunk(body: bytes, where: str) -> list[tuple[bytes, bytes]]:
    """Corrupt, naming `where`, unless these are records in order."""
    try:
        pairs = _chunk_decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Corrupt(f"{where}: a chunk of the checkpoint does not decode ({error})") from None
    last = b""
    for key, value in pairs:
        if not last < key or len(key) > MAX_KEY or len(value) > MAX_VALUE:
            raise Corrupt(f"{where}: a chunk of the checkpoint has records out of order, or of impossible length")
        last = key
    return pairs


def encode_index(sequence: int, records: int, size: int, chunks: Sequence[Ref]) -> bytes:
    """See the table."""
    return _encoder.encode(Index(BODY_VERSION, sequence, records, size, list(chunks)))


def decode_index(body: bytes, where: str) -> Index:
    """Corrupt, naming `where`."""
    try:
        index = _index_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        _check_version(_version_in(body), f"{where}: the checkpoint's index")
        raise Corrupt(f"{where}: the checkpoint's index does not decode ({error})") from None
    _check_version(index.version, f"{where}: the checkpoint's index")
    check_refs(index.chunks, where)
    return index


def encode_delta(delta: Delta) -> bytes:
    """See the table."""
    tails = [(tail.value_id, tail.offset, tail.data) for tail in delta.tails]
    return _encoder.encode((BODY_VERSION, delta.after, delta.upto, delta.ops, tails))


def decode_delta(body: bytes, where: str) -> Delta:
    """Corrupt, naming `where`."""
    try:
        log = _log_decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        _check_version(_version_in(body), f"{where}: an entry of the log")
        raise Corrupt(f"{where}: an entry of the log does not decode ({error})") from None
    _check_version(log.version, f"{where}: an entry of the log")
    if any(not 0 < len(key) <= MAX_KEY or (value is not None and len(value) > MAX_VALUE) for key, value in log.ops):
        raise Corrupt(f"{where}: an entry of the log has a record of impossible length")
    if log.after > log.upto or any(tail.value_id >= 1 << 64 or tail.offset + len(tail.data) >= 1 << 63 for tail in log.tails):
        raise Corrupt(f"{where}: an entry of the log has a tail in an impossible place, or ends before it begins")
    return Delta(log.after, log.upto, log.ops, [Tail(tail.value_id, tail.offset, tail.data) for tail in log.tails])


def _version_in(body: bytes) -> int:
    """The first field of a body, whatever the others are: a newer version may have other ones. BODY_VERSION if there is none."""
    try:
        return _int_decoder.decode(_raw_decoder.decode(body)[0])
    except (msgspec.MsgspecError, UnicodeError, RecursionError, LookupError):
        return BODY_VERSION


def _check_version(version: int, what: str) -> None:
    """BadArgument for a newer version, Corrupt for one that never was."""
    if version > BODY_VERSION:
        raise BadArgument(f"{what} has version {version}: a newer fusefs is needed")
    if version != BODY_VERSION:
        raise Corrupt(f"{what} has version {version}, which has never been")


def check_refs(refs: Sequence[Ref], where: str) -> None:
    """Corrupt, naming `where`, if one of them is no name of an object."""
    for ref in refs:
        if writer_of(ref.name) is None:
            raise Corrupt(f"{where}: refers to {ref.name[:40]!r}, which is no metadata object")
