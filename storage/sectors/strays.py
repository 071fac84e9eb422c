"""Strays: sectors whose record names too few hosts to read them by, while hosts have them.

A record that was only in staging when a cut of the history was made is published as it was then: it names no host, though the sector was on
its write quorum before that cut went out. So on another machine, and wherever staging is gone, hosts are asked for its shards by name; they
are few, since all of them are marked as below full replication.
"""

from __future__ import annotations

import logging

import trio

from storage.contractor import Contractor
from storage.errors import FusefsError, NotFound
from storage.hosts.layout import shard_name
from storage.hosts.registry import HostRegistry
from storage.sealing import sealed_length
from storage.sectors.records import SectorRecord, ShardRecord
from storage.sectors.redundancy import layout_of
from storage.sectors.staging import Staging

log = logging.getLogger("fusefs.sectors")

#: Seconds hosts have to say whether they have a shard.
TIMEOUT = 20.0
#: Sectors whose hosts are remembered.
REMEMBERED = 10_000


class Strays:
    """Asks hosts. Changes nothing."""

    def __init__(self, volume_id: bytes, registry: HostRegistry, contractor: Contractor, staging: Staging) -> None:
        self._volume_id, self._registry, self._contractor, self._staging = volume_id, registry, contractor, staging
        self._found: dict[int, SectorRecord] = {}

    def is_stray(self, record: SectorRecord) -> bool:
        """Does its record, with what is here, name too few shards to read it?"""
        there = sum(1 for shard in record.shards if shard.hosts or self._staging.files.has(shard.root))
        return there < len(record.shards) and there < layout_of(record.replication, record.length).needed

    async def locate(self, sector_id: int, record: SectorRecord) -> SectorRecord:
        """The record as it is, or, of a stray, with the hosts that have its shards now, as far as they can be reached."""
        if not self.is_stray(record):
            return record
        known = self._found.get(sector_id)
        if known is not None:
            return known
        located = SectorRecord(record.version, record.replication, record.length, record.data, record.live, [])
        for shard in record.shards:
            hosts = sorted({*shard.hosts, *await self._ask(shard)})
            located.shards.append(ShardRecord(shard.shard_id, shard.length, shard.root, hosts))
        if not self.is_stray(located):
            if len(self._found) >= REMEMBERED:
                self._found.clear()
            self._found[sector_id] = located
        return located

    async def _ask(self, shard: ShardRecord) -> list[int]:
        """Hosts that have the shard, whole as far as its end tells."""
        name, size = shard_name(self._volume_id, shard.root.hex()), sealed_length(shard.length)
        having: list[int] = []

        async def ask(number: int) -> None:
            try:
                if len(await self._registry.get(number).get_range(name, size - 1, 2)) == 1:
                    having.append(number)
            except NotFound:
                return
            except FusefsError as error:
                log.info("host %d does not say whether it has shard %s: %s", number, shard.root.hex()[:12], error)

        with trio.move_on_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                for number in self._registry.numbers():
                    if self._registry.available(number) and self._contractor.contract_for(number) is not None:
                        nursery.start_soon(ask, number)
        return having
