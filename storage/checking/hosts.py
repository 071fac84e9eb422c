"""What hosts hold against what metadata says they hold; contracts; copies that are missing are made again from good ones.

One listing per host and window of a million shards. A host that is away is one finding, not one for each of its shards.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass, field

import trio

from storage.checking.copies import kept_by_lock, remake
from storage.checking.patient import Patient
from storage.checking.scanning import pages
from storage.checking.staged import conclude_cached, conclude_waiting, find_damaged
from storage.contractor import Contractor
from storage.errors import BadArgument, Corrupt, FusefsError, NotFound
from storage.hosts.holders import holders_key
from storage.hosts.layout import check_root, sectors_prefix, shard_name
from storage.hosts.registry import HostRegistry
from storage.metadata.keys import EXTENT, LOST, SECTOR, read_u64, u32
from storage.sealing import sealed_length
from storage.sectors.records import SectorRecord, layout_for
from storage.sectors.redundancy import layout_of
from storage.values.records import decode_extent
from storage.wording import counted

#: Shards of one host that are compared at a time: 17 bytes each, some 60 while they are sorted.
WINDOW = 1_000_000
#: Copies found bad that are remembered one by one; what is beyond is found by the next check.
MAX_BAD = 200_000
#: Sectors without any good copy whose files are named.
MAX_LOST = 100_000


@dataclass(slots=True)
class _Seen:
    """What the hosts were found to hold."""

    #: (sector, host) -> (kind of finding, why)
    bad: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)
    #: Hosts that could not be looked at; of these, `lost` are those a person has given up.
    away: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    unlisted: int = 0

    def add(self, sector_id: int, host: int, kind: str, why: str) -> None:
        if len(self.bad) < MAX_BAD:
            self.bad.setdefault((sector_id, host), (kind, why))
        else:
            self.unlisted += 1


async def check_hosts(patient: Patient, *, data: bool) -> None:
    """After `check_sectors`. `data`: every shard is read and verified, on every host, all hosts at the same time."""
    registry, contractor = patient.registry, patient.contractor
    if registry is None or contractor is None:
        return
    seen = _Seen()
    counts = await _shards_per_host(patient)
    for number in sorted({*counts, *registry.numbers()}):
        await _check_host(patient, registry, contractor, seen, number, counts.get(number, 0))
    if data:
        patient.stage("reading every shard", sum(number for host, number in counts.items() if host not in seen.away))
        async with trio.open_nursery() as nursery:
            for number in counts:
                if number not in seen.away:
                    nursery.start_soon(_read_all, patient, contractor, seen, number)
    await _conclude(patient, seen, data=data)
    await patient.commit()


async def _shards_per_host(patient: Patient) -> dict[int, int]:
    counts: dict[int, int] = {}
    async for page in pages(patient.store, SECTOR):
        for key, _ in page:
            record = patient.sector(read_u64(key, 1))
            for shard in record.shards if record is not None else ():
                for host in shard.hosts:
                    counts[host] = counts.get(host, 0) + 1
    return counts


async def _check_host(patient: Patient, registry: HostRegistry, contractor: Contractor, seen: _Seen, number: int, shards: int) -> None:
    where = patient.url(number)
    if number not in registry.numbers():
        seen.away.add(number)
        await patient.found("unknown-host", f"host {number}", f"the volume has no such host; said to be there: {counted(shards, 'shard')}")
        return
    if patient.store.get(LOST + u32(number)) is not None:
        seen.away.add(number)
        seen.lost.add(number)
        if shards:
            patient.note("pending", where, f"it is lost; copies of what was on it ({counted(shards, 'shard')}) are made on other hosts")
        return
    if not registry.available(number):
        seen.away.add(number)
        await patient.found("host-away", where, f"{registry.reason(number)}; on it: {counted(shards, 'shard')}")
        return
    contract = contractor.contract_for(number)
    if contract is None or not contract.active(patient.seams.clock.time_ns()):
        what = "there is no contract with it" if contract is None else f"contract {contract.contract_id} has ended"
        await patient.found("no-contract", where, f"{what}; on it: {counted(shards, 'shard')}")
    patient.stage(f"what {where} holds", shards)
    patient.report.looked_at["shards"] += shards
    try:
        await _list(patient, registry, seen, number)
    except FusefsError as error:
        seen.away.add(number)
        await patient.found("host-away", where, f"{error}; on it: {counted(shards, 'shard')}")


# ---- listing


async def _list(patient: Patient, registry: HostRegistry, seen: _Seen, number: int) -> None:
    orphans = orphan_bytes = 0
    first = True
    start: bytes | None = SECTOR
    while start is not None:
        window, start = await _window(patient, number, start)
        if not window.keys and not first:
            break
        there = bytearray(len(window.keys))
        host = registry.get(number)
        prefix = sectors_prefix(patient.config.volume_id_bytes)
        async for name, size in host.list(prefix):
            root = _root_of(patient, name)
            at = window.find(root) if root is not None else None
            if root is not None and at is not None:
                there[at] = 1
                patient.progress.done += 1
                _check_size(patient, seen, number, window.sectors[at], root, size)
            elif first and (root is None or patient.store.get(holders_key(root, number)) is None):
                orphans, orphan_bytes = orphans + 1, orphan_bytes + size
        for at, found in enumerate(there):
            if not found:
                seen.add(window.sectors[at], number, "missing-copy", "is not there")
        first = False
    if orphans:
        patient.note("orphan-shards", patient.url(number), f"on no record: {counted(orphans, 'object')}, {counted(orphan_bytes, 'byte')}")


@dataclass(frozen=True, slots=True)
class _Window:
    """Shards of one host: the first 8 bytes of their roots, ascending, and their sectors."""

    keys: array[int]
    sectors: array[int]

    def find(self, root: bytes) -> int | None:
        key = int.from_bytes(root[:8], "big")
        at = bisect_left(self.keys, key)
        return at if at < len(self.keys) and self.keys[at] == key else None


async def _window(patient: Patient, number: int, start: bytes) -> tuple[_Window, bytes | None]:
    """The next shards of the host, and where to go on (None: that was all)."""
    found: list[int] = []
    following: bytes | None = None
    async for page in pages(patient.store, SECTOR, start):
        for key, _ in page:
            sector_id = read_u64(key, 1)
            record = patient.sector(sector_id)
            for shard in record.shards if record is not None else ():
                if number in shard.hosts:
                    found.append(int.from_bytes(shard.root[:8], "big") << 64 | sector_id)
        if len(found) >= WINDOW:
            following = page[-1][0] + b"\0"
            break
    found.sort()
    return _Window(array("Q", [one >> 64 for one in found]), array("Q", [one & (2**64 - 1) for one in found])), following


def _root_of(patient: Patient, name: str) -> bytes | None:
    last = name.rpartition("/")[2]
    try:
        root = check_root(last)
    except BadArgument:
        return None
    return root if name == shard_name(patient.config.volume_id_bytes, last) else None


def _check_size(patient: Patient, seen: _Seen, number: int, sector_id: int, root: bytes, size: int) -> None:
    record = patient.sector(sector_id)
    for shard in record.shards if record is not None else ():
        if shard.root == root and size != sealed_length(shard.length):
            seen.add(sector_id, number, "damaged-copy", f"has {size} bytes instead of {sealed_length(shard.length)}")


# ---- reading


async def _read_all(patient: Patient, contractor: Contractor, seen: _Seen, number: int) -> None:
    contract = contractor.contract_for(number)
    host_io = patient.host_io
    if contract is None or host_io is None:
        return
    async for page in pages(patient.store, SECTOR):
        for key, _ in page:
            sector_id = read_u64(key, 1)
            record = patient.sector(sector_id)
            for index, shard in enumerate(record.shards if record is not None else ()):
                if record is None or number not in shard.hosts or (sector_id, number) in seen.bad:
                    continue
                try:
                    plain = await host_io.read(contract.contract_id, shard.root.hex(), shard.shard_id)
                    layout_for(record, sector_id).check(sector_id, index, plain)
                    patient.report.looked_at["bytes read"] += len(plain)
                except NotFound:
                    seen.add(sector_id, number, "missing-copy", "is not there")
                except Corrupt as error:
                    seen.add(sector_id, number, "damaged-copy", f"does not verify ({error})")
                except FusefsError as error:
                    seen.add(sector_id, number, "unanswered", f"could not be read ({error})")
                patient.progress.done += 1


# ---- what follows


async def _conclude(patient: Patient, seen: _Seen, *, data: bool) -> None:
    """Sector by sector: what is bad is told, and mended from what is good; then the files that have lost something."""
    patient.stage("copies")
    lost: set[int] = set()
    staged = 0
    async for page in pages(patient.store, SECTOR):
        for key, _ in page:
            sector_id = read_u64(key, 1)
            record = patient.sector(sector_id)
            if record is not None and patient.staging is not None and patient.staging.only_here(sector_id):
                here, readable = await conclude_waiting(patient, patient.staging, sector_id, record, data=data)
                staged += here
                if not readable and record.live and len(lost) < MAX_LOST:
                    lost.add(sector_id)
            elif record is not None:
                await _conclude_sector(patient, seen, sector_id, record, lost, data=data)
            patient.progress.done += 1
    if staged:
        patient.note(
            "pending", "staging", f"on this machine, and on the way to their hosts while the volume is mounted: {counted(staged, 'sector')}"
        )
    if seen.unlisted:
        await patient.found("missing-copy", "copies", f"missing or damaged: {counted(seen.unlisted, 'more copy', 'more copies')}")
    if lost:
        await _name_files(patient, lost)


async def _conclude_sector(patient: Patient, seen: _Seen, sector_id: int, record: SectorRecord, lost: set[int], *, data: bool) -> None:
    staging = patient.staging
    damaged = {} if staging is None else await find_damaged(patient, staging, record, data=data)
    layout = layout_of(record.replication, record.length)
    what = "shard" if layout.spec.coded else "copy"
    bad = [{host: seen.bad[sector_id, host] for host in shard.hosts if (sector_id, host) in seen.bad} for shard in record.shards]
    for at, shard in enumerate(record.shards):
        bad[at] |= {host: ("missing-copy", "is on a host that is lost") for host in shard.hosts if host in seen.lost}
    good = [[host for host in shard.hosts if host not in bad[at] and host not in seen.away] for at, shard in enumerate(record.shards)]
    if _there(patient, record, good) < layout.needed:
        # What a thief deleted or overwrote is still read from the versions that a lock keeps, and made again from them.
        for at, shard in enumerate(record.shards):
            for host in [] if good[at] else sorted(bad[at].keys() - seen.lost):
                if await kept_by_lock(patient, sector_id, shard, host):
                    good[at].append(host)
                    bad[at][host] = (bad[at][host][0], f"{bad[at][host][1]}, but a locked version is")
                    break
    if patient.strays is not None and _there(patient, record, good) < layout.needed:
        # Published while it was in staging, say: hosts have it, and its record does not name them.
        located = await patient.strays.locate(sector_id, record)
        for at, shard in enumerate(located.shards):
            good[at] += [host for host in shard.hosts if host not in record.shards[at].hosts]
    readable = _there(patient, record, good) >= layout.needed
    if not readable and record.live and len(lost) < MAX_LOST:
        lost.add(sector_id)
    for at, reasons in enumerate(bad):
        for host, (kind, why) in reasons.items():
            repaired, told = False, ""
            if patient.repair and readable and kind != "unanswered":
                told, repaired = await remake(patient, sector_id, at, host, good, seen.away)
            patient.report.add(kind, f"sector {sector_id}", f"its {what} on {patient.url(host)} {why}{told}", repaired=repaired)
    have = sum(min(len(shard.hosts), layout.hosts_each) for shard in record.shards)
    if not any(bad) and record.live and have < len(layout.places):
        await _few(patient, seen, sector_id, record, good, readable)
    if staging is not None and damaged:
        await conclude_cached(patient, staging, sector_id, patient.sector(sector_id) or record, damaged)


def _there(patient: Patient, record: SectorRecord, good: list[list[int]]) -> int:
    """How many of its shards are on a host where they are good, or in staging."""
    staging = patient.staging
    return sum(
        1 for shard, hosts in zip(record.shards, good, strict=True) if hosts or (staging is not None and staging.files.has(shard.root))
    )


async def _few(patient: Patient, seen: _Seen, sector_id: int, record: SectorRecord, good: list[list[int]], readable: bool) -> None:
    layout = layout_of(record.replication, record.length)
    have = sum(min(len(shard.hosts), layout.hosts_each) for shard in record.shards)
    told, repaired = "", False
    if patient.repair and readable:
        for at, shard in enumerate(record.shards):
            for _ in range(layout.hosts_each - len(shard.hosts)):
                more, repaired = await remake(patient, sector_id, at, None, good, seen.away)
                told += more
                if not repaired:
                    break
    what = "shards" if layout.spec.coded else "copies"
    patient.report.add("few-copies", f"sector {sector_id}", f"it has {have} of {len(layout.places)} {what}{told}", repaired=repaired)


async def _name_files(patient: Patient, lost: set[int]) -> None:
    """One scan of the extents: a finding for each file, with the first range."""
    patient.stage("files that are affected")
    last = 0
    async for page in pages(patient.store, EXTENT):
        for key, raw in page:
            try:
                extent = decode_extent(key, raw)
            except Corrupt:
                continue
            if extent.sector_id in lost and extent.value_id != last and patient.value(extent.value_id) is not None:
                last = extent.value_id
                what = f"bytes {extent.offset} to {extent.end} are in sector {extent.sector_id}, of which no good copy can be reached"
                await patient.found("unreadable", patient.file_of(extent.value_id), what)
