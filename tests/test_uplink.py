"""The upload rate: all kinds of sending together keep to it, evenly; superblocks and small metadata do not stand behind bulk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from storage.interfaces import Host
from storage.pacing import SMOOTH, URGENT_SIZE, Uplink
from storage.seams import Seams
from storage.volume import Volume, VolumeOptions
from storage.wiring import open_volume
from tests.fakes import VirtualClock
from tests.rig import PASSPHRASE, QUIET, append, host_dirs, make, new_value, noise, opened, published

RATE = 100_000.0


def lines(sent: list[tuple[float, int, str]], kind: str) -> list[tuple[float, int]]:
    return [(at, size) for at, size, what in sent if what == kind]


async def test_over_a_minute_all_kinds_together_keep_to_the_rate_and_the_small_are_quick(autojump_clock: trio.testing.MockClock) -> None:
    uplink = Uplink(VirtualClock(), RATE)
    sent: list[tuple[float, int, str]] = []
    waited: dict[str, float] = {}

    async def sender(kind: str, size: int, every: float, urgent: bool) -> None:
        while True:
            started = trio.current_time()
            await uplink.take(size, urgent=urgent)
            sent.append((trio.current_time(), size, kind))
            waited[kind] = max(waited.get(kind, 0.0), trio.current_time() - started)
            await trio.sleep(every)

    async with trio.open_nursery() as nursery:
        # Each of the first three alone would take the rate many times.
        for _ in range(12):
            nursery.start_soon(sender, "sector", 60_000, 0.0, False)
        for _ in range(2):
            nursery.start_soon(sender, "merge", 30_000, 0.0, False)
        nursery.start_soon(sender, "repair", 50_000, 0.0, False)
        nursery.start_soon(sender, "checkpoint", 200_000, 0.0, False)
        nursery.start_soon(sender, "log", 5000, 2.0, True)
        nursery.start_soon(sender, "superblock", 8000, 5.0, True)
        await trio.sleep(10)
        begin = trio.current_time()
        await trio.sleep(60)
        total = sum(size for at, size, _ in sent if at >= begin)
        assert total == pytest.approx(60 * RATE, rel=0.1)
        # Evenly: in no second more than its rate and the largest object.
        for second in range(60):
            within = [size for at, size, _ in sent if begin + second <= at < begin + second + 1]
            assert sum(within) <= RATE * (1 + SMOOTH) + 200_000
        # Nobody is left out, and all bulk gets its turn alike.
        assert {kind for at, _, kind in sent if at >= begin} == {"sector", "merge", "repair", "checkpoint", "log", "superblock"}
        assert len(lines(sent, "sector")) == pytest.approx(12 * len(lines(sent, "repair")), rel=0.2)
        assert waited["log"] < 0.5 and waited["superblock"] < 0.5
        nursery.cancel_scope.cancel()


async def test_what_is_urgent_is_bounded_too_and_leaves_half_for_the_rest(autojump_clock: trio.testing.MockClock) -> None:
    uplink = Uplink(VirtualClock(), RATE)
    sent = {True: 0, False: 0}

    async def flood(urgent: bool) -> None:
        while True:
            await uplink.take(5000, urgent=urgent)
            sent[urgent] += 5000

    async with trio.open_nursery() as nursery:
        for urgent in (True, True, False, False):
            nursery.start_soon(flood, urgent)
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert sum(sent.values()) == pytest.approx(60 * RATE, rel=0.1)
    assert sent[False] == pytest.approx(30 * RATE, rel=0.1)


async def test_the_rate_can_be_changed_while_others_wait_and_who_goes_takes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    uplink = Uplink(VirtualClock(), 1000.0)
    await uplink.take(1_000_000)
    with trio.move_on_after(5) as scope:
        await uplink.take(1_000_000)
    assert scope.cancelled_caught and uplink.sent == 1_000_000
    started = trio.current_time()

    async def faster() -> None:
        await trio.sleep(10)
        uplink.rate = 1_000_000.0

    async with trio.open_nursery() as nursery:
        nursery.start_soon(faster)
        await uplink.take(1)
    assert trio.current_time() - started < 13
    uplink.rate = None
    before = trio.current_time()
    for _ in range(1000):
        await uplink.take(1 << 30)
    assert trio.current_time() == before


async def test_everything_a_volume_sends_goes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = host_dirs(tmp_path, 4)
    await make(tmp_path / "volume", urls[:3], replication="2")
    async with opened(tmp_path / "volume") as volume:
        put: dict[str, int] = {}
        watch_puts(volume, put, monkeypatch)
        before = volume.hosts.uplink.sent
        urgent: list[int] = []
        take = volume.hosts.uplink.take

        async def seen(size: int, **how: bool) -> None:
            urgent.append(size if how.get("urgent") else 0)
            await take(size, **how)

        monkeypatch.setattr(volume.hosts.uplink, "take", seen)
        for _ in range(3):
            await append(volume, new_value(volume), noise(100_000))
            await volume.flush()
        await published(volume)
        await volume.mark_host("2", lost=True)
        await volume.repair()
        await volume.sectors.wait_uploads()
        sent = volume.hosts.uplink.sent - before
        assert put["sectors"] > 600_000 and put["metadata"] > 0 and put["superblock"] > 0
        assert sent == sum(put.values())
        assert sum(urgent) >= put["superblock"]


def watch_puts(volume: Volume, put: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of all puts, by kind."""

    def kind(name: str) -> str:
        return "superblock" if "/superblock" in name else name.split("/")[2]

    def watch(host: Host) -> None:
        plain, conditional = host.put, host.put_if

        async def counted(name: str, data: bytes) -> str:
            put[kind(name)] = put.get(kind(name), 0) + len(data)
            return await plain(name, data)

        async def counted_if(name: str, data: bytes, expected: str | None) -> str:
            put[kind(name)] = put.get(kind(name), 0) + len(data)
            return await conditional(name, data, expected)

        monkeypatch.setattr(host, "put", counted)
        monkeypatch.setattr(host, "put_if", counted_if)

    for number in volume.hosts.numbers():
        watch(volume.hosts.get(number))


async def test_the_rate_is_the_volumes_option(tmp_path: Path) -> None:
    await make(tmp_path / "volume", host_dirs(tmp_path, 1))
    async with open_volume(tmp_path / "volume", passphrase=PASSPHRASE, options=replace(QUIET, upload_rate=50_000_000.0)) as volume:
        assert volume.hosts.uplink.rate == 50_000_000.0
    assert VolumeOptions().upload_rate is None and Uplink(Seams().clock).rate is None and URGENT_SIZE < 100_000
