"""An open volume: its layers, and what can be asked of it as a whole. `wiring` opens it, `status_of` says how it is."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from storage.config import VolumeConfig
from storage.contractor import Contractor
from storage.epochs import Epochs
from storage.errors import BadArgument, NotPermitted, Unavailable
from storage.files import Files
from storage.history.publisher import Publisher
from storage.host_io import HostIO
from storage.hosts.hostdb import HostDB
from storage.hosts.registry import HostRegistry
from storage.interfaces import Batch, FlushProgress, FlushReport, Refusal
from storage.metadata.store import Store
from storage.namespace import Namespace
from storage.renewal import Renewal
from storage.replication import parse_replication
from storage.seams import Seams
from storage.sectors.damage import Damages
from storage.sectors.deleter import Deleter
from storage.sectors.doubts import Doubts
from storage.sectors.hedging import Hedging
from storage.sectors.lock_keeper import LockKeeper
from storage.sectors.manager import SectorManager
from storage.sectors.mending import Mender
from storage.sectors.placement import Placement
from storage.sectors.reconcile import Reconciler
from storage.sectors.scrub import INTERVAL as SCRUB_INTERVAL
from storage.sectors.scrub import Scrubber
from storage.sectors.staging import Staging
from storage.sectors.strays import Strays
from storage.sectors.sweep import Sweeper
from storage.standing import AWAY_GRACE, Standing
from storage.status import (
    RenewalStatus,
    RepairStatus,
    RewriteStatus,
    ScrubReport,
    VolumeRoom,
    VolumeStatus,
)
from storage.status_of import repair_status_of, status_of
from storage.values.values import Values
from storage.values.whose import files_in

log = logging.getLogger("fusefs.volume")

DAY = 86400.0
#: See `VolumeOptions.staging`.
STAGING = 10 * 1024 * 1024 * 1024
#: Refusals kept for `status`.
REFUSALS = 100
#: Seconds for which names of damaged files are not looked for anew.
REMEMBERED = 60.0


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
    #: Start the processes that seal sectors at once (storage/coprocess/), for who stays; else the first large sector does.
    coprocesses: bool = False


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
        #: Sectors with bad copies, files with bytes in them, and until when that is true enough, on the monotonic clock.
        self._damaged: tuple[frozenset[int], list[str], float] = frozenset(), [], 0.0
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
        self.mender: Mender
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
        if report.degraded_sectors and not report.reasons:
            # Nothing has failed: what takes copies is too few, or has them on the way.
            report = replace(report, reasons=(self._shortage(),))
        # A host that is away now may have copies of anything: whoever flushes to be safe wants to know. One that was given up has none that
        # count.
        given_up = self.standing.lost()
        reasons = [self.hosts.reason(n) for n in self.hosts.numbers() if not self.hosts.available(n) and n not in given_up]
        away = [reason for reason in reasons if not any(reason in said for said in report.reasons)]
        return replace(report, reasons=(*report.reasons, *away)) if away else report

    async def add_host(self, url: str, contract_days: float | None = None) -> int:
        """A new host with a first contract. Returns its number. Unavailable without a majority of the hosts there are."""
        if self.publisher is not None and self.publisher.generation:
            # I5: what a majority is must not be for a minority to change.
            await self.publisher.confirm_majority()
        number = await self.hosts.add(url)
        # `status` and placement are to know its room before the next poll of all.
        await self.placement.ask_space(number)
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
        if leave:
            # It may have kept, and got something, since the last look without it.
            self.reconciler.look_anew(batch)
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
        # A copy that went to another host leaves one too many, and one that was put right may be what a sector has waited for.
        await self.reconciler.make_good(again=False)
        await self.store.commit()
        return repair_status_of(self)

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
        # Copies that are not there cannot be looked at, and whoever asks wants to know all the same.
        lacking = await self.sectors.lacking()
        files = await self._damaged_files() if report.left else []
        return msgspec.structs.replace(report, degraded_sectors=lacking, shortage=self._shortage() if lacking else "", files=files)

    async def _damaged_files(self) -> list[str]:
        """Some of those that bad copies are known of."""
        sectors = frozenset(self.damages.sectors())
        now = self.seams.clock.monotonic()
        if self._damaged[0] != sectors or now >= self._damaged[2]:
            # Not looked for each time somebody asks.
            self._damaged = sectors, await files_in(self.store, self.namespace.path_of, sectors), now + REMEMBERED
        return self._damaged[1]

    def _shortage(self) -> str:
        """Why sectors have too few copies."""
        return self.reconciler.status.trouble or f"copies are still to be made{self.placement.besides()}"

    def scrub_progress(self) -> tuple[int, int]:
        """Of the `scrub` that is under way: sectors looked at, and in all."""
        return self.scrubber.progress()

    def repair_progress(self) -> tuple[int, int]:
        """Bytes that making shards again has sent since the volume was opened, and the same with what is still to be sent."""
        now = self.reconciler.status
        return now.bytes, now.bytes + now.pending_bytes

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

    def room(self) -> VolumeRoom:
        """For df. No host is asked anything."""
        replication = parse_replication(self.config.replication)
        return VolumeRoom(self.namespace.regular_files(), self.namespace.counts()[1], self.placement.free(replication))

    async def status(self) -> VolumeStatus:
        """A snapshot, without asking any host anything that could hang."""
        stored_as, files = await self.sectors.stored_as(), await self._damaged_files()
        return msgspec.structs.replace(status_of(self), stored_as=stored_as, damaged_files=files)
