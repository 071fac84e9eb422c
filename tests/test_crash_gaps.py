"""Small gaps in crash safety, one by one: each test failed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from storage.interfaces import Batch, Buffer
from storage.metadata.keys import SECTOR, u64
from storage.values import shipping
from storage.values.records import extents_between
from tests.rig import SECTOR as SECTOR_SIZE
from tests.rig import append, contents, host_dirs, make, new_value, noise, opened

PAYLOAD = SECTOR_SIZE - 4096


@pytest.mark.parametrize("damaged", [1, 2])
async def test_a_damaged_sector_record_does_not_break_the_tail_that_lands_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: int
) -> None:
    """Breaks if flights are taken off the tail before it is known that the extents can be put: their bytes would be nowhere.

    The sector with the damaged record, first or second of the value, is written once more, under another id; the other is not.
    """
    monkeypatch.setattr(shipping, "RETRY_FIRST", 0.05)
    monkeypatch.setattr(shipping, "RETRY_LAST", 0.05)
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        real, second_is_there = volume.sectors.write_sector, trio.Event()
        #: Ids of the sectors with the value's first and second part.
        written: dict[int, list[int]] = {1: [], 2: []}
        value, data = new_value(volume), noise(2 * PAYLOAD + 100)

        async def write(sector_id: int, parts: list[Buffer], replication: str) -> None:
            number = 1 if bytes(parts[0][:32]) == data[:32] else 2
            written[number].append(sector_id)
            await real(sector_id, parts, replication)
            if number == damaged and len(written[number]) == 1:
                batch = Batch()
                batch.put(SECTOR + u64(sector_id), b"damaged")
                volume.store.apply(batch)
            if number == 1:
                await second_is_there.wait()

        volume.sectors.write_sector = write  # type: ignore[method-assign,assignment]
        await append(volume, value, data)
        with trio.fail_after(10):
            while not (written[1] and written[2] and volume.store.get(SECTOR + u64(written[2][0]))):
                await trio.sleep(0.01)
            await trio.sleep(0.1)
            second_is_there.set()
            await trio.sleep(0.5)
            await volume.values.commit(value)
            assert volume.values.size_of(value) == len(data)
            assert await contents(volume, value) == data
            while volume.values.pending_bytes > 100:
                await trio.sleep(0.01)
        assert await contents(volume, value) == data
        assert [len(written[1]), len(written[2])] == ([2, 1] if damaged == 1 else [1, 2])
        assert written[damaged][0] not in {extent.sector_id for extent in extents_between(volume.store, value, 0, len(data), 10)}
    async with opened(tmp_path / "v") as volume:
        assert await contents(volume, value) == data
        with trio.fail_after(10):
            await volume.flush()
        assert await contents(volume, value) == data
