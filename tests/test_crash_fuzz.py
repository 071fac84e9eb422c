"""Crashes anywhere: several tasks append, commit, flush, free and merge while hosts fail now and then; at some failpoint the process dies.

From that hit on nothing that has a failpoint happens any more: no journal, no LMDB, no host is written to, as after kill -9. Then the
volume is opened again, and everything is compared with what was appended, committed and freed; the next life goes on from there.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio

from storage import sealing
from storage.coprocess import sealer
from storage.errors import FusefsError, NotFound
from storage.hosts.faults import shards_only
from storage.interfaces import Buffer
from storage.metadata.keys import EXTENT, SECTOR, prefix_end, read_u64
from storage.sealing import ShardHeader
from storage.seams import Seams
from storage.sectors import deleter
from storage.sectors.records import decode_sector
from storage.values import merge, shipping
from storage.values.records import decode_extent
from storage.volume import Volume
from storage.wiring import open_volume
from tests.fakes import Crash
from tests.host_rig import FaultyOpener
from tests.rig import PASSPHRASE, QUIET, contents, free, host_dirs, make, new_value

SECTOR_SIZE = 64 * 1024
VALUES = 10


class DeadFrom:
    """The process dies at the `nth` hit and stays dead."""

    def __init__(self, nth: int) -> None:
        self.left = nth
        self._lock = threading.Lock()

    def hit(self, name: str) -> None:
        with self._lock:
            self.left -= 1
        if self.left <= 0:
            raise Crash(name)


@dataclass
class Life:
    """What is known of one value."""

    data: bytearray = field(default_factory=bytearray)
    #: Bytes that a commit has answered for; None: not even that there is such a value.
    committed: int | None = None
    freed: bool = False
    freed_durably: bool = False


class Model:
    """What must be true after any crash."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lives: dict[int, Life] = {}

    def alive(self) -> list[int]:
        return [value for value, life in self.lives.items() if not life.freed]

    def now(self) -> list[tuple[Life, int, bool]]:
        return [(life, len(life.data), life.freed) for life in self.lives.values()]

    @staticmethod
    def durable(snapshot: list[tuple[Life, int, bool]], only: Life | None = None) -> None:
        """A commit that began at the snapshot has returned."""
        for life, size, freed in snapshot:
            life.committed = max(life.committed or 0, size if only is None or life is only else 0)
            life.freed_durably = life.freed_durably or freed

    async def append(self, volume: Volume, value: int) -> None:
        size = self.random.choice((1, 90, 700, 5000, 30_000, SECTOR_SIZE, 90_000))
        data = self.random.randbytes(self.random.randint(1, size))
        await volume.values.reserve(value, len(data))
        life = self.lives[value]
        if not life.freed:
            at = volume.values.append_now(value, data)
            assert at == len(life.data)
            life.data += data

    async def step(self, volume: Volume) -> None:
        values = self.alive()
        what = self.random.random()
        if len(values) < VALUES and (not values or what < 0.1):
            self.lives[new_value(volume)] = Life()
            return
        value = self.random.choice(values)
        life = self.lives[value]
        if what < 0.6:
            await self.append(volume, value)
        elif what < 0.72:
            snapshot = self.now()
            await volume.values.commit(value)
            self.durable(snapshot, life)
        elif what < 0.76:
            snapshot = self.now()
            await volume.commit()
            self.durable(snapshot)
        elif what < 0.80:
            snapshot = self.now()
            await volume.flush()
            self.durable(snapshot)
        elif what < 0.88:
            await volume.values.shipper.gather()
        elif what < 0.91:
            free(volume, value)
            life.freed = True
        elif what < 0.95:
            await self.merge(volume)
        else:
            found = await volume.values.read(value, 0, len(life.data))
            assert bytes(life.data).startswith(found)

    async def merge(self, volume: Volume) -> None:
        partials = volume.sectors.partials
        group = [p for p in partials._partials.values() if p.sector_id not in partials.held]
        if len(group) >= 2:
            await volume.values._merger.merge(self.random.sample(group, min(len(group), self.random.randint(2, 5))))

    async def live(self, volume: Volume) -> None:
        """One of several tasks, until the process dies."""
        while True:
            try:
                await self.step(volume)
            except NotFound:
                await trio.lowlevel.checkpoint()  # freed by another task
            except FusefsError:
                await trio.sleep(0.005)
            await trio.sleep(self.random.choice((0.0, 0.0, 0.002)))

    async def check(self, volume: Volume) -> None:
        """After a crash; from here on, what there is is what there was."""
        for value, life in list(self.lives.items()):
            try:
                found = await contents(volume, value)
            except NotFound:
                assert life.freed or life.committed is None, f"value {value} is gone"
                del self.lives[value]
                continue
            assert not life.freed_durably, f"value {value} is back"
            assert len(found) >= (life.committed or 0), f"value {value}: {len(found)} of {life.committed} committed bytes"
            assert bytes(life.data[: len(found)]) == found, f"value {value} is no prefix"
            self.lives[value] = Life(bytearray(found), len(found))


def check_accounts(volume: Volume) -> None:
    """Live bytes, the index of partial sectors and the count of sectors say what extents say. No await: one moment."""
    live: Counter[int] = Counter()
    for key, raw in volume.store.scan(EXTENT, prefix_end(EXTENT), 1_000_000):
        extent = decode_extent(key, raw)
        live[extent.sector_id] += extent.length
    records = {read_u64(key, 1): raw for key, raw in volume.store.scan(SECTOR, prefix_end(SECTOR), 1_000_000)}
    assert set(live) <= set(records)
    for sector_id, raw in records.items():
        record = decode_sector(raw, sector_id)
        assert record.live == live[sector_id]
        partial = volume.sectors.partials._partials.get(sector_id)
        assert (partial is not None) == (volume.sectors.partials.class_of(record) is not None)
        assert partial is None or partial.live == record.live
    assert volume.sectors.count == len(records)


async def one_life(path: Path, model: Model, opener: FaultyOpener, nth: int, interval: float) -> bool:
    """True if the process died."""
    options = replace(
        QUIET, flush_interval=interval, journal_segment=128 * 1024, journal_limit=4 * 1024 * 1024, tail_budget=8 * SECTOR_SIZE
    )
    seams = Seams(failpoints=DeadFrom(nth))
    try:
        async with open_volume(path, passphrase=PASSPHRASE, seams=seams, options=options, opener=opener) as volume:
            for faults in opener.faults.values():
                faults.only, faults.error_rate = shards_only, model.random.choice((0.0, 0.2, 0.9))
                faults.latency = model.random.choice((0.0, 0.01, 0.05))
            with trio.move_on_after(0.8):
                async with trio.open_nursery() as nursery:
                    for _ in range(3):
                        nursery.start_soon(model.live, volume)
            check_accounts(volume)
            await volume.commit()
            model.durable(model.now())
    except BaseException as error:
        others = [one for one in _leaves(error) if not isinstance(one, Crash | FusefsError | trio.Cancelled)]
        if others or not any(isinstance(one, Crash | FusefsError) for one in _leaves(error)):
            raise
        return True
    return False


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_happens_before_a_crash_nothing_promised_is_lost(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed: dict[tuple[bytes, int], bytes] = {}
    real_seal = sealing.seal

    def watched(key: bytes, header: ShardHeader, data: list[Buffer], lend: Callable[[int], memoryview]) -> Buffer:
        # I1, over all lives of the volume.
        content = hashlib.sha256(header.encode() + b"".join(data)).digest()
        assert sealed.setdefault((key, header.sector_id), content) == content
        return real_seal(key, header, data, lend)

    monkeypatch.setattr(sealer, "seal", watched)
    monkeypatch.setattr(shipping, "RETRY_FIRST", 0.02)
    monkeypatch.setattr(shipping, "RETRY_LAST", 0.1)
    monkeypatch.setattr(merge, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(deleter, "GATHER_SECONDS", 0.02)
    monkeypatch.setattr(deleter, "RETRY_SECONDS", 0.1)
    path = tmp_path / "v"
    await make(path, host_dirs(tmp_path, 3), "2", SECTOR_SIZE)
    model, opener, deaths = Model(seed), FaultyOpener(), 0
    for _ in range(12):
        nth = int(10 ** model.random.uniform(0.5, 3.2))
        interval = model.random.choice((0.05, 1e6))
        deaths += await one_life(path, model, opener, nth, interval)
        for faults in opener.faults.values():
            faults.error_rate = faults.latency = 0.0
        async with open_volume(path, passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
            check_accounts(volume)
            await model.check(volume)
            volume.sectors.cache._blocks.clear()
            if model.random.random() < 0.3:
                await volume.flush()
                await model.check(volume)
            check_accounts(volume)
    assert deaths >= 4
