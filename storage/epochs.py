"""Epochs: whose key sealed which sector.

An epoch is one writer's tenure, with a random salt and thereby keys of its own. Sector ids come from one counter that only goes up, and one
writer at a time reserves from it, so epochs own ranges of ids that follow one another:

    epoch     1              2     3 (reserved nothing)   4
    first id  1              9001  12001                  12001
    owns      [1, 9001)      [9001, 12001)   nothing      [12001, ...

The epoch of a sector is therefore the *last* one whose first id is not above the sector's. An epoch that reserved nothing shares its
first id with its successor, owns nothing, and is never the last of those that share. Nothing of this is stored per sector.

Record under the key `e` + epoch u32 (storage/metadata/keys.py), a MessagePack array:

| place | type | value |
|---|---|---|
| 0 | int | record format, 2 |
| 1 | bin, 16 | salt |
| 2 | int | first sector id: the counter's next unreserved number when the epoch began; from 1 |
| 3 | int | wall clock when it began, nanoseconds |
| 4 | int | first sequence: number of the commit this record is in; what came before is of earlier epochs |

Format 1 has no place 4; its first sequence reads as 0.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from storage.errors import BadArgument, Corrupt, NotFound
from storage.interfaces import Batch, MetadataReader
from storage.keys import SALT_SIZE, Keys
from storage.metadata.keys import EPOCH, prefix_end, read_u32, u32
from storage.sealing import ShardHeader

RECORD_FORMAT = 2
_MAX_EPOCH = 0xFFFF_FFFF
_MAX_SECTOR_ID = 0xFFFF_FFFF_FFFF_FFFF
_SLICE = 1000


@dataclass(frozen=True, slots=True)
class Epoch:
    """One writer's tenure. The salt is no secret, but is left out of the repr as noise."""

    number: int
    salt: bytes = field(repr=False)
    first_sector_id: int
    started_ns: int
    #: Sequence number of its first commit; 0 where an older fusefs wrote the record.
    first_sequence: int = 0


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    record_format: int
    salt: Annotated[bytes, msgspec.Meta(min_length=SALT_SIZE, max_length=SALT_SIZE)]
    # Up to 2^64 - 1; msgspec takes no bound above 2^63 - 1, and MessagePack has no larger integers.
    first_sector_id: Annotated[int, msgspec.Meta(ge=1)]
    started_ns: Annotated[int, msgspec.Meta(ge=0)]
    first_sequence: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0


def encode_epoch(epoch: Epoch) -> tuple[bytes, bytes]:
    """(key, value) for the metadata store."""
    value = msgspec.msgpack.encode(_Record(RECORD_FORMAT, epoch.salt, epoch.first_sector_id, epoch.started_ns, epoch.first_sequence))
    return EPOCH + u32(epoch.number), value


def decode_epoch(key: bytes, value: bytes) -> Epoch:
    """Corrupt if it is no epoch record."""
    if len(key) != 5 or key[:1] != EPOCH:
        raise Corrupt(f"metadata: {key[:16].hex()} is no key of an epoch")
    number = read_u32(key, 1)
    try:
        record = msgspec.msgpack.decode(value, type=_Record)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Corrupt(f"metadata: the record of epoch {number} is damaged: {error}") from None
    if not 1 <= record.record_format <= RECORD_FORMAT:
        raise Corrupt(f"metadata: the record of epoch {number} has format {record.record_format}, this fusefs reads {RECORD_FORMAT}")
    if number == 0:
        raise Corrupt("metadata: epochs count from 1, there is a record of epoch 0")
    return Epoch(number, record.salt, record.first_sector_id, record.started_ns, record.first_sequence)


class Epochs:
    """All epochs of a volume's history, in memory. Synchronous, no await anywhere; one task's (the volume's) `begin`, anybody's reads.

    From threads, `header_for` and `key_for` are safe while nobody calls `begin`, which happens once, when the volume is opened.
    """

    __slots__ = ("_epochs", "_firsts", "_salts")

    def __init__(self, epochs: list[Epoch]) -> None:
        """`epochs` in order. Corrupt if numbers do not ascend, first ids descend, or a salt occurs twice."""
        # Invariant: _firsts[n] == _epochs[n].first_sector_id; ascending, not strictly.
        self._epochs: list[Epoch] = []
        self._firsts: list[int] = []
        self._salts: set[bytes] = set()
        for epoch in epochs:
            self._append(epoch)

    @classmethod
    def load(cls, store: MetadataReader) -> Epochs:
        """Those of a volume; none for a new one. Corrupt if a record is damaged or they contradict one another."""
        epochs: list[Epoch] = []
        start, stop = EPOCH, prefix_end(EPOCH)
        while pairs := store.scan(start, stop, _SLICE):
            epochs.extend(decode_epoch(key, value) for key, value in pairs)
            start = pairs[-1][0] + b"\0"
        return cls(epochs)

    def begin(self, batch: Batch, salt: bytes, first_sector_id: int, now_ns: int, first_sequence: int = 0, above: int = 0) -> Epoch:
        """Begin the next epoch: its record goes into `batch`, and it is `current` at once.

        Its number is above all earlier ones, and above `above` (others may have begun some that are not in this history).
        `first_sequence`: of the commit `batch` will be in.
        `first_sector_id` must be the sector counter's next unreserved number, which is above every id reserved so far (I1). Nothing may be
        sealed under the epoch until the commit that holds `batch` is durable. BadArgument for a salt of the wrong length; Corrupt if the
        number lies below what an earlier epoch began with, or if the salt was used before: the volume's counter, or the source of
        randomness, has been set back, and going on would seal twice under one nonce.
        """
        if len(salt) != SALT_SIZE:
            raise BadArgument(f"an epoch's salt has {SALT_SIZE} bytes, not {len(salt)}")
        number = max(self._epochs[-1].number if self._epochs else 0, above) + 1
        epoch = Epoch(number, bytes(salt), first_sector_id, now_ns, first_sequence)
        self._append(epoch)
        batch.put(*encode_epoch(epoch))
        return epoch

    @property
    def current(self) -> Epoch:
        """The latest. NotFound in a volume nobody has opened for writing yet."""
        if not self._epochs:
            raise NotFound("this volume has no epoch yet: open it for writing once")
        return self._epochs[-1]

    def all(self) -> list[Epoch]:
        """In order."""
        return list(self._epochs)

    def for_sector(self, sector_id: int) -> Epoch:
        """The epoch that reserved `sector_id` (if it has been reserved at all). NotFound if it lies before every epoch."""
        place = bisect_right(self._firsts, sector_id)
        if place == 0:
            raise NotFound(f"sector {sector_id}: no epoch of this volume has reserved that id")
        return self._epochs[place - 1]

    def header_for(self, volume_id: bytes, sector_id: int, plaintext_length: int) -> ShardHeader:
        """The header under which a shard with this id is sealed, and the only one a reader accepts."""
        epoch = self.for_sector(sector_id)
        return ShardHeader(volume_id, epoch.salt, epoch.number, plaintext_length, sector_id)

    def key_for(self, sector_id: int, keys: Keys) -> bytes:
        """The key under which a shard with this id is sealed."""
        return keys.sector_key(self.for_sector(sector_id).salt)

    def _append(self, epoch: Epoch) -> None:
        if not 1 <= epoch.number <= _MAX_EPOCH or not 1 <= epoch.first_sector_id <= _MAX_SECTOR_ID:
            raise Corrupt(f"metadata: epoch {epoch.number} begins with sector {epoch.first_sector_id}: one of them is out of range")
        if self._epochs:
            last = self._epochs[-1]
            if epoch.number <= last.number:
                raise Corrupt(f"metadata: epoch {epoch.number} follows epoch {last.number}")
            if epoch.first_sector_id < last.first_sector_id:
                raise Corrupt(
                    f"metadata: epoch {epoch.number} begins with sector {epoch.first_sector_id}, "
                    f"below {last.first_sector_id} of epoch {last.number}: sector ids would be used twice (use recover)"
                )
        # I1: one salt, one epoch.
        if epoch.salt in self._salts:
            raise Corrupt(f"metadata: epoch {epoch.number} has the salt of an earlier one: sector keys would be used twice")
        self._epochs.append(epoch)
        self._firsts.append(epoch.first_sector_id)
        self._salts.add(epoch.salt)

    def __repr__(self) -> str:
        return f"<Epochs {len(self._epochs)}, current {self._epochs[-1] if self._epochs else None}>"
