"""What a volume says of itself, as records that go through the control socket and into `--json`."""

from __future__ import annotations

from typing import Final

import msgspec

#: Exit statuses of a check or a scrub that was finished: everything that was found is repaired; something is left.
REPAIRED: Final = 20
LEFT: Final = 21


class RefusalStatus(msgspec.Struct, frozen=True):
    """An operation the append-only rules refused."""

    when_ns: int
    program: str
    path: str
    offset: int
    reason: str


class DayStatus(msgspec.Struct, frozen=True):
    """What was asked of a host on a day, as in 2025-12-31: requests, whatever came of them; bytes."""

    date: str
    requests: int
    sent: int
    received: int


class HostStatus(msgspec.Struct, frozen=True):
    """A host as seen from here. free, total: bytes, None where it does not tell.

    latency_ms: a moving average of small requests; median_ms, p95_ms: what half, and 95 of 100, of small reads did not exceed; read_rate,
    write_rate: bytes per second of larger requests; each None before the first success. failures: a score that halves every minute; failed:
    how many ever. hedged: reads for which another host was asked too because this one was slow; overtaken: those where the other won.

    error: why it cannot be used, or what was wrong with it within the last hour; error_ns: when that was, 0 for now.
    """

    number: int
    host_id: str
    url: str
    state: str
    error: str
    free: int | None
    total: int | None
    latency_ms: float | None
    failures: float
    reads: int
    writes: int
    median_ms: float | None = None
    p95_ms: float | None = None
    read_rate: float | None = None
    write_rate: float | None = None
    bytes_read: int = 0
    bytes_written: int = 0
    failed: int = 0
    hedged: int = 0
    overtaken: int = 0
    #: Requests for sectors and metadata, and their bytes; days are UTC's, oldest first.
    days: list[DayStatus] = []
    error_ns: int = 0
    #: What it can do, as probed when it was added.
    abilities: str = ""


class ContractStatus(msgspec.Struct, frozen=True):
    """A contract on record."""

    contract_id: str
    host_number: int
    url: str
    start_ns: int
    end_ns: int
    active: bool
    #: Contracts made from one another by renewal share a lineage; which this one renews, and which renews it, or "".
    lineage: str = ""
    renews: str = ""
    renewed_by: str = ""
    #: "in force"; "due": less than a third of its time is left, and it was not renewed yet; "ending": less than a sixth; "renewed": in
    #: force, with another that ends later; "ended".
    state: str = ""
    #: Why it could not be renewed, since when (nanoseconds; 0: it was not tried, or succeeded).
    trouble: str = ""
    trouble_since_ns: int = 0


class RenewalStatus(msgspec.Struct, frozen=True):
    """What became of a host's contract when those that are due were renewed: `renewed`, `error`, or neither: it was not due.

    `contract_id` and `end_ns` are of the new contract, if there is one.
    """

    host_number: int
    url: str
    contract_id: str
    end_ns: int
    renewed: bool = False
    error: str = ""


class RepairStatus(msgspec.Struct, frozen=True):
    """What reconcile has to do and has done since the volume was opened. trouble: why the last sector could not be mended, or ""."""

    pending: int = 0
    pending_bytes: int = 0
    mended: int = 0
    bytes: int = 0
    stage: str = ""
    trouble: str = ""


class StagingStatus(msgspec.Struct, frozen=True):
    """What is on this machine and on too few hosts yet, and how quickly it gets there.

    bytes: still to be sent, all copies together; rate: bytes per second lately; seconds_left: at that rate, None while nothing is sent.
    used, limit: bytes of the directory, what is only cached included. trouble: why nothing gets there, or what is wrong with it; "".
    """

    sectors: int = 0
    bytes: int = 0
    rate: float = 0.0
    seconds_left: float | None = None
    used: int = 0
    limit: int = 0
    trouble: str = ""


class RewriteStatus(msgspec.Struct, frozen=True):
    """Files that were given another replication: what is still in sectors of the old one, and what was moved since the volume was opened.
    directories: whose files are still to be told. trouble: why some are not moved yet, or ""."""

    files: int = 0
    pending_bytes: int = 0
    bytes: int = 0
    directories: int = 0
    trouble: str = ""


class StoredAs(msgspec.Struct, frozen=True):
    """Files of one replication: how many, their bytes, and how many of these are still in sectors of another."""

    replication: str
    files: int
    bytes: int
    misplaced: int


class ReplicationStatus(msgspec.Struct, frozen=True):
    """What holds for a directory or a file, and for what is below. own: "" where a directory inherits it; source: the directory that
    says so, from the root; "" for the volume, and for a file, which has its own. below: itself included, by replication."""

    path: str
    replication: str
    own: str
    source: str
    below: list[StoredAs]


class ScrubReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a scrub that somebody asked for has come to. `shards`: copies looked at, each shard on each of its hosts."""

    #: All of every shard; else a block of each, and where it ends.
    full: bool
    sectors: int
    shards: int
    bytes: int
    #: Copies that were not there, or did not verify; of both, those that are good now, or on another host.
    missing: int
    damaged: int
    repaired: int
    #: Sectors that hosts which answer cannot give back.
    lost: int
    #: Copies that could not be looked at, and the hosts they are on.
    unanswered: int
    hosts_away: list[str]
    #: Hosts most of whose copies are bad, with the reason.
    hosts_failing: list[str]
    #: Why something could not be repaired; "" if everything was.
    trouble: str
    seconds: float
    #: Sectors with fewer copies than they should have, and why: what is not there cannot be looked at.
    degraded_sectors: int = 0
    shortage: str = ""
    #: Some of the files with bytes in what is lost, or else in what is left.
    files: list[str] = []

    @property
    def left(self) -> int:
        """Copies that were found bad and still are."""
        return self.missing + self.damaged - self.repaired

    @property
    def exit_status(self) -> int:
        """0: every copy there should be was looked at, and is good; else REPAIRED or LEFT."""
        if self.left or self.unanswered or self.degraded_sectors:
            return LEFT
        return REPAIRED if self.missing + self.damaged else 0


class ScrubStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The scrub in the background, the last one over all sectors that ended, and what is known to be bad.

    interval: seconds, 0 if nothing is looked at in the background. Times: nanoseconds, 0 for never. `*_since`: since the volume was opened,
    whoever found it; `pending`: now. `lost`: sectors; the rest are copies.
    """

    interval: float = 0.0
    begun_ns: int = 0
    sectors: int = 0
    sectors_left: int = 0
    shards: int = 0
    bytes: int = 0
    missing: int = 0
    damaged: int = 0
    repaired: int = 0
    unanswered: int = 0
    last_begun_ns: int = 0
    last_ended_ns: int = 0
    last_full: bool = False
    last_sectors: int = 0
    last_found: int = 0
    last_repaired: int = 0
    last_unanswered: int = 0
    found_since: int = 0
    repaired_since: int = 0
    pending: int = 0
    lost: int = 0
    trouble: str = ""


class VolumeRoom(msgspec.Struct, frozen=True):
    """For df: files, the bytes in them, and the bytes that hosts could still take of files."""

    files: int
    used: int
    free: int


class VolumeStatus(msgspec.Struct, frozen=True):
    """Everything `fusefs status` shows."""

    volume_id: str
    path: str
    format_version: int
    replication: str
    sector_size: int
    files: int
    bytes: int
    sectors: int
    pending_bytes: int
    degraded_sectors: int
    sectors_to_delete: int
    cache_bytes: int
    cache_limit: int
    cache_hits: int
    cache_misses: int
    journal_fill: float
    epoch: int
    read_only: bool
    read_only_reason: str
    #: Why what was written lately is not durable on this machine; "" if it is, or will be with the next commit.
    local_error: str
    warnings: list[str]
    refusals: list[RefusalStatus]
    refusals_total: int
    hosts: list[HostStatus]
    contracts: list[ContractStatus]
    #: The last durable commit here; the last one a majority of the hosts has, when (nanoseconds; 0: not since it was opened), and whether
    #: something has changed since.
    commit: int = 0
    published_commit: int = 0
    published_ns: int = 0
    unpublished: bool = False
    #: Of a volume open for reading only: what it shows; "" for one that is open for writing.
    view: str = ""
    #: Another machine has gone on with the volume; `read_only_reason` says which.
    fenced: bool = False
    staging: StagingStatus = StagingStatus()
    repair: RepairStatus = RepairStatus()
    rewrite: RewriteStatus = RewriteStatus()
    #: Bytes that are in no sector yet, and in the log on a majority of the hosts: `pending_bytes` does not count them.
    logged_bytes: int = 0
    #: Some of the files with bytes in sectors that cannot be had, or else in those that a copy is bad of.
    damaged_files: list[str] = []
    #: Replication -> sectors that are stored so; empty where they are too many to look at each time.
    stored_as: dict[str, int] = {}
    #: Places that were looked for on a host that has forgotten things, and are not there: as far as no other host has them they are lost.
    missing_places: int = 0
    scrub: ScrubStatus = ScrubStatus()
