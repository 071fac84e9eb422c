"""A volume: every layer wired together, from the lock on its directory to its files."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import trio

from storage.config import VolumeConfig, load_config
from storage.contractor import Contractor
from storage.epochs import Epochs
from storage.errors import BadArgument, FusefsError, NotPermitted, Unavailable
from storage.files import Files
from storage.history.publisher import Publisher
from storage.host_io import HostIO
from storage.hosts.days import date_of
from storage.hosts.hostdb import HostDB, HostStatistics
from storage.hosts.locking import SHORT_LOCK, locking
from storage.hosts.registry import HostRegistry, Opener
from storage.interfaces import Batch, Contract, FlushProgress, FlushReport, MetadataStore, Refusal, TailPiece
from storage.keyfile import KEY_FILE, load_keyfile, open_slots
from storage.keys import SALT_SIZE, Keys
from storage.lock import VolumeLock
from storage.metadata.counters import Counter
from storage.metadata.keys import SECTOR, prefix_end, read_u64, u32
from storage.metadata.store import Store, open_store
from storage.namespace import Namespace
from storage.renewal import Renewal
from storage.replication import parse_replication
from storage.seams import Seams
from storage.sectors.cache import BlockCache
from storage.sectors.damage import Damages
from storage.sectors.deleter import Deleter
from storage.sectors.doubts import Doubts
from storage.sectors.hedging import Hedging
from storage.sectors.lock_keeper import LockKeeper
from storage.sectors.manager import SectorManager
from storage.sectors.placement import Placement
from storage.sectors.plan import can_be_read
from storage.sectors.reader import SectorReader
from storage.sectors.reconcile import Reconciler
from storage.sectors.records import decode_sector
from storage.sectors.regenerate import Regenerator
from storage.sectors.scrub import INTERVAL as SCRUB_INTERVAL
from storage.sectors.scrub import Scrubber
from storage.sectors.staging import Staging
from storage.sectors.strays import Strays
from storage.sectors.sweep import RECOVERED_KEY, Sweeper
from storage.standing import AWAY_GRACE, Standing
from storage.status import (
    ContractStatus,
    DayStatus,
    HostStatus,
    RefusalStatus,
    RenewalStatus,
    RepairStatus,
    RewriteStatus,
    ScrubReport,
    StagingStatus,
    VolumeStatus,
)
from storage.values.records import decode_value, tail_needed
from storage.values.values import Values

log = logging.getLogger("fusefs.volume")

DAY = 86400.0
#: Sector ids are reserved so many at a time: at 4 MiB each, one durable reservation per 16 GiB.
SECTOR_RANGE = 4096
#: Value, inode and cookie ids per reservation.
ID_RANGE = 1 << 16
#: Seconds for the last commit when a volume is closed because its task is cancelled.
CLOSE_LIMIT = 120.0
#: Seconds of these for putting the last metadata on the hosts; what they do not get then, they get at the next mount.
PUBLISH_LIMIT = 60.0
#: Seconds for locking what the last publication has put on hosts that can lock; the next mount goes on with it.
LOCK_LIMIT = 60.0
#: Seconds that opening waits for contracts that are due to be renewed: after a long absence nothing can be written before.
RENEW_LIMIT = 10.0
#: From so many recent failures on (they decay, half of them in a minute) `status` calls a host failing.
FAILING = 2.0
#: From such a score of reads that hung (it halves in a minute) `status` calls a host slow.
HUNG = 0.5
#: Seconds between two times that what was learned of hosts is saved.
SAVE_INTERVAL = 3600.0
#: See `VolumeOptions.staging`.
STAGING = 10 * 1024 * 1024 * 1024
#: Seconds for which `status` shows what was wrong with a host that answers well now.
RECENT = 3600.0
#: Refusals kept for `status`.
REFUSALS = 100


@dataclass(frozen=True, slots=True)
class VolumeOptions:
    """How an open volume behaves. Bytes and seconds."""

    cache: int = 128 * 1024 * 1024
    #: At most about a third of `journal_limit`: while hosts refuse, the journal must be able to take all tails once more.
    tail_budget: int = 64 * 1024 * 1024
    flush_interval: float = 30.0
    #: Every so often what was appended is made durable without anybody asking; None: the caller does it.
    commit_interval: float | None = 5.0
    #: Bytes per second that all sending to hosts together may take; None: no limit.
    upload_rate: float | None = None
    #: Bytes of sealed sectors on the local disk at most, on their way to hosts that are far or away, and as read cache; 0: none.
    staging: int = STAGING
    #: Bytes per second that making shards again, and moving files to another replication, may send each; None: no limit.
    repair_rate: float | None = None
    #: Seconds a host may be away before its shards are made again on others.
    away_grace: float = AWAY_GRACE
    #: Seconds within which every copy of every sector is looked at in the background; None: none is, unless somebody asks.
    scrub_interval: float | None = SCRUB_INTERVAL
    journal_segment: int = 8 * 1024 * 1024
    journal_limit: int = 256 * 1024 * 1024
    #: What this process does with the volume, for the message others get.
    purpose: str = "fusefs"


class Volume:
    """An open volume. Made by `open_volume`; gone when that ends."""

    def __init__(self, path: Path, config: VolumeConfig, options: VolumeOptions, seams: Seams) -> None:
        self.path = path
        self.config = config
        self.volume_id = config.volume_id
        self.options = options
        self.seams = seams
        self.warnings: list[str] = []
        #: Further ones, each with whether it still holds.
        self.passing: list[tuple[str, Callable[[], bool]]] = []
        self.refusals: deque[Refusal] = deque(maxlen=REFUSALS)
        self.refusals_total = 0
        # Set by `_wire`, before anybody sees the volume.
        self.store: Store
        self.epochs: Epochs
        self.hosts: HostRegistry
        self.hostdb: HostDB
        self.contractor: Contractor
        self.host_io: HostIO
        self.standing: Standing
        self.hedging: Hedging
        self.placement: Placement
        self.deleter: Deleter
        self.doubts: Doubts
        self.renewal: Renewal
        self.reconciler: Reconciler
        self.damages: Damages
        self.scrubber: Scrubber
        self.staging: Staging
        self.strays: Strays
        self.sectors: SectorManager
        self.values: Values
        self.namespace: Namespace
        self.files: Files
        #: None where the volume is open for reading only, as the next.
        self.sweeper: Sweeper | None = None
        self.publisher: Publisher | None = None
        self.lock_keeper: LockKeeper | None = None

    def standing_warnings(self) -> list[str]:
        """What was found wrong when the volume was opened, and still is."""
        return [*self.warnings, *(text for text, holds in self.passing if holds())]

    def record_refusal(self, refusal: Refusal) -> None:
        """For the log of refusals that `status` shows."""
        self.refusals.append(refusal)
        self.refusals_total += 1

    async def commit(self) -> None:
        """Everything appended and changed before the call survives kill -9 and power cuts when it returns."""
        await self.values.commit_all()

    async def publish(self) -> None:
        """What is durable here is so on a majority of the hosts when it returns, tails included. Fenced, Unavailable."""
        if self.publisher is not None:
            await self.publisher.publish()

    async def flush(self, progress: FlushProgress | None = None) -> FlushReport:
        """As `commit`, and on the hosts at full replication (or at write quorum: then the report says so). NoSpace, Unavailable: what
        hosts said."""
        report = await self.values.flush(progress)
        if self.publisher is not None:
            try:
                await self.publisher.publish()
            except Unavailable as error:
                report = replace(report, reasons=(*report.reasons, f"metadata: {error}"))
        # A host that is away now may have copies of anything: whoever flushes to be safe wants to know.
        reasons = [self.hosts.reason(number) for number in self.hosts.numbers() if not self.hosts.available(number)]
        away = [reason for reason in reasons if not any(reason in said for said in report.reasons)]
        kept = self.sectors.drain.status()
        return replace(report, reasons=(*report.reasons, *away), kept_sectors=kept.sectors, kept_bytes=kept.bytes)

    async def add_host(self, url: str, contract_days: float | None = None) -> int:
        """A new host with a first contract. Returns its number. Unavailable without a majority of the hosts there are."""
        if self.publisher is not None and self.publisher.generation:
            # I5: what a majority is must not be for a minority to change.
            await self.publisher.confirm_majority()
        number = await self.hosts.add(url)
        await self.contractor.conclude_contract(str(number), (contract_days or self.config.contract_days) * DAY)
        batch = Batch()
        self.reconciler.fill(batch)
        self.store.apply(batch)
        await self.store.commit()
        return number

    async def leave_host(self, host: str, *, leave: bool) -> None:
        """What is on the host goes to others, and nothing new goes there; or not after all. Durable when it returns. NotFound, BadArgument.

        It keeps its part of the history, and its vote (I5), until it is marked lost.
        """
        if self.publisher is None:
            raise NotPermitted(f"{self.path} is open for reading only")
        number = self.hosts.resolve(host)
        batch = Batch()
        self.standing.mark_leaving(batch, number, leave)
        self.store.apply(batch)
        await self.store.commit()
        self.reconciler.wake()

    async def repair(self) -> RepairStatus:
        """Every sector that can be is at its replication on hosts that keep it when it returns, and nowhere else; what is left, and why."""
        if self.publisher is None:
            raise NotPermitted(f"{self.path} is open for reading only")
        await self.sectors.wait_uploads()
        await self.reconciler.make_good()
        await self.damages.mend_listed(now=True)
        await self.store.commit()
        return self._repair_status()

    async def renew_contracts(self) -> list[RenewalStatus]:
        """Every contract that is due is renewed now, where its host does that; what became of each host's. Durable when it returns."""
        if self.publisher is None:
            raise NotPermitted(f"{self.path} is open for reading only")
        return await self.renewal.renew_due()

    async def scrub(self, *, full: bool = False, sample: float = 1.0) -> ScrubReport:
        """Every copy of every sector (of a share `sample` of them) is looked at, at a random block or, with `full`, at the whole, and what
        is missing or damaged is put right as far as that can be done now. What was repaired is durable. Busy: another one is under way."""
        if self.publisher is None:
            raise NotPermitted(f"{self.path} is open for reading only")
        report = await self.scrubber.scrub(full=full, sample=sample)
        await self.store.commit()
        return report

    def scrub_progress(self) -> tuple[int, int]:
        """Of the `scrub` that is under way: sectors looked at, and in all."""
        return self.scrubber.progress()

    def repair_progress(self) -> tuple[int, int]:
        """Bytes that making shards again has sent since the volume was opened, and the same with what is still to be sent."""
        now = self.reconciler.status
        return now.bytes, now.bytes + now.pending_bytes

    def _staging_status(self) -> StagingStatus:
        now, staging = self.sectors.drain.status(), self.staging
        left = now.bytes / now.rate if now.rate else None
        trouble = now.trouble or staging.trouble or next(iter(staging.losses.values()), "")
        return StagingStatus(now.sectors, now.bytes, now.rate, left, staging.size, staging.limit, trouble)

    def _repair_status(self) -> RepairStatus:
        now, damage = self.reconciler.status, self.damages.status
        return RepairStatus(
            now.pending + self.damages.listed,
            now.pending_bytes,
            now.mended + damage.mended,
            now.bytes + damage.bytes,
            now.stage,
            now.trouble or damage.trouble,
        )

    async def mark_host(self, host: str, *, lost: bool) -> None:
        """Say that a host (its number, id or URL) is lost for good, or back after all; durable when it returns. NotFound, BadArgument.

        Back: also one that was being left. A lost host holds back no deletion and does not count for a majority (I3, I5); what
        it has, if it ever answers again, is left alone.
        """
        if self.publisher is None:
            raise NotPermitted(f"{self.path} is open for reading only")
        number = self.hosts.resolve(host)
        others = [other for other in self.hosts.numbers() if other != number and other not in self.publisher.fleet.lost()]
        if lost and not others:
            raise BadArgument(f"host {self.hosts.url(number)} is the last one that is not lost; add another first")
        self.publisher.fleet.mark_lost(number, lost)
        if not lost:
            batch = Batch()
            self.standing.mark_leaving(batch, number, leaving=False)
            self.store.apply(batch)
        await self.store.commit()
        self.publisher.want()
        self.reconciler.wake()

    def _lock_warnings(self) -> list[str]:
        keeper = self.lock_keeper
        troubles = keeper.troubles if keeper is not None else {}
        return [
            *(f"host {self.hosts.url(number)}: locks are not extended: {trouble}" for number, trouble in sorted(troubles.items())),
            *(
                f"host {self.hosts.url(number)}: these credentials may not delete; what is not needed any more stays there"
                for number in self.host_io.undeletable()
            ),
            *(
                f"host {record.url} had Object Lock when it was added, and does not say so now: nothing more is locked there; see whether "
                "its credentials may read the bucket's configuration"
                for record in self.hosts.records()
                if record.capabilities.object_lock and self.hosts.available(record.number) and not self._locks(record.number)
            ),
        ]

    def _locks(self, number: int) -> bool:
        return locking(self.hosts.get(number)) is not None

    async def set_replication(self, ino: int, spec: str, *, now: bool = False) -> None:
        """What is created below the directory later is stored as `spec`; "" inherits. `now`: also what is below it, or a file's content.

        Durable when it returns; what is stored already is moved in the background (`rewrite` waits for it). BadArgument, and nothing was
        changed: no such replication, too few hosts for it.
        """
        if self.publisher is None:
            raise NotPermitted(f"{self.path} is open for reading only")
        if now:
            await self.namespace.give_replication(ino, spec)
        else:
            # A walk that is on its way would take it off again.
            await self.namespace.hand_down()
            self.namespace.set_replication(ino, spec)
        await self.store.commit()

    async def rewrite(self) -> RewriteStatus:
        """What was given another replication is in sectors of it when it returns; what could not be moved, and why. Fenced, NoSpace,
        Unavailable: it is tried again in the background."""
        if self.publisher is None:
            raise NotPermitted(f"{self.path} is open for reading only")
        await self.namespace.hand_down()
        await self.values.rewriter.make_over()
        await self.store.commit()
        return self.rewrite_status()

    def rewrite_status(self) -> RewriteStatus:
        """What there is to move to another replication, and what was moved since the volume was opened."""
        return msgspec.structs.replace(self.values.rewriter.status(), directories=self.namespace.handing_down())

    async def status(self) -> VolumeStatus:
        """A snapshot, without asking any host anything that could hang."""
        now = self.seams.clock.time_ns()
        size = self.namespace.counts()[1]
        failure = self.store.failure
        publisher = self.publisher
        lost = publisher.fleet.lost() if publisher is not None else {}
        histories = publisher.fleet.trouble_of() if publisher is not None else {}
        left = "leaving" if self.reconciler.unsettled() else "left"
        leaving = dict.fromkeys(self.standing.leaving(), left)
        ending, ended = self.standing.ending(), self.standing.ended()
        hosts: list[HostStatus] = []
        for record in self.hosts.records():
            space, stats = self.placement.space(record.number), self.hostdb.stats(record.number)
            spoiled = self.damages.failing(record.number)
            error, error_ns = self.hosts.reason(record.number) or spoiled or histories.get(record.number, ""), 0
            if not error and now - stats.last_error_ns < RECENT * 1e9:
                error, error_ns = stats.last_error, stats.last_error_ns
            hosts.append(
                HostStatus(
                    number=record.number,
                    host_id=record.host_id,
                    url=record.url,
                    state="lost"
                    if record.number in lost
                    else leaving.get(record.number)
                    or _state(
                        self.hosts.state(record.number),
                        stats,
                        spoiled=bool(spoiled),
                        ending=record.number in ending,
                        ended=record.number in ended,
                    ),
                    error=error,
                    free=space.free if space else None,
                    total=space.total if space else None,
                    latency_ms=_milliseconds(stats.latency),
                    failures=round(stats.failures, 3),
                    reads=stats.reads,
                    writes=stats.writes,
                    median_ms=_milliseconds(stats.median),
                    p95_ms=_milliseconds(stats.p95),
                    read_rate=stats.read_throughput,
                    write_rate=stats.write_throughput,
                    bytes_read=stats.bytes_read,
                    bytes_written=stats.bytes_written,
                    failed=stats.failed,
                    hedged=stats.hedged,
                    overtaken=stats.overtaken,
                    days=[DayStatus(date_of(day), day.requests, day.sent, day.received) for day in stats.days],
                    error_ns=error_ns,
                    abilities=str(record.capabilities),
                )
            )
        urls = {record.number: record.url for record in self.hosts.records()}
        trouble, local = self.values.shipper.trouble, self.values.local_trouble
        shown = (local, self.values.full, trouble, self.store.trouble)
        fenced = self.publisher is not None and failure is not None and self.publisher.fenced == failure
        return VolumeStatus(
            volume_id=self.volume_id,
            path=str(self.path),
            format_version=self.config.format_version,
            replication=self.config.replication,
            sector_size=self.config.sector_size,
            files=self.namespace.regular_files(),
            bytes=size,
            sectors=self.sectors.count,
            pending_bytes=self.values.pending_bytes,
            # What is in staging is told by itself.
            degraded_sectors=max(0, self.sectors.degraded() - len(self.staging.below)),
            sectors_to_delete=self.deleter.pending(),
            cache_bytes=self.sectors.cache.size,
            cache_limit=self.sectors.cache.limit,
            cache_hits=self.sectors.cache.statistics.hits,
            cache_misses=self.sectors.cache.statistics.misses,
            journal_fill=round(self.store.journal_fill, 4),
            epoch=self.epochs.current.number,
            read_only=failure is not None,
            read_only_reason=failure or "",
            # Fenced, it has committed what it had.
            local_error=str(local or ("" if fenced else failure) or ""),
            warnings=[
                *self.standing_warnings(),
                *self.renewal.warnings(),
                *([publisher.trouble] if publisher is not None and publisher.trouble else []),
                *dict.fromkeys(str(error) for error in shown if error is not None),
                *self._lock_warnings(),
                *self.sectors.notes,
            ],
            refusals=[RefusalStatus(r.when_ns, r.program, r.path, r.offset, r.reason) for r in self.refusals],
            refusals_total=self.refusals_total,
            commit=self.store.durable_sequence,
            published_commit=publisher.published_sequence if publisher is not None else 0,
            published_ns=publisher.published_ns if publisher is not None else 0,
            unpublished=publisher.dirty if publisher is not None else False,
            hosts=hosts,
            contracts=self._contract_statuses(urls, now),
            fenced=fenced,
            staging=self._staging_status(),
            repair=self._repair_status(),
            rewrite=self.rewrite_status(),
            missing_places=self.doubts.missing(),
            scrub=self.scrubber.status(),
        )

    def _contract_statuses(self, urls: Mapping[int, str], now: int) -> list[ContractStatus]:
        found = self.contractor.all_contracts()
        renewed_by = {self.contractor.renewed_from(c.contract_id): c.contract_id for c in found}
        troubles, in_force = self.renewal.troubles(), self.contractor.in_force()
        statuses: list[ContractStatus] = []
        for c in found:
            last = in_force.get(c.host_number) == c
            trouble = troubles.get(c.host_number)
            trouble = trouble if trouble is not None and trouble.contract == c.contract_id else None
            statuses.append(
                ContractStatus(
                    contract_id=c.contract_id,
                    host_number=c.host_number,
                    url=urls.get(c.host_number, "?"),
                    start_ns=c.start_ns,
                    end_ns=c.end_ns,
                    active=c.active(now),
                    lineage=c.lineage,
                    renews=self.contractor.renewed_from(c.contract_id) or "",
                    renewed_by=renewed_by.get(c.contract_id, ""),
                    state=_contract_state(c, now, last=last),
                    trouble=trouble.reason if trouble is not None else "",
                    trouble_since_ns=trouble.since_ns if trouble is not None else 0,
                )
            )
        return statuses


def absolute(path: Path | str) -> Path:
    """As seen from the working directory of now."""
    return Path(path).absolute()


@asynccontextmanager
async def open_volume(
    path: Path | str,
    *,
    passphrase: str,
    seams: Seams | None = None,
    wait_lock: float = 0.0,
    options: VolumeOptions | None = None,
    opener: Opener | None = None,
) -> AsyncIterator[Volume]:
    """Open a volume for reading and writing; a new epoch begins. What was appended is committed when the block ends.

    BadArgument (not a volume, newer format), WrongPassphrase, Corrupt (damaged key file or metadata), Busy (in use for longer than
    `wait_lock` seconds). Hosts that are away are no reason to fail: `warnings` says what cannot be read without them.
    """
    path = absolute(path)
    seams = seams or Seams()
    options = options or VolumeOptions()
    config = await seams.threads.run(load_config, path)
    keyfile = await seams.threads.run(load_keyfile, path / KEY_FILE, config.volume_id)
    master = await seams.threads.run(open_slots, keyfile, passphrase)
    lock = VolumeLock(path)
    await lock.acquire(seams, wait_lock, options.purpose)
    try:
        async with with_layers(path, config, Keys(master), options, seams, opener, create=False) as volume:
            yield volume
    finally:
        lock.release()


@asynccontextmanager
async def with_layers(
    path: Path,
    config: VolumeConfig,
    keys: Keys,
    options: VolumeOptions,
    seams: Seams,
    opener: Opener | None,
    *,
    create: bool,
    tails: Mapping[int, Sequence[tuple[int, bytes]]] | None = None,
    passed_over: frozenset[bytes] = frozenset(),
) -> AsyncIterator[Volume]:
    """The volume with its tasks running. Whatever the block raises comes out as itself, not in a group.

    `tails`, after a recovery: value id -> (offset, bytes) of what the log on the hosts had in no sector. Then nothing is deleted on hosts,
    and sectors only absent hosts have are no reason to fail. `passed_over`: hashes of superblocks that count for nothing any more (I5).
    """
    try:
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(
                open_store(
                    path,
                    seams,
                    journal_key=keys.journal_key,
                    tail_needed=tail_needed,
                    segment_size=options.journal_segment,
                    limit_bytes=options.journal_limit,
                )
            )
            volume = Volume(path, config, options, seams)
            async with trio.open_nursery() as nursery:
                await _wire(volume, store, keys, nursery, opener, create=create, tails=tails, passed_over=passed_over)
                try:
                    yield volume
                finally:
                    # Bounded: journal and disk answer or fail; hosts are not waited for.
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_LIMIT) as limit:
                        await _close(volume)
                    if limit.cancelled_caught:
                        log.error("%s: the last commit took longer than %d s; what nobody had committed may be lost", path, CLOSE_LIMIT)
                    nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise only(group) from group


async def _publish_last(publisher: Publisher) -> None:
    try:
        await publisher.publish()
    except FusefsError as error:
        log.warning("the hosts do not have the newest metadata, they get them at the next mount: %s", error)


async def _lock_last(keeper: LockKeeper) -> None:
    try:
        await keeper.round()
    except FusefsError as error:
        log.warning("what was published last is locked for %d days only: %s", SHORT_LOCK // DAY, error)


async def _take_tails(volume: Volume, tails: Mapping[int, Sequence[tuple[int, bytes]]]) -> None:
    """Tails that came from the log on the hosts: into this journal, and into memory."""
    volume.store.apply(Batch(), [TailPiece(value_id, at, (data,)) for value_id, pieces in tails.items() for at, data in pieces])
    volume.values.recover(tails)
    await volume.store.commit()


async def _fence(volume: Volume, reason: str) -> None:
    """Another machine has the volume: what is here becomes durable here, then nothing is taken any more (I5)."""
    try:
        with trio.move_on_after(CLOSE_LIMIT):
            await volume.commit()
    except FusefsError as error:
        log.error("what was written last is not durable: %s", error)
    volume.store.fence(reason)


async def _close(volume: Volume) -> None:
    batch = Batch()
    volume.hostdb.save(batch)
    volume.scrubber.save(batch)
    try:
        if volume.store.failure is None:
            volume.store.apply(batch)
            await volume.commit()
            publisher = volume.publisher
            if publisher is not None and publisher.dirty and volume.hosts.numbers():
                with trio.move_on_after(PUBLISH_LIMIT):
                    await _publish_last(publisher)
            if volume.lock_keeper is not None and volume.lock_keeper.behind():
                with trio.move_on_after(LOCK_LIMIT):
                    await _lock_last(volume.lock_keeper)
            await volume.commit()
            # No shard is put anywhere from here on.
            if volume.sweeper is not None and volume.sweeper.settle():
                await volume.commit()
    finally:
        await volume.hosts.aclose()


def only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception inside, or the group if there are several."""
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:
        inner = inner.exceptions[0]
    return inner


async def _wire(
    volume: Volume,
    store: Store,
    keys: Keys,
    nursery: trio.Nursery,
    opener: Opener | None,
    *,
    create: bool,
    tails: Mapping[int, Sequence[tuple[int, bytes]]] | None = None,
    passed_over: frozenset[bytes] = frozenset(),
) -> None:
    """Make every layer, bottom to top; begin the epoch; start the loops."""
    seams, options = volume.seams, volume.options
    volume.store = store
    volume.epochs = Epochs.load(store)
    sector_ids = Counter(store, b"sector", SECTOR_RANGE)
    make_layers(volume, store, keys, nursery, opener, sector_ids)
    publisher = volume.publisher = Publisher(
        directory=volume.path,
        config=volume.config,
        keys=keys,
        keyfile=await seams.threads.run(load_keyfile, volume.path / KEY_FILE, volume.volume_id),
        store=store,
        epochs=volume.epochs,
        registry=volume.hosts,
        seams=seams,
        interval=options.flush_interval,
        take_tails=volume.values.take_unlogged,
        tail_wanted=lambda record, value_id, end: decode_value(record, value_id).sealed < end,
        nursery=nursery,
        staged=volume.staging,
        passed_over=passed_over,
    )
    publisher.fleet.keep_all = tails is not None
    volume.deleter.gate, publisher.on_published = publisher, volume.deleter.wake
    volume.warnings += await volume.staging.open()
    await volume.hosts.open_all()
    if not create:
        # I5: before an epoch begins here.
        await publisher.examine()
    # I1: the epoch's record, its salt and the first range of ids are durable together, before anything is sealed under it.
    batch = Batch()
    epoch = volume.epochs.begin(
        batch,
        seams.random.token_bytes(SALT_SIZE),
        sector_ids.first,
        seams.clock.time_ns(),
        first_sequence=store.applied_sequence + 1,
        above=publisher.fleet.latest_epoch_seen(),
    )
    sector_ids.reserve(batch)
    store.begin_epoch(epoch.number, epoch.salt)
    if create:
        Namespace.format(batch, seams.clock.time_ns(), os.getuid(), os.getgid())
    if tails is not None:
        batch.put(RECOVERED_KEY, u32(epoch.number))
    store.apply(batch)
    await store.commit()
    store.on_pressure = volume.values.shipper.journal_pressure
    publisher.on_fenced = lambda reason: nursery.start_soon(_fence, volume, reason)
    # Now, so that df and status know from the first moment.
    await volume.placement.poll_space()
    if not create and tails is None:
        await check_servable(volume)
    # Nothing before this may load an inode: a file's map is compared with its value's size, tail included.
    volume.sectors.drop_fresh()
    volume.sectors.partials.load()
    recovered = volume.values.recover(store.recovered_tails())
    if recovered:
        log.info("%d bytes that were on no host yet came back from the journal", recovered)
    if tails:
        await _take_tails(volume, tails)
    if tails is not None:
        await volume.reconciler.find_strays()
    if not create:
        try:
            await publisher.claim()
        except Unavailable as error:
            message = f"other machines cannot see yet that this one has the volume: {error}"
            volume.passing.append((message, lambda: not publisher.published_ns))
            log.warning("%s", message)
    nursery.start_soon(publisher.run)
    volume.sweeper = Sweeper(
        store, volume.config.volume_id_bytes, volume.epochs, volume.hosts, volume.contractor, volume.host_io, publisher, seams
    )
    nursery.start_soon(volume.sweeper.run)
    volume.lock_keeper = LockKeeper(
        volume_id=volume.config.volume_id_bytes,
        store=store,
        registry=volume.hosts,
        contractor=volume.contractor,
        publisher=publisher,
        epochs=volume.epochs,
        seams=seams,
    )
    nursery.start_soon(volume.lock_keeper.run)
    nursery.start_soon(volume.sectors.run)
    nursery.start_soon(volume.renewal.run)
    # Before anything is written, and anybody looks which hosts keep what they have. Where hosts are slow it goes on in the background.
    with trio.move_on_after(RENEW_LIMIT):
        await volume.renewal.looked.wait()
    nursery.start_soon(volume.sectors.drain.run)
    nursery.start_soon(volume.staging.run)
    nursery.start_soon(volume.reconciler.run)
    nursery.start_soon(volume.damages.run)
    nursery.start_soon(volume.scrubber.run)
    nursery.start_soon(volume.values.run)
    nursery.start_soon(volume.files.run)
    nursery.start_soon(volume.hosts.retry)
    nursery.start_soon(volume.hedging.run)
    nursery.start_soon(_reap, volume)
    nursery.start_soon(_save_experience, volume)
    nursery.start_soon(_hand_down, volume)
    if options.commit_interval is not None:
        nursery.start_soon(_commit_loop, volume, options.commit_interval)


def make_layers(
    volume: Volume,
    store: MetadataStore,
    keys: Keys,
    nursery: trio.Nursery,
    opener: Opener | None,
    sector_ids: Counter,
    *,
    writable: bool = True,
) -> None:
    """Every layer above `volume.store` and `volume.epochs`; nothing is written, asked of a host or started yet."""
    seams, config, options = volume.seams, volume.config, volume.options
    volume_id = config.volume_id_bytes
    value_ids = Counter(store, b"value", ID_RANGE)
    volume.hosts = HostRegistry(volume_id, store, seams, opener=opener)
    volume.hosts.uplink.rate = options.upload_rate
    volume.hostdb = HostDB(store, seams)
    volume.hosts.requested = volume.hostdb.requested
    volume.contractor = Contractor(volume_id, store, volume.hosts, seams)
    volume.host_io = HostIO(volume_id, keys, volume.epochs, volume.hosts, volume.contractor, volume.hostdb, store, seams)
    volume.standing = Standing(store, volume.hosts, volume.contractor, seams, away_grace=options.away_grace)
    volume.placement = Placement(volume.hosts, volume.contractor, volume.hostdb, volume.standing)
    volume.deleter = Deleter(store, volume.host_io, volume.contractor, seams)
    cache = BlockCache(options.cache)
    reader = SectorReader(store, volume.host_io, volume.contractor, volume.hostdb, cache, seams)
    volume.hedging = reader.hedging
    volume.staging = Staging(
        volume.path, volume_id, store, volume.host_io, seams, limit=options.staging if writable else 0, writable=writable
    )
    volume.strays = Strays(volume_id, volume.hosts, volume.contractor, volume.staging)
    reader.staging, reader.strays = volume.staging, volume.strays
    regenerator = Regenerator(volume.host_io, volume.contractor, volume.hosts, volume.hostdb, reader, seams)
    volume.sectors = SectorManager(
        store=store,
        host_io=volume.host_io,
        placement=volume.placement,
        reader=reader,
        deleter=volume.deleter,
        cache=cache,
        counter=sector_ids,
        seams=seams,
        nursery=nursery,
        sector_size=config.sector_size,
        staging=volume.staging,
        regenerate=regenerator.shard,
    )
    volume.doubts = Doubts(store, volume.host_io, volume.contractor)
    volume.reconciler = Reconciler(
        store=store,
        host_io=volume.host_io,
        placement=volume.placement,
        standing=volume.standing,
        deleter=volume.deleter,
        doubts=volume.doubts,
        regenerate=regenerator.shard,
        contractor=volume.contractor,
        strays=volume.strays,
        seams=seams,
        rate=options.repair_rate,
    )
    volume.reconciler.uploading = volume.sectors.uploading
    volume.renewal = Renewal(
        store,
        volume.hosts,
        volume.contractor,
        volume.standing,
        seams,
        forgot=volume.doubts.forgot,
        has_left=lambda _number: not volume.reconciler.unsettled(),
    )
    volume.contractor.on_lapsed = volume.doubts.forgot
    # A host with a new contract keeps what it has, or keeps it again.
    volume.contractor.on_change.append(lambda _number: volume.reconciler.wake())
    volume.damages = Damages(
        store=store,
        host_io=volume.host_io,
        contractor=volume.contractor,
        registry=volume.hosts,
        hostdb=volume.hostdb,
        deleter=volume.deleter,
        regenerate=regenerator.shard,
        replace=volume.reconciler.replace,
        pace=volume.reconciler.pace,
        notes=reader.notes,
        seams=seams,
    )
    reader.on_damage = volume.damages.suspect
    volume.reconciler.bad = volume.damages.hosts
    volume.scrubber = Scrubber(
        store=store,
        damages=volume.damages,
        registry=volume.hosts,
        standing=volume.standing,
        seams=seams,
        interval=options.scrub_interval,
    )
    volume.reconciler.settled = volume.staging.settled
    volume.values = Values(
        store=store,
        sectors=volume.sectors,
        counter=value_ids,
        seams=seams,
        nursery=nursery,
        tail_budget=options.tail_budget,
        flush_interval=options.flush_interval,
        default_replication=config.replication,
        rewrite_rate=options.repair_rate,
    )
    volume.namespace = Namespace(
        store, volume.values, seams, default_replication=config.replication, check_replication=lambda spec: _check_hosts(volume, spec)
    )
    volume.values.set_path_of(volume.namespace.path_of)
    volume.files = Files(volume.namespace, seams)


def _state(state: str, stats: HostStatistics, *, spoiled: bool, ending: bool, ended: bool) -> str:
    """As the registry says; one it last found well is failing if it fails now or spoils what it has, slow if its answers are not waited
    for, or without a contract that goes on."""
    if state != "ok":
        return state
    if stats.failures >= FAILING or spoiled:
        return "failing"
    return "ended" if ended else "ending" if ending else "slow" if stats.stalls >= HUNG else "ok"


def _contract_state(contract: Contract, now: int, *, last: bool) -> str:
    """See ContractStatus. `last`: it is the one in force that ends last on its host."""
    if not contract.active(now):
        return "ended" if now >= contract.end_ns else "to come"
    if not last:
        return "renewed"
    return "ending" if contract.ending(now) else "due" if contract.due(now) else "in force"


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


async def _save_experience(volume: Volume) -> None:
    """What was learned of hosts, every hour, with the next commit: a crash should not cost a week of it."""
    while True:
        await volume.seams.clock.sleep(SAVE_INTERVAL)
        batch = Batch()
        # Counts alone are no reason: publishing them makes requests, which are counted.
        volume.hostdb.save(batch, counts=False)
        try:
            if batch.ops:
                volume.store.apply(batch)
        except FusefsError as error:
            log.info("what was learned of hosts is not saved: %s", error)


def _check_hosts(volume: Volume, spec: str) -> None:
    """BadArgument if the volume has too few hosts for the replication."""
    replication = parse_replication(spec)
    given_up = volume.standing.lost() | volume.standing.leaving().keys()
    have = len(set(volume.hosts.numbers()) - given_up)
    if replication.hosts_needed > have:
        besides = ", besides those that are lost or being left" if given_up else ""
        raise BadArgument(f"replication {spec} needs {replication.hosts_needed} hosts, this volume has {have}{besides}")


async def _hand_down(volume: Volume) -> None:
    try:
        await volume.namespace.hand_down()
    except FusefsError as error:
        log.error("files below a directory that was given another replication keep theirs until the next mount: %s", error)


async def _reap(volume: Volume) -> None:
    try:
        await volume.namespace.reap_orphans()
    except FusefsError as error:
        # The space of some removed file: no reason to take the volume down.
        log.error("files that were removed while they were open keep their space: %s", error)


async def _commit_loop(volume: Volume, interval: float) -> None:
    while True:
        await volume.seams.clock.sleep(interval)
        try:
            await volume.commit()
        except FusefsError as error:
            log.error("what was written lately is not durable yet: %s", error)


async def check_servable(volume: Volume) -> None:
    """With hosts away: warn of each, and of what cannot be read until they are back. Reading that is Unavailable then; all else goes on.

    Looks at every sector, in slices, but only when a host is away.
    """
    away = {record.number: record.url for record in volume.hosts.records() if not volume.hosts.available(record.number)}
    if not away:
        return
    given_up = volume.standing.lost()
    for number, url in away.items():
        if number in given_up:
            continue
        reason = volume.hosts.reason(number)
        message = reason if url in reason else f"host {url} cannot be used: {reason}"
        log.warning("%s", message)
        volume.passing.append((message, partial(_any_away, volume, [number])))
    here = set(volume.hosts.numbers()) - away.keys()
    start, end, lost = SECTOR, prefix_end(SECTOR), 0
    examples: list[int] = []
    needed: set[int] = set()
    while found := volume.store.scan(start, end, 500):
        for key, raw in found:
            sector_id = read_u64(key, 1)
            record = await volume.strays.locate(sector_id, decode_sector(raw, sector_id))
            if record.live and not can_be_read(record, here, volume.staging.has):
                lost += 1
                needed |= {host for shard in record.shards for host in shard.hosts} & away.keys()
                if len(examples) < 5:
                    examples.append(sector_id)
        start = found[-1][0] + b"\0"
        await trio.lowlevel.checkpoint()
    if lost:
        sectors = ", ".join(map(str, examples)) + (f" and {lost - len(examples)} more" if lost > len(examples) else "")
        hosts_text = ", ".join(away[number] for number in sorted(needed or away))
        warning = f"sectors {sectors} are only on {hosts_text}: what is in them cannot be read before that host is back"
        log.warning("%s: %s", volume.path, warning)
        volume.passing.append((warning, partial(_any_away, volume, sorted(needed or away))))


def _any_away(volume: Volume, numbers: list[int]) -> bool:
    return any(not volume.hosts.available(number) for number in numbers)
