"""A volume open for reading only: it begins no epoch, disturbs no writer, and what is stored is not changed by a byte.

    from            shows                                                     needs
    VOLUME          what its directory durably holds, the journal's tails     that nobody has it open for writing at this moment;
                    included: also of a volume that is fenced or failed       a writer may come later, and is not seen
    its hosts       the newest superblock on any of them, as of its commit    URLs (given, or VOLUME's while somebody writes there)
                                                                              and the passphrase or the phrase

Either is a snapshot: what a writer changes later is not shown. What it deletes from the hosts later cannot be read here any more: that is
an error (EIO), never other bytes, since every block is verified against the metadata of the snapshot. Mount again to see the newer state.

Metadata restored from hosts stand in a private directory (`scratch`): names, sizes and structure, no contents.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import msgspec
import trio

from storage.config import load_config
from storage.epochs import Epochs
from storage.errors import Corrupt, Fenced, FusefsError, NotFound, Unavailable
from storage.history.finding import Candidate, Choice, Secret, choose_volume, find, places
from storage.history.restore import Progress, Restored, restore
from storage.hosts.registry import Opener, decode_record
from storage.hosts.urls import HostURL, parse_url
from storage.interfaces import FlushProgress, FlushReport, Host
from storage.keyfile import KEY_FILE, load_keyfile, open_slots
from storage.keys import Keys, master_of_phrase, phrase_of
from storage.lock import VolumeLock
from storage.metadata.counters import Counter
from storage.metadata.keys import HOST, prefix_end
from storage.metadata.lmdb_base import MAP_SIZE, LmdbBase
from storage.metadata.read_only import ReadOnlyStore, open_read_only_store
from storage.metadata.store import Store
from storage.seams import Seams
from storage.servable import check_servable
from storage.status import VolumeStatus
from storage.values.records import sealed_end, tail_needed
from storage.volume import Volume, VolumeOptions
from storage.wiring import SECTOR_RANGE, absolute, make_layers, only, trim_idle

log = logging.getLogger("fusefs.volume")

#: What whoever tries to change something is told.
REASON = "it is mounted read-only"


@dataclass(frozen=True, slots=True)
class ReadOnlySource:
    """What a read-only view is made from: `path`, a volume's directory; or `hosts`, URLs of some of its hosts.

    `volume_id`: which one, where hosts hold several (the beginning of it). `superblock`: of several histories or generations the one to
    show. One of passphrase and phrase; `path` needs the passphrase.
    """

    path: Path | None = None
    hosts: tuple[str, ...] = ()
    volume_id: str = ""
    passphrase: str = field(default="", repr=False)
    phrase: str = field(default="", repr=False)
    superblock: str = ""


class ReadOnlyVolume(Volume):
    """Made by `open_read_only`. Whatever would change something raises Fenced."""

    #: What it shows, for people.
    view = ""
    #: What `status` calls the volume's place, where that is not its directory.
    shown_path = ""
    #: What is shown comes from the volume's directory.
    local = True

    async def commit(self) -> None:
        """There is nothing to commit."""
        await trio.lowlevel.checkpoint()

    async def flush(self, progress: FlushProgress | None = None) -> FlushReport:  # noqa: ARG002 - as a volume's
        """There is nothing to send. Tails that only the journal has stay here: they go to the hosts from a mount for writing."""
        await trio.lowlevel.checkpoint()
        return FlushReport()

    async def add_host(self, url: str, contract_days: float | None = None) -> int:  # noqa: ARG002 - as a volume's
        raise Fenced(f"{url} is not added: {REASON}")

    async def status(self) -> VolumeStatus:
        """See Volume. `local_error` is empty: nothing is here that could fail to become durable."""
        now = await super().status()
        path = self.shown_path or now.path
        # What came from hosts is there: in sectors, or in the log.
        pending = now.pending_bytes if self.local else 0
        return msgspec.structs.replace(
            now, path=path, pending_bytes=pending, read_only=True, read_only_reason=REASON, local_error="", view=self.view
        )


@asynccontextmanager
async def open_read_only(
    source: ReadOnlySource,
    *,
    scratch: Path,
    seams: Seams | None = None,
    options: VolumeOptions | None = None,
    opener: Opener | None = None,
    progress: Progress | None = None,
) -> AsyncIterator[ReadOnlyVolume]:
    """See the module. `scratch`: an empty directory that only this user can enter; the caller removes it afterwards. `progress`: told how
    much of the metadata has come from hosts, in bytes.

    Hosts that are away are warned about (`status`), and only what they alone have cannot be read. BadArgument (not a volume, several
    volumes on the hosts, newer format), NotFound (no superblock), WrongPassphrase, Corrupt, Unavailable, IOFailure.
    """
    seams = seams or Seams()
    options = options or VolumeOptions()
    if source.path is None:
        async with _from_hosts(source, scratch, seams, options, opener, progress) as volume:
            yield volume
        return
    path = absolute(source.path)
    config = await seams.threads.run(load_config, path)
    keyfile = await seams.threads.run(load_keyfile, path / KEY_FILE, config.volume_id)
    master = await seams.threads.run(open_slots, keyfile, source.passphrase)
    keys = Keys(master)
    lock = VolumeLock(path)
    if not lock.acquire_shared():
        known = await seams.threads.run(known_hosts, path)
        # By the phrase: the passphrase may have been changed since the superblock was written.
        there = ReadOnlySource(path, known, config.volume_id, phrase=phrase_of(master))
        async with _from_hosts(there, scratch, seams, options, opener, progress) as volume:
            volume.view += f", while another process has {path} open"
            yield volume
        return
    try:
        async with open_read_only_store(path, seams, reason=REASON, journal_key=keys.journal_key, tail_needed=tail_needed) as store:
            volume = ReadOnlyVolume(path, config, options, seams)
            volume.view = f"commit {store.durable_sequence}, what {path} has now"
            async with _served(volume, store, keys, opener, store.recovered_tails()):
                # From here on a writer may come: LMDB keeps what this snapshot needs, and the tails are in memory.
                store.let_go_of_journal()
                lock.release()
                yield volume
    finally:
        lock.release()


def known_hosts(path: Path) -> tuple[str, ...]:
    """URLs of the hosts of the volume in `path`, beside whoever has it open for writing. Blocking, briefly. Corrupt, IOFailure.

    BadArgument: this process has it open itself.
    """
    base = LmdbBase(path / "metadata", MAP_SIZE, read_only=True)
    try:
        return tuple(decode_record(key, raw).url for key, raw in base.scan(HOST, prefix_end(HOST), 1_000_000))
    finally:
        base.close()


@asynccontextmanager
async def _served(
    volume: ReadOnlyVolume, store: ReadOnlyStore, keys: Keys, opener: Opener | None, tails: Mapping[int, Sequence[tuple[int, bytes]]]
) -> AsyncIterator[None]:
    """The layers over `store`, with the only loops that change nothing. Whatever the block raises comes out as itself, not in a group."""
    try:
        async with trio.open_nursery() as nursery:
            # A MetadataStore, which is all that layers need; what a Store has besides is for writers.
            volume.store = cast("Store", store)
            volume.epochs = Epochs.load(store)
            make_layers(volume, store, keys, nursery, opener, Counter(store, b"sector", SECTOR_RANGE), writable=False)
            volume.warnings += await volume.staging.open()
            await volume.hosts.open_all()
            await volume.placement.poll_space()
            await check_servable(volume)
            volume.values.recover(tails, ship=False)
            nursery.start_soon(volume.hedging.run)
            nursery.start_soon(trim_idle, volume.seams)
            nursery.start_soon(volume.files.run)
            nursery.start_soon(volume.hosts.retry)
            try:
                yield
            finally:
                with trio.CancelScope(shield=True):
                    await volume.hosts.aclose()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise only(group) from group


class _Relocated(Opener):
    """Opens hosts where they were found, which need not be where the metadata say. The registry checks that they are the ones on record."""

    def __init__(self, inner: Opener, places: Mapping[str, str]) -> None:
        self._inner, self._places = inner, places

    async def __call__(self, url: HostURL, seams: Seams, *, create: bool = False) -> Host:
        place = self._places.get(url.base)
        return await self._inner(parse_url(place) if place is not None else url, seams, create=create)


@asynccontextmanager
async def _from_hosts(
    source: ReadOnlySource,
    scratch: Path,
    seams: Seams,
    options: VolumeOptions,
    opener: Opener | None,
    progress: Progress | None,
) -> AsyncIterator[ReadOnlyVolume]:
    """The newest superblock on `source.hosts`, restored into `scratch`."""
    secret = Secret(source.passphrase or None, source.phrase or None)
    if source.phrase:
        # Before anything is asked of a host: it can be mistyped.
        master_of_phrase(source.phrase)
    async with places(source.hosts, seams, opener) as found:
        choice = await find(found, await choose_volume(found, source.volume_id or None), secret, superblock=source.superblock or None)
        chosen, restored = await _restore(scratch, choice, bool(source.superblock), seams, progress)
        having = ", ".join(one.url.base for one in choice.sources if one.host_id in chosen.hosts)
        moved = {one.host_id: one.url.base for one in choice.sources}
    block, body, keys = chosen.block, chosen.body, choice.keys
    at = {known.url: moved[known.host_id] for known in body.hosts if known.host_id in moved}
    async with open_read_only_store(scratch, seams, reason=REASON, journal_key=keys.journal_key, tail_needed=tail_needed) as store:
        volume = ReadOnlyVolume(source.path or scratch, choice.config, options, seams)
        volume.shown_path = str(source.path or ", ".join(source.hosts))
        volume.local = False
        written = datetime.fromtimestamp(block.written_ns // 1_000_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        volume.view = f"commit {block.sequence} of {written} (epoch {block.epoch}, {body.machine}), what {having} has"
        volume.warnings += [*choice.notes, *choice.silent.values(), *restored.notes]
        async with _served(volume, store, keys, _Relocated(opener or Opener(), at), restored.tails):
            yield volume


async def _restore(scratch: Path, choice: Choice, by_hand: bool, seams: Seams, progress: Progress | None) -> tuple[Candidate, Restored]:
    """The newest superblock that is whole, of the history chosen; what a person chose is not replaced by another. Corrupt, Unavailable."""
    refused: FusefsError = NotFound("there is no superblock")
    for candidate in [choice.chosen] if by_hand else [choice.chosen, *choice.older]:
        hosts = [source.host for source in choice.sources]
        try:
            restored = await restore(
                scratch, hosts, choice.keys, candidate.block, candidate.body, sealed_of=sealed_end, seams=seams, progress=progress
            )
        except (Corrupt, NotFound, Unavailable) as error:
            refused = error
            choice.notes.append(f"superblock {candidate.name} cannot be used: {error}")
            await seams.threads.run(shutil.rmtree, scratch / "metadata")
            continue
        return candidate, restored
    raise refused
