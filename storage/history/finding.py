"""From URLs of some hosts to the superblock to go on from: which volumes there are, the key, which history, which generation.

    given hosts -> volumes -> superblocks -> passphrase or phrase -> the hosts these superblocks name, as far as they answer -> the newest

What hosts say is compared, never trusted: a superblock counts once its key verifies it. A host that is damaged, stale or foreign is left
out and said so; only where none of several histories has a majority of the hosts must a person choose (I5). Nothing is changed anywhere.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from storage.config import VolumeConfig
from storage.errors import BadArgument, Corrupt, FusefsError, NotFound, Unavailable, WrongPassphrase
from storage.history.ancestry import Lineage, newest, point_of
from storage.history.reading import superblocks_on, volumes_on
from storage.history.superblock import Body, Superblock, config_of
from storage.hosts.identity import read_identity
from storage.hosts.registry import OPEN_TIMEOUT, Opener
from storage.hosts.urls import HostURL, parse_url
from storage.interfaces import Host
from storage.keyfile import KeyFile, encode_keyfile, open_slots
from storage.keys import Keys, master_of_phrase
from storage.seams import Seams
from storage.wording import counted

#: Distinct key files tried with a passphrase at most: each costs a second or so, and hosts may have made them up.
MAX_KEYFILES = 8


@dataclass(frozen=True, slots=True)
class Secret:
    """One of the two."""

    passphrase: str | None = field(default=None, repr=False)
    phrase: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Source:
    """A host that answers, and says who it is."""

    host: Host
    host_id: str
    url: HostURL


@dataclass(frozen=True, slots=True)
class VolumeOnHosts:
    """A volume, as far as its superblocks can be read without a key. Unverified: hosts may say anything."""

    volume_id: str
    #: Of the newest superblock; 0 where there is none.
    generation: int
    epoch: int
    sequence: int
    written_ns: int
    #: URLs of those that hold something of it.
    hosts: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Candidate:
    """A superblock that verifies."""

    block: Superblock
    body: Body
    #: Ids of the hosts that have it.
    hosts: set[str] = field(default_factory=set)
    #: Ids of those that have no newer one.
    newest_on: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """How a person chooses it: generation and the first digits of its hash."""
        return f"{self.block.generation}-{self.block.digest.hex()[:8]}"

    def describe(self) -> str:
        """For a person who has to choose."""
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.block.written_ns / 1e9))
        return f"{self.name}: epoch {self.block.epoch}, commit {self.block.sequence}, of {at}, by {self.body.machine}:{self.body.directory}"

    def lineage(self) -> Lineage:
        return Lineage(self.body.epochs, self.block.sequence)


@dataclass(slots=True)
class Choice:
    """What to restore from."""

    volume_id: bytes
    config: VolumeConfig
    keys: Keys
    #: Key slots to go on with; the one the passphrase opened.
    keyfile: KeyFile
    chosen: Candidate
    #: Older generations of the same history, newest first: to fall back on.
    older: list[Candidate]
    #: Everything that verifies and is not in the chosen one's history.
    others: list[Candidate]
    sources: list[Source]
    #: URL -> why the host is not among the sources.
    silent: dict[str, str]
    #: What was left out, and why; a sentence each.
    notes: list[str]


class Places:
    """The hosts that are asked. Made by `places`."""

    def __init__(self, seams: Seams, opener: Opener | None) -> None:
        self.seams, self._opener = seams, opener or Opener()
        self.sources: list[Source] = []
        self.silent: dict[str, str] = {}
        self.notes: list[str] = []
        #: Host id -> its superblocks of the volume, newest generation first.
        self.blocks: dict[str, list[Superblock]] = {}

    async def open(self, urls: Sequence[HostURL], expected: Sequence[str | None]) -> None:
        """All at the same time; who does not answer, or is not the host id expected, is silent. Never raises for a host."""
        found: dict[int, Source] = {}

        async def one(place: int, url: HostURL) -> None:
            try:
                source = await self._open(url)
            except FusefsError as error:
                self.silent[url.base] = str(error)
                return
            wanted = expected[place]
            if wanted is not None and source.host_id != wanted:
                self.silent[url.base] = f"host {url.base} is another host now (id {source.host_id}, not {wanted})"
                await _close(source.host)
                return
            found[place] = source

        async with trio.open_nursery() as nursery:
            for place, url in enumerate(urls):
                nursery.start_soon(one, place, url)
        known = {source.host_id for source in self.sources}
        for _, source in sorted(found.items()):
            if source.host_id in known:
                await _close(source.host)
                continue
            known.add(source.host_id)
            self.sources.append(source)

    async def _open(self, url: HostURL) -> Source:
        with trio.move_on_after(OPEN_TIMEOUT):
            host = await self._opener(url, self.seams)
            try:
                identity = await read_identity(host)
            except BaseException:
                await _close(host)
                raise
            return Source(host, identity.id, url)
        raise Unavailable(f"host {url.base} did not answer within {OPEN_TIMEOUT:g} s")

    async def volumes(self) -> dict[bytes, list[Source]]:
        """Which volumes the hosts hold anything of."""
        found: dict[bytes, list[Source]] = {}

        async def one(source: Source) -> None:
            try:
                for volume_id in await volumes_on(source.host):
                    found.setdefault(volume_id, []).append(source)
            except FusefsError as error:
                self.silent[source.url.base] = str(error)

        async with trio.open_nursery() as nursery:
            for source in self.sources:
                nursery.start_soon(one, source)
        return found

    async def read(self, volume_id: bytes) -> None:
        """The superblocks of the hosts that were not asked yet. BadArgument: one of a newer format, which must not be passed over."""
        refused: list[BadArgument] = []

        async def one(source: Source) -> None:
            try:
                self.blocks[source.host_id], notes = await superblocks_on(source.host, volume_id)
                self.notes += notes
            except BadArgument as error:
                refused.append(error)
            except FusefsError as error:
                self.silent[source.url.base] = str(error)
                self.blocks[source.host_id] = []

        async with trio.open_nursery() as nursery:
            for source in self.sources:
                if source.host_id not in self.blocks:
                    nursery.start_soon(one, source)
        if refused:
            raise refused[0]

    async def aclose(self) -> None:
        for source in self.sources:
            await _close(source.host)


async def _close(host: Host) -> None:
    with trio.CancelScope(shield=True):
        try:
            await host.aclose()
        except FusefsError:
            # It was only read from.
            pass


@asynccontextmanager
async def places(urls: Sequence[str], seams: Seams, opener: Opener | None) -> AsyncIterator[Places]:
    """The hosts at these URLs, open as long as the block runs. BadArgument: no URL, or none at all. Unavailable: none answers."""
    if not urls:
        raise BadArgument("name at least one host of the volume: --host URL")
    parsed = [parse_url(url) for url in urls]
    found = Places(seams, opener)
    try:
        await found.open(parsed, [None] * len(parsed))
        if not found.sources:
            raise Unavailable(f"no host answers: {'; '.join(found.silent.values())}")
        yield found
    finally:
        await found.aclose()


# --------------------------------------------------------------------------------------------------------------------
# Which volume


async def list_volumes(urls: Sequence[str], *, seams: Seams | None = None, opener: Opener | None = None) -> list[VolumeOnHosts]:
    """Every volume the hosts hold anything of, newest first. Needs no key. BadArgument, Unavailable: no host answers."""
    async with places(urls, seams or Seams(), opener) as found:
        listed: list[VolumeOnHosts] = []
        for volume_id, holders in (await found.volumes()).items():
            found.blocks, found.notes = {}, []
            try:
                await found.read(volume_id)
            except BadArgument as error:
                found.notes.append(str(error))
            blocks = [block for source in holders for block in found.blocks.get(source.host_id, [])]
            top = max(blocks, key=lambda block: (block.epoch, block.sequence, block.generation), default=None)
            listed.append(
                VolumeOnHosts(
                    volume_id.hex(),
                    top.generation if top else 0,
                    top.epoch if top else 0,
                    top.sequence if top else 0,
                    top.written_ns if top else 0,
                    tuple(source.url.base for source in found.sources if source in holders),
                    (*found.notes, *found.silent.values()),
                )
            )
        return sorted(listed, key=lambda volume: (-volume.written_ns, volume.volume_id))


async def choose_volume(found: Places, wanted: str | None) -> bytes:
    """The one volume there is, or the one whose id begins with `wanted`. NotFound; BadArgument lists them where there are several."""
    there = sorted(volume_id.hex() for volume_id in await found.volumes())
    where = ", ".join(source.url.base for source in found.sources)
    if not there:
        raise NotFound(f"{where}: there is no volume on {'this host' if len(found.sources) == 1 else 'these hosts'}")
    fitting = [volume_id for volume_id in there if volume_id.startswith((wanted or "").lower())]
    if len(fitting) == 1:
        return bytes.fromhex(fitting[0])
    if wanted and not fitting:
        raise NotFound(f"{where}: there is no volume {wanted!r}; there are {_some(there)}")
    raise BadArgument(f"{where}: there are several volumes, choose one with --volume ID: {_some(fitting)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


# --------------------------------------------------------------------------------------------------------------------
# Key, history, generation


async def find(found: Places, volume_id: bytes, secret: Secret, *, superblock: str | None = None) -> Choice:
    """The superblock to go on from. `superblock`: the one a person chose, GENERATION or GENERATION-HASH.

    NotFound (there is none: salvage), WrongPassphrase, Corrupt (none verifies), Unavailable; BadArgument: a newer format, or several
    histories of which none has a majority of the hosts: the message describes them, and how to choose.
    """
    await found.read(volume_id)
    if not any(found.blocks.values()):
        raise NotFound(
            f"no superblock of volume {volume_id.hex()} is left on {', '.join(source.url.base for source in found.sources)}"
            f"{_because([*found.notes, *found.silent.values()])}; name more hosts, or bring back what the sectors hold with --salvage"
        )
    keys, keyfile = await unlock(found, volume_id, secret)
    candidates = _verified(found, keys)
    if not candidates:
        if secret.phrase is not None:
            raise WrongPassphrase(f"these 24 words open no superblock of volume {volume_id.hex()}: are they another volume's?")
        raise Corrupt(f"no superblock of volume {volume_id.hex()} verifies{_because(found.notes)}; name more hosts, or use --salvage")
    # Twice: a newer superblock on one of them may name more.
    for _ in range(2):
        if not await _reach_further(found, candidates):
            break
        await found.read(volume_id)
        candidates = _verified(found, keys)
    chosen = _by_hand(candidates, superblock) if superblock else _newest(found, candidates)
    lineage = chosen.lineage()
    same = [c for c in candidates if c is not chosen and _within(lineage, c)]
    same.sort(key=lambda c: (c.block.epoch, c.block.sequence, c.block.generation), reverse=True)
    others = [c for c in candidates if c is not chosen and not _within(lineage, c)]
    config = config_of(chosen.body, f"superblock {chosen.block.generation}")
    if config.volume_id_bytes != volume_id:
        raise Corrupt(f"superblock {chosen.block.generation} is of volume {volume_id.hex()}, its volume.json of {config.volume_id}")
    return Choice(
        volume_id, config, keys, keyfile or chosen.block.keys, chosen, same, others, found.sources, found.silent, _unique(found.notes)
    )


def _because(notes: Sequence[str]) -> str:
    return f" ({'; '.join(_unique(notes)[:5])})" if notes else ""


def _unique(notes: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(notes))


def _within(lineage: Lineage, candidate: Candidate) -> bool:
    """Is it an earlier moment of that history? Of an epoch before all it names nothing is known: then it is, if they share nothing else."""
    point = point_of(candidate.block)
    if lineage.epochs and point.epoch < lineage.epochs[0].number:
        return not lineage.complete
    return lineage.contains(point)


async def unlock(found: Places, volume_id: bytes, secret: Secret) -> tuple[Keys, KeyFile | None]:
    """(keys, key file that the passphrase opened). WrongPassphrase."""
    if secret.phrase is not None:
        return Keys(master_of_phrase(secret.phrase)), None
    if secret.passphrase is None:
        raise BadArgument("a passphrase or the recovery phrase is needed")
    blocks = sorted((block for blocks in found.blocks.values() for block in blocks), key=lambda block: block.generation, reverse=True)
    keyfiles = {encode_keyfile(block.keys): block.keys for block in blocks}
    refused: FusefsError | None = None
    for keyfile in list(keyfiles.values())[:MAX_KEYFILES]:
        try:
            return Keys(await found.seams.threads.run(open_slots, keyfile, secret.passphrase)), keyfile
        except (WrongPassphrase, Corrupt) as error:
            refused = refused if isinstance(refused, WrongPassphrase) else error
    raise refused or WrongPassphrase(f"no key slot of volume {volume_id.hex()} opens with this passphrase; try again")


def _verified(found: Places, keys: Keys) -> list[Candidate]:
    """Those the key opens; what does not open is noted."""
    candidates: dict[bytes, Candidate] = {}
    key = keys.superblock_key()
    for source in found.sources:
        first = True
        for block in found.blocks.get(source.host_id, []):
            candidate = candidates.get(block.digest)
            if candidate is None:
                try:
                    body = block.open(key, f"host {source.url.base}: superblock {block.generation}")
                except Corrupt as error:
                    found.notes.append(str(error))
                    continue
                candidate = candidates[block.digest] = Candidate(block, body)
            candidate.hosts.add(source.host_id)
            if first:
                candidate.newest_on.add(source.host_id)
                first = False
    return list(candidates.values())


async def _reach_further(found: Places, candidates: Sequence[Candidate]) -> bool:
    """Open the hosts that superblocks name and nobody gave, as far as they answer. True if there are any."""
    known = {source.host_id for source in found.sources}
    wanted: dict[str, HostURL] = {}
    for candidate in candidates:
        for host in candidate.body.hosts:
            if host.lost or host.host_id in known or host.host_id in wanted:
                continue
            try:
                url = parse_url(host.url)
            except BadArgument as error:
                found.notes.append(str(error))
                continue
            if url.base not in found.silent:
                wanted[host.host_id] = url
    before = len(found.sources)
    await found.open(list(wanted.values()), list(wanted))
    return len(found.sources) > before


def _by_hand(candidates: Sequence[Candidate], wanted: str) -> Candidate:
    fitting = [c for c in candidates if c.name == wanted or str(c.block.generation) == wanted]
    if len(fitting) == 1:
        return fitting[0]
    there = "; ".join(c.describe() for c in fitting or candidates)
    if fitting:
        raise BadArgument(f"superblock {wanted}: there are several, choose one with --superblock NAME: {there}")
    raise NotFound(f"there is no superblock {wanted!r}; there are {there}")


def _newest(found: Places, candidates: Sequence[Candidate]) -> Candidate:
    """The end of the one history there is, or of the one that a majority of the hosts holds.

    On each host only its newest counts: below it may stand a history that was passed over there, by who had a majority at that moment.
    """
    candidates = [candidate for candidate in candidates if candidate.newest_on]
    place, ends = newest([(c.block, c.lineage()) for c in candidates])
    if place is not None:
        return candidates[place]
    held: list[tuple[Candidate, int, int]] = []
    lineages = [candidates[i].lineage() for i in ends]
    for end in (candidates[i] for i in ends):
        # What is in several of them, from before they parted, speaks for none.
        counting = {host.host_id for host in end.body.hosts if not host.lost}
        own = [c for c in candidates if _within(end.lineage(), c) and sum(_within(lineage, c) for lineage in lineages) == 1]
        on = {host_id for c in own for host_id in c.newest_on}
        held.append((end, len(on & counting), len(counting)))
    with_majority = [end for end, have, of in held if have > of // 2]
    if len(with_majority) == 1:
        chosen = with_majority[0]
        for end, have, of in held:
            if end is not chosen:
                found.notes.append(f"another history, on {have} of {counted(of, 'host')}, is passed over: {end.describe()}")
        return chosen
    described = "; ".join(f"{end.describe()}, on {have} of {counted(of, 'host')}" for end, have, of in held)
    raise BadArgument(
        f"the hosts hold {len(held)} different histories, and none a majority; look at both with mount --read-only, "
        f"then choose one with --superblock NAME: {described}"
    )
