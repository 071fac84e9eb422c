"""Opening a volume for a check, and the passes in their order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from storage.checking.extents import check_extents
from storage.checking.findings import CheckProgress, CheckReport, Finding
from storage.checking.history import check_history
from storage.checking.hosts import check_hosts
from storage.checking.maps import check_maps
from storage.checking.names import check_names, check_orphans
from storage.checking.patient import Patient
from storage.checking.records import check_epochs, check_records, counters_are_sound
from storage.checking.sectors import check_sectors
from storage.config import load_config
from storage.contractor import Contractor
from storage.errors import Corrupt
from storage.host_io import HostIO
from storage.hosts.hostdb import HostDB
from storage.hosts.registry import HostRegistry, Opener
from storage.keyfile import KEY_FILE, load_keyfile, open_slots
from storage.keys import Keys
from storage.lock import VolumeLock
from storage.metadata.keys import LOST, u32
from storage.metadata.opening import open_store
from storage.metadata.replay import RecoveredTails
from storage.seams import Seams
from storage.sectors.staging import Staging
from storage.sectors.strays import Strays
from storage.values.records import tail_needed


def absolute(path: Path | str) -> Path:
    """As seen from the working directory of now."""
    return Path(path).absolute()


async def check_volume(
    path: Path | str,
    *,
    passphrase: str,
    repair: bool = False,
    data: bool = False,
    on_finding: Callable[[Finding], None] | None = None,
    progress: CheckProgress | None = None,
    seams: Seams | None = None,
    opener: Opener | None = None,
    wait_lock: float = 0.0,
) -> CheckReport:
    """Check a volume that nobody has open; findings are handed on as they are made. What was repaired is durable when it returns.

    Without `repair` nothing of the volume is changed (the journal's commits go to LMDB, as at any open), here or on hosts. `data`: every
    shard is read and verified on every host. BadArgument (no volume), WrongPassphrase, Busy (in use for longer than `wait_lock` seconds),
    Corrupt (journal or LMDB cannot be read at all: recover), NoSpace, IOFailure: then it could not be checked.
    """
    path = absolute(path)
    seams = seams or Seams()
    config = await seams.threads.run(load_config, path)
    keyfile = await seams.threads.run(load_keyfile, path / KEY_FILE, config.volume_id)
    keys = Keys(await seams.threads.run(open_slots, keyfile, passphrase))
    report = CheckReport()
    if on_finding is not None:
        report.on_finding = on_finding
    lock = VolumeLock(path)
    await lock.acquire(seams, wait_lock, "fusefs check")
    try:
        async with open_store(path, seams, journal_key=keys.journal_key, tail_needed=tail_needed) as store:
            patient = Patient(store, config, seams, report, progress or CheckProgress(), repair=repair)
            tails = store.recovered_tails()
            await _examine(patient, path, keys, tails, opener, data=data)
    finally:
        lock.release()
    return report


async def _examine(patient: Patient, path: Path, keys: Keys, tails: RecoveredTails, opener: Opener | None, *, data: bool) -> None:
    # Without an epoch to begin, or numbers to give out, nothing can be repaired; what is wrong can be told.
    if not await check_epochs(patient) or not counters_are_sound(patient):
        patient.repair = False
    await _open_hosts(patient, keys, opener, path)
    try:
        # First: nothing is repaired in a directory whose history was gone on with elsewhere.
        await check_history(patient, keys, data=data)
        await check_records(patient)
        if patient.registry is None and patient.repair:
            # The records that were in the way are set aside now.
            await _open_hosts(patient, keys, opener, path)
            await check_history(patient, keys, data=data)
        await _read_tails(patient, tails)
        await check_extents(patient)
        await check_names(patient)
        await check_maps(patient)
        await check_orphans(patient)
        await check_sectors(patient)
        await check_hosts(patient, data=data)
    finally:
        if patient.registry is not None:
            await patient.registry.aclose()
    await patient.commit()


async def _read_tails(patient: Patient, tails: RecoveredTails) -> None:
    """A value at a time: bytes on no host yet must open. Only where they stand is kept in mind."""
    patient.stage("tails in the journal", len(tails))
    for value_id in tails:
        try:
            pieces = await patient.seams.threads.run(tails.__getitem__, value_id)
        except Corrupt as error:
            await patient.found("tail", patient.file_of(value_id), str(error))
            continue
        patient.tails[value_id] = sorted((offset, len(data)) for offset, data in pieces)
        patient.report.looked_at["tails"] += 1
        patient.progress.done += 1

    def again(value_id: int) -> list[tuple[int, bytes]]:
        return tails[value_id] if value_id in patient.tails and value_id in tails else []

    patient.tail_bytes = again


async def _open_hosts(patient: Patient, keys: Keys, opener: Opener | None, path: Path) -> None:
    """Hosts, contracts and what reads shards; none of them where their records are damaged, which `check_records` has told."""
    patient.stage("opening hosts")
    volume_id, store, seams = patient.config.volume_id_bytes, patient.store, patient.seams
    try:
        registry = HostRegistry(volume_id, store, seams, opener=opener)
        contractor = Contractor(volume_id, store, registry, seams)
    except Corrupt as error:
        await patient.found("hosts-record", "hosts", str(error))
        return
    await registry.open_all()
    patient.registry, patient.contractor = registry, contractor
    lost = {number for number in registry.numbers() if store.get(LOST + u32(number)) is not None}
    patient.hosts_complete = all(registry.available(number) for number in registry.numbers() if number not in lost)
    if patient.epochs is not None:
        patient.host_io = HostIO(volume_id, keys, patient.epochs, registry, contractor, HostDB(store, seams), store, seams)
        patient.staging = Staging(path, volume_id, store, patient.host_io, seams, limit=0, writable=False)
        # What it misses is told with the sectors.
        await patient.staging.open()
        patient.strays = Strays(volume_id, registry, contractor, patient.staging)
