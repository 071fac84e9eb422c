"""The superblock: the small record on every host that says where the volume's metadata are. Codec only.

Stored as `volumes/<volume id>/superblock.<number>`, the latest two on each host. The number is one more than that of the host's latest
before, and must not exist: so two writers on one host contend for one name. All integers big-endian. Format 1:

| at | size | field |
|---|---|---|
| 0 | 8 | magic `fusefsS` NUL |
| 8 | 4 | format version |
| 12 | 4 | epoch of the writer |
| 16 | 16 | volume id |
| 32 | 8 | generation: grows by one or more with each superblock of the volume |
| 40 | 8 | sequence number of the commit that checkpoint and log give back |
| 48 | 8 | wall clock when it was written, nanoseconds |
| 56 | 16 | salt of the epoch |
| 72 | 4 | length of the key slots |
| 76 | 4 | length of the sealed body |
| 80 | 12 | nonce: random (I1) |
| 92 | 4 | zero |
| 96 | | key slots: the key file document (storage/keyfile.py), so that the passphrase alone opens the volume |
| | | AES-256-GCM (superblock key, nonce above, all bytes before as associated data) of the body |

What stands in the clear says nothing a host does not see anyway. Body: MessagePack array, version 1:

| # | field | type | meaning |
|---|---|---|---|
| 0 | version | int | 1 |
| 1 | predecessor | bin | BLAKE3 of the superblock this history published before; empty for the first |
| 2 | config | bin | the volume.json document |
| 3 | checkpoint | ref or nil | index of the checkpoint; nil as long as there is none |
| 4 | log | array | entries since the checkpoint's scan began, in order: [after, upto, level, [refs]] |
| 5 | hosts | array | [number, host id, url, lost]: where else to look |
| 6 | epochs | array | the latest up to 64: [number, salt, first sequence], ascending, the writer's own last |
| 7 | machine | str | the writer's host name, for messages |
| 8 | directory | str | the writer's volume directory, for messages |

A reader takes the newest whose tag verifies (storage/history/ancestry.py says what newest means).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.config import VolumeConfig, parse_config
from storage.errors import BadArgument, Corrupt
from storage.history.objects import Ref, check_refs
from storage.hosts.layout import Id, volume_prefix
from storage.hosts.urls import MAX_URL
from storage.keyfile import KeyFile, encode_keyfile, parse_keyfile
from storage.keys import SALT_SIZE
from storage.seams import Randomness

FORMAT = 1
BODY_VERSION = 1
NONCE_SIZE = 12
#: Epochs a superblock names; the metadata name all.
MAX_EPOCHS = 64
#: Log entries of a superblock at most; merging keeps them far below.
MAX_ENTRIES = 4096
MAX_KEYS, MAX_BODY = 65536, 4 * 1024 * 1024
#: Bytes of a stored superblock at most.
MAX_SUPERBLOCK = 96 + MAX_KEYS + MAX_BODY

_HEADER = struct.Struct(">8sII16sQQQ16sII12sI")
_MAGIC = b"fusefsS\x00"
_NAME = "superblock."

_U63 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_U32 = Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]


class LogEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One delta on the hosts, in one or more objects. `level`: how often entries were merged into it (eight of one level become one)."""

    after: _U63
    upto: _U63
    level: Annotated[int, msgspec.Meta(ge=0, le=32)]
    parts: Annotated[list[Ref], msgspec.Meta(min_length=1, max_length=MAX_ENTRIES)]

    @property
    def size(self) -> int:
        """Bytes stored."""
        return sum(ref.size for ref in self.parts)


class KnownHost(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A host of the volume, as the writer knew it."""

    number: _U32
    host_id: Id
    url: Annotated[str, msgspec.Meta(max_length=MAX_URL)]
    lost: bool


class KnownEpoch(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An epoch of the history: sequence numbers from `first_sequence` on are its, up to the next one's."""

    number: _U32
    salt: Annotated[bytes, msgspec.Meta(min_length=SALT_SIZE, max_length=SALT_SIZE)]
    first_sequence: _U63


class Body(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What only the volume's owner reads."""

    version: int
    predecessor: Annotated[bytes, msgspec.Meta(max_length=32)]
    config: Annotated[bytes, msgspec.Meta(max_length=65536)]
    checkpoint: Ref | None
    log: Annotated[list[LogEntry], msgspec.Meta(max_length=MAX_ENTRIES)]
    hosts: Annotated[list[KnownHost], msgspec.Meta(max_length=4096)]
    epochs: Annotated[list[KnownEpoch], msgspec.Meta(min_length=1, max_length=MAX_EPOCHS)]
    machine: _Text
    directory: _Text


@dataclass(frozen=True, slots=True)
class Superblock:
    """One generation, as far as it can be read without a key."""

    volume_id: bytes
    epoch: int
    salt: bytes
    generation: int
    sequence: int
    written_ns: int
    keys: KeyFile
    #: BLAKE3 of all its bytes: what a successor calls its predecessor.
    digest: bytes
    raw: bytes

    @property
    def _split(self) -> int:
        return len(self.raw) - int(_HEADER.unpack_from(self.raw)[9])

    def open(self, key: bytes, where: str) -> Body:
        """The body. `key`: the superblock key. Corrupt, naming `where`, if it does not verify; BadArgument for a newer version."""
        try:
            plain = AESGCM(key).decrypt(self.raw[80:92], self.raw[self._split :], self.raw[: self._split])
        except InvalidTag:
            raise Corrupt(f"{where} does not verify, it is damaged or of another volume") from None
        try:
            # The version first: a newer one may have other fields.
            fields = msgspec.msgpack.decode(plain)
            if isinstance(fields, list) and fields and isinstance(fields[0], int) and fields[0] > BODY_VERSION:
                raise BadArgument(f"{where} has version {fields[0]}: a newer fusefs is needed")
            body = _decoder.decode(plain)
        except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError) as error:
            raise Corrupt(f"{where} does not decode ({error})") from None
        _check(self, body, where)
        return body


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Body)


def superblock_number(name: str) -> int | None:
    """The number in the last component of a superblock's name; None if it is not one."""
    digits = name.removeprefix(_NAME)
    return int(digits) if len(digits) == 20 and digits.isascii() and digits.isdecimal() and name.startswith(_NAME) else None


def superblock_level(volume_id: bytes) -> str:
    """The prefix in which a volume's superblocks stand, beside contracts/, sectors/ and metadata/."""
    return volume_prefix(volume_id)


def encode_superblock(
    key: bytes,
    *,
    volume_id: bytes,
    generation: int,
    sequence: int,
    written_ns: int,
    keys: KeyFile,
    body: Body,
    random: Randomness,
) -> Superblock:
    """Seal a superblock; epoch and salt are those of the body's last epoch. `key`: the superblock key."""
    writer = body.epochs[-1]
    slots = encode_keyfile(keys)
    plain = _encoder.encode(body)
    nonce = random.token_bytes(NONCE_SIZE)
    if len(slots) > MAX_KEYS or len(plain) + 16 > MAX_BODY:
        raise BadArgument(f"a superblock with a body of {len(plain)} bytes: at most {MAX_BODY}")
    head = _HEADER.pack(
        _MAGIC,
        FORMAT,
        writer.number,
        volume_id,
        generation,
        sequence,
        written_ns,
        writer.salt,
        len(slots),
        len(plain) + 16,
        nonce,
        0,
    )
    raw = head + slots + AESGCM(key).encrypt(nonce, plain, head + slots)
    return Superblock(volume_id, writer.number, writer.salt, generation, sequence, written_ns, keys, blake3(raw).digest(), raw)


def parse_superblock(raw: bytes, where: str) -> Superblock:
    """What stands in the clear. Corrupt, naming `where`; BadArgument for a newer format. Needs no key and verifies nothing: `open` does."""
    if len(raw) < _HEADER.size or raw[:8] != _MAGIC:
        raise Corrupt(f"{where} is no superblock")
    _, version, epoch, volume_id, generation, sequence, written_ns, salt, slots, sealed, _, zero = _HEADER.unpack_from(raw)
    if version > FORMAT:
        raise BadArgument(f"{where} has format {version}, this fusefs knows up to {FORMAT}: a newer fusefs is needed")
    if version != FORMAT or zero or slots > MAX_KEYS or not 16 < sealed <= MAX_BODY or len(raw) != _HEADER.size + slots + sealed:
        raise Corrupt(f"{where} is damaged: {len(raw)} bytes do not fit what its header says")
    if epoch == 0 or max(generation, sequence, written_ns) >= 1 << 63:
        raise Corrupt(f"{where} is damaged: a number in it is out of range")
    keys = parse_keyfile(raw[_HEADER.size : _HEADER.size + slots], f"{where}: its key slots")
    if keys.volume_id != volume_id.hex():
        raise Corrupt(f"{where} is damaged: its key slots are of volume {keys.volume_id}")
    return Superblock(volume_id, epoch, salt, generation, sequence, written_ns, keys, blake3(raw).digest(), raw)


def config_of(body: Body, where: str) -> VolumeConfig:
    """The volume's configuration. Corrupt, naming `where`; BadArgument if of a newer format."""
    return parse_config(body.config, f"{where}: its volume.json")


def _check(block: Superblock, body: Body, where: str) -> None:
    """Corrupt unless the body agrees with itself and with what stands in the clear."""
    if body.version != BODY_VERSION:
        raise Corrupt(f"{where}: version {body.version} has never been")
    own = body.epochs[-1]
    if (own.number, own.salt) != (block.epoch, block.salt):
        raise Corrupt(f"{where}: its epoch {block.epoch} is not the one it names")
    if any(a.number >= b.number or a.first_sequence > b.first_sequence for a, b in pairwise(body.epochs)):
        raise Corrupt(f"{where}: its epochs are out of order")
    if any(entry.after > entry.upto for entry in body.log) or any(a.upto != b.after for a, b in pairwise(body.log)):
        raise Corrupt(f"{where}: its log has a gap")
    if body.log and body.log[-1].upto != block.sequence:
        raise Corrupt(f"{where}: its log ends with commit {body.log[-1].upto}, not with {block.sequence}")
    check_refs([*([body.checkpoint] if body.checkpoint else []), *(ref for entry in body.log for ref in entry.parts)], where)
