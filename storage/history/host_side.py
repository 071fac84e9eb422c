"""One host's part of the history: which superblocks and metadata objects it has, and bringing it up to date."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import trio
from blake3 import blake3

from storage.errors import Busy, Corrupt, FusefsError, NotFound, NotPermitted, Unavailable
from storage.history.ancestry import Lineage, point_of
from storage.history.log import Fetch
from storage.history.objects import MAX_OBJECT, Ref, metadata_prefix, object_name, writer_of
from storage.history.reading import Slots, numbers_on, slots_on, top_slot
from storage.history.superblock import MAX_SUPERBLOCK, Body, Superblock
from storage.hosts.layout import superblock_name
from storage.hosts.registry import HostRegistry
from storage.interfaces import Host
from storage.pacing import URGENT_SIZE
from storage.seams import Failpoints

log = logging.getLogger("fusefs.history")

#: Numbers in the names of superblocks stay below: 20 digits.
MAX_SLOT = 10**19
#: Generations kept on each host.
GENERATIONS = 2
#: A superblock that was sent and could not be read in so many looks that gave those after it holds nothing back any more.
UNREAD = 8
#: Seconds a request may take, besides what its bytes take at `SLOWEST` bytes per second.
TIMEOUT = 20.0
SLOWEST = 32 * 1024


@dataclass(frozen=True, slots=True)
class Found:
    """A superblock on a host, opened."""

    block: Superblock
    body: Body

    @property
    def lineage(self) -> Lineage:
        return Lineage(self.body.epochs, self.block.sequence)

    def names(self) -> set[str]:
        """The metadata objects it refers to itself; a checkpoint's chunks stand in its index."""
        refs = [ref for entry in self.body.log for ref in entry.parts]
        return {ref.name for ref in ([self.body.checkpoint] if self.body.checkpoint else []) + refs}


@dataclass(slots=True)
class Kept:
    """A generation that stands on the host, under the number `slot`."""

    slot: int
    generation: int
    sequence: int
    digest: bytes
    #: Of its objects on the host; None: not known, so nothing is deleted while it stands.
    names: frozenset[str] | None
    ours: bool
    #: False: it was put there by this process, or read before, and cannot be read now.
    readable: bool = True
    #: Times it could not be read where those after it could.
    unread: int = 0


class HostSide:
    """State of one host. `lineage`: this history as it is now; a superblock of another one is foreign."""

    def __init__(
        self,
        number: int,
        registry: HostRegistry,
        volume_id: bytes,
        superblock_key: bytes,
        lineage: Callable[[], Lineage],
        failpoints: Failpoints,
        passed_over: frozenset[bytes] = frozenset(),
    ) -> None:
        self.number = number
        self._registry = registry
        self._volume_id = volume_id
        self._key = superblock_key
        self._lineage = lineage
        #: Hashes of superblocks a recovery went on without, of whatever history.
        self._passed_over = passed_over
        self._hit = failpoints.hit
        #: False until the host has said what it has; again after it was away.
        self.examined = False
        #: Newest first. Valid once examined.
        self.kept: list[Kept] = []
        #: The newest superblock, if it is of another history.
        self.foreign: Found | None = None
        #: The newest, whoever's it is.
        self.newest: Found | None = None
        #: Highest generation of those that verify: what others are called proves nothing.
        self.highest = 0
        #: The highest number in a superblock's name here, whatever stands there, or was hidden there and is still locked. The next one
        #: goes right above it, if nobody was quicker: so whoever writes here contends for the same name, and nobody's goes unseen (I5).
        self.top = 0
        #: What this process has put there and not deleted since, by number: it counts also while the host answers with something else (I3).
        self._put: dict[int, Kept] = {}
        #: Sent there, and no answer told whether it arrived, by number: it may stand there, or come to, until the number is read, gone,
        #: or has been used after all, or is damaged for good. It holds back what it names (I3), and is not deleted: it may be somebody
        #: else's that stands there (I5).
        self._sent: dict[int, Kept] = {}
        #: The numbers of all superblocks there, whoever's they are, as far as is known.
        self._listed: set[int] = set()
        #: What was wrong with superblocks, as it was last said.
        self._said: set[str] = set()
        #: Metadata objects that are there, with their sizes: one of another size is not the one that was put.
        self.present: dict[str, int] = {}
        #: It has a superblock that a newer fusefs wrote.
        self.too_new = False
        #: Why the last attempt failed; "" after a success.
        self.trouble = ""
        #: A call has failed since `present` was listed: what such a host acknowledged meanwhile it need not have.
        self.failed = False

    @property
    def generation(self) -> int:
        """Of our newest superblock on the host that can be read; 0 if it has none, or another history's is newer."""
        return next((kept.generation for kept in self.kept if kept.readable), 0) if self.foreign is None else 0

    def oldest_sequence(self) -> int | None:
        """Of the oldest generation it keeps, 0 if that is not known or of another history; None if it keeps none."""
        if not self.examined or self.foreign is not None:
            return 0
        return min((kept.sequence for kept in [*self.kept, *self._sent.values()]), default=None)

    # ----------------------------------------------------------------------------------------------------------------

    async def examine(self) -> None:
        """Look what is there. Unavailable; BadArgument for a superblock of a newer fusefs."""
        host = self._registry.get(self.number)
        slots = await slots_on(host, self._volume_id)
        notes = list(slots.notes)
        opened: dict[int, Found] = {}
        for slot, block in slots.blocks.items():
            if block is None:
                continue
            try:
                opened[slot] = Found(block, block.open(self._key, f"host {host.url}: superblock {slot}"))
            except Corrupt as error:
                notes.append(str(error))
        self._say(notes)
        present = await self._objects(host)
        self.highest = max((found.block.generation for found in opened.values()), default=0)
        self.top, self._listed = slots.top, slots.numbers
        self.present = present
        lineage = self._lineage()
        self.newest = next(iter(opened.values()), None)
        self.foreign = self.newest if self.newest is not None and not self._known(lineage, self.newest.block) else None
        # What was read there once counts as what was put there: it need not be given each time.
        known = {kept.slot: kept for kept in self.kept if kept.ours} | self._put
        self._put = {slot: kept for slot, kept in self._put.items() if slot in slots.numbers}
        self.kept = [replace(kept, readable=False) for slot, kept in known.items() if slot in slots.numbers and slot not in opened]
        for slot, found in opened.items():
            ours = lineage.contains(point_of(found.block))
            before = known.get(slot) or self._sent.get(slot)
            # Of what was sent to one number several times: what all of them name.
            names = before.names if ours and before is not None and (slot in self._sent or before.digest == found.block.digest) else None
            self.kept.append(Kept(slot, found.block.generation, found.block.sequence, found.block.digest, names, ours))
        self.kept.sort(key=lambda kept: -kept.slot)
        self._settle(slots, opened)
        self.examined = True
        self.trouble, self.failed = "", False

    def _settle(self, slots: Slots, opened: dict[int, Found]) -> None:
        """Which of those that were sent may stand there unread still."""
        left = {}
        for slot, sent in self._sent.items():
            if slot in opened or (slot not in slots.numbers and slot <= slots.top):
                continue
            # Where the host gives all that came after it, and never this one, it is damaged for good, as others are that are not used.
            passed = slot in slots.blocks and sum(kept.ours and kept.readable for kept in self.kept if kept.slot > slot) >= GENERATIONS
            sent.unread += passed
            if sent.unread < UNREAD:
                left[slot] = sent
        self._sent = left

    async def look_again(self) -> None:
        """Which metadata objects are there now: what a host acknowledged it need not have. Unavailable."""
        known = set(self.present)
        there = await self._objects(self._registry.get(self.number))
        # What a checkpoint has put there meanwhile need not be on the list.
        self.present = there | {name: size for name, size in self.present.items() if name not in known}
        self.failed = False

    async def _objects(self, host: Host) -> dict[str, int]:
        with self._request(host):
            level = await host.level(metadata_prefix(self._volume_id))
        return {name: size for name, size in level.objects.items() if writer_of(name) is not None}

    def _say(self, notes: list[str]) -> None:
        """Once, not at every look."""
        for note in notes:
            if note not in self._said:
                log.warning("%s; it is not used", note)
        self._said = set(notes)

    def _known(self, lineage: Lineage, block: Superblock) -> bool:
        return lineage.contains(point_of(block)) or block.digest in self._passed_over

    def knows(self, generation: int, names: frozenset[str]) -> None:
        """What a generation on the host refers to, its checkpoint's chunks included."""
        for kept in self.kept:
            if kept.generation == generation:
                kept.names = names

    def has(self, ref: Ref) -> bool:
        """Is the object there, whole as far as its size tells?"""
        return self.present.get(ref.name) == ref.size

    # ----------------------------------------------------------------------------------------------------------------

    async def place(self, ref: Ref, fetch: Fetch) -> None:
        """The object is on the host when it returns. What `fetch` and the host raise."""
        if self.has(ref):
            return
        data = await fetch(ref)
        host = self._registry.get(self.number)
        self._hit("history.object.before_put")
        await self._registry.uplink.take(len(data), urgent=len(data) <= URGENT_SIZE)
        with self._request(host, sent=len(data)):
            await host.put(object_name(self._volume_id, ref.name), data)
        self._hit("history.object.after_put")
        self.present[ref.name] = ref.size

    async def get(self, ref: Ref) -> bytes:
        """The object's bytes, unverified. NotFound, Unavailable, Corrupt."""
        host = self._registry.get(self.number)
        with self._request(host, received=ref.size):
            return await host.get(object_name(self._volume_id, ref.name), min(ref.size, MAX_OBJECT))

    async def put(self, block: Superblock, refs: Sequence[Ref], fetch: Fetch) -> bool:
        """Bring the host to this superblock: its objects first (I4), then itself, conditionally (I5). False: somebody else wrote one.

        Then the host is to be examined again. True: it was re-read, and is the newest there. Unavailable, NoSpace, Corrupt.
        """
        host = self._registry.get(self.number)
        if self.failed:
            await self.look_again()
        for ref in refs:
            await self.place(ref, fetch)
        slot = self.top + 1
        if slot >= MAX_SLOT:
            raise Corrupt(f"host {host.url}: a superblock is called {self.top}, and none can stand above it: remove it, it is no volume's")
        name = superblock_name(self._volume_id, slot)
        self._hit("history.superblock.before_put")
        await self._registry.uplink.take(len(block.raw), urgent=True)
        with self._request(host, sent=len(block.raw), requests=2):
            if not self._registry.record(self.number).capabilities.conditional_put:
                if await top_slot(host, self._volume_id) >= slot:
                    return await self._same(host, slot, block) and self._has(slot, block, refs)
                self._sends(slot, block, refs)
                await host.put(name, block.raw)
            else:
                before = self._sends(slot, block, refs)
                try:
                    await host.put_if(name, block.raw, None)
                except Busy:
                    if before is None:
                        # What stands there is somebody else's, or was sent by an earlier process.
                        del self._sent[slot]
                    # Ours after all, if an earlier attempt got through and its answer did not.
                    if not await self._same(host, slot, block):
                        return False
            self._hit("history.superblock.after_put")
            # A stale writer can make one that others have passed and removed: only the newest counts.
            there = await numbers_on(host, self._volume_id)
            if max(there, default=0) != slot:
                return False
        has = self._has(slot, block, refs)
        # It was put back to what it had at some time: what else is known of it is not so any more. Or what was sent there once cannot be
        # read: perhaps now. The next round looks.
        self.examined = there == self._listed and not self._sent
        return has

    def _sends(self, slot: int, block: Superblock, refs: Sequence[Ref]) -> Kept | None:
        """From now on this one may stand there, or one that was sent to the same number before it, which is returned."""
        names, sequence = frozenset(ref.name for ref in refs), block.sequence
        if (earlier := self._sent.get(slot)) is not None:
            names |= earlier.names or frozenset()
            sequence = min(sequence, earlier.sequence)
        self._sent[slot] = Kept(slot, block.generation, sequence, block.digest, names, True, readable=False)
        return earlier

    def _has(self, slot: int, block: Superblock, refs: Sequence[Ref]) -> bool:
        names = frozenset(ref.name for ref in refs)
        # Another history's, which a majority has passed over, hold nothing back any more.
        earlier = [kept for kept in self.kept if kept.ours and kept.slot != slot]
        self._put[slot] = Kept(slot, block.generation, block.sequence, block.digest, names, True)
        self._sent.pop(slot, None)
        self.kept = [self._put[slot], *earlier]
        self.highest, self.top = block.generation, slot
        self._listed.add(slot)
        self.foreign = None
        self.trouble = ""
        return True

    async def _same(self, host: Host, slot: int, block: Superblock) -> bool:
        try:
            return await host.get(superblock_name(self._volume_id, slot), len(block.raw)) == block.raw
        except (NotFound, Corrupt):
            return False

    async def confirm(self) -> bool:
        """Re-read: is the newest superblock the one we put there? False too where the host does not answer."""
        if not self.examined or self.foreign is not None or not self.kept or not (self.kept[0].ours and self.kept[0].readable):
            return False
        newest = self.kept[0]
        try:
            host = self._registry.get(self.number)
            with self._request(host, requests=2) as traffic:
                if await top_slot(host, self._volume_id) != newest.slot:
                    self.examined = False
                    return False
                raw = await host.get(superblock_name(self._volume_id, newest.slot), MAX_SUPERBLOCK)
                traffic.received = len(raw)
        except FusefsError as error:
            self.trouble = str(error)
            return False
        same = blake3(raw).digest() == newest.digest
        self.examined = same
        self.trouble = "" if same else f"host {host.url}: superblock {newest.slot} is not as it was put there"
        return same

    async def tidy(self, busy: set[str]) -> None:
        """Delete our older generations but one, then the metadata objects of this history that no generation here needs.

        `busy`: names that are being put there, or soon named by a superblock. Errors leave it for the next time.
        """
        host = self._registry.get(self.number)
        ours = [kept for kept in self.kept if kept.ours]
        # Of those that can be read, too: what the host answers to the newest may be true.
        stay = [*ours[:GENERATIONS], *[kept for kept in ours if kept.readable][:GENERATIONS]]
        for kept in [kept for kept in ours if kept not in stay]:
            self._hit("history.superblock.before_delete")
            if await self._delete(host, superblock_name(self._volume_id, kept.slot)):
                self._listed.discard(kept.slot)
            self.kept.remove(kept)
            self._put.pop(kept.slot, None)
        needed = set(busy)
        for kept in [*self.kept, *self._sent.values()]:
            if kept.names is None:
                return
            needed |= kept.names
        lineage = self._lineage()
        for name in sorted(self.present.keys() - needed):
            writer = writer_of(name)
            # I5: another history's are not ours to delete, whoever holds the majority.
            if writer is None or not lineage.has_epoch(*writer):
                continue
            self._hit("history.object.before_delete")
            await self._delete(host, object_name(self._volume_id, name))
            self.present.pop(name, None)

    @contextmanager
    def _request(self, host: Host, *, sent: int = 0, received: int = 0, requests: int = 1) -> Iterator[_Traffic]:
        """A host that hangs is one that does not answer: Unavailable. What is asked is counted."""
        seconds = TIMEOUT + (sent + received) / SLOWEST
        traffic = _Traffic(sent, received)
        try:
            with trio.move_on_after(seconds) as scope:
                yield traffic
        finally:
            for number in range(requests):
                self._registry.requested(self.number, *((traffic.sent, traffic.received) if number == 0 else (0, 0)))
        if scope.cancelled_caught:
            raise Unavailable(f"host {host.url} did not answer within {seconds:.0f} s")

    async def _delete(self, host: Host, name: str) -> bool:
        """Is it gone? Credentials that may not delete are no trouble: the generation counts as gone, since nothing relies on it any more
        (I3)."""
        with self._request(host):
            try:
                await host.delete(name)
            except NotPermitted as error:
                log.info("%s", error)
                return False
        return True


@dataclass(slots=True)
class _Traffic:
    """Bytes of one request, for the count."""

    sent: int
    received: int
