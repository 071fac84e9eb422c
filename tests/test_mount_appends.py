"""What must not grow with the number of appends: extents per sector."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from storage import open_volume
from storage.metadata.keys import EXTENT, SECTOR, prefix_end
from tests.mount_child import PASSPHRASE
from tests.mounting import mounting_in


def count(volume: Path, prefix: bytes) -> int:
    async def look() -> int:
        async with open_volume(volume, passphrase=PASSPHRASE) as opened:
            return len(opened.store.scan(prefix, prefix_end(prefix), 10_000_000))

    return trio.run(look)


@pytest.mark.timeout(300)
def test_ten_million_appends_of_100_bytes_leave_no_more_extents_than_sectors(tmp_path: Path) -> None:
    with mounting_in(tmp_path) as mounting:
        mounted = mounting.mount("commit_interval=2,flush_interval=5")
        log = mounted.path / "log"
        line = b"%07d " + b"x" * 91 + b"\n"
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            for start in range(0, 10_000_000, 1_000_000):
                for number in range(start, start + 1_000_000):
                    os.write(fd, line % number)
        finally:
            os.close(fd)
        assert log.stat().st_size == 10_000_000 * 100
        with open(log, "rb") as file:
            for number in (0, 1, 4_999_999, 9_999_999):
                file.seek(number * 100)
                assert file.read(100) == line % number
        mounted.unmount()
        extents, sectors = count(mounted.volume, EXTENT), count(mounted.volume, SECTOR)
        assert 10_000_000 * 100 // (4 << 20) <= extents <= sectors
        mounted = mounting.mount()
        with open(mounted.path / "log", "rb") as file:
            for number in range(0, 10_000_000, 100_003):
                file.seek(number * 100)
                assert file.read(100) == line % number
