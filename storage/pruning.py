"""Pruning: a host's owner takes away what no contract covers any more. Needs no key, no volume and no passphrase.

Everything below `volumes/<id>/` belongs to one volume, and stays or goes as a whole. Its contracts decide, which anybody can read:

| verdict | when |
|---|---|
| `in force` | some contract has not ended. Nothing makes a pruner touch it |
| `in grace` | the last one ended less than the grace ago. Nor this |
| `unclear` | a contract file is damaged, of another host or volume, or not one at all; or there is none. Goes only if forced by name |
| `over` | what there is has ended, longer than the grace ago |
| `begun` | an earlier pruning was broken off |

A volume goes in this order, so that whoever comes back at any moment is told the truth:

    mark (pruning.json) -> contracts, read once more -> superblocks -> metadata -> sectors -> the rest -> mark

From the mark on its owner can conclude nothing there, and is told why; what a contract concluded at that very moment does, see
`storage/contractor.py`. Without its contract nobody renews, and thinks that everything is there: the owner's renewal finds nothing, and
doubts what is on record there from then on (`storage/sectors/doubts.py`). Superblocks go before what they name (I4 the other way round),
so that nobody recovers from half a history. With the mark, the next pruning knows what it has before it and goes on.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import msgspec
import trio

from storage.documents import MAX_DOCUMENT
from storage.errors import BadArgument, Busy, Corrupt, FusefsError, NotFound, Unavailable
from storage.history.objects import metadata_prefix
from storage.history.reading import volumes_on
from storage.history.superblock import superblock_level, superblock_number
from storage.hosts.identity import read_identity
from storage.hosts.layout import (
    contracts_prefix,
    decode_contract_file,
    decode_pruning_file,
    encode_json,
    is_id,
    new_pruning_file,
    pruning_name,
    sectors_prefix,
    volume_prefix,
)
from storage.hosts.locking import locking
from storage.hosts.registry import Opener
from storage.hosts.urls import parse_url
from storage.interfaces import Host, TidyHost
from storage.seams import Seams
from storage.wording import counted

log = logging.getLogger("fusefs.prune")

DAY_NS = 86400 * 10**9
#: Days after the end of the last contract; the owner was warned for a third of its length before.
DEFAULT_GRACE_DAYS = 30.0
#: Deletions under way at a time.
WORKERS = 8
#: Seconds any question may take.
TIMEOUT = 60.0
#: Contracts of one volume at most: a renewal every day for a century.
MAX_CONTRACTS = 40_000

T = TypeVar("T")

Verdict = Literal["in force", "in grace", "unclear", "over", "begun"]
#: Told how many objects were looked at, or deleted; and of how many, where that is known.
Progress = Callable[[int, int | None], None]


class HeldContract(msgspec.Struct, frozen=True):
    """A contract as it stands on the host."""

    contract_id: str
    start_ns: int
    end_ns: int


class HeldVolume(msgspec.Struct):
    """What a host holds of a volume, and under which contracts."""

    volume_id: str
    verdict: Verdict
    contracts: list[HeldContract]
    #: Of the last contract; 0: there is none.
    end_ns: int
    #: Why the verdict is unclear, or why pruning it failed; a sentence each.
    problems: list[str]
    superblocks: int = 0
    metadata: int = 0
    shards: int = 0
    objects: int = 0
    bytes: int = 0
    #: To be pruned: it is over, was begun, or is unclear and was named.
    prunable: bool = False
    pruned: bool = False


@dataclass(slots=True)
class _Contracts:
    names: list[str] = field(default_factory=list)
    valid: list[HeldContract] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    begun: bool = False

    @property
    def end_ns(self) -> int:
        return max((contract.end_ns for contract in self.valid), default=0)


def _ignore(_done: int, _total: int | None) -> None:
    return


class Pruner:
    """One host, open. Made by `open_pruner`."""

    def __init__(self, host: Host, host_id: str, grace_ns: int, forced: Collection[str], seams: Seams) -> None:
        self.host = host
        self.host_id = host_id
        self._grace_ns = grace_ns
        self._forced = frozenset(forced)
        self._seams = seams

    # ----------------------------------------------------------------------------------------------------------------
    # Looking

    async def survey(self, progress: Progress = _ignore) -> list[HeldVolume]:
        """Every volume the host holds anything of. Unavailable; NotFound for a forced one that is not there."""
        held: list[HeldVolume] = []
        seen = 0

        def counted() -> None:
            nonlocal seen
            seen += 1
            if seen % 1000 == 0:
                progress(seen, None)

        for volume_id in sorted(await volumes_on(self.host)):
            volume = await self._look(volume_id)
            await self._weigh(volume_id, volume, counted)
            if volume.objects:
                held.append(volume)
        missing = self._forced - {volume.volume_id for volume in held}
        if missing:
            raise NotFound(f"host {self.host.url} holds no volume {sorted(missing)[0]}; nothing was deleted")
        return held

    async def _look(self, volume_id: bytes) -> HeldVolume:
        found, now = await self._read_contracts(volume_id), self._seams.clock.time_ns()
        volume = HeldVolume(volume_id.hex(), "over", found.valid, found.end_ns, found.problems)
        if found.end_ns > now:
            volume.verdict = "in force"
        elif found.end_ns + self._grace_ns > now and found.valid:
            volume.verdict = "in grace"
        elif found.problems:
            volume.verdict = "unclear"
        elif found.begun:
            volume.verdict = "begun"
        elif not found.valid:
            volume.verdict = "unclear"
            volume.problems.append("it has no contract: it lost them, or was written to after it had been pruned")
        forced = volume.verdict == "unclear" and volume.volume_id in self._forced
        volume.prunable = volume.verdict in ("over", "begun") or forced
        return volume

    async def _read_contracts(self, volume_id: bytes) -> _Contracts:
        """What stands among the contracts, and the mark. Unavailable: a contract that cannot be read covers, for all we know."""
        prefix, found = contracts_prefix(volume_id), _Contracts()
        names = [name async for name, _ in self._listing(self.host.list(prefix))]
        lock = locking(self.host)
        if lock is not None:
            # Somebody may have deleted the names alone.
            names += [stored.name async for stored in lock.hidden(prefix)]
        found.names = sorted(set(names))[:MAX_CONTRACTS]
        if len(set(names)) > MAX_CONTRACTS:
            found.problems.append(f"it has {counted(len(names), 'contract')}, more than there can be")
        for name in found.names:
            contract_id = name.removeprefix(prefix).removesuffix(".json")
            if not is_id(contract_id) or not name.endswith(".json"):
                found.problems.append(f"{name.removeprefix(prefix)} is no contract")
                continue
            try:
                contract = decode_contract_file(await self._answer(self.host.get(name, MAX_DOCUMENT)), name)
            except NotFound:
                continue  # deleted meanwhile: another pruner is at work
            except (Corrupt, BadArgument) as error:
                found.problems.append(str(error))
                continue
            if contract.contract != contract_id or contract.volume != volume_id.hex() or contract.host != self.host_id:
                found.problems.append(f"{name} is a contract of another volume or host")
                continue
            found.valid.append(HeldContract(contract_id, contract.start_ns, contract.end_ns))
        found.valid.sort(key=lambda contract: contract.end_ns)
        try:
            raw = await self._answer(self.host.get(pruning_name(volume_id), MAX_DOCUMENT))
        except NotFound:
            return found
        try:
            mark = decode_pruning_file(raw, pruning_name(volume_id))
            found.begun = mark.volume == volume_id.hex() and mark.host == self.host_id
        except (Corrupt, BadArgument) as error:
            found.problems.append(str(error))
        return found

    async def _weigh(self, volume_id: bytes, volume: HeldVolume, counted: Callable[[], None]) -> None:
        top, sectors, metadata = volume_prefix(volume_id), sectors_prefix(volume_id), metadata_prefix(volume_id)
        async for name, size in self._listing(self.host.list(top)):
            volume.objects += 1
            volume.bytes += size
            volume.shards += name.startswith(sectors)
            volume.metadata += name.startswith(metadata)
            volume.superblocks += superblock_number(name.removeprefix(top)) is not None
            counted()

    # ----------------------------------------------------------------------------------------------------------------
    # Taking away

    async def prune(self, volume: HeldVolume, progress: Progress = _ignore) -> None:
        """Nothing of the volume is left when it returns. Busy: it has a contract again, and everything stays. Unavailable, and the like:
        it is half gone, and the next pruning goes on with it."""
        volume_id, done = bytes.fromhex(volume.volume_id), 0

        def deleted() -> None:
            nonlocal done
            done += 1
            progress(done, volume.objects)

        mark = pruning_name(volume_id)
        await self._answer(self.host.put(mark, encode_json(new_pruning_file(volume_id, self.host_id, self._seams.clock.time_ns()))))
        # After the mark: what was concluded before it is seen here, what is concluded later sees the mark (storage/contractor.py).
        now = await self._look(volume_id)
        if not now.prunable:
            await self._delete(mark)
            raise Busy(f"volume {volume.volume_id} is {now.verdict} on host {self.host.url} now; nothing of it was deleted")
        found = await self._read_contracts(volume_id)
        await self._delete_all(found.names, deleted)
        level = await self._answer(self.host.level(superblock_level(volume_id)))
        top = volume_prefix(volume_id)
        await self._delete_all([top + name for name in level.objects if superblock_number(name) is not None], deleted)
        await self._delete_below(metadata_prefix(volume_id), deleted)
        folders = (await self._answer(self.host.level(sectors_prefix(volume_id)))).folders
        for folder in folders:
            # One of 256: so many names are in memory at a time.
            await self._delete_below(f"{sectors_prefix(volume_id)}{folder}/", deleted)
        await self._delete_below(top, deleted, but=mark)
        await self._delete(mark)
        if isinstance(self.host, TidyHost):
            await self._answer(self.host.tidy(top))
        volume.pruned = True

    async def _delete_below(self, prefix: str, deleted: Callable[[], None], *, but: str = "") -> None:
        names = [name async for name, _ in self._listing(self.host.list(prefix)) if name != but]
        lock = locking(self.host)
        if lock is not None:
            names += [stored.name async for stored in lock.hidden(prefix)]
        await self._delete_all(names, deleted)

    async def _delete_all(self, names: Collection[str], deleted: Callable[[], None]) -> None:
        """A few at a time; the first error, once those under way have ended."""
        left, errors = list(names), list[FusefsError]()

        async def worker() -> None:
            while left and not errors:
                name = left.pop()
                try:
                    await self._delete(name)
                except FusefsError as error:
                    errors.append(error)  # raised outside of the nursery, which would wrap it
                else:
                    deleted()

        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(worker)
        if errors:
            raise errors[0]

    async def _delete(self, name: str) -> None:
        await self._answer(self.host.delete(name))
        lock = locking(self.host)
        if lock is not None:
            # What a lock still protects stays under its version until the bucket's owner or a later pruning comes by.
            await self._answer(lock.purge(name))

    # ----------------------------------------------------------------------------------------------------------------

    async def _answer(self, call: Awaitable[T]) -> T:
        with trio.move_on_after(TIMEOUT):
            return await call
        raise Unavailable(f"host {self.host.url} did not answer within {TIMEOUT:.0f} s")

    async def _listing(self, listing: AsyncIterator[tuple[str, int]]) -> AsyncIterator[tuple[str, int]]:
        while True:
            try:
                yield await self._answer(anext(listing))
            except StopAsyncIteration:
                return


@asynccontextmanager
async def open_pruner(
    url: str,
    *,
    grace_days: float = DEFAULT_GRACE_DAYS,
    forced: Collection[str] = (),
    seams: Seams | None = None,
    opener: Opener | None = None,
) -> AsyncIterator[Pruner]:
    """The host at `url`, to be looked at and pruned. `forced`: ids of volumes that go although it is unclear what covers them.

    BadArgument; NotFound: it never was a host; Unavailable, Corrupt.
    """
    seams = seams or Seams()
    for volume_id in forced:
        if not is_id(volume_id):
            raise BadArgument(f"{volume_id[:64]!r} is no volume's id: 32 hexadecimal digits, all of them")
    if not grace_days >= 0:
        raise BadArgument(f"a grace of {grace_days} days")
    host = await (opener or Opener())(parse_url(url), seams)
    try:
        identity = await read_identity(host)
        yield Pruner(host, identity.id, round(grace_days * DAY_NS), forced, seams)
    finally:
        with trio.CancelScope(shield=True):
            await host.aclose()
