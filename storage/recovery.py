"""Getting a volume back from its hosts, after the machine or the directory that had it is gone.

    which superblock (storage/history/finding.py) -> an empty directory, the lock, `recovering.json` -> keys.json
        -> metadata (storage/history/restore.py), amended in their last transaction -> opened once: a new epoch, claimed on the hosts
        -> volume.json, with which the directory becomes a volume; `recovering.json` goes

| a crash ... | leaves | and then |
|---|---|---|
| before `recovering.json` | an empty directory, maybe with a lock | as if nothing had been |
| until volume.json | `recovering.json`, and no volume | the next recover into that directory removes what is there and starts over |
| after volume.json | a volume, maybe with a `recovering.json` nobody looks at | mount it |

Amended: every counter jumps by 2^32, so that no number the lost machine may have given out meanwhile is given out again; epochs that were
claimed and never shipped are written down, so that the new one comes after them; hosts get the URL they were found at. Nothing that hosts
hold is deleted: the older superblocks, and what they refer to, go with the first mounts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from storage.config import CONFIG_FILE, load_config, save_config
from storage.documents import Document, encode_document
from storage.durable import from_os_error, fsync_dir, write_file_atomic
from storage.epochs import Epoch, encode_epoch
from storage.errors import BadArgument, Corrupt, Exists, Fenced, FusefsError, NotFound, Unavailable
from storage.history.ancestry import point_of
from storage.history.finding import Candidate, Choice, Secret, choose_volume, find, places
from storage.history.restore import Progress, Restored, restore
from storage.hosts.registry import Opener, decode_record, encode_record
from storage.interfaces import Batch, MetadataReader
from storage.keyfile import KEY_FILE, Argon2Parameters, make_keyfile, make_slot, passphrase_bytes, save_keyfile
from storage.keys import master_of_phrase
from storage.lock import LOCK_FILE, VolumeLock
from storage.metadata.keys import COUNTER, HOST, SECTOR, prefix_end, read_u64, u64
from storage.metadata.store import PUBLISHED_KEY
from storage.seams import Seams
from storage.sectors.plan import can_be_read, make_plan
from storage.sectors.records import decode_sector
from storage.sectors.staging import DIRECTORY as STAGING_DIRECTORY
from storage.values.records import sealed_end
from storage.values.whose import files_in
from storage.volume import Volume, VolumeOptions
from storage.wiring import absolute, with_layers

RECOVERING_FILE = "recovering.json"
RECOVERING_FORMAT = "fusefs recovering"
RECOVERING_VERSION = 1
#: What a recovery makes in the directory.
_MADE = ("journal", "metadata", STAGING_DIRECTORY, KEY_FILE, CONFIG_FILE, RECOVERING_FILE, LOCK_FILE)
#: Numbers of each kind left out: more than any tenure gives out.
JUMP = 1 << 32
#: The counters there are, also those that have no record yet.
COUNTERS = (b"sector", b"value", b"inode", b"cookie")
_SLICE = 500


class Recovering(Document, frozen=True, kw_only=True):
    """`recovering.json`: what is being recovered here. Only that it is there counts."""

    volume_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class Degraded:
    """Sectors that have fewer copies on hosts that answer than they should have."""

    #: Some copies; none at all.
    fewer: int = 0
    unreadable: int = 0
    #: Files that have bytes in unreadable ones; not all.
    paths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What came back, and how things stand."""

    volume_id: str
    generation: int
    #: The commit, and when the superblock with it was written.
    sequence: int
    written_ns: int
    #: Who wrote it.
    machine: str
    directory: str
    #: The new one, begun here.
    epoch: int
    files: int
    bytes: int
    sectors: int
    degraded: Degraded
    #: Hosts of the volume that did not answer: URL and why.
    silent: tuple[str, ...]
    #: A majority of the hosts has the new epoch: whoever else has the volume will notice.
    majority: bool
    #: Why not.
    trouble: str
    #: What was left out or passed over, and why.
    notes: tuple[str, ...]


async def recover_volume(
    path: Path | str,
    hosts: Sequence[str],
    *,
    passphrase: str | None = None,
    phrase: str | None = None,
    new_passphrase: str | None = None,
    volume_id: str | None = None,
    superblock: str | None = None,
    seams: Seams | None = None,
    opener: Opener | None = None,
    progress: Progress | None = None,
    argon2: Argon2Parameters | None = None,
) -> RecoveryReport:
    """The volume whose superblocks are on `hosts`, in the new (or empty) directory `path`; a volume like any other when it returns.

    One of `passphrase` and `phrase`; with the phrase `new_passphrase` is what the volume opens with here. `volume_id`: the beginning of
    one, where there are several. `superblock`: of several histories or generations the one to go back to (`Candidate.name`).

    Exists: there is a volume already. BadArgument: what is missing or has to be chosen. NotFound: no volume, no superblock.
    WrongPassphrase. Corrupt, Unavailable: no generation can be restored. Fenced: somebody else began an epoch meanwhile. NoSpace,
    IOFailure.
    If it raises, the directory is as it was before.
    """
    path = absolute(path)
    seams = seams or Seams()
    _check_target(path)
    secret = Secret(passphrase, phrase)
    if phrase is not None:
        if new_passphrase is None:
            raise BadArgument("with the recovery phrase, a new passphrase is needed: what the volume opens with from now on")
        # Before anything is asked of a host: both can be mistyped.
        passphrase_bytes(new_passphrase)
        master_of_phrase(phrase)
    async with places(hosts, seams, opener) as found:
        choice = await find(found, await choose_volume(found, volume_id), secret, superblock=superblock)
        if phrase is not None and new_passphrase is not None:
            slot = await seams.threads.run(
                make_slot, master_of_phrase(phrase), new_passphrase, choice.config.volume_id, seams.random, argon2
            )
            choice.keyfile = make_keyfile(choice.config.volume_id, (slot,))
        made = await seams.threads.run(_make_directory, path)
        lock = VolumeLock(path)
        await lock.acquire(seams, 0.0, "recover")
        try:
            # Again, now that nobody else can: of two that recover into one directory, one is told so.
            _check_target(path)
            return await _into(path, choice, bool(superblock), seams, opener, progress)
        except (Exception, trio.Cancelled):
            # Not for what kills the process: that leaves what it leaves.
            with trio.CancelScope(shield=True):
                await seams.threads.run(_remove, path, made)
            raise
        finally:
            lock.release()


# --------------------------------------------------------------------------------------------------------------------
# The directory


def _check_target(path: Path) -> None:
    """Exists, BadArgument unless a volume can be recovered into `path`."""
    try:
        entries = sorted(entry.name for entry in path.iterdir())
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise BadArgument(f"{path.parent} is no directory: make it first") from None
        return
    except NotADirectoryError:
        raise BadArgument(f"{path} exists and is not a directory; recover into a new one") from None
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error
    if CONFIG_FILE in entries:
        raise Exists(f"{path} is a volume already, and is not overwritten; recover into a new directory")
    known = _MADE if RECOVERING_FILE in entries else (LOCK_FILE,)
    other = [name for name in entries if name not in known and not _temporary(name)]
    if other:
        raise BadArgument(f"{path} is not empty (there is {other[0]!r}); recover into a new directory")


def _temporary(name: str) -> bool:
    return name.startswith(tuple(f".{made}." for made in _MADE)) and name.endswith(".tmp")


def _make_directory(path: Path) -> bool:
    """True if it was made, False if it was there."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    except OSError as error:
        raise BadArgument(f"cannot make {path}: {error.strerror}") from error
    fsync_dir(path.parent)
    return True


def _clear(path: Path, keep: Sequence[str] = ()) -> None:
    """Remove what a recovery made. Only for who holds the lock, in a directory that is no volume."""
    try:
        for entry in path.iterdir():
            if entry.name in keep or not (entry.name in _MADE or _temporary(entry.name)):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        fsync_dir(path)
    except OSError as error:
        raise from_os_error(error, f"removing what an earlier recovery left in {path}") from error


def _remove(path: Path, made: bool) -> None:
    if (path / CONFIG_FILE).exists():
        # It became a volume: what came after that is no reason to take it away.
        return
    # The marker last: should this be interrupted, the next one knows whose the rest is.
    _clear(path, (RECOVERING_FILE, LOCK_FILE))
    _clear(path, (LOCK_FILE,))
    if made:
        try:
            os.unlink(path / LOCK_FILE)
            os.rmdir(path)
        except OSError as error:
            raise from_os_error(error, f"removing {path}") from error


# --------------------------------------------------------------------------------------------------------------------
# Recovery


async def _into(
    path: Path, choice: Choice, by_hand: bool, seams: Seams, opener: Opener | None, progress: Progress | None
) -> RecoveryReport:
    hit = seams.failpoints.hit
    hit("recover.before_marker")
    marker = Recovering(
        format=RECOVERING_FORMAT,
        format_version=RECOVERING_VERSION,
        volume_id=choice.config.volume_id,
        generation=choice.chosen.block.generation,
    )
    await seams.threads.run(write_file_atomic, path / RECOVERING_FILE, encode_document(marker), 0o600, seams.failpoints)
    await seams.threads.run(_clear, path, (LOCK_FILE, RECOVERING_FILE))
    hit("recover.cleared")
    await seams.threads.run(save_keyfile, path / KEY_FILE, choice.keyfile, seams.failpoints)
    hit("recover.keys")
    candidate, restored, passed_over = await _restore(path, choice, by_hand, seams, progress)
    hit("recover.restored")
    options = VolumeOptions(purpose="recover", commit_interval=None)
    async with with_layers(
        path, choice.config, choice.keys, options, seams, opener, create=False, tails=restored.tails, passed_over=passed_over
    ) as volume:
        hit("recover.opened")
        publisher = volume.publisher
        if publisher is None:
            raise RuntimeError("a volume that is open for writing has a publisher")
        trouble = ""
        try:
            # A checkpoint of what is here now: amended, and under the new epoch.
            await publisher.publish()
        except Fenced:
            raise
        except FusefsError as error:
            # It is a volume all the same: mounted, it goes on trying.
            trouble = str(error)
        report = await _report(volume, choice, candidate, publisher.published_ns > 0, trouble)
    hit("recover.before_config")
    # Last: with this file the directory is a volume.
    await seams.threads.run(save_config, path, choice.config, seams.failpoints)
    hit("recover.config")
    await seams.threads.run(_unmark, path)
    return report


def _unmark(path: Path) -> None:
    load_config(path)
    try:
        os.unlink(path / RECOVERING_FILE)
    except OSError as error:
        raise from_os_error(error, f"removing {path / RECOVERING_FILE}") from error
    fsync_dir(path)


async def _restore(
    path: Path, choice: Choice, by_hand: bool, seams: Seams, progress: Progress | None
) -> tuple[Candidate, Restored, frozenset[bytes]]:
    """(superblock, what it gave back, hashes of those it goes on without). The newest that is whole, of this history; what a person chose
    is not replaced by another."""
    failed: list[Candidate] = []
    for candidate in [choice.chosen] if by_hand else [choice.chosen, *choice.older]:
        lineage = candidate.lineage()
        over = [*failed, *choice.others, *(c for c in choice.older if not lineage.contains(point_of(c.block)))]
        amend = partial(_amend, choice, candidate, goes_on=not over)
        try:
            restored = await restore(
                path,
                [source.host for source in choice.sources],
                choice.keys,
                candidate.block,
                candidate.body,
                sealed_of=sealed_end,
                seams=seams,
                progress=progress,
                amend=amend,
            )
        except (Corrupt, NotFound, Unavailable) as error:
            choice.notes.append(f"superblock {candidate.name} cannot be restored: {error}")
            failed.append(candidate)
            refused: FusefsError = error
            await seams.threads.run(shutil.rmtree, path / "metadata")
            continue
        choice.notes += restored.notes
        if failed:
            choice.notes.append(
                f"this is an older state, of generation {candidate.block.generation} (commit {candidate.block.sequence}): "
                f"what was committed after it, up to {choice.chosen.block.sequence}, is not in it"
            )
        return candidate, restored, frozenset(c.block.digest for c in over)
    raise type(refused)(f"{refused}; name more hosts, or bring back what the sectors hold with --salvage")


def _amend(choice: Choice, candidate: Candidate, reader: MetadataReader, restored: Restored, *, goes_on: bool) -> Batch:
    """See the module. `goes_on`: nothing newer stands on any host, so the log there can be gone on with."""
    batch = Batch()
    urls = {source.host_id: source.url for source in choice.sources}
    for key, raw in reader.scan(HOST, prefix_end(HOST), 1 << 20):
        record = decode_record(key, raw)
        url = urls.get(record.host_id)
        if url is not None and url.base != record.url:
            batch.put(*encode_record(replace(record, url=url.base, domain=url.domain or record.domain)))
    numbers = {COUNTER + name: 1 for name in COUNTERS}
    for key, raw in reader.scan(COUNTER, prefix_end(COUNTER), 1 << 20):
        numbers[key] = read_u64(raw) if len(raw) == 8 else 0
    for key, number in numbers.items():
        if not 0 < number < (1 << 63) - JUMP:
            raise Corrupt(f"superblock {candidate.block.generation}: its counter {key[1:].decode('ascii', 'replace')!r} is damaged")
        batch.put(key, u64(number + JUMP))
    for claim in restored.claims:
        # What was committed under it was never shipped: as far as this history goes, it ends here.
        first = min(claim.first_sequence, candidate.block.sequence + 1)
        epoch = Epoch(claim.number, claim.salt, numbers[COUNTER + b"sector"], candidate.block.written_ns, first)
        batch.put(*encode_epoch(epoch))
    if goes_on:
        batch.put(PUBLISHED_KEY, u64(candidate.block.sequence))
    return batch


# --------------------------------------------------------------------------------------------------------------------
# Report


async def _report(volume: Volume, choice: Choice, candidate: Candidate, majority: bool, trouble: str) -> RecoveryReport:
    block, body = candidate.block, candidate.body
    away = [record for record in volume.hosts.records() if not volume.hosts.available(record.number)]
    on_record = {record.url for record in volume.hosts.records()}
    reasons = {record.url: volume.hosts.reason(record.number) for record in away}
    reasons |= {url: why for url, why in choice.silent.items() if url not in on_record}
    # Most reasons name the host themselves.
    silent = [why if url in why else f"host {url}: {why}" for url, why in reasons.items()]
    ids = {record.host_id for record in volume.hosts.records()}
    notes = [*choice.notes, *(f"host {s.url.base} is none of the volume's hosts" for s in choice.sources if s.host_id not in ids)]
    return RecoveryReport(
        volume_id=choice.config.volume_id,
        generation=block.generation,
        sequence=block.sequence,
        written_ns=block.written_ns,
        machine=body.machine,
        directory=body.directory,
        epoch=volume.epochs.current.number,
        files=volume.namespace.regular_files(),
        bytes=volume.namespace.counts()[1],
        sectors=volume.sectors.count,
        degraded=await _degraded(volume),
        silent=tuple(silent),
        majority=majority,
        trouble=trouble,
        notes=tuple(dict.fromkeys(notes)),
    )


async def _scan(reader: MetadataReader, prefix: bytes, look: Callable[[bytes, bytes], bool]) -> None:
    """Show every record to `look`, in slices, until it says True."""
    start, stop = prefix, prefix_end(prefix)
    while found := reader.scan(start, stop, _SLICE):
        for key, value in found:
            if look(key, value):
                return
        start = found[-1][0] + b"\0"
        await trio.lowlevel.checkpoint()


async def _degraded(volume: Volume) -> Degraded:
    """Which sectors lack copies on hosts that answer now."""
    here = {number for number in volume.hosts.numbers() if volume.hosts.available(number)}
    fewer = 0
    unreadable: set[int] = set()

    def look(key: bytes, raw: bytes) -> bool:
        nonlocal fewer
        sector_id = read_u64(key, 1)
        record = decode_sector(raw, sector_id)
        if record.live and not can_be_read(record, here):
            unreadable.add(sector_id)
        elif record.live and make_plan(record, here, volume.standing.domain).missing:
            fewer += 1
        return False

    await _scan(volume.store, SECTOR, look)
    return Degraded(fewer, len(unreadable), tuple(await files_in(volume.store, volume.namespace.path_of, unreadable, most=None)))
