"""Reclaim finds all that was freed and nothing else, and what it costs does not grow with what was freed before."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.interfaces import Batch
from storage.metadata.keys import GARBAGE, prefix_end
from storage.values import reclaim
from storage.volume import Volume
from tests.rig import append, contents, free, host_dirs, make, new_value, noise, opened


def reclaimed(volume: Volume) -> None:
    while volume.values._reclaimer.step():
        pass


async def test_more_freed_values_than_are_remembered_are_all_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaim, "REMEMBERED", 2)
    monkeypatch.setattr(reclaim, "SLICE", 2)
    await make(tmp_path / "volume", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "volume") as volume:
        values = [new_value(volume) for _ in range(9)]
        for value in values:
            await append(volume, value, noise(3000))
        await volume.flush()
        reclaimed(volume)  # nothing of earlier processes is left to be looked for
        for value in reversed(values):
            free(volume, value)
        reclaimed(volume)
        assert volume.store.scan(GARBAGE, prefix_end(GARBAGE), 10) == []
        assert volume.sectors.count == 0


async def test_a_value_whose_freeing_was_refused_is_not_reclaimed(tmp_path: Path) -> None:
    await make(tmp_path / "volume", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "volume") as volume:
        kept, gone = new_value(volume), new_value(volume)
        data = noise(3000)
        for value in (kept, gone):
            await append(volume, value, data)
        await volume.flush()
        volume.values.free(Batch(), kept)  # a batch that is never applied
        free(volume, gone)
        reclaimed(volume)
        assert await contents(volume, kept) == data
        assert volume.store.scan(GARBAGE, prefix_end(GARBAGE), 10) == []


async def test_the_marks_of_what_was_reclaimed_are_not_walked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await make(tmp_path / "volume", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "volume") as volume:
        values = [new_value(volume) for _ in range(20)]
        reclaimed(volume)
        scanned: list[bytes] = []
        scan = volume.store.scan

        def counted(start: bytes, stop: bytes, limit: int, reverse: bool = False) -> list[tuple[bytes, bytes]]:
            scanned.append(start)
            return scan(start, stop, limit, reverse)

        monkeypatch.setattr(volume.store, "scan", counted)
        for value in values:
            free(volume, value)
            reclaimed(volume)
        assert [start for start in scanned if start.startswith(GARBAGE)] == []
