"""The key file: the master key, wrapped under passphrases. Stands in the volume's directory and, as it is, in every superblock.

`keys.json` is a document (storage/documents.py) with these fields:

| field | value |
|---|---|
| `format`, `format_version` | `fusefs keys`, 1 |
| `volume_id` | 32 hexadecimal digits |
| `slots` | 1 to 8 key slots; each opens by itself |

A slot (bytes as base64):

| field | value |
|---|---|
| `kdf` | `argon2id` (RFC 9106, version 1.3), 32 bytes of output |
| `memory_kib`, `time`, `lanes` | its parameters, within the bounds below, checked before anything is computed |
| `salt` | 16 random bytes |
| `nonce` | 12 random bytes |
| `wrapped` | 48 bytes: AES-256-GCM of the master key under Argon2id's output |

Associated data of the wrapping, 84 bytes: `fusefs key slot` padded with zeros to 16, slot version u32 (1), volume id 16, memory_kib u32,
time u32, lanes u32, zero u32, salt 16, zero 16; integers big-endian.

A passphrase is text: it is normalised to NFKD, as BIP-39 does, so that it is the same from every keyboard and terminal, and encoded in
UTF-8 (bytes that came in from the environment and are no UTF-8 stay as they were). It is not trimmed. Functions that take one block, for
up to a second with usual parameters: call them in a thread.
"""

from __future__ import annotations

import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from storage.documents import MAX_DOCUMENT, Document, decode_document, encode_document
from storage.durable import read_small_file, write_file_atomic
from storage.errors import BadArgument, Corrupt, NoSpace, NotFound, WrongPassphrase
from storage.keys import MASTER_SIZE
from storage.seams import Failpoints, Randomness, Seams

KEY_FILE = "keys.json"
FORMAT = "fusefs keys"
FORMAT_VERSION = 1

MAX_SLOTS = 8
#: Bytes, after normalising: more is a file given by mistake.
MAX_PASSPHRASE = 65536

# Bounds of the Argon2id parameters. The upper ones limit what a hostile key file on a host can make us spend: 1 GiB, some tens of seconds.
MIN_MEMORY_KIB, MAX_MEMORY_KIB = 64, 1024 * 1024
MIN_TIME, MAX_TIME = 1, 16
MIN_LANES, MAX_LANES = 1, 16
#: KiB of memory times passes, of all slots that are tried together: what one may cost.
MAX_WORK = MAX_MEMORY_KIB * MAX_TIME

_SALT_SIZE = 16
_NONCE_SIZE = 12
_WRAPPED_SIZE = MASTER_SIZE + 16
_SLOT_VERSION = 1
_ASSOCIATED = struct.Struct(">16sI16sIIII16s16s")

_Memory = Annotated[int, msgspec.Meta(ge=MIN_MEMORY_KIB, le=MAX_MEMORY_KIB)]
_Time = Annotated[int, msgspec.Meta(ge=MIN_TIME, le=MAX_TIME)]
_Lanes = Annotated[int, msgspec.Meta(ge=MIN_LANES, le=MAX_LANES)]


def _out_of_bounds(memory_kib: int, time: int, lanes: int) -> str:
    """What is wrong with the parameters; "" if nothing."""
    if not MIN_TIME <= time <= MAX_TIME:
        return f"{time} passes are not between {MIN_TIME} and {MAX_TIME}"
    if not MIN_LANES <= lanes <= MAX_LANES:
        return f"{lanes} lanes are not between {MIN_LANES} and {MAX_LANES}"
    # Argon2 itself needs 8 KiB for each lane.
    least = max(MIN_MEMORY_KIB, 8 * lanes)
    if not least <= memory_kib <= MAX_MEMORY_KIB:
        return f"{memory_kib} KiB of memory are not between {least} and {MAX_MEMORY_KIB}"
    return ""


@dataclass(frozen=True, slots=True)
class Argon2Parameters:
    """What one guess costs. The default is RFC 9106's second recommendation: 64 MiB, 3 passes, 4 lanes; 0.2-0.3 s here."""

    memory_kib: int = 64 * 1024
    time: int = 3
    lanes: int = 4

    def __post_init__(self) -> None:
        problem = _out_of_bounds(self.memory_kib, self.time, self.lanes)
        if problem:
            raise BadArgument(f"Argon2id parameters: {problem}")


#: As weak as the format allows: for tests, where nothing is secret.
CHEAP = Argon2Parameters(MIN_MEMORY_KIB, MIN_TIME, MIN_LANES)


class KeySlot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The master key under one passphrase."""

    kdf: Literal["argon2id"] = "argon2id"
    memory_kib: _Memory
    time: _Time
    lanes: _Lanes
    salt: Annotated[bytes, msgspec.Meta(min_length=_SALT_SIZE, max_length=_SALT_SIZE)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=_NONCE_SIZE, max_length=_NONCE_SIZE)]
    wrapped: Annotated[bytes, msgspec.Meta(min_length=_WRAPPED_SIZE, max_length=_WRAPPED_SIZE)]


class KeyFile(Document, frozen=True, kw_only=True):
    """All slots of a volume."""

    volume_id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    slots: Annotated[tuple[KeySlot, ...], msgspec.Meta(min_length=1, max_length=MAX_SLOTS)]


# --------------------------------------------------------------------------------------------------------------------
# Slots


def make_slot(master: bytes, passphrase: str, volume_id: str, random: Randomness, parameters: Argon2Parameters | None = None) -> KeySlot:
    """Wrap `master` under `passphrase` with a fresh salt and nonce (I1).

    BadArgument for an empty passphrase; NoSpace if memory does not suffice.
    """
    if len(master) != MASTER_SIZE:
        raise BadArgument(f"a master key has {MASTER_SIZE} bytes, not {len(master)}")
    cost = parameters or Argon2Parameters()
    salt, nonce = random.token_bytes(_SALT_SIZE), random.token_bytes(_NONCE_SIZE)
    bare = KeySlot(memory_kib=cost.memory_kib, time=cost.time, lanes=cost.lanes, salt=salt, nonce=nonce, wrapped=b"")
    key = _derive(bare, passphrase_bytes(passphrase))
    return msgspec.structs.replace(bare, wrapped=AESGCM(key).encrypt(nonce, master, _associated(bare, volume_id)))


def open_slots(keyfile: KeyFile, passphrase: str) -> bytes:
    """The master key. WrongPassphrase if no slot opens; Corrupt if a slot is not within the bounds; NoSpace if memory does not suffice."""
    return _open(keyfile, passphrase)[1]


def _open(keyfile: KeyFile, passphrase: str) -> tuple[int, bytes]:
    """(index of the cheapest slot that opens, master key)."""
    secret = passphrase_bytes(passphrase)
    work = 0
    # Hosts hand out slots too: all of them together may cost no more than one may.
    for index, slot in sorted(enumerate(keyfile.slots), key=lambda item: item[1].memory_kib * item[1].time):
        work += slot.memory_kib * slot.time
        if work > MAX_WORK and not _out_of_bounds(slot.memory_kib, slot.time, slot.lanes):
            raise WrongPassphrase(
                f"the cheaper key slots of volume {keyfile.volume_id} do not open with this passphrase, and trying all "
                f"{len(keyfile.slots)} costs more than any volume's do: try again, or use a copy of the key file that can be trusted"
            )
        key = _derive(slot, secret)
        try:
            return index, AESGCM(key).decrypt(slot.nonce, slot.wrapped, _associated(slot, keyfile.volume_id))
        except InvalidTag:
            continue
    raise WrongPassphrase(f"no key slot of volume {keyfile.volume_id} opens with this passphrase; try again")


def passphrase_bytes(passphrase: str) -> bytes:
    """What goes into Argon2id. BadArgument for an empty, an endless or an undecodable passphrase."""
    if len(passphrase) > MAX_PASSPHRASE:
        raise BadArgument(f"passphrase: {len(passphrase)} characters, at most {MAX_PASSPHRASE} bytes are taken; was another file meant?")
    try:
        secret = unicodedata.normalize("NFKD", passphrase).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise BadArgument("passphrase: contains half of a surrogate pair, which is no text") from None
    if not secret:
        raise BadArgument("passphrase: it is empty; choose one of at least one character")
    if len(secret) > MAX_PASSPHRASE:
        raise BadArgument(f"passphrase: {len(secret)} bytes, at most {MAX_PASSPHRASE} are taken; was another file meant?")
    return secret


def _derive(slot: KeySlot, secret: bytes) -> bytes:
    # Checked when parsed, and again here: a slot may have come from elsewhere than `parse_keyfile`.
    problem = _out_of_bounds(slot.memory_kib, slot.time, slot.lanes)
    if problem:
        raise Corrupt(f"key slot: {problem}")
    try:
        return Argon2id(salt=slot.salt, length=32, iterations=slot.time, lanes=slot.lanes, memory_cost=slot.memory_kib).derive(secret)
    except MemoryError:
        raise NoSpace(f"key slot: opening it takes {slot.memory_kib // 1024} MiB of memory, which this machine cannot give now") from None


def _associated(slot: KeySlot, volume_id: str) -> bytes:
    return _ASSOCIATED.pack(
        b"fusefs key slot", _SLOT_VERSION, bytes.fromhex(volume_id), slot.memory_kib, slot.time, slot.lanes, 0, slot.salt, b""
    )


# --------------------------------------------------------------------------------------------------------------------
# The file


def make_keyfile(volume_id: str, slots: tuple[KeySlot, ...]) -> KeyFile:
    """A key file of the current format. BadArgument if there are no slots, or too many."""
    if not 1 <= len(slots) <= MAX_SLOTS:
        raise BadArgument(f"key file of volume {volume_id}: {len(slots)} slots, between 1 and {MAX_SLOTS} fit")
    return KeyFile(format=FORMAT, format_version=FORMAT_VERSION, volume_id=volume_id, slots=slots)


def encode_keyfile(keyfile: KeyFile) -> bytes:
    """The file's bytes, for the volume's directory and for superblocks."""
    return encode_document(keyfile)


def parse_keyfile(raw: bytes, name: str = "key file") -> KeyFile:
    """The key file in `raw`; `name` is what errors call it. Corrupt if damaged, BadArgument if of a newer format. Needs no secret."""
    keyfile = decode_document(raw, KeyFile, FORMAT, FORMAT_VERSION, name)
    for slot in keyfile.slots:
        problem = _out_of_bounds(slot.memory_kib, slot.time, slot.lanes)
        if problem:
            raise Corrupt(f"{name} is damaged: {problem}")
    return keyfile


def load_keyfile(path: Path, volume_id: str | None = None) -> KeyFile:
    """Read `path`. Corrupt if it is missing, damaged, or not of `volume_id` (where given); BadArgument if of a newer format."""
    try:
        raw = read_small_file(path, MAX_DOCUMENT)
    except NotFound:
        raise Corrupt(f"key file {path} is missing; restore it from a copy, or recover the volume from a host") from None
    keyfile = parse_keyfile(raw, f"key file {path}")
    if volume_id is not None and keyfile.volume_id != volume_id:
        raise Corrupt(f"key file {path} belongs to volume {keyfile.volume_id}, not to {volume_id}")
    return keyfile


def save_keyfile(path: Path, keyfile: KeyFile, failpoints: Failpoints | None = None) -> None:
    """Write `path`, mode 0600, atomically and durably (`write_file_atomic`)."""
    write_file_atomic(path, encode_keyfile(keyfile), 0o600, failpoints)


def change_passphrase(path: Path, volume_id: str, old: str, new: str, seams: Seams, parameters: Argon2Parameters | None = None) -> None:
    """Replace the slot that `old` opens by one for `new`; durable when it returns, and the old file as it was if it raises.

    Copies of the old slot elsewhere (in superblocks on hosts, in backups) still open with `old`: nothing can revoke those. The caller holds
    the volume's lock. WrongPassphrase, Corrupt, BadArgument, and what writing a file raises.
    """
    passphrase_bytes(new)
    keyfile = load_keyfile(path, volume_id)
    index, master = _open(keyfile, old)
    slot = make_slot(master, new, volume_id, seams.random, parameters)
    slots = (*keyfile.slots[:index], slot, *keyfile.slots[index + 1 :])
    save_keyfile(path, make_keyfile(volume_id, slots), seams.failpoints)
