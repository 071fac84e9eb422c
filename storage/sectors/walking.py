"""Going through all sectors, or those that are not as they should be, in the order of their ids, in slices, beside whoever changes them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import trio

from storage.errors import Corrupt, NotFound
from storage.interfaces import MetadataReader
from storage.metadata.keys import SECTOR, UNDERREPLICATED, prefix_end, read_u64, u64
from storage.sectors.records import SectorRecord, decode_sector

log = logging.getLogger("fusefs.sectors")

#: Sectors between two checkpoints.
SLICE = 200


async def walk(store: MetadataReader, first: int = 0) -> AsyncIterator[tuple[int, SectorRecord]]:
    """Every sector from id `first` on, with its record as it is at that moment. What does not decode is logged and passed over."""
    start = SECTOR + u64(first)
    while found := store.scan(start, prefix_end(SECTOR), SLICE):
        for key, _ in found:
            try:
                sector_id = read_u64(key, 1)
                raw = store.get(key)
                if raw is not None:
                    yield sector_id, decode_sector(raw, sector_id)
            except (Corrupt, NotFound) as error:
                log.error("%s", error)
        start = found[-1][0] + b"\0"
        await trio.lowlevel.checkpoint()


async def below_full(store: MetadataReader) -> AsyncIterator[int]:
    """Ids of the sectors on the list of those that are not as they should be, whether or not they are there still."""
    start = UNDERREPLICATED
    while found := store.scan(start, prefix_end(UNDERREPLICATED), SLICE):
        for key, _ in found:
            try:
                sector_id = read_u64(key, 1)
            except Corrupt as error:
                log.error("%s", error)
                continue
            yield sector_id
        start = found[-1][0] + b"\0"
        await trio.lowlevel.checkpoint()


async def count(store: MetadataReader, first: int = 0) -> int:
    """How many there are from id `first` on."""
    start, counted = SECTOR + u64(first), 0
    while found := store.scan(start, prefix_end(SECTOR), SLICE):
        counted += len(found)
        start = found[-1][0] + b"\0"
        await trio.lowlevel.checkpoint()
    return counted
