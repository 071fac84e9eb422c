"""What every implementation of `storage.interfaces.SectorManager` promises. Each check gets one with three hosts and `"2"` as a possible
replication."""

from __future__ import annotations

import pytest

from storage.errors import BadArgument, Exists, NotFound
from storage.interfaces import SectorManager


async def what_is_written_can_be_read_whole_and_in_part(sectors: SectorManager) -> None:
    data = bytes(range(256)) * 700
    sector = await sectors.allocate_sector()
    await sectors.write_sector(sector, data, "2")
    assert await sectors.read_sector(sector) == data
    for offset, length in (
        (0, 1),
        (65_500, 100),
        (65_504, 65_536),
        (0, len(data)),
        (len(data) - 3, 50),
        (len(data), 5),
        (10**9, 5),
        (5, 0),
    ):
        assert await sectors.insecure_read_sector_at(sector, offset, length) == data[offset : offset + length]


async def pieces_are_one_sector(sectors: SectorManager) -> None:
    sector = await sectors.allocate_sector()
    await sectors.write_sector(sector, [b"one", memoryview(b"two"), bytearray(b"three"), b""], "1")
    assert await sectors.read_sector(sector) == b"onetwothree"


async def an_empty_sector_is_a_sector(sectors: SectorManager) -> None:
    sector = await sectors.allocate_sector()
    await sectors.write_sector(sector, b"", "2")
    assert await sectors.read_sector(sector) == b""
    assert await sectors.insecure_read_sector_at(sector, 0, 10) == b""


async def ids_are_never_given_twice(sectors: SectorManager) -> None:
    ids = [await sectors.allocate_sector() for _ in range(5000)]
    assert len(set(ids)) == len(ids)
    assert min(ids) >= 1


async def a_second_write_raises_and_changes_nothing(sectors: SectorManager) -> None:
    sector = await sectors.allocate_sector()
    await sectors.write_sector(sector, b"first", "1")
    for again in (b"first", b"second"):
        with pytest.raises(Exists):
            await sectors.write_sector(sector, again, "1")
    assert await sectors.read_sector(sector) == b"first"


async def what_was_never_written_or_is_deleted_is_not_found(sectors: SectorManager) -> None:
    sector = await sectors.allocate_sector()
    with pytest.raises(NotFound):
        await sectors.read_sector(sector)
    with pytest.raises(NotFound):
        await sectors.insecure_read_sector_at(sector, 0, 1)
    await sectors.write_sector(sector, b"x", "2")
    await sectors.delete(sector)
    with pytest.raises(NotFound):
        await sectors.read_sector(sector)
    with pytest.raises(NotFound):
        await sectors.delete(sector)


async def what_makes_no_sense_is_refused(sectors: SectorManager) -> None:
    for replication in ("", "0", "two", "1+", "-1"):
        with pytest.raises(BadArgument):
            await sectors.write_sector(await sectors.allocate_sector(), b"x", replication)
    with pytest.raises(BadArgument):
        await sectors.write_sector(await sectors.allocate_sector(), bytes(64 * 1024 * 1024), "1")


CHECKS = [
    what_is_written_can_be_read_whole_and_in_part,
    pieces_are_one_sector,
    an_empty_sector_is_a_sector,
    ids_are_never_given_twice,
    a_second_write_raises_and_changes_nothing,
    what_was_never_written_or_is_deleted_is_not_found,
    what_makes_no_sense_is_refused,
]
