"""The hosts of a volume together, as far as its history is concerned: who counts, who has what, and who may be deleted on."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio
from blake3 import blake3

from storage.errors import BadArgument, FusefsError, Unavailable
from storage.history.ancestry import Lineage
from storage.history.host_side import HostSide
from storage.history.log import Held
from storage.history.objects import Ref, SealedObject, object_name
from storage.hosts.registry import HostRegistry
from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import LOST, prefix_end, read_u32, u32, u64
from storage.seams import Seams
from storage.wording import counted

log = logging.getLogger("fusefs.history")


class Fleet:
    """A `HostSide` for each host. `held`: objects whose bytes are here; `lineage`: this history as it is now."""

    def __init__(
        self,
        *,
        volume_id: bytes,
        superblock_key: bytes,
        store: MetadataStore,
        registry: HostRegistry,
        lineage: Callable[[], Lineage],
        held: Held,
        seams: Seams,
        passed_over: frozenset[bytes] = frozenset(),
    ) -> None:
        self._volume_id, self._superblock_key = volume_id, superblock_key
        self._store, self._registry, self._lineage, self._held, self._seams = store, registry, lineage, held, seams
        self._passed_over = passed_over
        self._sides: dict[int, HostSide] = {}
        #: Objects that none of the hosts that answered has, whole, as far as `fetch` has found.
        self.vanished: set[str] = set()
        #: Delete nothing on any host, and release nothing for deletion: so it is during a recovery.
        self.keep_all = False

    # ------------------------------------------------------------------------------------------------------------
    # Who there is

    def lost(self) -> dict[int, int]:
        """Hosts somebody has marked lost: number -> when, nanoseconds."""
        pairs = self._store.scan(LOST, prefix_end(LOST), 4096)
        # A key of another length names no host; fusefs check tells.
        return {read_u32(key, 1): int.from_bytes(value, "big") for key, value in pairs if len(key) == 5}

    def mark_lost(self, number: int, lost: bool) -> None:
        """From the next commit on the host holds back no deletion and does not count for a majority (or does again). NotFound."""
        self._registry.record(number)
        batch = Batch()
        if lost:
            batch.put(LOST + u32(number), u64(self._seams.clock.time_ns()))
        else:
            batch.delete(LOST + u32(number))
        self._store.apply(batch)

    def sides(self) -> list[HostSide]:
        """One for each host that is not lost."""
        lost = self.lost()
        for number in self._registry.numbers():
            if number not in self._sides:
                self._sides[number] = HostSide(
                    number,
                    self._registry,
                    self._volume_id,
                    self._superblock_key,
                    self._lineage,
                    self._seams.failpoints,
                    self._passed_over,
                )
        return [side for number, side in sorted(self._sides.items()) if number not in lost]

    def voters(self) -> list[HostSide]:
        """The hosts that count for I5: those with true conditional puts; all, if there is none."""
        sides = self.sides()
        able = [side for side in sides if self._registry.record(side.number).capabilities.conditional_put]
        return able or sides

    @staticmethod
    def majority(count: int) -> int:
        """How many of `count` hosts are one."""
        return count // 2 + 1

    async def on_each(self, sides: list[HostSide], work: Callable[[HostSide], Awaitable[None]]) -> None:
        """All at the same time; a host's failure is its own."""

        async def one(side: HostSide) -> None:
            try:
                await work(side)
            except FusefsError as error:
                # NotFound, Corrupt: what a lying host says; it is looked at anew.
                side.examined = side.examined and isinstance(error, Unavailable)
                side.failed = True
                side.too_new = isinstance(error, BadArgument)
                if str(error) != side.trouble:
                    log.warning("history: %s", error)
                side.trouble = str(error) or "?"

        async with trio.open_nursery() as nursery:
            for side in sides:
                if self._registry.available(side.number):
                    nursery.start_soon(one, side)
                else:
                    side.examined = False
                    side.trouble = self._registry.reason(side.number)

    def available(self, side: HostSide) -> bool:
        """Can it be reached, as far as is known?"""
        return self._registry.available(side.number)

    def url(self, side: HostSide) -> str:
        """For messages."""
        return self._registry.url(side.number)

    def every(self) -> list[HostSide]:
        """Lost ones included, as far as they were ever looked at."""
        return list(self._sides.values())

    def troubles(self) -> str:
        """Why hosts did not do what they were asked, for messages; "" if all did."""
        return "; ".join(filter(None, (side.trouble for side in self.sides())))

    def trouble_of(self) -> dict[int, str]:
        """By host number: why it does not have its part of the history."""
        return {side.number: side.trouble for side in self.sides() if side.trouble}

    def latest_epoch_seen(self) -> int:
        """The highest number of an epoch on any host: a new one is above it."""
        return max((side.newest.block.epoch for side in self._sides.values() if side.newest is not None), default=0)

    def highest_generation(self) -> int:
        """Of a superblock that verifies, on any host."""
        return max((side.highest for side in self._sides.values()), default=0)

    # ------------------------------------------------------------------------------------------------------------
    # Objects

    async def fetch(self, ref: Ref) -> bytes:
        """An object's bytes: from here, or from the first host whose copy is what its name says."""
        held = self._held.objects.get(ref.name)
        if held is not None:
            return held
        reasons: list[str] = []
        silent = False
        for side in sorted(self.sides(), key=lambda side: not side.has(ref)):
            if not self._registry.available(side.number):
                continue
            try:
                data = await side.get(ref)
            except FusefsError as error:
                reasons.append(str(error))
                silent = silent or isinstance(error, Unavailable)
                side.present.pop(ref.name, None)
                continue
            if await self._seams.threads.run(_is, data, ref):
                return data
            reasons.append(f"host {self._registry.url(side.number)}: {object_name(self._volume_id, ref.name)} is damaged")
            side.present.pop(ref.name, None)
        if reasons and not silent:
            self.vanished.add(ref.name)
        raise Unavailable(f"no host gives metadata object {ref.name[:26]} ({'; '.join(reasons) or 'no host can be reached'})")

    async def spread(self, sealed: SealedObject) -> None:
        """To every host that can be reached. Unavailable if none takes it."""

        async def fetch(_: Ref) -> bytes:
            return sealed.data

        async def place(side: HostSide) -> None:
            await side.place(sealed.ref, fetch)

        await self.on_each(self.sides(), place)
        if not any(side.has(sealed.ref) for side in self.sides()):
            raise Unavailable(f"no host takes metadata ({self.troubles()})")
        self._held.placed(sealed.ref.name)

    async def make_whole(self, generation: int, refs: Sequence[Ref]) -> None:
        """Hosts that keep the superblock of this generation get again what it names and they have lost, or cut off: a disk can lose what it
        acknowledged, and say nothing. Names and sizes are compared; what is damaged within shows when it is read, and to `fusefs check`."""

        async def look(side: HostSide) -> None:
            if not side.examined or side.generation != generation:
                return  # It is looked at when it is brought up to date.
            await side.look_again()
            lost = [ref for ref in refs if not side.has(ref)]
            if lost:
                log.warning("history: host %s has lost %s; it gets them again", self.url(side), counted(len(lost), "metadata object"))
            for ref in lost:
                await side.place(ref, self.fetch)

        await self.on_each(self.sides(), look)

    # ------------------------------------------------------------------------------------------------------------
    # The gate for deletions (I3): see HistoryGate

    def released_sequence(self) -> int:
        """What was freed by commits up to this one is in no superblock generation that any host, not marked lost, keeps."""
        if self.keep_all:
            return 0
        kept = [side.oldest_sequence() for side in self.sides()]
        known = [sequence for sequence in kept if sequence is not None]
        return min([self._store.durable_sequence, *known])

    async def confirm(self, host_number: int) -> bool:
        """Re-reads which superblock the host has: is it ours? False also where it does not answer."""
        side = next((side for side in self.sides() if side.number == host_number), None)
        # A lost host is not deleted on: it keeps what it has, whatever that is.
        return side is not None and await side.confirm()


def _is(data: bytes, ref: Ref) -> bool:
    return len(data) == ref.size and blake3(data).hexdigest() == ref.root
