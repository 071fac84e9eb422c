"""What stands around a body on a disk or a host, made so that it verifies: the fuzzer's way past checksums and tags."""

from __future__ import annotations

import struct

import msgspec
from blake3 import blake3

from storage.documents import encode_document
from storage.keyfile import CHEAP, encode_keyfile, make_keyfile, make_slot
from storage.keys import Keys
from storage.metadata.records import HASH, HEADER_SIZE, RECORD_HEAD, RECORD_MAGIC, digest, padded
from tests.fakes import SeededRandom

MASTER = bytes(range(32))
KEYS = Keys(MASTER)
VOLUME_ID = bytes(range(100, 116))
SALT = bytes(range(16))
PASSPHRASE = "correct horse"
KEYFILE = make_keyfile(VOLUME_ID.hex(), (make_slot(MASTER, PASSPHRASE, VOLUME_ID.hex(), SeededRandom(), CHEAP),))
KEYFILE_BYTES = encode_keyfile(KEYFILE)


def mended_document(data: bytes) -> bytes | None:
    """The JSON object in `data` as a document is written, with the checksum it should have; None if there is none."""
    try:
        fields = msgspec.json.decode(data, type=dict[str, object])
        fields.pop("checksum", None)
        return encode_document(fields)  # type: ignore[arg-type]
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


def mended_segment(data: bytes, number: int, previous: bytes, sequence: int | None) -> tuple[bytes, bytes]:
    """A journal segment whose header and records verify, and hang together, as far as their lengths make sense; and its last chain hash.

    `sequence`: what its first commit is to be called, the following ones counting up; None: as they are.
    """
    raw = bytearray(data)
    if len(raw) < HEADER_SIZE:
        return bytes(raw), previous
    raw[16:24] = struct.pack(">Q", number)
    raw[48:80] = previous
    if sequence is not None:
        raw[24:32] = struct.pack(">Q", sequence)
    raw[80:HEADER_SIZE] = digest(raw[:80]).ljust(HEADER_SIZE - 80, b"\0")
    chain, at = bytes(raw[80:112]), HEADER_SIZE
    while at + RECORD_HEAD <= len(raw):
        raw[at : at + 4] = RECORD_MAGIC
        flags, body_length, sealed_length = raw[at + 7] & 1, *struct.unpack_from(">II", raw, at + 28)
        stop = at + RECORD_HEAD + body_length + sealed_length
        if stop > len(raw):
            break
        raw[at + 4 : at + 16] = struct.pack(">IQ", flags, number)
        if sequence is not None:
            raw[at + 16 : at + 24] = struct.pack(">Q", sequence)
            sequence += flags
        raw[at + 36 : at + 40 + HASH] = bytes(4) + chain
        chain = digest(raw[at : at + 72], raw[at + RECORD_HEAD : stop])
        raw[at + 72 : at + RECORD_HEAD] = chain
        at = padded(stop)
    return bytes(raw), chain


def hash_of(data: bytes) -> str:
    return blake3(data).hexdigest()
