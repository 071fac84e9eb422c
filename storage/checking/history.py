"""The history on the hosts: superblocks, and the metadata objects they name, against this directory's history.

What stands there is what the volume is recovered from when this machine is gone. Comes first: where another machine has gone on with the
volume, nothing is repaired (I5).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from storage.checking.patient import Patient
from storage.errors import BadArgument, Corrupt, FusefsError, NotFound, Unavailable
from storage.history.ancestry import Lineage, point_of
from storage.history.host_side import SLOWEST, TIMEOUT
from storage.history.objects import CHUNK, INDEX, LOG, MAX_OBJECT, Ref, decode_index, metadata_prefix, object_name, open_object, writer_of
from storage.history.reading import Slots, slots_on
from storage.history.superblock import Body, KnownEpoch, Superblock
from storage.hosts.layout import superblock_name
from storage.hosts.locking import locking
from storage.hosts.registry import HostRegistry
from storage.interfaces import Batch, Host
from storage.keys import Keys
from storage.metadata.keys import LOST, u32
from storage.metadata.store import PUBLISHED_KEY
from storage.wording import counted


@dataclass(slots=True)
class _Side:
    """What one host has."""

    number: int
    host: Host
    #: Superblocks that verify, the latest first.
    found: list[tuple[Superblock, Body]] = field(default_factory=list)
    #: Metadata objects: name -> size.
    objects: dict[str, int] = field(default_factory=dict)
    #: Names of those its superblocks need, as far as could be found out.
    named: set[str] = field(default_factory=set)


async def check_history(patient: Patient, keys: Keys, *, data: bool) -> None:
    """Before anything is repaired. `data`: every metadata object is read and verified on every host."""
    registry, epochs = patient.registry, patient.epochs
    if registry is None or epochs is None or not epochs.all():
        return
    patient.stage("superblocks on hosts")
    lineage = Lineage([KnownEpoch(one.number, one.salt, one.first_sequence) for one in epochs.all()], patient.store.durable_sequence)
    sides: list[_Side] = []
    for number in registry.numbers():
        if registry.available(number) and not _given_up(patient, number):
            side = await _look(patient, registry, number, keys.superblock_key())
            if side is not None:
                sides.append(side)
    foreign = [side for side in sides if side.found and not lineage.contains(point_of(side.found[0][0]))]
    ours = [side for side in sides if side not in foreign]
    await _tell_foreign(patient, registry, foreign, ours, lineage)
    await _compare(patient, ours)
    for side in ours:
        await _check_objects(patient, side, ours, keys, data=data)
    _tell_orphans(patient, ours, lineage)


async def _look(patient: Patient, registry: HostRegistry, number: int, key: bytes) -> _Side | None:
    """What the host says; None where it does not, which the pass over the hosts tells."""
    volume_id = patient.config.volume_id_bytes
    host = registry.get(number)
    side = _Side(number, host)
    where = patient.url(number)
    try:
        slots = await slots_on(host, volume_id)
        if not any(slots.blocks.values()) and locking(host) is not None:
            slots = await _hidden(patient, host, where)
        with trio.move_on_after(TIMEOUT) as scope:
            side.objects = (await host.level(metadata_prefix(volume_id))).objects
        if scope.cancelled_caught:
            raise Unavailable(f"{where} did not answer within {TIMEOUT:.0f} s")
    except BadArgument as error:
        patient.repair = False
        await patient.found("newer-history", where, str(error))
        return None
    except FusefsError as error:
        await patient.found("host-away", where, f"{error}; its superblocks were not looked at")
        return None
    for note in slots.notes:
        await patient.found("superblock", where, note)
    for slot, block in slots.blocks.items():
        if block is None:
            continue
        try:
            side.found.append((block, block.open(key, f"superblock {slot}")))
        except BadArgument as error:
            patient.repair = False
            await patient.found("newer-history", where, str(error))
            return None
        except Corrupt as error:
            await patient.found("superblock", where, str(error))
    patient.report.looked_at["superblocks"] += len(side.found)
    return side


async def _hidden(patient: Patient, host: Host, where: str) -> Slots:
    """Of a host that shows no superblock: the latest that somebody deleted and a lock has kept. Put there again, if that may be done."""
    volume_id = patient.config.volume_id_bytes
    slots = await slots_on(host, volume_id, hidden=True)
    number, block = next(((number, block) for number, block in slots.blocks.items() if block is not None), (0, None))
    if block is None:
        return slots
    repaired = False
    if patient.repair:
        # The same bytes under the same name: whoever's it is, it says what it said.
        with trio.move_on_after(TIMEOUT):
            await host.put(superblock_name(volume_id, number), block.raw)
            repaired = True
    what = f"none of its superblocks is there by name, but a locked version of number {number} is"
    patient.report.add("superblock", where, what, repaired=repaired)
    return Slots(slots.top, {number: block}, slots.notes, slots.numbers)


async def _tell_foreign(patient: Patient, registry: HostRegistry, foreign: list[_Side], ours: list[_Side], lineage: Lineage) -> None:
    """Newest superblocks of a history that this directory's does not contain. Unless a majority is ours, nothing may be repaired here."""
    able = [n for n in registry.numbers() if registry.record(n).capabilities.conditional_put and not _given_up(patient, n)]
    voters = able or [n for n in registry.numbers() if not _given_up(patient, n)]
    passed_over = sum(1 for side in ours if side.found and side.number in voters) > len(voters) // 2
    for side in foreign:
        block, body = side.found[0]
        what = (
            f"it has epoch {block.epoch} of {body.machine}:{body.directory}, commit {block.sequence}, which is not in this directory "
            f"(epoch {lineage.epochs[-1].number}, commit {patient.store.durable_sequence})"
        )
        if passed_over:
            patient.note("behind", patient.url(side.number), f"{what}, and a majority of the hosts has ours")
        else:
            patient.repair = False
            await patient.found("foreign-history", patient.url(side.number), what)


def _given_up(patient: Patient, number: int) -> bool:
    return patient.store.get(LOST + u32(number)) is not None


async def _compare(patient: Patient, sides: list[_Side]) -> None:
    """Hosts among each other, and with what is here."""
    newest = max((side.found[0][0].generation for side in sides if side.found), default=0)
    if sides and not newest:
        if patient.store.published is not None:
            await patient.found("no-superblock", "hosts", "none of those that answer has a superblock of this volume any more")
        else:
            patient.note("pending", "hosts", "nothing was published yet: without this directory the volume cannot be recovered")
        return
    for side in sides:
        generation = side.found[0][0].generation if side.found else 0
        if generation < newest:
            what = f"its newest superblock is generation {generation}" if generation else "it has no superblock"
            patient.note("behind", patient.url(side.number), f"{what}, others have {newest}")
    sequence = max((side.found[0][0].sequence for side in sides if side.found), default=0)
    if newest and sequence < patient.store.durable_sequence and patient.store.changes.newer:
        patient.note("pending", "hosts", f"commits {sequence + 1} to {patient.store.durable_sequence} are on this machine alone")


# ---- objects


async def _check_objects(patient: Patient, side: _Side, sides: list[_Side], keys: Keys, *, data: bool) -> None:
    """Of each generation the host keeps: the log, the checkpoint's index, and its chunks."""
    refs: dict[str, tuple[Ref, int]] = {}
    for block, body in side.found:
        refs |= {ref.name: (ref, LOG) for entry in body.log for ref in entry.parts}
        if body.checkpoint is None:
            continue
        refs[body.checkpoint.name] = (body.checkpoint, INDEX)
        try:
            raw = await _from_any(patient, body.checkpoint, INDEX, [side, *sides], keys)
            index = decode_index(raw, f"{patient.url(side.number)}: checkpoint")
        except FusefsError as error:
            what = f"the checkpoint of superblock generation {block.generation} cannot be read ({error})"
            await _lost(patient, side, what)
            continue
        refs |= {chunk.name: (chunk, CHUNK) for chunk in index.chunks}
    side.named = set(refs)
    patient.stage(f"metadata on {patient.url(side.number)}", len(refs))
    patient.report.looked_at["metadata objects"] += len(refs)
    for ref, kind in refs.values():
        why = await _problem(patient, side, ref, kind, keys, data=data)
        if why:
            await _mend(patient, side, [other for other in sides if other is not side], ref, kind, keys, why)
        patient.progress.done += 1


async def _problem(patient: Patient, side: _Side, ref: Ref, kind: int, keys: Keys, *, data: bool) -> str:
    """What is wrong with the object there; "" if nothing is."""
    size = side.objects.get(ref.name)
    if size != ref.size:
        why = "is not there" if size is None else f"has {size} bytes instead of {ref.size}"
        return f"{why}, but a locked version is" if await _kept_by_lock(patient, side, ref, kind, keys) else why
    if data:
        try:
            await _open(patient, side, ref, kind, keys)
        except Unavailable as error:
            await patient.found("unanswered", patient.url(side.number), str(error))
        except (Corrupt, NotFound) as error:
            return f"cannot be used ({error})"
    return ""


async def _kept_by_lock(patient: Patient, side: _Side, ref: Ref, kind: int, keys: Keys) -> bool:
    """Of a name that somebody deleted or overwrote: does the host have a locked version with the object, whole?"""
    if locking(side.host) is None:
        return False
    try:
        await _open(patient, side, ref, kind, keys)
    except FusefsError:
        return False
    return True


async def _mend(patient: Patient, side: _Side, others: list[_Side], ref: Ref, kind: int, keys: Keys, why: str) -> None:
    """Put it there again from a host that has it whole, if only in a locked version; where none has, see to it that the next mount writes a
    new checkpoint."""
    where, what = patient.url(side.number), f"metadata object {ref.name[:26]} {why}"
    sources = others if locking(side.host) is None else [*others, side]
    try:
        sealed = await _from_any(patient, ref, kind, sources, keys, opened=False)
    except FusefsError:
        await _lost(patient, side, f"{what}, and no other host has it whole")
        return
    if not patient.repair:
        await patient.found("metadata-object", where, what)
        return
    name = object_name(patient.config.volume_id_bytes, ref.name)
    try:
        with trio.move_on_after(TIMEOUT + ref.size / SLOWEST) as scope:
            await side.host.put(name, sealed)
        if scope.cancelled_caught:
            raise Unavailable(f"{where} did not answer in time")
    except FusefsError as error:
        await patient.found("metadata-object", where, f"{what} ({error})")
        return
    patient.report.add("metadata-object", where, what, repaired=True)


async def _lost(patient: Patient, side: _Side, what: str) -> None:
    batch = Batch()
    # Where it is not known what was published, a checkpoint is (storage/history/publisher.py).
    batch.delete(PUBLISHED_KEY)
    repaired = await patient.found("lost-metadata", patient.url(side.number), what, batch if patient.store.get(PUBLISHED_KEY) else None)
    if repaired:
        patient.note("pending", patient.url(side.number), "the next mount writes all metadata to the hosts anew")


async def _from_any(patient: Patient, ref: Ref, kind: int, sides: list[_Side], keys: Keys, *, opened: bool = True) -> bytes:
    """The object, opened or as stored, from the first that gives it whole. Unavailable, Corrupt, NotFound: why the last did not."""
    error: FusefsError = NotFound("no other host is there")
    for side in sides:
        try:
            raw, body = await _open(patient, side, ref, kind, keys)
            return body if opened else raw
        except FusefsError as failed:
            error = failed
    raise error


async def _open(patient: Patient, side: _Side, ref: Ref, kind: int, keys: Keys) -> tuple[bytes, bytes]:
    """(as stored, body)."""
    volume_id = patient.config.volume_id_bytes
    where = patient.url(side.number)
    with trio.move_on_after(TIMEOUT + ref.size / SLOWEST):
        raw = await side.host.get(object_name(volume_id, ref.name), min(ref.size, MAX_OBJECT))
        return raw, await patient.seams.threads.run(open_object, keys.metadata_key(), volume_id, ref, kind, raw, where)
    raise Unavailable(f"{where} did not give metadata object {ref.name[:26]} in time")


def _tell_orphans(patient: Patient, sides: list[_Side], lineage: Lineage) -> None:
    """Objects of this history that no log entry names: of a checkpoint that was broken off, or of generations that have gone."""
    for side in sides:
        orphans = 0
        for name in side.objects.keys() - side.named:
            writer = writer_of(name)
            orphans += writer is not None and lineage.has_epoch(*writer)
        if orphans:
            patient.note(
                "pending", patient.url(side.number), f"what no superblock names is taken away: {counted(orphans, 'metadata object')}"
            )
