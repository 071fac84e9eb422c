"""What must not grow with what is stored, counted and not timed: bytecodes of an append, and of an entry of a listing. What C does, and
commits, is not counted.

`scripts/bench --growth` measures the same of volumes with a million files and logs of ten million appends.
"""

from __future__ import annotations

import gc
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import storage
from fusefs.entries import shown
from storage import Volume

OPTIONS = storage.VolumeOptions(commit_interval=None, coprocesses=False)


def bytecodes(work: Callable[[], object]) -> int:
    """How many of them `work` takes."""
    count = 0

    def inside(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        nonlocal count
        count += event == "opcode"
        return inside

    def entered(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return inside

    before = sys.gettrace()
    # Whatever else would be run in between: finalizers, and who is told of collections.
    gc.collect()
    gc.disable()
    sys.settrace(entered)
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


async def made(directory: Path) -> Path:
    await storage.create_volume(directory / "volume", "flat", hosts=[f"dir:{directory / 'host'}"])
    return directory / "volume"


async def test_an_append_costs_what_the_first_ones_did(tmp_path: Path) -> None:
    async with storage.open_volume(await made(tmp_path), passphrase="flat", options=OPTIONS) as volume:
        names = volume.namespace
        ino, size = names.create(1, b"log", stat.S_IFREG | 0o644, 0, 0), 0
        line = b"x" * 100

        def appended(count: int) -> None:
            nonlocal size
            for _ in range(count):
                assert names.write_now(ino, size, line)
                size += len(line)

        costs = []
        for _ in range(5):
            # As many as fill two of the chunks that appends are gathered in.
            costs.append(bytecodes(lambda: appended(1300)))
            for _ in range(20):
                appended(1000)
                await names.commit(ino)
        assert costs[0] > 1300 * 50, "nothing was counted"
        assert max(costs) <= 1.02 * costs[0], costs


async def filled(volume: Volume, name: bytes, count: int) -> int:
    names = volume.namespace
    directory = names.mkdir(1, name, 0o755, 0, 0)
    for number in range(count):
        ino = names.create(directory, b"file%06d" % number, stat.S_IFREG | 0o644, 0, 0)
        await names.write(ino, 0, os.urandom(16))
    return directory


@pytest.mark.parametrize("after_a_takeover", [False, True])
async def test_an_entry_of_a_long_listing_costs_what_one_of_a_short_one_does(tmp_path: Path, after_a_takeover: bool) -> None:
    path = await made(tmp_path)
    async with storage.open_volume(path, passphrase="flat", options=OPTIONS) as volume:
        directories = {count: await filled(volume, b"%d" % count, count) for count in (200, 4000)}
        await volume.flush()
        if not after_a_takeover:
            # All of it is in memory: what there are of changes is less than what LMDB takes over.
            assert volume.store._memtable.frozen is None and len(volume.store._memtable.active.values) > 4000
            compared(volume, directories)
    if after_a_takeover:
        # Closing it took everything into LMDB.
        async with storage.open_volume(path, passphrase="flat", options=OPTIONS) as volume:
            compared(volume, directories)


def compared(volume: Volume, directories: dict[int, int]) -> None:
    costs = {}
    for count, directory in directories.items():

        def listed(directory: int = directory, count: int = count) -> None:
            after, found = 0, 0
            while (page := volume.namespace.listing(directory, after, 200)).names:
                for _ in shown(page):
                    pass
                found, after = found + len(page.names), page.cookies[-1]
            assert found == count

        listed()
        costs[count] = bytecodes(listed) / count
    assert costs[200] > 50, "nothing was counted"
    assert costs[4000] <= 1.05 * costs[200], costs
