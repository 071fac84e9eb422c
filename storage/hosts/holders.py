"""Who holds a shard on a host: the contracts for whose sake it must stay there.

A contract holds a root if its lineage wrote it there and it was not released through this contract, nor through one that this one was
renewed from before the renewal: a renewal takes over what its predecessor held *then*.

Record under the key `r` + root (32 bytes) + host number u32, a MessagePack array:

| # | field | type | meaning |
|---|---|---|---|
| 0 | version | int | 1; 2 where the next two follow |
| 1 | lineages | array | of [lineage (16 bytes), releases] |
| 2 | stored version | str | of the object, on a host that locks what it holds |
| 3 | locked | int | until when, nanoseconds |

A release is [contract id (16 bytes), ordinal of the latest contract of the volume when it happened]. Contracts are numbered in the
order in which they were concluded; so a renewal has taken over what is released later, and not what was released before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from storage.errors import Corrupt
from storage.metadata.keys import HOLDERS, u32

RECORD_VERSION = 1
LOCKED_VERSION = 2

_Id = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class _Release(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    contract: _Id
    ordinal: Annotated[int, msgspec.Meta(ge=0)]


class _Lineage(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    lineage: _Id
    releases: list[_Release]


class _Record(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    version: int
    lineages: list[_Lineage]


class _LockedRecord(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    version: int
    lineages: list[_Lineage]
    stored_version: Annotated[str, msgspec.Meta(max_length=1024)]
    locked_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True, slots=True)
class Claim:
    """A contract in the terms of this module: `chain` is (contract id, ordinal) of it and of what it was renewed from, newest first."""

    lineage: str
    chain: tuple[tuple[str, int], ...]


def holders_key(root: bytes, host_number: int) -> bytes:
    """In the metadata store."""
    return HOLDERS + root + u32(host_number)


@dataclass(slots=True)
class Holders:
    """The record of one root on one host."""

    #: lineage -> contract id -> latest ordinal when the root was released through it.
    lineages: dict[str, dict[str, int]] = field(default_factory=dict)
    #: On a host that locks what it holds: the version that was put, and until when it is locked, nanoseconds. "" and 0 elsewhere.
    stored_version: str = ""
    locked_ns: int = 0

    def write(self, lineage: str) -> None:
        """The lineage has stored the root (again): whatever was released before is held anew."""
        self.lineages[lineage] = {}

    def release(self, claim: Claim, latest_ordinal: int) -> None:
        """The contract no longer holds the root."""
        releases = self.lineages.get(claim.lineage)
        if releases is not None:
            releases.setdefault(claim.chain[0][0], latest_ordinal)

    def held_by(self, claim: Claim) -> bool:
        """True if the contract, in force or not, holds the root."""
        releases = self.lineages.get(claim.lineage)
        if releases is None:
            return False
        renewal: int | None = None
        for contract_id, ordinal in claim.chain:
            released = releases.get(contract_id)
            if released is not None and (renewal is None or renewal > released):
                return False
            renewal = ordinal
        return True

    def held(self, claims: Sequence[Claim]) -> bool:
        """True if any of them holds it."""
        return any(self.held_by(claim) for claim in claims)

    def encode(self) -> bytes:
        """For the metadata store."""
        lineages = [
            _Lineage(bytes.fromhex(lineage), [_Release(bytes.fromhex(contract), ordinal) for contract, ordinal in sorted(releases.items())])
            for lineage, releases in sorted(self.lineages.items())
        ]
        if self.stored_version:
            return msgspec.msgpack.encode(_LockedRecord(LOCKED_VERSION, lineages, self.stored_version, self.locked_ns))
        return msgspec.msgpack.encode(_Record(RECORD_VERSION, lineages))


def decode_holders(raw: bytes | None, root: bytes) -> Holders:
    """The record, empty for None; Corrupt if it is none."""
    if raw is None:
        return Holders()
    # 0x94: how MessagePack begins an array of four. Only version 2 has so many fields.
    locked = raw[:1] == b"\x94"
    record: _Record | _LockedRecord
    try:
        record = msgspec.msgpack.decode(raw, type=_LockedRecord) if locked else msgspec.msgpack.decode(raw, type=_Record)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Corrupt(f"metadata: the holders of root {root.hex()[:12]} are damaged: {error}") from None
    if record.version != (LOCKED_VERSION if locked else RECORD_VERSION):
        raise Corrupt(f"metadata: the holders of root {root.hex()[:12]} have version {record.version}, this fusefs reads {LOCKED_VERSION}")
    holders = Holders({one.lineage.hex(): {release.contract.hex(): release.ordinal for release in one.releases} for one in record.lineages})
    if isinstance(record, _LockedRecord):
        holders.stored_version, holders.locked_ns = record.stored_version, record.locked_ns
    return holders
