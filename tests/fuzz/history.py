"""Targets of what is kept on hosts for recovery: superblocks, and the objects of checkpoint and log."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.config import encode_config, new_config
from storage.errors import BadArgument, Corrupt
from storage.history.objects import (
    CHUNK,
    INDEX,
    LOG,
    MAX_BODY,
    Delta,
    Ref,
    Tail,
    Writer,
    decode_chunk,
    decode_delta,
    decode_index,
    encode_chunk,
    encode_delta,
    encode_index,
    object_name,
    open_object,
    seal_object,
    writer_of,
)
from storage.history.superblock import (
    Body,
    KnownEpoch,
    KnownHost,
    LogEntry,
    Superblock,
    config_of,
    encode_superblock,
    parse_superblock,
    superblock_number,
)
from storage.hosts.layout import check_name, superblock_name
from tests.fakes import SeededRandom
from tests.fuzz.frames import KEYFILE, KEYFILE_BYTES, KEYS, SALT, VOLUME_ID, hash_of, mended_document
from tests.fuzz.target import Target

_WHERE = "host dir:/x: superblock"
_BLOCK_KEY = KEYS.superblock_key()
_OBJECT_KEY = KEYS.metadata_key()
_WRITER = Writer(VOLUME_ID, 5, SALT)
_NONCE = bytes(12)
_NAME = f"00000005-{SALT[:4].hex()}-{'ab' * 32}"
_REF = Ref(_NAME, 1000)
_SEQUENCE = 900


def _body() -> Body:
    log = [LogEntry(100, 500, 1, [_REF, _REF]), LogEntry(500, _SEQUENCE, 0, [_REF])]
    hosts = [KnownHost(1, "ab" * 16, "dir:/mnt/disk", False), KnownHost(2, "cd" * 16, "dir:/mnt/other%20one", True)]
    epochs = [KnownEpoch(3, bytes(16), 1), KnownEpoch(5, SALT, 400)]
    return Body(1, bytes(32), encode_config(new_config(VOLUME_ID, 1)), _REF, log, hosts, epochs, "machine", "/srv/volume")


def _block() -> Superblock:
    return encode_superblock(
        _BLOCK_KEY,
        volume_id=VOLUME_ID,
        generation=7,
        sequence=_SEQUENCE,
        written_ns=10**18,
        keys=KEYFILE,
        body=_body(),
        random=SeededRandom(),
    )


# --------------------------------------------------------------------------------------------------------------------
# Superblocks


def _superblock(data: bytes) -> None:
    """As a host gives it out: nothing verifies unless nothing was changed."""
    block = parse_superblock(data, _WHERE)
    if block.keys.volume_id != block.volume_id.hex() or len(block.salt) != 16:
        raise AssertionError("a superblock that contradicts itself")
    superblock_name(block.volume_id, block.generation)
    body = block.open(_BLOCK_KEY, _WHERE)
    if data != _block().raw:
        raise AssertionError(f"somebody else's superblock opened: {body}")


def _superblock_mended(data: bytes) -> None:
    """96 bytes of header, of which lengths and zeros are put right, then key slots as JSON; the body is a good one, and verifies."""
    fields = data[:72].ljust(72, b"\0")
    slots, plain = mended_document(data[96:]) or KEYFILE_BYTES, msgspec.msgpack.encode(_body())
    head = fields + struct.pack(">II12sI", len(slots), len(plain) + 16, _NONCE, 0) + slots
    block = parse_superblock(head + AESGCM(_BLOCK_KEY).encrypt(_NONCE, plain, head), _WHERE)
    superblock_name(block.volume_id, block.generation)
    block.open(_BLOCK_KEY, _WHERE)


def _superblock_body(data: bytes) -> None:
    """`data`: what stands sealed in a superblock of this volume."""
    head = struct.pack(
        ">8sII16sQQQ16sII12sI", b"fusefsS\0", 1, 5, VOLUME_ID, 7, _SEQUENCE, 10**18, SALT, len(KEYFILE_BYTES), len(data) + 16, _NONCE, 0
    )
    raw = head + KEYFILE_BYTES
    block = parse_superblock(raw + AESGCM(_BLOCK_KEY).encrypt(_NONCE, data, raw), _WHERE)
    body = block.open(_BLOCK_KEY, _WHERE)
    config_of(body, _WHERE)
    again = encode_superblock(
        _BLOCK_KEY, volume_id=VOLUME_ID, generation=7, sequence=_SEQUENCE, written_ns=1, keys=KEYFILE, body=body, random=SeededRandom()
    )
    if again.open(_BLOCK_KEY, _WHERE) != body:
        raise AssertionError("a superblock that reads otherwise when it is written again")
    for ref in [*([body.checkpoint] if body.checkpoint else []), *(ref for entry in body.log for ref in entry.parts)]:
        check_name(object_name(VOLUME_ID, ref.name))


def _superblock_body_seeds() -> list[bytes]:
    body = _body()
    empty = Body(1, b"", body.config, None, [], [], body.epochs[-1:], "", "")
    newer = [2, "another", "layout"]
    return [msgspec.msgpack.encode(tree) for tree in (body, empty, newer, [])]


# --------------------------------------------------------------------------------------------------------------------
# Objects


def _object(data: bytes) -> None:
    """As a host gives it out, under the name its hash has."""
    if not len(data) > 64:
        return
    epoch, salt = struct.unpack_from(">I", data, 40)[0], data[24:28]
    ref = Ref(f"{epoch:08x}-{salt.hex()}-{hash_of(data)}", len(data))
    for kind in (CHUNK, INDEX, LOG):
        try:
            open_object(_OBJECT_KEY, VOLUME_ID, ref, kind, data, "host dir:/x")
        except (Corrupt, BadArgument) as error:
            refused = error
        else:
            return
    raise refused


def _object_body(data: bytes) -> None:
    """The first two bytes: what is added to the length the header tells. Then the packed body, which is sealed as it is."""
    try:
        length = len(zlib.decompressobj().decompress(data[2:], MAX_BODY + 1))
    except zlib.error:
        length = 100
    length += struct.unpack(">h", data[:2].ljust(2, b"\0"))[0]
    header = struct.pack(">4sHBB16s16sII12sI", b"fsMD", 1, CHUNK, 1, VOLUME_ID, SALT, 5, max(0, length), _NONCE, 0)
    raw = header + AESGCM(_OBJECT_KEY).encrypt(_NONCE, data[2:], header)
    ref = Ref(f"00000005-{SALT[:4].hex()}-{hash_of(raw)}", len(raw))
    body = open_object(_OBJECT_KEY, VOLUME_ID, ref, CHUNK, raw, "host dir:/x")
    if len(body) != length:
        raise AssertionError("an object that is not as long as it says")
    decode_chunk(body, "host dir:/x")


def _object_seeds() -> list[bytes]:
    bodies = (
        (CHUNK, encode_chunk([(b"a", b"b")])),
        (INDEX, encode_index(1, 2, 3, [_REF])),
        (LOG, encode_delta(Delta(1, 2, [(b"k", None)]))),
    )
    return [seal_object(_OBJECT_KEY, _WRITER, kind, body, SeededRandom(kind)).data for kind, body in bodies]


def _object_body_seeds() -> list[bytes]:
    sizes = b"\0\0", b"\0\1", b"\xff\xff"
    small = [size + zlib.compress(encode_chunk([(b"a", b"b" * 20), (b"c", b"")]), 1) for size in sizes]
    # Thirty-two megabytes, and more than that, in a few thousand bytes.
    return [*small, b"\0\0" + zlib.compress(bytes(MAX_BODY), 9), b"\0\0" + zlib.compress(bytes(MAX_BODY * 3), 9)]


def _chunk(data: bytes) -> None:
    pairs = decode_chunk(data, "here")
    if sorted(pairs) != pairs or decode_chunk(encode_chunk(pairs), "here") != pairs:
        raise AssertionError("a chunk out of order")


@contextmanager
def _versions_are_told(data: bytes) -> Iterator[None]:
    """A newer version, whatever its other fields, is a reason to use a newer fusefs, and no damage; and nothing else is."""
    try:
        version = msgspec.msgpack.decode(msgspec.msgpack.decode(data, type=list[msgspec.Raw])[0], type=int)
    except (ValueError, RecursionError, LookupError):
        version = 0
    try:
        yield
    except (Corrupt, BadArgument) as error:
        if isinstance(error, BadArgument) != (version > 1):
            raise AssertionError(f"version {version}: {error!r}") from error
        raise


def _index(data: bytes) -> None:
    with _versions_are_told(data):
        index = decode_index(data, "here")
    if decode_index(encode_index(index.sequence, index.records, index.size, index.chunks), "here") != index:
        raise AssertionError("an index that reads otherwise when it is written again")
    for ref in index.chunks:
        check_name(object_name(VOLUME_ID, ref.name))
    struct.pack(">QQQ", index.sequence, index.records, index.size)


def _delta(data: bytes) -> None:
    with _versions_are_told(data):
        delta = decode_delta(data, "here")
    if decode_delta(encode_delta(delta), "here") != delta:
        raise AssertionError("a log entry that reads otherwise when it is written again")
    struct.pack(">QQ", delta.after, delta.upto)
    for tail in delta.tails:
        struct.pack(">QQ", tail.value_id, tail.offset + len(tail.data))


def _object_names(data: bytes) -> None:
    """Names as a listing gives them."""
    text = data.decode("utf-8", "surrogateescape")
    number, writer = superblock_number(text), writer_of(text)
    if number is not None and superblock_name(VOLUME_ID, number).rpartition("/")[2] != text:
        raise AssertionError(f"{text!r} is not how generation {number} is written")
    if writer is not None:
        check_name(object_name(VOLUME_ID, text))


TARGETS = (
    Target("superblock", _superblock, lambda: [_block().raw], (Corrupt, BadArgument)),
    Target("superblock_mended", _superblock_mended, lambda: [_block().raw[:96] + KEYFILE_BYTES], (Corrupt, BadArgument)),
    Target("superblock_body", _superblock_body, _superblock_body_seeds, (Corrupt, BadArgument), "msgpack"),
    Target("object", _object, _object_seeds, (Corrupt, BadArgument)),
    Target("object_body", _object_body, _object_body_seeds, (Corrupt,)),
    Target("chunk", _chunk, lambda: [encode_chunk([(b"a", b"b"), (b"ab", b"")]), encode_chunk([])], shape="msgpack"),
    Target(
        "index", _index, lambda: [encode_index(100, 5, 1000, [_REF, _REF]), encode_index(0, 0, 0, [])], (Corrupt, BadArgument), "msgpack"
    ),
    Target(
        "delta",
        _delta,
        lambda: [encode_delta(Delta(5, 9, [(b"k", b"v"), (b"gone", None)], [Tail(3, 2**40, b"tail")])), encode_delta(Delta(0, 0, []))],
        (Corrupt, BadArgument),
        "msgpack",
    ),
    Target("object_names", _object_names, lambda: [_NAME.encode(), b"superblock.00000000000000000007"]),
)
