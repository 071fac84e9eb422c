"""From URLs and a secret to the newest superblock: for whoever has nothing of a volume but its hosts.

The hosts given are looked at, then those the newest superblock on them names: a host that was away for a week must not hide what the
others have. Nothing is written to any host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from storage.errors import BadArgument, Corrupt, FusefsError, NotFound, Unavailable, WrongPassphrase
from storage.history.ancestry import Lineage, newest
from storage.history.reading import superblocks_on, volumes_on
from storage.history.superblock import Body, Superblock
from storage.hosts.identity import read_identity
from storage.hosts.layout import is_id
from storage.hosts.registry import OPEN_TIMEOUT, Opener
from storage.hosts.urls import HostURL, parse_url
from storage.interfaces import Host
from storage.keyfile import open_slots
from storage.keys import Keys, master_of_phrase
from storage.seams import Seams


@dataclass(frozen=True, slots=True)
class Secret:
    """One of the two."""

    passphrase: str = field(default="", repr=False)
    phrase: str = field(default="", repr=False)


@dataclass(slots=True)
class _Looked:
    """A host that could be opened."""

    host: Host
    host_id: str
    blocks: list[Superblock]


@dataclass(slots=True)
class Lookup:
    """What was found. `aclose` closes the hosts."""

    keys: Keys
    block: Superblock
    body: Body
    #: The host that has it.
    where: str
    #: Open, best first: the ones that hold the newest superblock.
    hosts: list[Host]
    #: URL by host id, of every host that answered.
    urls: dict[str, str]
    #: What was wrong with hosts and superblocks, a sentence each.
    notes: list[str]

    async def aclose(self) -> None:
        await _close(self.hosts)


async def look_up(
    urls: Sequence[str],
    seams: Seams,
    *,
    volume_id: str = "",
    secret: Secret | None = None,
    keys: Keys | None = None,
    opener: Opener | None = None,
) -> Lookup:
    """The newest superblock of the volume on the hosts. `keys`, or a `secret` to have them from.

    BadArgument: bad URLs, id or phrase; several volumes, and none named; two histories of which neither contains the other. NotFound: no
    such volume, or no superblock. WrongPassphrase. Corrupt: superblocks are there, and none is whole. Unavailable: no host answers.
    """
    if volume_id and not is_id(volume_id):
        raise BadArgument(f"{volume_id[:80]!r} is no volume id: 32 hexadecimal digits")
    run = _Run(seams, opener or Opener(), volume_id, secret or Secret(), keys)
    try:
        return await run.all([parse_url(url) for url in urls])
    except BaseException:
        await _close([looked.host for looked in run.looked])
        raise


class _Run:
    """One look."""

    def __init__(self, seams: Seams, opener: Opener, volume_id: str, secret: Secret, keys: Keys | None) -> None:
        self._seams, self._opener = seams, opener
        self._volume = bytes.fromhex(volume_id)
        self._secret = secret
        self._keys = Keys(master_of_phrase(secret.phrase)) if keys is None and secret.phrase else keys
        self.looked: list[_Looked] = []
        self._tried: set[str] = set()
        self._opened: dict[bytes, Body] = {}
        self._notes: list[str] = []

    async def all(self, urls: Sequence[HostURL]) -> Lookup:
        await self._look(urls)
        if not self.looked:
            raise Unavailable(f"no host answers ({'; '.join(self._notes)})")
        await self._choose_volume()
        await self._read(self.looked)
        keys = self._keys or await self._unlock()
        found = self._newest(keys)
        # The hosts it names may have a newer one. Nobody but the volume's owner can have written these URLs.
        given = len(self.looked)
        have = {one.host_id for one in self.looked}
        await self._look([parse_url(known.url) for known in found[1].hosts if not known.lost and known.host_id not in have])
        await self._read(self.looked[given:])
        block, body = self._newest(keys)
        having = [one for one in self.looked if any(other.digest == block.digest for other in one.blocks)]
        order = having + [one for one in self.looked if one not in having]
        return Lookup(
            keys,
            block,
            body,
            having[0].host.url,
            [one.host for one in order],
            {one.host_id: one.host.url for one in self.looked},
            self._notes,
        )

    async def _look(self, urls: Sequence[HostURL]) -> None:
        """Open hosts, all at the same time; each once, whatever its URLs. In the order given."""
        opened: dict[str, _Looked] = {}

        async def one(url: HostURL) -> None:
            try:
                host = await self._open(url)
            except FusefsError as error:
                self._notes.append(str(error))
                return
            opened[url.base] = host

        wanted = [url for url in urls if url.base not in self._tried]
        self._tried |= {url.base for url in wanted}
        async with trio.open_nursery() as nursery:
            for url in wanted:
                nursery.start_soon(one, url)
        for url in wanted:
            looked = opened.get(url.base)
            if looked is None:
                continue
            if any(other.host_id == looked.host_id for other in self.looked):
                await _close([looked.host])
            else:
                self.looked.append(looked)

    async def _open(self, url: HostURL) -> _Looked:
        with trio.move_on_after(OPEN_TIMEOUT):
            host = await self._opener(url, self._seams)
            try:
                return _Looked(host, (await read_identity(host)).id, [])
            except BaseException:
                await _close([host])
                raise
        raise Unavailable(f"host {url.base} did not answer within {OPEN_TIMEOUT:g} s")

    async def _choose_volume(self) -> None:
        if self._volume:
            return
        ids: dict[bytes, None] = {}
        for one in self.looked:
            try:
                ids |= dict.fromkeys(await volumes_on(one.host))
            except FusefsError as error:
                self._notes.append(str(error))
        if not ids:
            raise NotFound(f"no volume is on {self._names()}{self._because()}")
        if len(ids) > 1:
            raise BadArgument(f"{self._names()}: several volumes are there, name one with --volume: {', '.join(v.hex() for v in ids)}")
        self._volume = next(iter(ids))

    async def _read(self, hosts: Sequence[_Looked]) -> None:
        async def one(looked: _Looked) -> None:
            try:
                looked.blocks, notes = await superblocks_on(looked.host, self._volume)
            except FusefsError as error:
                self._notes.append(str(error))
            else:
                self._notes += notes

        async with trio.open_nursery() as nursery:
            for looked in hosts:
                nursery.start_soon(one, looked)

    async def _unlock(self) -> Keys:
        """The keys, from any superblock's slots: after a change of the passphrase older ones still have the old slot."""
        blocks = {block.keys: block for one in self.looked for block in one.blocks}
        if not blocks:
            raise self._nothing()
        wrong: WrongPassphrase | None = None
        for slots in blocks:
            try:
                return Keys(await self._seams.threads.run(open_slots, slots, self._secret.passphrase))
            except WrongPassphrase as error:
                wrong = error
        raise wrong or WrongPassphrase("no key slot opens with this passphrase")

    def _newest(self, keys: Keys) -> tuple[Superblock, Body]:
        """Of each host the newest that is whole; of these the one whose history contains the others."""
        found: list[tuple[Superblock, Body, str]] = []
        any_block = False
        for one in self.looked:
            for block in one.blocks:
                any_block = True
                where = f"host {one.host.url}: superblock {block.generation}"
                try:
                    body = self._opened.get(block.digest) or block.open(keys.superblock_key(), where)
                except Corrupt as error:
                    if str(error) not in self._notes:
                        self._notes.append(str(error))
                    continue
                self._opened[block.digest] = body
                found.append((block, body, where))
                break
        if not found:
            if any_block:
                raise Corrupt(f"volume {self._volume.hex()}: no superblock can be opened{self._because()}; is it the right phrase?")
            raise self._nothing()
        place, ends = newest([(block, Lineage(body.epochs, block.sequence)) for block, body, _ in found])
        if place is None:
            several = "; ".join(
                f"{found[end][2]}: epoch {found[end][0].epoch}, commit {found[end][0].sequence}, by {found[end][1].machine}" for end in ends
            )
            raise BadArgument(f"the hosts tell of {len(ends)} histories, of which none contains the others ({several}): choose by --host")
        return found[place][0], found[place][1]

    def _nothing(self) -> NotFound:
        return NotFound(f"volume {self._volume.hex()}: no superblock is on {self._names()}{self._because()}")

    def _names(self) -> str:
        return ", ".join(one.host.url for one in self.looked)

    def _because(self) -> str:
        return f" ({'; '.join(self._notes)})" if self._notes else ""


async def _close(hosts: Sequence[Host]) -> None:
    with trio.CancelScope(shield=True):
        for host in hosts:
            try:
                await host.aclose()
            except FusefsError:
                continue  # nothing was written to it
