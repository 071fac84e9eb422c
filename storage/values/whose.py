"""Whose bytes are in a sector: for messages, since a sector's number says nothing to who has the files."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

import trio

from storage.errors import Corrupt, NotFound
from storage.interfaces import MetadataReader
from storage.metadata.keys import EXTENT, prefix_end
from storage.values.records import decode_extent, decode_value, value_key
from storage.wording import EXAMPLES

#: Extents looked at for it while a volume is in use; in a larger one some files may not be found.
MAX_EXTENTS = 300_000
_SLICE = 500


async def files_in(
    store: MetadataReader, path_of: Callable[[int], bytes | None], sectors: Collection[int], *, most: int | None = MAX_EXTENTS
) -> list[str]:
    """Paths of some files with bytes in these sectors, EXAMPLES at most. There is no index that leads from a sector to files: extents are
    looked through, `most` of them (None: all), in slices. What does not decode is passed over."""
    wanted, owners = set(sectors), dict[int, None]()
    start, left = EXTENT, most
    while wanted and len(owners) < EXAMPLES and (found := store.scan(start, prefix_end(EXTENT), _SLICE)):
        for key, raw in found:
            try:
                extent = decode_extent(key, raw)
                if extent.sector_id in wanted and (value := store.get(value_key(extent.value_id))) is not None:
                    owners[decode_value(value, extent.value_id).owner] = None
            except Corrupt:
                continue
        if left is not None and (left := left - len(found)) <= 0:
            break
        start = found[-1][0] + b"\0"
        await trio.lowlevel.checkpoint()
    paths: list[str] = []
    for owner in owners:
        try:
            path = path_of(owner)
        except (Corrupt, NotFound):
            continue
        if path is not None:
            paths.append(os.fsdecode(path))
    return paths[:EXAMPLES]
