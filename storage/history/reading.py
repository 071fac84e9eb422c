"""What hosts say of a volume's history: which superblocks they have, and which volumes."""

from __future__ import annotations

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
    """(whole superblocks of the volume, newest generation first; what was wrong with others, a sentence each).

    Whole is what parses: that it is not forged only its key shows (`Superblock.open`). Unavailable; BadArgument for one of a newer format,
    which must not be taken for damage.
    """
    with trio.move_on_after(TIMEOUT):
        return await _superblocks_on(host, volume_id)
    raise Unavailable(f"host {host.url} did not give its superblocks within {TIMEOUT:.0f} s")


async def _superblocks_on(host: Host, volume_id: bytes) -> tuple[list[Superblock], list[str]]:
    level = await host.level(superblock_level(volume_id))
    generations = sorted((n for n in map(superblock_number, level.objects) if n is not None), reverse=True)
    found: list[Superblock] = []
    notes: list[str] = []
    for generation in generations[:MAX_READ]:
        where = f"host {host.url}: superblock {generation}"
        try:
            raw = await host.get(superblock_name(volume_id, generation), MAX_SUPERBLOCK)
            block = parse_superblock(raw, where)
            if (block.volume_id, block.generation) != (volume_id, generation):
                raise Corrupt(f"{where} is another one: generation {block.generation} of volume {block.volume_id.hex()}")
        except (Corrupt, NotFound) as error:
            # NotFound: replaced since the listing.
            notes.append(str(error))
            continue
        found.append(block)
    return found, notes


async def volumes_on(host: Host) -> list[bytes]:
    """The ids of the volumes the host holds anything of. Unavailable."""
    with trio.move_on_after(TIMEOUT):
        level = await host.level(f"{VOLUMES}/")
        return [bytes.fromhex(name) for name in level.folders if is_id(name)]
    raise Unavailable(f"host {host.url} did not say within {TIMEOUT:.0f} s which volumes it holds")


async def newest_generation(host: Host, volume_id: bytes) -> int:
    """The highest generation by name, 0 if there is none. One listing. Unavailable."""
    level = await host.level(superblock_level(volume_id))
    return max((n for n in map(superblock_number, level.objects) if n is not None), default=0)
