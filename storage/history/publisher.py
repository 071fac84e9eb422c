"""Publishing the volume's history: what makes the volume survive this machine.

    cut (between two batches) -> local commit -> every sector it knows on its write quorum -> log objects on every host
        -> superblock, next generation, conditionally, on every host (I4)
        on a majority of the hosts that can do that, and re-read there as the newest: published (I5)
        another history on a majority: fenced. On a minority, while a majority is ours: passed over with a higher generation.

One round at a time; a host that was away is brought up to date when it is back, and one that lost metadata objects without a word within
an hour. Also here: the gate for deletions (I3).

What is cut, what superblocks may name of it, and checkpoints: `draft`.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from pathlib import Path

import trio

from storage.config import VolumeConfig, encode_config
from storage.epochs import Epochs
from storage.errors import BadArgument, Fenced, FusefsError, Unavailable
from storage.history.ancestry import Lineage, point_of
from storage.history.checkpoint import Checkpoint
from storage.history.draft import Draft, Ready, TakeTails
from storage.history.fleet import Fleet
from storage.history.host_side import HostSide
from storage.history.log import Log, TailWanted
from storage.history.objects import INDEX, Ref, Writer, decode_index, open_object
from storage.history.superblock import BODY_VERSION, Body, KnownEpoch, KnownHost, Superblock, encode_superblock
from storage.hosts.registry import HostRegistry
from storage.interfaces import Backlog, Batch
from storage.keyfile import KEY_FILE, KeyFile, load_keyfile
from storage.keys import Keys
from storage.metadata.keys import LOCAL, u64
from storage.metadata.store import Store
from storage.seams import Seams
from storage.wording import counted

log = logging.getLogger("fusefs.history")

#: Seconds between two looks at whether hosts still have the metadata objects that they acknowledged: one request to each.
COMPARE_SECONDS = 3600.0
#: Seconds between two looks at hosts that are behind, while there is nothing new to publish.
CATCH_UP_SECONDS = 15.0
#: Superblocks tried in one round, each with a higher generation, where others write at the same time.
ATTEMPTS = 4


class Publisher:
    """See the module. `run` in the volume's nursery; everything else may be called at any time by its tasks."""

    def __init__(
        self,
        *,
        directory: Path,
        config: VolumeConfig,
        keys: Keys,
        keyfile: KeyFile,
        store: Store,
        epochs: Epochs,
        registry: HostRegistry,
        seams: Seams,
        interval: float,
        take_tails: TakeTails,
        tail_wanted: TailWanted,
        nursery: trio.Nursery,
        staged: Backlog,
        passed_over: frozenset[bytes] = frozenset(),
    ) -> None:
        self._staged = staged
        self._directory, self._config, self._keys, self._keyfile = directory, config, keys, keyfile
        self._store, self._epochs, self._registry, self._seams = store, epochs, registry, seams
        self._interval = interval
        self._volume_id = config.volume_id_bytes
        self._lock = trio.Lock()
        log_of_changes = Log(keys.metadata_key(), self._volume_id, self._writer, seams, tail_wanted)
        self.fleet = Fleet(
            volume_id=self._volume_id,
            superblock_key=keys.superblock_key(),
            store=store,
            registry=registry,
            lineage=self.lineage,
            held=log_of_changes.held,
            seams=seams,
            passed_over=passed_over,
        )
        self.draft = Draft(
            store=store,
            log=log_of_changes,
            fleet=self.fleet,
            staged=staged,
            take_tails=take_tails,
            seams=seams,
            nursery=nursery,
            lock=self._lock,
            publish=self._round,
        )
        #: Objects of the round that is under way.
        self._busy: set[str] = set()
        #: Of the newest superblock of this history, and its digest; 0: there is none.
        self.generation = 0
        self._digest = b""
        #: When hosts were last asked, on the monotonic clock, whether another machine has gone on, while a cut was held.
        self._watched = 0.0
        #: When it was last looked at whether hosts have all that they should, on the monotonic clock.
        self._compared = seams.clock.monotonic()
        #: The one that hosts are to have.
        self._current: Superblock | None = None
        self._current_refs: list[Ref] = []
        #: The commit and the time of the superblock that a majority has.
        self.published_sequence = 0
        self.published_ns = 0
        #: Why this process may not write any more; told once, with `on_fenced`.
        self.fenced: str | None = None
        self.on_fenced: Callable[[str], None] = lambda _reason: None
        #: Called when a majority has a new superblock.
        self.on_published: Callable[[], None] = lambda: None
        #: Why the last attempt did not reach a majority; "" since one did.
        self.trouble = ""
        self._wanted = trio.Event()
        self._again = False
        store.changes.on_many = self._many
        staged.on_reached = self.want

    # ------------------------------------------------------------------------------------------------------------
    # Who we are

    def _writer(self) -> Writer:
        epoch = self._epochs.current
        return Writer(self._volume_id, epoch.number, epoch.salt)

    def _known_epochs(self) -> list[KnownEpoch]:
        return [KnownEpoch(epoch.number, epoch.salt, epoch.first_sequence) for epoch in self._epochs.all()]

    def lineage(self) -> Lineage:
        """This history, up to what is durable here."""
        return Lineage(self._known_epochs(), self._store.durable_sequence)

    # ------------------------------------------------------------------------------------------------------------
    # Hosts

    async def examine(self) -> None:
        """At open, before an epoch begins: which superblocks the hosts have. Fenced if there is a later history on them (use recover).

        BadArgument: a newer fusefs has gone on with the volume.
        """
        async with self._lock:
            await self.fleet.on_each(self.fleet.sides(), HostSide.examine)
            for side in self.fleet.sides():
                if side.too_new:
                    raise BadArgument(side.trouble)
            self._judge(opening=True)
            await self._go_on()

    def _judge(self, *, opening: bool = False) -> bool:
        """Is there another history? Fenced if it has a majority (at open: unless ours has one). True if ours may pass it over."""
        voters = self.fleet.voters()
        need = self.fleet.majority(len(voters))
        foreign = [side for side in self.fleet.sides() if side.examined and side.foreign is not None]
        if not foreign:
            return False
        against = sum(1 for side in foreign if side in voters)
        ours = sum(1 for side in voters if side.examined and side.foreign is None and side.kept)
        if against >= need or (opening and ours < need):
            self._fence(max(foreign, key=lambda side: (side.newest.block.epoch, side.newest.block.sequence) if side.newest else (0, 0)))
        return ours >= need

    def _fence(self, side: HostSide) -> None:
        found = side.foreign
        if found is None:
            raise RuntimeError("fenced by nobody")
        block, body = found.block, found.body
        self.fenced = (
            f"another machine has gone on with this volume: host {self.fleet.url(side)} has epoch {block.epoch} of "
            f"{body.machine}:{body.directory}, commit {block.sequence}, which is not in {self._directory} (epoch {self._last_epoch()}, "
            f"commit {self._store.durable_sequence}); to go on here: fusefs recover into a new directory; to read what only this one has: "
            f"fusefs mount --read-only {self._directory}"
        )
        self.on_fenced(self.fenced)
        raise Fenced(self.fenced)

    def _last_epoch(self) -> int:
        epochs = self._epochs.all()
        return epochs[-1].number if epochs else 0

    async def _go_on(self) -> None:
        """Take the newest superblock of this history for what the log goes on from, if nothing newer is here."""
        lineage = self.lineage()
        candidates = [side.newest for side in self.fleet.every() if side.newest is not None]
        ours = [found for found in candidates if lineage.contains(point_of(found.block))]
        self.generation = max(self.generation, self.fleet.highest_generation())
        if not ours or self._current is not None:
            return
        newest = max(ours, key=lambda found: (found.block.epoch, found.block.sequence, found.block.generation))
        published = self._store.published
        checkpoint = None
        if published is None or newest.block.sequence < published:
            # Only hosts that lag behind answer, or what led from there to now is not known: a new checkpoint is needed.
            log.info("the log on the hosts cannot be gone on with; a checkpoint is due")
        elif newest.body.checkpoint is not None:
            try:
                checkpoint = await self._load_checkpoint(newest.body.checkpoint)
            except FusefsError as error:
                log.warning("the checkpoint on the hosts cannot be used, a new one is written: %s", error)
        self._digest = newest.block.digest
        if checkpoint is not None:
            self.draft.go_on_from(checkpoint, newest.body.log, newest.block.sequence)
            names = frozenset(ref.name for ref in self.draft.refs())
            for side in self.fleet.every():
                if side.newest is not None and side.newest.block.digest == newest.block.digest:
                    side.knows(newest.block.generation, names)

    async def _load_checkpoint(self, ref: Ref) -> Checkpoint:
        data = await self.fleet.fetch(ref)
        body = await self._seams.threads.run(open_object, self._keys.metadata_key(), self._volume_id, ref, INDEX, data, "checkpoint")
        index = decode_index(body, "checkpoint")
        stored = sum(chunk.size for chunk in index.chunks) + ref.size
        return Checkpoint(index.sequence, index.chunks, index.records, index.size, stored, ref)

    # ------------------------------------------------------------------------------------------------------------
    # Rounds

    def want(self) -> None:
        """Publish soon, without waiting for the interval."""
        self._wanted.set()

    def _many(self) -> None:
        """So much has changed that a cut is due; while one is held there is none, and it waits for hosts, not for us."""
        if not self.draft.held:
            self.want()

    @property
    def dirty(self) -> bool:
        """Is there something hosts should know?"""
        return self._store.changes.reason or self._again or not self.draft.published_all

    async def run(self) -> None:
        """Until cancelled: a round every interval in which something changed; hosts that are behind are brought up to date."""
        while True:
            with trio.move_on_after(self._interval):
                await self._wanted.wait()
            self._wanted = trio.Event()
            try:
                await self.tick()
            except Fenced:
                return
            except FusefsError as error:
                self._say(f"the volume's metadata are not on a majority of its hosts yet: {error}")
                await trio.sleep(min(CATCH_UP_SECONDS, self._interval))

    def _say(self, trouble: str) -> None:
        if trouble != self.trouble:
            log.warning("%s", trouble)
        self.trouble = trouble

    async def tick(self) -> None:
        """What `run` does each time."""
        await self._refresh_keys()
        if self.dirty or self._any_behind():
            await self.publish(wait=False)
        await self._compare()

    async def _compare(self) -> None:
        """Now and then: what hosts have lost they get again; where none has it any more, a checkpoint makes up for it."""
        now = self._seams.clock.monotonic()
        if now - self._compared < COMPARE_SECONDS:
            return
        self._compared = now
        async with self._lock:
            current, refs = self._current, self._current_refs
            if current is None or self.fenced is not None:
                return
            await self.fleet.make_whole(current.generation, refs)
            self._look_for_lost(refs)
            if self.draft.gap:
                self._again = True
                self.want()

    def _any_behind(self) -> bool:
        """Is there a host that could be brought up to date now?"""
        current = self._current
        return current is not None and any(
            self.fleet.available(side) and (side.generation < current.generation or not side.examined) for side in self.fleet.sides()
        )

    async def _refresh_keys(self) -> None:
        """The passphrase may have been changed: superblocks carry the slots."""
        try:
            keyfile = await self._seams.threads.run(load_keyfile, self._directory / KEY_FILE, self._config.volume_id)
        except FusefsError as error:
            log.warning("the key slots on the hosts stay as they are: %s", error)
            return
        if keyfile != self._keyfile:
            self._keyfile, self._again = keyfile, True

    async def claim(self) -> None:
        """At open: put the new epoch on the hosts, with the history as they have it (none: nothing is done). Fenced, Unavailable."""
        async with self._lock:
            if self.draft.ready is not None:
                await self._round()

    async def publish(self, *, wait: bool = True) -> None:
        """Everything applied before the call is on a majority of the hosts when it returns. Fenced; Unavailable: fewer have it.

        `wait`: also for a checkpoint, where nothing can be published before there is one.
        """
        version = self._store.changes.version
        await self._refresh_keys()
        attempts = 0
        while attempts < ATTEMPTS:
            async with self._lock:
                if self.fenced is not None:
                    raise Fenced(self.fenced)
                if self.draft.published_all and self.draft.version >= version and not self._again:
                    await self._catch_up()
                    if not self._again:
                        return
                writing = await self._publish()
            if not wait:
                return
            if self.draft.held:
                # Each sector's upload has its time limit; where none gets anywhere this raises.
                await self._staged.reached_all()
            elif writing is None:
                if self.draft.version >= version:
                    return
                # What went out was a cut that had been held.
            else:
                attempts += 1
                await writing.wait()
                if self.draft.failure is not None:
                    raise type(self.draft.failure)(str(self.draft.failure))
        raise Unavailable("checkpoints do not keep up with what changes; see that hosts are reachable, and quick enough")

    async def confirm_majority(self) -> None:
        """A new superblock is on a majority when it returns, whether or not there was anything new. Fenced, Unavailable."""
        self._again = True
        async with self._lock:
            if self.fenced is not None:
                raise Fenced(self.fenced)
            await self._look()
            if self.draft.ready is not None and (self.draft.held or self.draft.ready.sequence == self.draft.sequence):
                # Without a new cut, which might be held, and not what is held already: hosts that are full, or too few, are a reason to
                # add one.
                await self._round()
                return
        await self.publish()

    async def _publish(self) -> trio.Event | None:
        """One round; or, where nothing can be published without a new checkpoint, the end of that one."""
        await self._look()
        if self.draft.held and self._staged.waiting():
            await self._while_held()
            return None
        if self.draft.base is not None and not self.draft.gap:
            # What was held goes out before anything newer is looked at.
            if not self.draft.held:
                await self.draft.cut()
                if self.draft.hold():
                    await self._while_held()
                    return None
            await self.draft.log.merge(self.fleet.fetch)
            self.draft.make_ready()
        if self.draft.base is not None and not self.draft.gap:
            try:
                await self._round()
            except Unavailable:
                # The round may have found that hosts no longer have what it names: then only a checkpoint helps.
                if not self.draft.gap:
                    raise
        if self.draft.base is not None and not self.draft.gap:
            if self.draft.checkpoint_due:
                self.draft.begin_checkpoint()
            return None
        if self.draft.writing is None:
            self.draft.begin_checkpoint()
        else:
            await self.draft.cut()
            await self.draft.spread_log()
        return self.draft.writing

    async def _while_held(self) -> None:
        """A cut is held: what was ready before it is what hosts are to have, and whether they still say that it is ours is asked (I5)."""
        ready = self.draft.ready
        if ready is not None and (self._again or ready.sequence > self.published_sequence):
            await self._round()
            return
        now = self._seams.clock.monotonic()
        if now - self._watched < min(CATCH_UP_SECONDS, self._interval):
            return
        self._watched = now
        await self.fleet.on_each(self.fleet.sides(), HostSide.examine)
        self._judge()
        await self._catch_up()

    async def _catch_up(self) -> None:
        """Hosts that were away get the superblock the others have; nobody else is sent anything. Fenced."""
        current, refs = self._current, self._current_refs
        if current is None or not self._any_behind():
            return

        async def bring(side: HostSide) -> None:
            if not side.examined:
                await side.examine()
            if side.generation >= current.generation or side.foreign is not None:
                return
            if not await side.put(current, refs, self.fleet.fetch):
                # Somebody else wrote there: the next round judges that.
                await side.examine()
                self._again = True

        behind = [side for side in self.fleet.sides() if side.generation < current.generation or not side.examined]
        await self.fleet.on_each(behind, bring)
        # A host that answers with something else is behind again and again: it must not get more and more of them.
        await self._tidy()
        if self._judge():
            # Another history stands somewhere, and a majority is ours: the next round passes it over.
            self._again = True

    async def _look(self) -> None:
        """Hosts that came back say what they have; the first time any does, the log goes on from there. Unavailable, Fenced."""
        sides = self.fleet.sides()
        await self.fleet.on_each([side for side in sides if not side.examined], HostSide.examine)
        if not any(side.examined for side in sides):
            raise Unavailable(f"no host can be reached ({self.fleet.troubles() or 'there is none'})")
        self._judge()
        if self.draft.base is None and self.draft.writing is None and self._current is None:
            await self._go_on()

    def _encode(self, ready: Ready) -> Superblock:
        lost = self.fleet.lost()
        body = Body(
            version=BODY_VERSION,
            predecessor=self._digest,
            config=encode_config(self._config),
            checkpoint=ready.base.index,
            log=list(ready.entries),
            hosts=[KnownHost(r.number, r.host_id, r.url, r.number in lost) for r in self._registry.records()],
            epochs=self.lineage().latest(),
            machine=socket.gethostname()[:200],
            directory=str(self._directory).encode("utf-8", "backslashreplace").decode("utf-8")[:4000],
        )
        return encode_superblock(
            self._keys.superblock_key(),
            volume_id=self._volume_id,
            generation=max(self.generation, self.fleet.highest_generation()) + 1,
            sequence=ready.sequence,
            written_ns=self._seams.clock.time_ns(),
            keys=self._keyfile,
            body=body,
            random=self._seams.random,
        )

    async def _round(self) -> None:
        """A new superblock, with all it names, on every host that can be reached. Returns on a majority. Fenced, Unavailable."""
        ready = self.draft.ready
        if ready is None:
            raise RuntimeError("nothing is ready to be published")
        over = False
        for _ in range(ATTEMPTS):
            block, refs = self._encode(ready), ready.refs()
            self.generation = block.generation
            done: set[int] = set()
            self._busy = {ref.name for ref in refs}
            again = await self._bring(block, refs, done, over)
            self._current, self._current_refs, self._digest = block, refs, block.digest
            for ref in refs:
                if ref.name in self.draft.log.held.unplaced and any(side.has(ref) for side in self.fleet.every()):
                    self.draft.log.held.placed(ref.name)
            self._look_for_lost(refs)
            voters = self.fleet.voters()
            have = sum(1 for side in voters if side.number in done)
            if have >= self.fleet.majority(len(voters)):
                foreign = [side for side in self.fleet.sides() if side.foreign is not None and self.fleet.available(side)]
                if foreign and not over:
                    # A majority is ours at this very moment, so what the others have never had one, and never will.
                    for side in foreign:
                        log.warning("host %s: another history is passed over", self.fleet.url(side))
                    over = True
                    continue
                self._published(block)
                await self._tidy()
                self.on_published()
                return
            self._judge()
            if not again:
                break
        reasons = self.fleet.troubles()
        raise Unavailable(
            f"the newest superblock is on {have} of {counted(len(voters), 'host')}, and has to be on {self.fleet.majority(len(voters))} "
            f"({reasons})"
        )

    def _look_for_lost(self, refs: list[Ref]) -> None:
        """What every host that answers has lost, they get anew: with a checkpoint."""
        gone = self.fleet.vanished.intersection(ref.name for ref in refs)
        self.fleet.vanished.clear()
        if gone and not self.draft.gap:
            log.warning("hosts have lost %s, and none has that any more; a checkpoint is due", counted(len(gone), "metadata object"))
            self.draft.lose()

    async def _bring(self, block: Superblock, refs: list[Ref], done: set[int], over: bool) -> bool:
        """To every host; those that have it are added to `done`. True if somebody wrote to one meanwhile, but no other history."""
        again = False

        async def bring(side: HostSide) -> None:
            nonlocal again
            if not side.examined:
                await side.examine()
            if side.foreign is not None and not over:
                return
            if await side.put(block, refs, self.fleet.fetch):
                done.add(side.number)
                return
            await side.examine()
            again = again or side.foreign is None

        await self.fleet.on_each(self.fleet.sides(), bring)
        return again

    def _published(self, block: Superblock) -> None:
        self.draft.published_all, self._again = not self.draft.held, False
        self.published_sequence, self.published_ns = block.sequence, block.written_ns
        self.trouble = ""
        if self._store.failure is None:
            self._store.mark_published(block.sequence)

    async def _tidy(self) -> None:
        if self.fleet.keep_all:
            return
        busy = self._busy | ({ref.name for ref in self.draft.next.refs()} if self.draft.next is not None else set())

        async def tidy(side: HostSide) -> None:
            if side.generation == self.generation:
                await side.tidy(busy | self.draft.spreading)

        await self.fleet.on_each(self.fleet.sides(), tidy)

    # ------------------------------------------------------------------------------------------------------------
    # The gate for deletions (I3): see HistoryGate

    def released_sequence(self) -> int:
        """See HistoryGate."""
        return self.fleet.released_sequence()

    async def confirm(self, host_number: int) -> bool:
        """See HistoryGate."""
        return await self.fleet.confirm(host_number)

    def want_release(self, sequence: int) -> None:
        """Something freed by this commit waits for an older generation to go: publish once more, if that can help."""
        if self.draft.held:
            return
        sides = self.fleet.sides()
        if not all(side.examined and side.foreign is None and self.fleet.available(side) for side in sides):
            return
        if sequence > self._store.applied_sequence and self._store.failure is None:
            # Freed in the latest commit, and counted to the next, since a cut may have fallen between: let there be a next one.
            batch = Batch()
            batch.put(LOCAL + b"tick", u64(sequence))
            self._store.apply(batch)
        self._again = True
