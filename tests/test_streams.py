"""Read-ahead follows several readers of one file, beside those who read here and there."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.values.records import extents_between
from storage.values.streams import FOLLOWED, FRESH, VALUES, Streams
from tests.rig import QUIET, SECTOR, noise, opened
from tests.test_read_now import stored

STEP = 64 * 1024


@pytest.mark.parametrize("in_turns", [True, False])
@pytest.mark.parametrize("readers", [1, 2, FOLLOWED])
async def test_each_reader_of_a_file_finds_its_next_sector_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers: int, in_turns: bool
) -> None:
    """Each from somewhere else; they take turns strictly, or in any order with reads at random in between."""
    each = 4
    data = noise((each * readers + 8) * SECTOR)
    value = await stored(tmp_path, data)
    dice = random.Random(readers)
    async with opened(tmp_path / "v", options=replace(QUIET, cache=4 * len(data))) as volume:
        values = volume.values
        asked: set[int] = set()
        prefetch = values._reader._sectors.prefetch

        def noted(sector_id: int) -> bool:
            asked.add(sector_id)
            return prefetch(sector_id)

        monkeypatch.setattr(values._reader._sectors, "prefetch", noted)
        places = [number * each * SECTOR + 3 * STEP for number in range(readers)]
        begun = list(places)
        behind = 0
        while active := [number for number in range(readers) if places[number] < begun[number] + (each - 1) * SECTOR]:
            number = min(active, key=lambda number: places[number] - begun[number]) if in_turns else dice.choice(active)
            at = places[number]
            if at > begun[number] + SECTOR:
                (extent,) = extents_between(volume.store, value, at, at + 1, 1)
                assert extent.sector_id in asked, f"reader {number} of {readers} met a sector at {at} that nobody had asked for"
                behind += 1
            now = values.read_now(value, at, STEP)
            assert (await values.read(value, at, STEP) if now is None else now) == data[at : at + STEP]
            places[number] = at + STEP
            if not in_turns and dice.random() < 0.5:
                there = dice.randrange(readers * each * SECTOR, len(data) - 4096)
                assert await values.read(value, there, 4096) == data[there : there + 4096]
        assert behind >= readers


async def test_who_reads_here_and_there_has_hardly_anything_fetched_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pages, one now and then begins where another one ended."""
    data = noise(16 * SECTOR)
    value = await stored(tmp_path, data)
    dice = random.Random(1)
    async with opened(tmp_path / "v", options=replace(QUIET, cache=0)) as volume:
        asked = 0

        def noted(_sector_id: int) -> bool:
            nonlocal asked
            asked += 1
            return True

        monkeypatch.setattr(volume.values._reader._sectors, "prefetch", noted)
        for _ in range(500):
            at = dice.randrange(1, len(data) // 4096) * 4096
            assert bytes(await volume.values.read(value, at, 4096)) == data[at : at + 4096]
        # Each time some sectors.
        assert asked < 500 * 0.05 * 5


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 30), st.sampled_from([None, 0, 1, 2])), max_size=200))
def test_where_a_read_ended_somebody_goes_on_once(reads: list[tuple[int, int, int | None]]) -> None:
    streams = Streams()
    ended: dict[tuple[int, int], set[int]] = {}
    for value, at, sector in reads:
        found = streams.take(value, at)
        if found is not None:
            # Never of another value, never with a sector that nobody had put there, and not twice.
            assert found in ended.pop((value, at))
            assert streams.take(value, at) is None
        streams.put(value, at + 1, sector)
        ended.setdefault((value, at + 1), set()).add(sector or 0)
        followed, fresh = streams._values[value].followed, streams._values[value].fresh
        assert len(followed) <= FOLLOWED
        assert len(fresh) <= FRESH
        assert streams.take(value, at + 1) in ended[value, at + 1]
        streams.put(value, at + 1, sector)


def test_what_is_remembered_is_bounded() -> None:
    streams = Streams()
    for value in range(3 * VALUES):
        streams.put(value, 1, None)
    assert len(streams._values) == VALUES
    assert streams.take(0, 1) is None
    assert streams.take(3 * VALUES - 1, 1) == 0
