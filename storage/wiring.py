"""Opening a volume: the lock on its directory, every layer made and wired to the others, the loops started, and all of it ended again."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from storage.config import VolumeConfig, load_config
from storage.contractor import Contractor
from storage.coprocess import pair as coprocesses
from storage.epochs import Epochs
from storage.errors import BadArgument, FusefsError, NoSpace, Unavailable
from storage.files import Files
from storage.history.publisher import Publisher
from storage.host_io import HostIO
from storage.hosts.hostdb import HostDB
from storage.hosts.locking import SHORT_LOCK
from storage.hosts.registry import HostRegistry, Opener
from storage.interfaces import Batch, MetadataStore, TailPiece
from storage.keyfile import KEY_FILE, load_keyfile, open_slots
from storage.keys import SALT_SIZE, Keys
from storage.lock import VolumeLock
from storage.metadata.counters import Counter
from storage.metadata.keys import u32
from storage.metadata.opening import open_store
from storage.metadata.store import Store
from storage.namespace import Namespace
from storage.renewal import Renewal
from storage.replication import parse_replication
from storage.seams import Seams
from storage.sectors.cache import BlockCache
from storage.sectors.damage import Damages
from storage.sectors.deleter import Deleter
from storage.sectors.doubts import Doubts
from storage.sectors.lock_keeper import LockKeeper
from storage.sectors.manager import SectorManager
from storage.sectors.mending import Mender
from storage.sectors.placement import Placement
from storage.sectors.reader import SectorReader
from storage.sectors.reconcile import Reconciler
from storage.sectors.regenerate import Regenerator
from storage.sectors.scrub import INTERVAL as SCRUB_INTERVAL
from storage.sectors.scrub import Scrubber
from storage.sectors.shards import ShardReader
from storage.sectors.staging import Staging
from storage.sectors.strays import Strays
from storage.sectors.sweep import RECOVERED_KEY, Sweeper
from storage.servable import check_servable
from storage.standing import Standing
from storage.values.records import decode_value, tail_needed
from storage.values.values import Values
from storage.volume import DAY, Volume, VolumeOptions
from storage.wording import counted

log = logging.getLogger("fusefs.volume")

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
#: Seconds between two times that what was learned of hosts is saved.
SAVE_INTERVAL = 3600.0
#: Seconds after which memory that was not used is given back.
TRIM_SECONDS = 10.0


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
    if options.coprocesses:
        # They take a moment of a core each: while keys are derived, and not while the first thing is done with the volume.
        await seams.threads.run(coprocesses.start)
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


def _published(volume: Volume, publisher: Publisher) -> None:
    """A majority of the hosts has a new superblock."""
    volume.deleter.wake()
    if publisher.draft.published_all:
        # Else what was cut last is held, and the superblock speaks of what was ready before.
        volume.values.log_published()


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
            try:
                volume.store.apply(batch)
            except NoSpace as error:
                # What was learned of hosts is of less worth than what else waits for this commit.
                log.warning("what was learned of hosts lately is forgotten: %s", error)
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
    volume.deleter.gate, publisher.on_published = publisher, partial(_published, volume, publisher)
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
        log.info("what was in no sector yet came back from the journal: %s", counted(recovered, "byte"))
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
        store,
        volume.config.volume_id_bytes,
        volume.epochs,
        volume.hosts,
        volume.contractor,
        volume.host_io,
        publisher,
        volume.mender.surplus,
        seams,
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
    nursery.start_soon(volume.staging.files.run)
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
    nursery.start_soon(trim_idle, seams)
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
    shards = ShardReader(volume.host_io, volume.contractor, volume.hostdb, seams)
    reader = SectorReader(store, volume.host_io, volume.hostdb, cache, shards)
    volume.hedging = shards.hedging
    volume.staging = Staging(
        volume.path, volume_id, store, volume.host_io, seams, limit=options.staging if writable else 0, writable=writable
    )
    volume.strays = Strays(volume_id, volume.hosts, volume.contractor, volume.staging)
    shards.staging, reader.strays = volume.staging, volume.strays
    regenerator = Regenerator(volume.host_io, volume.contractor, volume.hosts, volume.hostdb, shards, seams)
    volume.sectors = SectorManager(
        store=store,
        host_io=volume.host_io,
        placement=volume.placement,
        reader=reader,
        shards=shards,
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
    volume.mender = Mender(
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
    volume.reconciler = Reconciler(
        store=store,
        placement=volume.placement,
        standing=volume.standing,
        doubts=volume.doubts,
        mender=volume.mender,
        seams=seams,
    )
    volume.mender.uploading = volume.sectors.uploading
    volume.renewal = Renewal(
        store,
        volume.hosts,
        volume.contractor,
        volume.standing,
        seams,
        forgot=volume.doubts.forgot,
        has_left=lambda number: not volume.reconciler.leaving.still_on([number]),
    )
    volume.standing.revoked = volume.renewal.revoked
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
        replace=volume.mender.replace,
        pace=volume.mender.pace,
        notes=shards.notes,
        seams=seams,
        interval=options.scrub_interval or SCRUB_INTERVAL,
    )
    shards.on_damage = volume.damages.suspect
    volume.mender.bad = volume.damages.hosts
    volume.damages.watchers.append(lambda copy, outcome: volume.reconciler.retry(copy.sector_id) if outcome.mended else None)
    volume.scrubber = Scrubber(
        store=store,
        damages=volume.damages,
        registry=volume.hosts,
        standing=volume.standing,
        seams=seams,
        interval=options.scrub_interval,
    )
    volume.mender.settled = volume.sectors.settled
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
        raise BadArgument(f"replication {spec} needs {counted(replication.hosts_needed, 'host')}, this volume has {have}{besides}")


async def trim_idle(seams: Seams) -> None:
    """For ever, in every open volume: memory that large sectors went through goes back to the kernel when none do."""
    while True:
        await seams.clock.sleep(TRIM_SECONDS)
        await seams.threads.run(coprocesses.ARENA.trim)


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
