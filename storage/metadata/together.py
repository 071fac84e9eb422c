"""Many records at a time: MessagePack decoded with one call, which takes half the time of one call for each, and keys fetched by number.

What one damaged record leaves over, or takes from the next one's bytes, shows in the number of items. So whatever does not decode
together is decoded one by one, which says which record is damaged, and how.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol, cast

from storage.metadata.keys import numbered, u64

#: From so many on, numbers are looked at for being a row.
_ROW = 8
_ARRAY = struct.Struct(">BI")


class Source(Protocol):
    """What of a MetadataStore is needed here."""

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]: ...
    def row(self, first: bytes, last: bytes, count: int) -> list[bytes] | None: ...


def as_array(raws: Sequence[bytes], items: int = 1) -> bytes:
    """One MessagePack array of what stands in all of them, which should be so many `items` in each."""
    return _ARRAY.pack(0xDD, items * len(raws)) + b"".join(raws)


def complete(found: list[bytes | None]) -> list[bytes] | None:
    """What was looked for, if none of it is missing."""
    return None if None in found else cast("list[bytes]", found)


def numbers(before: int, joined: bytes) -> tuple[int, ...]:
    """The u64 of many things that stand side by side: `before` other bytes, then the number, which ends each."""
    return struct.unpack(">" + f"{before}xQ" * (len(joined) // (before + 8)), joined)


def by_number(store: Source, prefix: bytes, wanted: Sequence[int]) -> list[bytes | None]:
    """As `get_many` of `prefix + u64(number)`, a prefix of one byte, which all keys that begin with it have the length of. Numbers that
    were given out one after the other are fetched by walking, without making their keys: a third of the time."""
    count = len(wanted)
    if count >= _ROW and wanted[-1] - wanted[0] == count - 1 and list(wanted) == list(range(wanted[0], wanted[0] + count)):
        # As many keys of one length, from the first number to the last: it is these.
        raws = store.row(prefix + u64(wanted[0]), prefix + u64(wanted[-1]), count)
        if raws is not None:
            return raws  # type: ignore[return-value]
    return store.get_many(numbered(prefix, wanted))
