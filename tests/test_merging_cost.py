"""What merging and packing cost: bytes sent and kept per byte appended."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import trio
import trio.testing

from storage.config import DEFAULT_SECTOR_SIZE
from storage.hosts.memory import MemoryHost
from storage.metadata.keys import SECTOR, prefix_end
from storage.values.records import extents_between
from tests.fakes import make_seams
from tests.rig import QUIET, append, contents, host_dirs, make, new_value, noise, opened
from tests.test_values import settled, shards_on


async def test_10000_files_of_1_kib_take_at_most_1_15_times_their_bytes_on_each_host(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls, "2", sector_size=DEFAULT_SECTOR_SIZE)
    async with opened(tmp_path / "v") as volume:
        for i in range(10_000):
            fd = await volume.files.open(f"some/directory/of/average/depth/file-number-{i:05}.txt", existing=False, write=True)
            await volume.files.append(fd, noise(1024))
            await volume.files.close(fd)
        await volume.flush()
        await settled(volume)
    for host in ("host0", "host1"):
        stored = sum(shard.stat().st_size for shard in shards_on(tmp_path / host))
        assert 10_000 * 1024 < stored <= 1.15 * 10_000 * 1024


def test_24_hours_of_a_100_byte_per_second_log_send_at_most_6_times_its_bytes(tmp_path: Path, monkeypatch: object) -> None:
    """All of it: sectors, log, checkpoints, superblocks.

    Virtual time: timers and wall clock jump when nothing else is to be done, threads run inline.
    """
    sent: Counter[str] = Counter()
    real_put, real_put_if = MemoryHost.put, MemoryHost.put_if

    def count(name: str, data: bytes) -> None:
        sent[name.split("/")[2].split(".")[0] if "/" in name else name] += len(data)

    async def counting_put(self: MemoryHost, name: str, data: bytes) -> str:
        count(name, data)
        return await real_put(self, name, data)

    async def counting_put_if(self: MemoryHost, name: str, data: bytes, expected: str | None) -> str:
        count(name, data)
        return await real_put_if(self, name, data, expected)

    monkeypatch.setattr(MemoryHost, "put", counting_put)  # type: ignore[attr-defined]
    monkeypatch.setattr(MemoryHost, "put_if", counting_put_if)  # type: ignore[attr-defined]

    async def a_day() -> None:
        seams = make_seams()
        await make(tmp_path / "v", ["mem:day"], sector_size=DEFAULT_SECTOR_SIZE, seams=seams)
        options = replace(QUIET, flush_interval=30.0, commit_interval=None, journal_segment=8 << 20, journal_limit=256 << 20)
        async with opened(tmp_path / "v", seams=seams, options=options) as volume:
            value, written, started = new_value(volume), b"", trio.current_time()
            line = b"Nov 22 20:13:14 host program[123]: one hundred bytes of log, give or take, as they come".ljust(99) + b"\n"
            while trio.current_time() - started < 86_400:
                await append(volume, value, 5 * line)
                written += 5 * line
                await trio.sleep(5)
            await trio.sleep(120)
            assert await contents(volume, value) == written
            extents = len(extents_between(volume.store, value, 0, len(written), 1_000_000))
            sectors = len(volume.store.scan(SECTOR, prefix_end(SECTOR), 1_000_000))
            assert extents <= sectors
            assert extents < 60
        assert len(written) >= 86_000 * 100
        shares = ", ".join(f"{what} {count / len(written):.2f}" for what, count in sent.most_common(3))
        print(f"sent {sent.total() / len(written):.2f} times its bytes ({shares}), {extents} extents in {sectors} sectors")
        assert sent.total() <= 6 * len(written)

    trio.run(a_day, clock=trio.testing.MockClock(autojump_threshold=0))
