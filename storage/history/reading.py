"""What hosts say of a volume's history: which superblocks they have, and which volumes."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from storage.errors import Corrupt, NotFound, Unavailable
from storage.history.superblock import MAX_SUPERBLOCK, Superblock, parse_superblock, superblock_level, superblock_number
from storage.hosts.layout import VOLUMES, is_id, superblock_name
from storage.interfaces import Host

#: Superblocks read of one host at most: it has two, and what a crash or a stale writer left.
MAX_READ = 8
#: Seconds a host has for all of it.
TIMEOUT = 20.0


async def superblocks_on(host: Host, volume_id: bytes) -> tuple[list[Superblock], list[str]]:
    """(whole superblocks of the volume, the latest on the host first; what was wrong with others, a sentence each).

    Whole is what parses: that it is not forged only its key shows (`Superblock.open`). Unavailable; BadArgument for one of a newer format,
    which must not be taken for damage.
    """
    slots = await slots_on(host, volume_id)
    return [block for block in slots.blocks.values() if block is not None], slots.notes


@dataclass(frozen=True, slots=True)
class Slots:
    """The superblocks of a host by the number in their names, latest first; None for a damaged one. `top`: the highest number, or 0."""

    top: int
    blocks: dict[int, Superblock | None]
    notes: list[str]


async def slots_on(host: Host, volume_id: bytes) -> Slots:
    """As `superblocks_on`, with where each stands."""
    with trio.move_on_after(TIMEOUT):
        return await _slots_on(host, volume_id)
    raise Unavailable(f"host {host.url} did not give its superblocks within {TIMEOUT:.0f} s")


async def _slots_on(host: Host, volume_id: bytes) -> Slots:
    level = await host.level(superblock_level(volume_id))
    numbers = sorted((n for n in map(superblock_number, level.objects) if n is not None), reverse=True)
    found = Slots(max(numbers, default=0), {}, [])
    for number in numbers[:MAX_READ]:
        where = f"host {host.url}: superblock {number}"
        found.blocks[number] = None
        try:
            raw = await host.get(superblock_name(volume_id, number), MAX_SUPERBLOCK)
            block = parse_superblock(raw, where)
            if block.volume_id != volume_id:
                raise Corrupt(f"{where} is of volume {block.volume_id.hex()}")
        except (Corrupt, NotFound) as error:
            # NotFound: replaced since the listing.
            found.notes.append(str(error))
            continue
        found.blocks[number] = block
    return found


async def volumes_on(host: Host) -> list[bytes]:
    """The ids of the volumes the host holds anything of. Unavailable."""
    with trio.move_on_after(TIMEOUT):
        level = await host.level(f"{VOLUMES}/")
        return [bytes.fromhex(name) for name in level.folders if is_id(name)]
    raise Unavailable(f"host {host.url} did not say within {TIMEOUT:.0f} s which volumes it holds")


async def top_slot(host: Host, volume_id: bytes) -> int:
    """The highest number in the name of a superblock, 0 if there is none. One listing. Unavailable."""
    level = await host.level(superblock_level(volume_id))
    return max((n for n in map(superblock_number, level.objects) if n is not None), default=0)
