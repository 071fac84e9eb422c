"""Damaged records in the metadata: each costs what it stands for, and keeps nothing else from working."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.checking import check_volume
from storage.errors import Corrupt, NotFound
from storage.interfaces import Batch
from storage.metadata.keys import EXTENT, FREED, GARBAGE, HOST_STATS, LOST, ORPHAN, SETTING, read_u32, read_u64, u64
from storage.renewal import Trouble, trouble_key
from tests.rig import PASSPHRASE, append, contents, free, host_dirs, make, new_value, noise, opened, published

#: `int` would raise for some of them, and take others for host 2.
DAMAGED_KEYS = (b"", b"x", b"\xff\xfe", b"2.5", b"-2", b"+2", b" 2", b"02", b"2_0", b"9" * 400)


@pytest.mark.parametrize("read", [read_u32, read_u64])
def test_a_key_that_is_too_short_is_an_error_of_our_own(read: object) -> None:
    with pytest.raises(Corrupt, match="fusefs check"):
        read(b"x\0\0", 1)  # type: ignore[operator]


@pytest.mark.parametrize("prefix", [FREED, GARBAGE, ORPHAN, LOST, HOST_STATS])
async def test_a_record_under_a_short_key_keeps_nothing_else_from_working(tmp_path: Path, prefix: bytes) -> None:
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "volume", urls, replication="2")
    async with opened(tmp_path / "volume") as volume:
        batch = Batch()
        batch.put(prefix + b"\0\1", b"\1\2\3")
        volume.store.apply(batch)
    async with opened(tmp_path / "volume") as volume:
        kept, gone = new_value(volume), new_value(volume)
        data = noise(100_000)
        for value in (kept, gone):
            await append(volume, value, data)
            await volume.flush()
        free(volume, gone)
        while volume.values._reclaimer.step():
            pass
        assert volume.sectors.count == 1
        for _ in range(4):
            await published(volume)
            await volume.deleter.drain()
        assert volume.deleter.pending() == (1 if prefix == FREED else 0)
        await volume.namespace.reap_orphans()
        assert await contents(volume, kept) == data
    async with opened(tmp_path / "volume") as volume:
        assert await contents(volume, kept) == data


async def test_a_renewal_record_under_a_damaged_key_revokes_nobody_and_check_takes_it_away(tmp_path: Path) -> None:
    await make(tmp_path / "volume", host_dirs(tmp_path, 2), replication="2")
    async with opened(tmp_path / "volume") as volume:
        contract = volume.contractor.contract_for(2)
        assert contract is not None
        trouble = Trouble(contract.contract_id, 1, NotFound.__name__, "its record is gone").encode()
        batch = Batch()
        for key in DAMAGED_KEYS:
            batch.put(SETTING + b"renewal." + key, trouble)
        batch.put(trouble_key(1), b"\xff" + trouble)
        volume.store.apply(batch)
        assert volume.standing.keeping() == {1, 2}
        assert not volume.renewal.warnings()
        value = new_value(volume)
        await append(volume, value, noise(100_000))
        await volume.flush()
        # What is sound among them counts.
        batch = Batch()
        batch.put(trouble_key(2), trouble)
        volume.store.apply(batch)
        assert volume.renewal.revoked() == {2}
    for left in (len(DAMAGED_KEYS) + 1, 0):
        report = await check_volume(tmp_path / "volume", passphrase=PASSPHRASE, repair=True)
        assert report.found.get("undecodable", 0) == left
    async with opened(tmp_path / "volume") as volume:
        await volume.renewal.renew_due()
        assert volume.standing.keeping() == {1, 2}


async def test_a_damaged_extent_of_a_freed_value_is_not_in_the_way_of_others(tmp_path: Path) -> None:
    await make(tmp_path / "volume", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "volume") as volume:
        damaged, other = new_value(volume), new_value(volume)
        for value in (damaged, other):
            await append(volume, value, noise(100_000))
            await volume.flush()
        batch = Batch()
        batch.put(EXTENT + u64(damaged) + u64(0), b"\xff\xff")
        volume.store.apply(batch)
        free(volume, damaged)
        free(volume, other)
        while volume.values._reclaimer.step():
            pass
        # What the damaged one pointed to stays, for `fusefs check`.
        assert volume.sectors.count == 1
