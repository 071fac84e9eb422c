"""What `status` says of an open volume: a snapshot, put together from what its layers know of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from storage.hosts.days import date_of
from storage.hosts.hostdb import HostStatistics
from storage.hosts.locking import locking
from storage.interfaces import Contract
from storage.status import (
    ContractStatus,
    DayStatus,
    HostStatus,
    RefusalStatus,
    RepairStatus,
    StagingStatus,
    VolumeStatus,
)

if TYPE_CHECKING:
    from storage.volume import Volume

#: From so many recent failures on (they decay, half of them in a minute) `status` calls a host failing.
FAILING = 2.0
#: From such a score of reads that hung (it halves in a minute) `status` calls a host slow.
HUNG = 0.5
#: Seconds for which `status` shows what was wrong with a host that answers well now.
RECENT = 3600.0


def status_of(volume: Volume) -> VolumeStatus:
    """A snapshot, without asking any host anything that could hang."""
    now = volume.seams.clock.time_ns()
    size = volume.namespace.counts()[1]
    failure = volume.store.failure
    publisher = volume.publisher
    lost = publisher.fleet.lost() if publisher is not None else {}
    histories = publisher.fleet.trouble_of() if publisher is not None else {}
    given_up = volume.standing.leaving()
    needed = volume.reconciler.leaving.still_on(given_up)
    leaving = {number: "leaving" if number in needed else "left" for number in given_up}
    ending, ended = volume.standing.ending(), volume.standing.ended()
    hosts: list[HostStatus] = []
    for record in volume.hosts.records():
        space, stats = volume.placement.space(record.number), volume.hostdb.stats(record.number)
        spoiled = volume.damages.failing(record.number)
        error, error_ns = volume.hosts.reason(record.number) or spoiled or histories.get(record.number, ""), 0
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
                    volume.hosts.state(record.number),
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
    urls = {record.number: record.url for record in volume.hosts.records()}
    trouble, local = volume.values.shipper.trouble, volume.values.admission.local_trouble
    shown = (local, volume.values.admission.full, trouble, volume.store.trouble)
    # Of what was removed meanwhile nothing is pending.
    logged = min(volume.values.logged_bytes(), volume.values.pending_bytes)
    fenced = volume.publisher is not None and failure is not None and volume.publisher.fenced == failure
    return VolumeStatus(
        volume_id=volume.volume_id,
        path=str(volume.path),
        format_version=volume.config.format_version,
        replication=volume.config.replication,
        sector_size=volume.config.sector_size,
        files=volume.namespace.regular_files(),
        bytes=size,
        sectors=volume.sectors.count,
        pending_bytes=volume.values.pending_bytes - logged,
        logged_bytes=logged,
        # What is in staging is told by itself.
        degraded_sectors=max(0, volume.sectors.degraded() - len(volume.staging.below)),
        sectors_to_delete=volume.deleter.pending(),
        cache_bytes=volume.sectors.cache.size,
        cache_limit=volume.sectors.cache.limit,
        cache_hits=volume.sectors.cache.statistics.hits,
        cache_misses=volume.sectors.cache.statistics.misses,
        journal_fill=round(volume.store.journal_fill, 4),
        epoch=volume.epochs.current.number,
        read_only=failure is not None,
        read_only_reason=failure or "",
        # Fenced, it has committed what it had.
        local_error=str(local or ("" if fenced else failure) or ""),
        warnings=[
            *volume.standing_warnings(),
            *volume.renewal.warnings(),
            *([publisher.trouble] if publisher is not None and publisher.trouble else []),
            *dict.fromkeys(str(error) for error in shown if error is not None),
            *_lock_warnings(volume),
            *volume.sectors.notes,
        ],
        refusals=[RefusalStatus(r.when_ns, r.program, r.path, r.offset, r.reason) for r in volume.refusals],
        refusals_total=volume.refusals_total,
        commit=volume.store.durable_sequence,
        published_commit=publisher.published_sequence if publisher is not None else 0,
        published_ns=publisher.published_ns if publisher is not None else 0,
        unpublished=publisher.dirty if publisher is not None else False,
        hosts=hosts,
        contracts=_contracts(volume, urls, now),
        fenced=fenced,
        staging=_staging(volume),
        repair=repair_status_of(volume),
        rewrite=volume.rewrite_status(),
        missing_places=volume.doubts.missing(),
        scrub=volume.scrubber.status(),
    )


def _staging(volume: Volume) -> StagingStatus:
    now, staging = volume.sectors.drain.status(), volume.staging
    left = now.bytes / now.rate if now.rate else None
    trouble = now.trouble or staging.files.trouble or next(iter(staging.losses.values()), "")
    return StagingStatus(now.sectors, now.bytes, now.rate, left, staging.files.size, staging.files.limit, trouble)


def repair_status_of(volume: Volume) -> RepairStatus:
    now, damage = volume.reconciler.status, volume.damages.status
    return RepairStatus(
        now.pending + volume.damages.listed,
        now.pending_bytes,
        now.mended + damage.mended,
        now.bytes + damage.bytes,
        now.stage,
        now.trouble or damage.trouble,
    )


def _lock_warnings(volume: Volume) -> list[str]:
    keeper = volume.lock_keeper
    troubles = keeper.troubles if keeper is not None else {}
    return [
        *(f"host {volume.hosts.url(number)}: locks are not extended: {trouble}" for number, trouble in sorted(troubles.items())),
        *(
            f"host {volume.hosts.url(number)}: these credentials may not delete; what is not needed any more stays there"
            for number in volume.host_io.undeletable()
        ),
        *(
            f"host {record.url} had Object Lock when it was added, and does not say so now: nothing more is locked there; see whether "
            "its credentials may read the bucket's configuration"
            for record in volume.hosts.records()
            if record.capabilities.object_lock and volume.hosts.available(record.number) and not _locks(volume, record.number)
        ),
    ]


def _locks(volume: Volume, number: int) -> bool:
    return locking(volume.hosts.get(number)) is not None


def _contracts(volume: Volume, urls: Mapping[int, str], now: int) -> list[ContractStatus]:
    found = volume.contractor.all_contracts()
    renewed_by = {volume.contractor.renewed_from(c.contract_id): c.contract_id for c in found}
    troubles, in_force = volume.renewal.troubles(), volume.contractor.in_force()
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
                renews=volume.contractor.renewed_from(c.contract_id) or "",
                renewed_by=renewed_by.get(c.contract_id, ""),
                state=_contract_state(c, now, last=last),
                trouble=trouble.reason if trouble is not None else "",
                trouble_since_ns=trouble.since_ns if trouble is not None else 0,
            )
        )
    return statuses


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
