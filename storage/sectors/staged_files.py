"""The files of staging: sealed shards on the local disk that are needed there, or were, and are a read cache since.

A directory host of this machine with a contract of its own (see `staging`); what is in it is found by root. Files come by `take`, and go by
`_drop`: at once what was settled to be removed, least recently used first what is only cached, where room is needed.

Invariants kept here: I2 (`take` returns when the shards are durable), I3 (what was settled is cached or removed only once that is durable),
I7 (a limit, and a reserve of the disk that is never used).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from storage.errors import Corrupt, Fenced, FusefsError, NotFound
from storage.host_io import HostIO
from storage.hosts.directory import DirectoryHost
from storage.hosts.identity import claim_identity
from storage.hosts.layout import (
    CONTRACT_FORMAT,
    CONTRACT_VERSION,
    ContractFile,
    check_root,
    contract_name,
    encode_json,
    sectors_prefix,
    shard_name,
)
from storage.interfaces import MetadataStore, SealedShard
from storage.sealing import MAX_SEALED, block_range, sealed_length
from storage.seams import Seams
from storage.sectors.records import ShardRecord

log = logging.getLogger("fusefs.staging")

#: The disk keeps this much free, or a twentieth of it if that is less: the journal and the metadata stand on it too.
RESERVE = 1024 * 1024 * 1024
#: Seconds between two looks at what can be dropped.
TIDY_SECONDS = 5.0


@dataclass(slots=True)
class _File:
    size: int
    #: Some sector that is below full replication needs it; or it is not known to be durable yet that none does.
    needed: bool = True


class StagedFiles:
    """See the module. `open` first; `run` in the volume's nursery. What is not async is atomic."""

    def __init__(
        self, path: Path, volume_id: bytes, store: MetadataStore, host_io: HostIO, seams: Seams, *, limit: int, writable: bool
    ) -> None:
        """`limit`: bytes at most; 0: nothing is taken, what is there can be read."""
        self.path = path
        self._volume_id, self._store, self._host_io, self._seams = volume_id, store, host_io, seams
        self.limit, self._writable = limit, writable
        self._host: DirectoryHost | None = None
        #: Least recently used first.
        self._files: OrderedDict[bytes, _File] = OrderedDict()
        #: Invariant: the sizes of `_files` together.
        self.size = 0
        #: Roots that nobody needs once everything applied so far is durable: False, to be kept as cache; True, to be removed.
        self._settling: dict[bytes, bool] = {}
        #: One decision on room at a time.
        self._room = trio.Lock()
        #: What the disk said last; "" since it took something.
        self.trouble = ""

    async def open(self) -> None:
        """Look what is there. FusefsError: it cannot be used. Blocks nothing."""
        if self._writable and self.limit and self._host is None:
            self._host = await self._create()
        elif self.path.is_dir():
            self._host = await DirectoryHost.open(str(self.path), self._seams)
        if self._host is not None:
            await self._list(self._host)

    async def _create(self) -> DirectoryHost:
        host = await DirectoryHost.open(str(self.path), self._seams, create=True)
        identity = await claim_identity(host, self._seams)
        await self._sign(host, identity.id)
        return host

    async def _sign(self, host: DirectoryHost, host_id: str) -> None:
        """A contract without an end, for tools that look at hosts: nobody reclaims what is here. Its id is the host's."""
        name = contract_name(self._volume_id, host_id)
        if await host.tag(name) is None:
            now = self._seams.clock.time_ns()
            file = ContractFile(
                format=CONTRACT_FORMAT,
                format_version=CONTRACT_VERSION,
                contract=host_id,
                volume=self._volume_id.hex(),
                host=host_id,
                start_ns=now,
                end_ns=2**63 - 1,
                lineage=host_id,
                renewed_from=None,
            )
            await host.put(name, encode_json(file))

    async def _list(self, host: DirectoryHost) -> None:
        prefix = sectors_prefix(self._volume_id)
        found: list[tuple[bytes, int]] = []
        async for name, size in host.list(prefix):
            text = name.rpartition("/")[2]
            if len(text) == 64 and name == shard_name(self._volume_id, text):
                found.append((check_root(text), size))
        # Nothing is known of what was read: the oldest files go first.
        for root, size in await self._seams.threads.run(self._by_age, found):
            self._files[root] = _File(size, needed=False)
            self.size += size

    def _by_age(self, found: list[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
        """(root, size), the oldest file first. Blocking, briefly."""

        def age(file: tuple[bytes, int]) -> int:
            try:
                return (self.path / shard_name(self._volume_id, file[0].hex())).stat().st_mtime_ns
            except OSError:
                return 0

        return sorted(found, key=age)

    # ------------------------------------------------------------------------------------------------------------
    # What is here

    def has(self, root: bytes) -> bool:
        """Is the shard here?"""
        return root in self._files

    def need(self, root: bytes) -> None:
        """Some sector that is below full replication needs it, if it is here."""
        if (file := self._files.get(root)) is not None:
            file.needed = True

    def settle(self, root: bytes, *, remove: bool) -> None:
        """Nobody needs it once everything applied so far is durable: from then on it is cached, or, `remove`, goes."""
        if root in self._files:
            self._settling[root] = remove

    async def read(self, shard: ShardRecord, offset: int, length: int) -> bytes:
        """Plaintext bytes [offset, offset + length), which lie within the shard; verified. NotFound, Corrupt, Unavailable: ask hosts."""
        _, _, at, size = block_range(offset, length, shard.length)
        raw = await self._get(shard, at, size)
        try:
            return await self._host_io.open_raw(shard.shard_id, shard.length, offset, length, raw)
        except Corrupt:
            file = self._files.get(shard.root)
            if file is not None and not file.needed:
                await self._damaged(shard.root)
            # Else other blocks of it may be good, and be nowhere else.
            raise

    async def sealed(self, shard: ShardRecord) -> SealedShard:
        """The shard as it was sealed, its root verified. NotFound, Corrupt, Unavailable."""
        raw = await self._get(shard, 0, sealed_length(shard.length))
        try:
            return await self._host_io.verified(SealedShard(shard.root.hex(), shard.shard_id, shard.length, raw))
        except Corrupt:
            await self._damaged(shard.root)
            raise

    async def _get(self, shard: ShardRecord, at: int, size: int) -> bytes:
        file, host = self._files.get(shard.root), self._host
        if file is None or host is None:
            raise NotFound(f"staging has no shard {shard.root.hex()[:12]}")
        self._files.move_to_end(shard.root)
        name = shard_name(self._volume_id, shard.root.hex())
        try:
            raw = await (host.get(name, MAX_SEALED) if size > file.size else host.get_range(name, at, size))
        except NotFound:
            # Somebody removed it by hand.
            self._discard(shard.root)
            raise
        if len(raw) != size:
            await self._damaged(shard.root)
            raise Corrupt(f"staging: shard {shard.root.hex()[:12]} is cut off")
        return raw

    async def _damaged(self, root: bytes) -> None:
        """What stands there is not the shard, or not all of it. What is only cached is removed, and would take room that nobody counts;
        the rest stays, for what a person may still do with it."""
        file, host = self._files.get(root), self._host
        if file is None or file.needed or host is None or not self._writable:
            self._discard(root)
        else:
            await self._drop(host, root)

    def _discard(self, root: bytes) -> None:
        """What is there is not the shard, or nothing: it is not asked again."""
        file = self._files.pop(root, None)
        if file is not None:
            self.size -= file.size

    async def put_back(self, shard: SealedShard) -> None:
        """For `fusefs check`: a shard that was damaged or removed is here again when it returns. NoSpace, IOFailure."""
        if self._host is None:
            self._host = await self._create()
        await self._host.put(shard_name(self._volume_id, shard.root), shard.sealed)
        root = bytes.fromhex(shard.root)
        self._discard(root)
        self._files[root] = _File(len(memoryview(shard.sealed)))
        self.size += self._files[root].size

    async def remove(self, root: bytes) -> None:
        """For `fusefs check`: nobody needs what stands here under that root, which is damaged. IOFailure."""
        self._discard(root)
        if self._host is not None:
            await self._host.delete(shard_name(self._volume_id, root.hex()))

    def is_whole_length(self, shard: ShardRecord) -> bool:
        """Of a shard that is here, without reading it: is the file long enough?"""
        return self._files[shard.root].size >= sealed_length(shard.length)

    # ------------------------------------------------------------------------------------------------------------
    # Coming and going

    async def take(self, shards: Sequence[SealedShard]) -> bool:
        """True: the shards are durable here, and stay until a sector that was entered with them no longer needs them. False: no room, or
        the disk failed (`trouble`); nothing is here."""
        host, need = self._host, sum(len(memoryview(shard.sealed)) for shard in shards)
        if host is None or not self.limit:
            return False
        async with self._room:
            if not await self._make_room(host, need):
                return False
            # No await since there was room for them.
            for shard in shards:
                self._files[bytes.fromhex(shard.root)] = _File(len(memoryview(shard.sealed)))
            self.size += need
        errors: list[FusefsError] = []

        async def put(shard: SealedShard) -> None:
            self._seams.failpoints.hit("staging.before_put")
            try:
                await host.put(shard_name(self._volume_id, shard.root), shard.sealed)
            except FusefsError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for shard in shards:
                nursery.start_soon(put, shard)
        self._seams.failpoints.hit("staging.before_record")
        if errors:
            self.trouble = f"staging takes nothing: {errors[0]}"
            log.warning("%s", self.trouble)
            self.release(shards)
            return False
        self.trouble = ""
        return True

    def release(self, shards: Iterable[SealedShard]) -> None:
        """They were taken, and no sector is entered with them after all."""
        for shard in shards:
            self.settle(bytes.fromhex(shard.root), remove=True)

    # ------------------------------------------------------------------------------------------------------------
    # Room

    async def _make_room(self, host: DirectoryHost, need: int) -> bool:
        """True: so many bytes more are within the limit and leave the disk its reserve; what is cached goes for it."""
        try:
            while not await self._fits(host, need):
                if not await self._drop_one(host):
                    return False
        except Fenced:
            raise
        except FusefsError as error:
            self.trouble = f"staging takes nothing: {error}"
            return False
        return True

    async def _fits(self, host: DirectoryHost, need: int) -> bool:
        if self.size + need > self.limit:
            return False
        space = await host.space()
        return space is None or space.free - need >= min(RESERVE, space.total // 20)

    async def _drop_one(self, host: DirectoryHost) -> bool:
        """The least recently used file that is only cached."""
        victim = self._victim()
        if victim is None and self._settling:
            await self._settle(host)
            victim = self._victim()
        if victim is None:
            return False
        await self._drop(host, victim)
        return True

    def _victim(self) -> bytes | None:
        return next((root for root, file in self._files.items() if not file.needed), None)

    async def _settle(self, host: DirectoryHost) -> None:
        """What nobody needs any more, durably (I3): the rest is kept as cache."""
        settling, self._settling = self._settling, {}
        try:
            await self._store.commit()
        except BaseException:
            self._settling = {**settling, **self._settling}
            raise
        for root, remove in settling.items():
            file = self._files.get(root)
            if file is None:
                continue
            file.needed = False
            if remove:
                await self._drop(host, root)

    async def _drop(self, host: DirectoryHost, root: bytes) -> None:
        file = self._files.pop(root)
        self.size -= file.size
        self._seams.failpoints.hit("staging.before_unlink")
        try:
            await host.delete(shard_name(self._volume_id, root.hex()))
        except FusefsError as error:
            log.warning("staging: %s stays until the volume is opened again: %s", root.hex()[:12], error)

    async def run(self) -> None:
        """Until cancelled: what is freed goes, and the disk gets its reserve back from what is cached."""
        while self._host is not None:
            await self._seams.clock.sleep(TIDY_SECONDS)
            try:
                await self.tidy()
            except Fenced:
                return
            except FusefsError as error:
                log.warning("staging: %s", error)

    async def tidy(self) -> None:
        """What `run` does each time. Fenced, NoSpace: the commit that has to come before fails."""
        host = self._host
        if host is None:
            return
        async with self._room:
            if any(self._settling.values()):
                await self._settle(host)
            while not await self._fits(host, 0) and await self._drop_one(host):
                pass
