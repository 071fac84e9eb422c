"""Filling: hosts that were added get their share of what there is, one shard at a time from those that have most.

| key | value |
|---|---|
| `w` + "reconcile.fill" | there: hosts were added, and are to get their share |
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from storage.errors import Fenced, FusefsError
from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import SETTING
from storage.sectors.mending import Mender
from storage.sectors.placement import Placement
from storage.sectors.records import SectorRecord
from storage.sectors.walking import walk
from storage.standing import Standing

log = logging.getLogger("fusefs.reconcile")

#: A host is filled until it has this share of what the average host has.
FILLED = 0.9

_FILL = SETTING + b"reconcile.fill"


class Filling:
    """See the module."""

    def __init__(self, store: MetadataStore, placement: Placement, standing: Standing, mender: Mender) -> None:
        self._store, self._placement, self._standing, self._mender = store, placement, standing, mender

    def ask(self, batch: Batch) -> None:
        """In `batch`: a host was added."""
        batch.put(_FILL, b"")

    def asked(self) -> bool:
        """Is there a host that has not got its share?"""
        return self._store.get(_FILL) is not None

    async def fill(self, keeping: frozenset[int], outdated: Callable[[], bool]) -> bool:
        """Move shards to hosts that have less than their share, from those that have most. Once through all sectors. False: broken off,
        since `outdated` says that hosts have come or gone meanwhile."""
        load = dict.fromkeys(keeping, 0)
        async for _, record in walk(self._store):
            for shard in record.shards:
                for host in shard.hosts:
                    if host in load:
                        load[host] += shard.length
        total = sum(load.values())
        if load and total:
            goal = total / len(load) * FILLED
            async for sector_id, record in walk(self._store):
                short = [host for host in load if load[host] < goal and self._placement.takes(host)]
                if not short:
                    break
                if outdated():
                    return False
                await self._move(sector_id, record, short, load, keeping)
        batch = Batch()
        batch.delete(_FILL)
        self._store.apply(batch)
        return True

    async def _move(self, sector_id: int, record: SectorRecord, short: list[int], load: dict[int, int], keeping: frozenset[int]) -> None:
        """One shard of the sector to the host that has least, if one that has more loses it, and no failure domain gets two for it."""
        domain = self._standing.domain
        plan = self._mender.plan(sector_id, record, keeping)
        target = min((host for host in short if host not in plan.hosts), key=lambda host: load[host], default=None)
        if target is None or plan.missing or not self._mender.takes(sector_id):
            return
        places = [(index, host) for index, hosts in enumerate(plan.counted) for host in hosts]

        def keeps_apart(source: int) -> bool:
            return domain(target) not in {domain(host) for _, host in places if host != source}

        able = [place for place in places if keeps_apart(place[1])] or ([] if any(keeps_apart(h) for _, h in places) else places)
        index, source = max(able, key=lambda place: load[place[1]], default=(0, 0))
        shard = record.shards[index]
        if not source or load[source] - load[target] < 2 * shard.length:
            return
        with self._mender.at(sector_id):
            try:
                await self._mender.add(sector_id, record, index, {*load} - {target}, keeping)
                current = self._mender.record(sector_id)
                if current is not None:
                    # With the source no longer counted, it is surplus.
                    plan = self._mender.plan(sector_id, current, frozenset(keeping - {source}))
                    if not plan.missing:
                        self._mender.settle(sector_id, current, plan)
                        load[source] -= shard.length
                        load[target] += shard.length
            except Fenced:
                raise
            except FusefsError as error:
                log.info("sector %d is not moved: %s", sector_id, error)
