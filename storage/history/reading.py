"""What hosts say of a volume's history: which superblocks they have, and which volumes."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from storage.errors import Corrupt, NotFound, Unavailable
from storage.history.superblock import MAX_SUPERBLOCK, Superblock, parse_superblock, superblock_level, superblock_number
from storage.hosts.layout import VOLUMES, is_id, superblock_name
from storage.hosts.locking import locking
from storage.interfaces import Host, LockingHost

#: Superblocks read of one host at most: it has two, and what a crash or a stale writer left.
MAX_READ = 8
#: On a host that locks what it holds: whole ones, and names tried for these. Hostile credentials may have left others above ours.
MAX_READ_LOCKED, MAX_TRIED_LOCKED = 64, 512
#: Seconds a host has for all of it; also for what is hidden.
TIMEOUT = 20.0
TIMEOUT_HIDDEN = 120.0


async def superblocks_on(host: Host, volume_id: bytes) -> tuple[list[Superblock], list[str]]:
    """(whole superblocks of the volume, the latest on the host first; what was wrong with others, a sentence each).

    Whole is what parses: that it is not forged only its key shows (`Superblock.open`). Unavailable; BadArgument for one of a newer format,
    which must not be taken for damage.
    """
    slots = await slots_on(host, volume_id, hidden=True)
    return [block for block in slots.blocks.values() if block is not None], slots.notes


@dataclass(frozen=True, slots=True)
class Slots:
    """The superblocks of a host by the number in their names, latest first; None for a damaged one. `top`: the highest number, or 0; also
    of what was deleted and a lock still keeps, since of such a name the oldest version counts: it can never be used again."""

    top: int
    blocks: dict[int, Superblock | None]
    notes: list[str]
    #: All that a listing shows, also those that were not read; none that only a lock still has.
    numbers: set[int]


async def slots_on(host: Host, volume_id: bytes, *, hidden: bool = False) -> Slots:
    """As `superblocks_on`, with where each stands. `hidden`: also what was deleted and a lock still keeps."""
    limit = TIMEOUT if locking(host) is None else TIMEOUT_HIDDEN
    with trio.move_on_after(limit):
        return await _slots_on(host, volume_id, hidden)
    raise Unavailable(f"host {host.url} did not give its superblocks within {limit:.0f} s")


async def _slots_on(host: Host, volume_id: bytes, hidden: bool) -> Slots:
    listed = await numbers_on(host, volume_id)
    numbers = set(listed)
    wanted, tries = MAX_READ, MAX_READ
    top = max(listed, default=0)
    if (locked := locking(host)) is not None:
        unseen = await _hidden_numbers(locked, volume_id)
        top = max(top, *unseen, 0)
        if hidden:
            numbers |= unseen
            wanted, tries = MAX_READ_LOCKED, MAX_TRIED_LOCKED
    found = Slots(top, {}, [], listed)
    whole: set[bytes] = set()
    for number in sorted(numbers, reverse=True)[:tries]:
        where = f"host {host.url}: superblock {number}"
        found.blocks[number] = None
        try:
            raw = await host.get(superblock_name(volume_id, number), MAX_SUPERBLOCK)
            block = parse_superblock(raw, where)
            if block.volume_id != volume_id:
                raise Corrupt(f"{where} is of volume {block.volume_id.hex()}")
        except (Corrupt, NotFound) as error:
            # NotFound: replaced since the listing.
            if len(found.notes) < MAX_READ:
                found.notes.append(str(error))
            continue
        found.blocks[number] = block
        whole.add(block.digest)
        if len(whole) >= wanted:
            break
    return found


async def _hidden_numbers(host: LockingHost, volume_id: bytes) -> set[int]:
    prefix = superblock_level(volume_id)
    numbers: set[int] = set()
    async for stored in host.hidden(prefix + "superblock."):
        number = superblock_number(stored.name.removeprefix(prefix))
        if number is not None:
            numbers.add(number)
    return numbers


async def volumes_on(host: Host) -> list[bytes]:
    """The ids of the volumes the host holds anything of. Unavailable."""
    with trio.move_on_after(TIMEOUT):
        level = await host.level(f"{VOLUMES}/")
        names = set(level.folders)
        locked = locking(host)
        if locked is not None:
            names |= set(await locked.folders(f"{VOLUMES}/"))
        return [bytes.fromhex(name) for name in sorted(names) if is_id(name)]
    raise Unavailable(f"host {host.url} did not say within {TIMEOUT:.0f} s which volumes it holds")


async def top_slot(host: Host, volume_id: bytes) -> int:
    """The highest number in the name of a superblock, 0 if there is none. One listing. Unavailable."""
    return max(await numbers_on(host, volume_id), default=0)


async def numbers_on(host: Host, volume_id: bytes) -> set[int]:
    """The numbers in the names of superblocks. One listing. Unavailable."""
    level = await host.level(superblock_level(volume_id))
    return {n for n in map(superblock_number, level.objects) if n is not None}
