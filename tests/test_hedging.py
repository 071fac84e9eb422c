"""Hedging: a second request cuts the tail, costs at most five in a hundred more, a host that hangs costs a reader seconds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from storage.errors import Unavailable
from storage.hosts.hostdb import ENOUGH, HALF_LIFE, STALL
from storage.interfaces import Batch
from storage.metadata.keys import SECTOR, u64
from storage.sealing import BLOCK
from storage.sectors.cache import BlockCache
from storage.sectors.hedging import SAVED, SHARE, Attempt, Hedging
from storage.sectors.reader import SectorReader
from storage.sectors.records import VERSION, SectorRecord, ShardRecord
from storage.sectors.redundancy import layout_of
from storage.sectors.shards import ShardReader
from tests.fakes import make_seams
from tests.host_rig import Rig
from tests.rig import noise

USUAL = 0.02


class Fleet:
    """One sector on as many hosts in memory as it takes, host i + 1 with shard i (or a copy), and a reader without a cache."""

    def __init__(self, rig: Rig, contracts: list[str], sector: int, data: bytes, spec: str) -> None:
        self.rig, self.contracts, self.sector, self.data, self.spec = rig, contracts, sector, data, spec
        self.reader = self.new_reader()

    def new_reader(self) -> SectorReader:
        rig = self.rig
        shards = ShardReader(rig.io, rig.contractor, rig.hostdb, rig.seams)
        self.hedging = shards.hedging
        return SectorReader(rig.store, rig.io, rig.hostdb, BlockCache(0), shards)

    def latency(self, of: Callable[[int, int], float]) -> None:
        """Request number n (from 1) to host h is answered after of(h, n) seconds."""
        for number, contract in enumerate(self.contracts, 1):
            self._latency(number, contract, of)

    def _latency(self, number: int, contract: str, of: Callable[[int, int], float]) -> None:
        faults, count = self.rig.faults(contract), 0

        def applies(operation: str, _name: str) -> bool:
            nonlocal count
            if operation == "get_range":
                count += 1
                faults.latency = of(number, count)
            return True

        faults.only = applies

    async def read(self, block: int = 0) -> float:
        """Reads a block; how long that took."""
        started = trio.current_time()
        at = block * BLOCK
        assert await self.reader.read_range(self.sector, at, 100) == self.data[at : at + 100]
        return trio.current_time() - started

    def requests(self, number: int | None = None) -> int:
        """Ranges asked for, of one host or all."""
        chosen = self.contracts if number is None else [self.contracts[number - 1]]
        return sum(self.rig.host(contract).calls.get("get_range", 0) for contract in chosen)


@asynccontextmanager
async def a_fleet(spec: str) -> AsyncIterator[Fleet]:
    rig = Rig(seams=make_seams())
    data, sector = noise(8 * BLOCK), 100
    layout = layout_of(spec, len(data))
    plains = layout.plaintexts(sector, [data])
    contracts = [await rig.add(f"mem:hedging-{spec.replace('+', '.')}-{i}-{id(rig)}") for i in range(layout.spec.hosts_needed)]
    sealed = [rig.io.seal(plain, sector + number) for number, plain in enumerate(plains)]
    record = SectorRecord(
        VERSION, spec, len(data), 0, 0, [ShardRecord(s.sector_id, s.plaintext_length, bytes.fromhex(s.root), []) for s in sealed]
    )
    for number, (shard, contract) in enumerate(zip(layout.places, contracts, strict=True), 1):
        await rig.io.write_sealed(contract, sealed[shard])
        record.shards[shard].hosts.append(number)
    batch = Batch()
    batch.put(SECTOR + u64(sector), record.encode())
    rig.store.apply(batch)
    fleet = Fleet(rig, contracts, sector, data, spec)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fleet.hedging.run)
        await trio.testing.wait_all_tasks_blocked()
        yield fleet
        nursery.cancel_scope.cancel()


async def tail(fleet: Fleet, reads: int) -> list[float]:
    return sorted([await fleet.read() for _ in range(reads)])


@pytest.mark.parametrize(
    ("spec", "every", "share"),
    # A rebuild costs k requests, so that a smaller share of reads can be hedged.
    [("3", 50, 0.99), ("4+2", 200, 0.997)],
)
async def test_a_second_request_cuts_the_tail(spec: str, every: int, share: float, autojump_clock: trio.testing.MockClock) -> None:
    results: dict[bool, list[float]] = {}
    for hedged in (False, True):
        async with a_fleet(spec) as fleet:
            # One request in so many, to any host, takes a second.
            fleet.latency(lambda host, n: 1.0 if (n + 7 * host) % every == 0 else USUAL)
            if not hedged:
                fleet.hedging.spend = lambda _cost: False  # type: ignore[method-assign]
            await tail(fleet, 400)
            results[hedged] = await tail(fleet, 1000)
            assert fleet.hedging.second <= 0.05 * fleet.hedging.reads
    at = round(share * 1000)
    assert results[False][at] >= 1.0
    # Slow, and then as long as another takes.
    assert results[True][at] < 4 * USUAL
    # What is not slow is as quick as before.
    assert results[True][500] == pytest.approx(results[False][500])


@pytest.mark.parametrize(("spec", "every"), [("3", 22), ("2+1", 70)])
async def test_second_requests_are_at_most_five_in_a_hundred_whatever_hosts_do(
    spec: str, every: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with a_fleet(spec) as fleet:
        # Slower and slower, each read slower than all before it; then nearly as many slow ones as can be hedged; then half of them.
        def latency(_host: int, n: int) -> float:
            if n < 300:
                return 0.001 * 1.01**n
            return 0.5 if n % (every if n < 2500 else 2) == 0 else 0.02

        fleet.latency(latency)
        reads, before = 3000, fleet.requests()
        for _ in range(reads):
            await fleet.read()
            assert fleet.hedging.second <= 0.05 * fleet.hedging.reads
        assert fleet.hedging.reads == reads
        assert fleet.hedging.second > 0.2 * SHARE * reads
        assert fleet.hedging.stalls == 0
        assert fleet.requests() - before == reads + fleet.hedging.second
        told = [fleet.rig.hostdb.stats(number) for number in range(1, len(fleet.contracts) + 1)]
        assert sum(host.hedged for host in told) * (1 if spec == "3" else 2) == fleet.hedging.second
        assert sum(host.overtaken for host in told) == fleet.hedging.won
        # A second request is none of the host's failures.
        assert all(host.failed == 0 and host.failures == 0 for host in told)


async def test_no_more_is_saved_up_than_a_burst(autojump_clock: trio.testing.MockClock) -> None:
    async with a_fleet("2") as fleet:
        fleet.latency(lambda _host, _n: USUAL)
        for _ in range(2000):
            await fleet.read()
        spent = 0
        while fleet.hedging.spend(1):
            spent += 1
        assert spent <= SAVED


async def test_an_unknown_host_is_never_hedged(autojump_clock: trio.testing.MockClock) -> None:
    async with a_fleet("2") as fleet:
        fleet.latency(lambda host, n: 1.9 if n == ENOUGH else USUAL)
        for _ in range(2 * ENOUGH - 2):
            fleet.hedging._saved = SAVED
            await fleet.read()
        assert fleet.hedging.second == fleet.hedging.stalls == 0


@pytest.mark.parametrize("spec", ["2", "4+2"])
async def test_a_hung_host_costs_the_first_read_seconds_and_the_next_nothing(spec: str, autojump_clock: trio.testing.MockClock) -> None:
    async with a_fleet(spec) as fleet:
        fleet.latency(lambda _host, _n: USUAL)
        hung = fleet.rig.faults(fleet.contracts[0])
        hung.hang = True
        # Nothing is known of any host: the first read after a volume is opened.
        assert STALL <= await fleet.read() < STALL + 0.2
        assert fleet.hedging.second == 0
        asked = fleet.requests(1)
        for _ in range(20):
            assert await fleet.read() < 0.1
        assert fleet.requests(1) == asked
        assert fleet.rig.hostdb.stats(1).failed == 0
        # It is looked at again, and tried again; once it answers, it is used.
        hung.hang = False
        await trio.sleep(3 * HALF_LIFE)
        for _ in range(200):
            await fleet.read()
        assert fleet.requests(1) > asked


async def test_a_rebuild_does_not_wait_for_a_hung_host_either(autojump_clock: trio.testing.MockClock) -> None:
    async with a_fleet("4+2") as fleet:
        fleet.latency(lambda _host, _n: USUAL)
        fleet.rig.faults(fleet.contracts[0]).gone = "away"
        fleet.rig.faults(fleet.contracts[1]).hang = True
        assert await fleet.read() < STALL + 0.2
        for _ in range(10):
            assert await fleet.read() < 0.1
        # One more, and it cannot be read; that is said as soon as it is known.
        fleet.rig.faults(fleet.contracts[2]).gone = "away"
        with pytest.raises(Unavailable, match="too few of its shards can be read"):
            await fleet.read()


async def test_hosts_slow_by_nature_are_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    async with a_fleet("1") as fleet:
        fleet.latency(lambda _host, _n: 15.0)
        assert await fleet.read() == pytest.approx(15.0)
    async with a_fleet("2") as fleet:
        fleet.latency(lambda _host, _n: 5.0)
        for _ in range(ENOUGH):
            for host in (1, 2):
                fleet.rig.hostdb.succeeded(host, "read", BLOCK, 5.0)
        for _ in range(50):
            assert await fleet.read() == pytest.approx(5.0)
        assert fleet.hedging.stalls == 0


@pytest.mark.parametrize("watched", [False, True])
async def test_nothing_is_left_running_when_a_reader_goes_or_an_answer_has_come(
    watched: bool, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    seams = make_seams()
    rig = Rig(seams=seams)
    hedging = Hedging(rig.hostdb, seams)
    if watched:
        nursery.start_soon(hedging.run)
        await trio.testing.wait_all_tasks_blocked()
    running = 0

    def attempt(seconds: float, error: bool = False) -> Attempt:
        async def run() -> bytes:
            nonlocal running
            running += 1
            try:
                await trio.sleep(seconds)
            finally:
                running -= 1
            if error:
                raise Unavailable("as ordered")
            return b"%d" % round(seconds)

        return Attempt(run, 100, host=1)

    # Hangs, fails, hangs, answers: each lets the next begin.
    outcome = await hedging.first_good([attempt(1e6), attempt(1, error=True), attempt(1e6), attempt(3)])
    await trio.testing.wait_all_tasks_blocked()
    assert list(outcome.found.values()) == [b"3"] and [str(error) for error in outcome.errors] == ["as ordered"] and running == 0
    # The first does answer in the end, or the second fails, or both.
    outcome = await hedging.first_good([attempt(STALL + 3), attempt(1e6)])
    await trio.testing.wait_all_tasks_blocked()
    assert outcome.found == {0: b"5"} and running == 0
    outcome = await hedging.first_good([attempt(STALL + 3), attempt(1, error=True)])
    assert outcome.found == {0: b"5"} and running == 0
    outcome = await hedging.first_good([attempt(STALL + 3, error=True), attempt(1, error=True)])
    assert outcome.found == {} and len(outcome.errors) == 2 and running == 0
    with trio.move_on_after(10) as scope:
        await hedging.first_good([attempt(1e6), attempt(1e6)])
    await trio.testing.wait_all_tasks_blocked()
    assert scope.cancelled_caught and running == 0
    # All fail: that is told, once the last has.
    outcome = await hedging.first_good([attempt(1, error=True), attempt(2, error=True), attempt(5, error=True)], 2)
    assert outcome.found == {} and len(outcome.errors) == 3 and running == 0
    # Several at a time.
    outcome = await hedging.first_good([attempt(1), attempt(1e6), attempt(2), attempt(1e6)], 2)
    assert outcome.found == {0: b"1", 2: b"2"} and running == 0
    assert [entry.read for entry in hedging._watched if entry.read is not None] == []

    async def broken() -> bytes:
        raise ZeroDivisionError

    # A defect is the reader's, not the end of who watches.
    with pytest.raises((ZeroDivisionError, ExceptionGroup)):
        await hedging.first_good([attempt(1e6), Attempt(broken, 100, host=2)])
    assert running == 0
    outcome = await hedging.first_good([attempt(1e6), attempt(1)])
    assert list(outcome.found.values()) == [b"1"]
