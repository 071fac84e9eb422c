"""I7: room in the journal is looked at for several large appends at once, and what is accepted so finds room all the same, whatever else
comes in between, and if the disk is full from then on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import trio

from storage.errors import NoSpace
from storage.interfaces import Batch
from storage.metadata import journal, room
from storage.values import admission
from storage.volume import Volume
from tests.rig import QUIET, append, host_dirs, make, new_value, noise, opened

MIB = 1024 * 1024
SEGMENT = 8 * MIB
OPTIONS = replace(QUIET, journal_segment=SEGMENT, journal_limit=256 * MIB, tail_budget=64 * MIB)


async def stream(volume: Volume) -> None:
    """Segments are at hand for what is written at full rate, until a commit gives back what it does not need."""
    value = new_value(volume)
    while len(volume.store._journal._prepared) < 6:
        with trio.CancelScope(shield=True):
            await append(volume, value, bytes(MIB))
    with trio.fail_after(20):
        while volume.values.shipper.unsafe > 5 * MIB:
            await trio.sleep(0.02)


def none(_: Volume) -> None:
    return


def changes(volume: Volume) -> None:
    """As many as are accepted."""
    for number in range(100_000):
        if volume.store.overdue:
            return
        try:
            volume.values.check_room()
        except NoSpace:
            return
        batch = Batch()
        batch.put(b"other%d" % number, bytes(400))
        volume.store.apply(batch)
        if not volume.store.has_room(0, 0, 0, admission.CREATE_KEPT):
            return


@pytest.mark.parametrize("between", [none, changes])
@pytest.mark.parametrize("size", [admission.LARGE, 128 * 1024, MIB, 4 * MIB])
async def test_what_is_accepted_at_once_can_be_committed_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, between: Callable[[Volume], None]
) -> None:
    monkeypatch.setattr(room, "ROOM_WAIT", 1.0)
    monkeypatch.setattr(admission, "ROOM_WAIT", 1.0)
    await make(tmp_path / "v", host_dirs(tmp_path, 1), sector_size=4 * MIB)
    async with opened(tmp_path / "v", options=OPTIONS) as volume:
        await stream(volume)
        # Nothing lands from here on: the journal has to take it.
        (tmp_path / "host0").rename(tmp_path / "away")
        value = new_value(volume)
        await append(volume, value, noise(size))
        await volume.values.commit_all()
        await volume.store._journal.give_up_spares(volume.store._writer)

        def full(*_: object, **__: object) -> NoReturn:
            raise NoSpace("the disk is full")

        with monkeypatch.context() as patched:
            patched.setattr(journal, "prepare", full)
            between(volume)
            # No await: nothing can be waited for.
            accepted = 0
            while accepted < 32 * MIB and volume.values.reserve_now(value, size):
                volume.values.append_now(value, noise(size))
                accepted += size
            await volume.values.commit_all()
            assert volume.values.shipper.unsafe == 0
        (tmp_path / "away").rename(tmp_path / "host0")
