"""What cannot be read while hosts are away: said when a volume is opened, so that nobody finds it out file by file."""

from __future__ import annotations

import logging
from functools import partial

import trio

from storage.metadata.keys import SECTOR, prefix_end, read_u64
from storage.sectors.plan import can_be_read
from storage.sectors.records import decode_sector
from storage.values.whose import files_in
from storage.volume import Volume
from storage.wording import named

log = logging.getLogger("fusefs.volume")

#: Sectors that cannot be read and whose files are looked for, to name some.
MAX_NAMED = 100_000


async def check_servable(volume: Volume) -> None:
    """With hosts away: warn of each, and of what cannot be read until they are back. Reading that is Unavailable then; all else goes on.

    Looks at every sector, in slices, but only when a host is away.
    """
    away = {record.number: record.url for record in volume.hosts.records() if not volume.hosts.available(record.number)}
    if not away:
        return
    given_up = volume.standing.lost()
    for number, url in away.items():
        if number in given_up:
            continue
        reason = volume.hosts.reason(number)
        message = reason if url in reason else f"host {url} cannot be used: {reason}"
        log.warning("%s", message)
        volume.passing.append((message, partial(_missed, volume, number)))
    here = set(volume.hosts.numbers()) - away.keys()
    start, end, lost = SECTOR, prefix_end(SECTOR), 0
    examples: list[int] = []
    unreadable: set[int] = set()
    needed: set[int] = set()
    while found := volume.store.scan(start, end, 500):
        for key, raw in found:
            sector_id = read_u64(key, 1)
            record = await volume.strays.locate(sector_id, decode_sector(raw, sector_id))
            if record.live and not can_be_read(record, here, volume.staging.files.has):
                lost += 1
                if lost <= MAX_NAMED:
                    unreadable.add(sector_id)
                needed |= {host for shard in record.shards for host in shard.hosts} & away.keys()
                if len(examples) < 5:
                    examples.append(sector_id)
        start = found[-1][0] + b"\0"
        await trio.lowlevel.checkpoint()
    if lost:
        numbers = ", ".join(map(str, examples)) + (f" and {lost - len(examples)} more" if lost > len(examples) else "")
        sectors, are, them = ("sector", "is", "it") if lost == 1 else ("sectors", "are", "them")
        hosts_text = ", ".join(away[number] for number in sorted(needed or away))
        files = named(await files_in(volume.store, volume.namespace.path_of, unreadable))
        what = f"{sectors} {numbers}, with bytes of {files}," if files else f"{sectors} {numbers}"
        warning = f"{what} {are} only on {hosts_text}: what is in {them} cannot be read before that host is back"
        log.warning("%s: %s", volume.path, warning)
        volume.passing.append((warning, partial(_any_away, volume, sorted(needed or away))))


def _missed(volume: Volume, number: int) -> bool:
    """Is the host away, and has nobody given it up since?"""
    return not volume.hosts.available(number) and number not in volume.standing.lost()


def _any_away(volume: Volume, numbers: list[int]) -> bool:
    return any(not volume.hosts.available(number) for number in numbers)
