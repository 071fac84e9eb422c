"""Shards on hosts that lock what they hold: put under a lock, and found again when their names are gone or show other bytes."""

from __future__ import annotations

from cachetools import LRUCache

from storage.errors import Corrupt, FusefsError, NotFound
from storage.hosts.holders import Holders
from storage.hosts.locking import MAX_TRIED, SHORT_LOCK, locking
from storage.interfaces import Host, LockingHost, SealedShard
from storage.sealing import MAX_SEALED, root_of
from storage.seams import Seams

#: Versions remembered of shards whose names proved wrong.
REMEMBERED = 65536


class LockedShards:
    """For HostIO. What it remembers costs a request where it is forgotten, nothing else."""

    def __init__(self, seams: Seams) -> None:
        self._seams = seams
        #: (host number, root) -> version to read, where the name does not give the shard any more.
        self._versions: LRUCache[tuple[int, str], str] = LRUCache(maxsize=REMEMBERED)

    async def put(self, host: Host, name: str, shard: SealedShard, contract_end_ns: int) -> tuple[str, int]:
        """Store it: (version, locked until), or ("", 0) on a host that has no locks. What is to last is locked to the contract's end."""
        locked = locking(host)
        if locked is None:
            await host.put(name, shard.sealed)
            return "", 0
        soon = self._seams.clock.time_ns() + round(SHORT_LOCK * 1e9)
        until = max(soon, contract_end_ns) if shard.lasting else soon
        return await locked.put_locked(name, shard.sealed, until), until

    def known(self, number: int, root: str) -> bool:
        """Does `fetch` know another version than the name's?"""
        return bool(self._versions) and (number, root) in self._versions

    async def fetch(self, host: Host, number: int, root: str, name: str, part: tuple[int, int]) -> bytes | None:
        """The part (offset, length) of a shard whose name is known not to give it; None where nothing is known."""
        version = self._versions.get((number, root))
        locked = locking(host)
        if version is None or locked is None:
            return None
        return await locked.get_version(name, version, *part)

    async def find(self, host: Host, number: int, root: str, name: str, holders: Holders, error: FusefsError) -> bytes:
        """The whole sealed shard, from the version on record or any other that has the root; else `error`, which is why it is asked for."""
        locked = locking(host)
        if locked is None:
            raise error
        for version in await self._candidates(locked, name, holders.stored_version):
            try:
                sealed = await locked.get_version(name, version, 0, MAX_SEALED)
            except (NotFound, Corrupt):
                continue
            if await self._seams.threads.run(root_of, sealed) == root:
                self._versions[number, root] = version
                return sealed
        raise error

    @staticmethod
    async def _candidates(host: LockingHost, name: str, recorded: str) -> list[str]:
        """Versions to try: the recorded one alone if there is one that is still there."""
        listed = [stored.version for stored in await host.versions(name) if stored.size <= MAX_SEALED]
        return list(dict.fromkeys([*([recorded] if recorded else []), *listed[:MAX_TRIED]]))
