"""Finding lost extents and lost sector records again, in what the hosts hold. Only under repair."""

from __future__ import annotations

from collections.abc import Callable

from storage.checking import lostfound
from storage.checking.patient import Patient, attempt
from storage.checking.scanning import pages, windows
from storage.errors import Corrupt, FusefsError
from storage.hosts.layout import shard_name
from storage.interfaces import Batch
from storage.metadata.keys import EXTENT, FREED, HOLDERS, SECTOR, read_u32, read_u64, u64
from storage.namespace.records import InodeRecord
from storage.replication import MAX_SHARDS
from storage.sealing import HEADER_SIZE, ShardHeader
from storage.sectors.label import LABEL_SIZE, Label, parse_label
from storage.sectors.records import VERSION, SectorRecord, ShardRecord, decode_sector, layout_for
from storage.sectors.redundancy import Layout, layout_of
from storage.values.packing import TableEntry, parse_table
from storage.values.records import Extent, decode_extent

#: Sectors that are looked for or into; beyond it, what is left is found by the next check.
MAX_SECTORS = 10_000
#: Seconds a host has for one answer.
TIMEOUT = 60.0


def holder_number(root: bytes, host: int) -> int:
    """A shard on a host as a u64 that ascends with its key; two with one number would have to share 48 bits of their roots."""
    return int.from_bytes(root[:6], "big") << 16 | (host & 0xFFFF)


#: Sector -> what its shards say of it, and those found by their numbers.
_Unknown = dict[int, tuple[Label, dict[int, ShardRecord]]]


class Rescue:
    """One check's search."""

    def __init__(self, patient: Patient) -> None:
        self._patient = patient
        #: Sectors whose tables cannot be read: nothing may be concluded from what is not in them.
        self.unreadable: set[int] = set()

    def new_file(self, batch: Batch, ino: int, value_id: int, size: int) -> InodeRecord:
        """See `lostfound.new_file`."""
        return lostfound.new_file(self._patient, batch, ino, value_id, size)

    # ---- sectors that are not on record

    async def find_sectors(self) -> None:
        """Extents point to sectors that are not on record: look for them among the shards that belong to no sector."""
        patient = self._patient
        missing: dict[int, tuple[int, str]] = {}
        async for page in pages(patient.store, EXTENT):
            for key, raw in page:
                extent = decode_extent(key, raw)
                # Not those of freed values: reclaim passes over what is not on record.
                if patient.sector(extent.sector_id) is None and len(missing) < MAX_SECTORS:
                    record = patient.value(extent.value_id)
                    if record is not None:
                        live, spec = missing.get(extent.sector_id, (0, record.replication))
                        missing[extent.sector_id] = (live + extent.length, spec)
        if not missing or patient.host_io is None:
            return
        for sector_id, (label, shards) in (await self._unknown_shards(missing)).items():
            live, spec = missing[sector_id]
            if label.m:
                spec = f"{label.k}+{label.m}"
            if len(shards) < layout_of(spec, label.length).shards:
                continue  # the roots of those that are not there are not known
            sector = SectorRecord(VERSION, spec, label.length, live, live, [shards[number] for number in sorted(shards)])
            batch = Batch()
            batch.put(SECTOR + u64(sector_id), sector.encode())
            hosts = sorted({host for shard in sector.shards for host in shard.hosts})
            what = f"its record is missing, {live} bytes of files are in it; its shards were found on hosts {hosts}"
            await patient.found("lost-sector", f"sector {sector_id}", what, batch)

    async def _unknown_shards(self, missing: dict[int, tuple[int, str]]) -> _Unknown:
        """Of the holders that no sector on record accounts for, those whose shards are of a missing sector."""
        patient = self._patient
        found: _Unknown = {}
        async for tally in windows(patient.store, HOLDERS, lambda key: holder_number(key[1:33], read_u32(key, 33))):
            for prefix, at in ((SECTOR, 1), (FREED, 9)):
                async for page in pages(patient.store, prefix):
                    for key, raw in page:
                        for shard in decode_sector(raw, read_u64(key, at)).shards:
                            for host in shard.hosts:
                                tally.add(holder_number(shard.root, host))
            async for page in pages(patient.store, HOLDERS):
                for key, _ in page:
                    root, host = key[1:33], read_u32(key, 33)
                    number = holder_number(root, host)
                    if tally.get(number) == 0 and tally.keys[0] <= number <= tally.keys[-1]:
                        await self._ask(root, host, missing, found)
        return found

    async def _ask(self, root: bytes, host: int, missing: dict[int, tuple[int, str]], found: _Unknown) -> None:
        patient = self._patient
        if patient.registry is None or patient.host_io is None or patient.contractor is None:
            return
        contract = patient.contractor.contract_for(host)
        try:
            raw = await patient.registry.get(host).get_range(shard_name(patient.config.volume_id_bytes, root.hex()), 0, HEADER_SIZE)
            header = ShardHeader.parse(raw)
            # A sector's shards have the ids that follow its own.
            if contract is None or not any(header.sector_id - number in missing for number in range(MAX_SHARDS)):
                return
            # The header is not authenticated; the label's blocks are.
            at = max(0, header.plaintext_length - LABEL_SIZE)
            plain = await patient.host_io.insecure_read(
                contract.contract_id, root.hex(), header.sector_id, at, LABEL_SIZE, header.plaintext_length
            )
            label = parse_label(plain)
        except FusefsError:
            return
        sector_id = header.sector_id - label.number
        if sector_id not in missing or label.sector_id != sector_id:
            return
        known, shards = found.setdefault(sector_id, (label, {}))
        if (known.k, known.m, known.length) != (label.k, label.m, label.length):
            return
        shard = shards.setdefault(label.number, ShardRecord(header.sector_id, header.plaintext_length, root, []))
        if shard.root == root:
            shard.hosts = sorted({*shard.hosts, host})

    # ---- extents that are gone

    async def find_extents(self) -> None:
        """Sectors say that more of them is live than extents do: put back the extents that their tables know and no other sector has."""
        patient = self._patient
        short = await self._short_sectors()
        if not short or patient.host_io is None:
            return
        patient.progress.total = len(short)
        for sector_id in short:
            patient.progress.done += 1
            table = await self.table(sector_id)
            for entry in table or ():
                await self._restore(sector_id, entry)

    async def _short_sectors(self) -> list[int]:
        patient = self._patient
        short: list[int] = []
        async for tally in windows(patient.store, SECTOR, lambda key: read_u64(key, 1)):
            await add_live(patient, tally.add)
            for sector_id in tally.keys:
                record = patient.sector(sector_id)
                if record is not None and tally.get(sector_id) < record.live and len(short) < MAX_SECTORS:
                    short.append(sector_id)
        return short

    async def _restore(self, sector_id: int, entry: TableEntry) -> None:
        patient = self._patient
        if not entry.length or patient.value(entry.value_id) is None:
            return
        extent = Extent(entry.value_id, entry.offset, sector_id, entry.position, entry.length)
        known = patient.store.get(extent.key)
        if known == extent.encode():
            return
        if known is not None:
            there = decode_extent(extent.key, known)
            if there.sector_id != sector_id:
                # Moved by a merge, unless the table there does not know it.
                table = await self.table(there.sector_id)
                if patient.sector(there.sector_id) is not None and (table is None or _in(there, table)):
                    return
        elif self.covered(extent):
            return
        batch = Batch()
        batch.put(extent.key, extent.encode())
        where = patient.file_of(entry.value_id)
        what = f"the extent for bytes {extent.offset} to {extent.end} was {'wrong' if known else 'missing'}; they are in sector {sector_id}"
        await patient.found("bad-extent", where, what, batch)

    def covered(self, extent: Extent) -> bool:
        """Some other extent holds bytes of the range: it was merged since."""
        store, prefix = self._patient.store, EXTENT + u64(extent.value_id)
        before = store.scan(prefix, prefix + u64(extent.offset), 1, reverse=True)
        if before and decode_extent(*before[0]).end > extent.offset:
            return True
        return bool(store.scan(prefix + u64(extent.offset), prefix + u64(extent.end), 1))

    async def table(self, sector_id: int) -> list[TableEntry] | None:
        """The sector's own table; None where no copy can be read."""
        patient = self._patient
        record = patient.sector(sector_id)
        if record is None or patient.host_io is None or patient.contractor is None:
            return None
        try:
            layout = layout_for(record, sector_id)
            found: dict[int, bytes] = {}
            for number in range(layout.shards):
                if len(found) < layout.needed:
                    plain = await self._shard(sector_id, record, layout, number)
                    if plain is not None:
                        found[number] = plain
            pieces = [
                memoryview(found.get(part.shard) or layout.rebuild(sector_id, part.shard, 0, found))[part.offset :][: part.length]
                for part in layout.whole()
            ]
            return parse_table(memoryview(b"".join(pieces)))
        except Corrupt:
            pass
        self.unreadable.add(sector_id)
        return None

    async def _shard(self, sector_id: int, record: SectorRecord, layout: Layout, number: int) -> bytes | None:
        """The shard's plaintext, from the first host whose copy verifies."""
        patient, shard = self._patient, record.shards[number]
        if patient.host_io is None or patient.contractor is None:
            return None
        for host in shard.hosts:
            contract = patient.contractor.contract_for(host)
            if contract is None:
                continue
            try:
                plain = await patient.host_io.read(contract.contract_id, shard.root.hex(), shard.shard_id)
                layout.check(sector_id, number, plain)
            except FusefsError:
                continue
            return plain
        return None


def _in(extent: Extent, table: list[TableEntry]) -> bool:
    return any(
        (entry.value_id, entry.offset, entry.position, entry.length) == (extent.value_id, extent.offset, extent.position, extent.length)
        for entry in table
    )


async def add_live(patient: Patient, add: Callable[[int, int], None]) -> None:
    """Call `add(sector id, length)` for every extent: of values, and of freed ones whose extents are still to be walked."""
    async for page in pages(patient.store, EXTENT):
        for key, raw in page:
            extent = attempt(decode_extent, key, raw)
            if extent is not None:
                add(extent.sector_id, extent.length)
