"""The host that fails on order fails as ordered, the same way every time."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from storage.errors import Busy, Corrupt, NoSpace, NotFound, Unavailable
from storage.hosts.faults import FaultyHost, shards_only
from storage.hosts.memory import MemoryHost
from tests.fakes import make_seams

LIMIT = 1000


def faulty(seed: int = 0) -> FaultyHost:
    return FaultyHost(MemoryHost("mem:x"), make_seams(), seed)


async def test_slow(autojump_clock: trio.testing.MockClock) -> None:
    host = faulty()
    host.faults.latency, host.faults.throughput = 3.0, 10.0
    before = trio.current_time()
    await host.put("a", b"x" * 20)
    assert trio.current_time() - before == pytest.approx(5.0)


async def test_failing_next_and_by_chance_deterministically() -> None:
    host = faulty()
    host.faults.fail_next = 2
    for _ in range(2):
        with pytest.raises(Unavailable):
            await host.put("a", b"1")
    assert await host.tag("a") is None

    async def outcomes(seed: int) -> list[bool]:
        host = faulty(seed)
        host.faults.error_rate = 0.5
        result = []
        for _ in range(40):
            try:
                await host.put("a", b"1")
                result.append(True)
            except Unavailable:
                result.append(False)
        return result

    assert await outcomes(1) == await outcomes(1) != await outcomes(2)
    assert {True, False} == set(await outcomes(1))


async def test_lying_truncating_replaying() -> None:
    host = faulty()
    await host.put("a", b"first")
    await host.put("a", b"second")
    host.faults.lying = 1.0
    assert await host.get("a", LIMIT) != b"second"
    assert len(await host.get_range("a", 0, 3)) == 3
    host.faults.lying, host.faults.truncating = 0.0, 2
    assert await host.get("a", LIMIT) == b"seco"
    host.faults.truncating, host.faults.replay = 0, True
    assert await host.get("a", LIMIT) == b"first"
    assert await host.get_range("a", 1, 2) == b"ir"
    with pytest.raises(Corrupt):
        await host.get("a", 3)
    host.faults.replay = False
    assert await host.get("a", LIMIT) == b"second"


async def test_losing_full_gone_and_hanging(autojump_clock: trio.testing.MockClock) -> None:
    host = faulty()
    host.faults.losing = True
    await host.put("a", b"1")
    with pytest.raises(NotFound):
        await host.get("a", LIMIT)
    host.faults.losing, host.faults.quota = False, 10
    await host.put("a", b"12345678")
    with pytest.raises(NoSpace):
        await host.put("b", b"123")
    await host.put("a", b"1234567890")
    space = await host.space()
    assert space is not None
    assert (space.free, space.total) == (0, 10)
    host.faults.quota, host.faults.gone = None, "on fire"
    with pytest.raises(Unavailable, match="on fire"):
        await host.get("a", LIMIT)
    host.faults.gone, host.faults.hang = None, True
    with trio.move_on_after(1000) as scope:
        await host.get("a", LIMIT)
    assert scope.cancelled_caught


async def test_a_lost_answer_and_ignored_conditions() -> None:
    host = faulty()
    host.faults.lose_answer_next = 1
    with pytest.raises(Unavailable):
        await host.put("a", b"1")
    assert await host.get("a", LIMIT) == b"1"
    with pytest.raises(Busy):
        await host.put_if("a", b"2", None)
    host.faults.lose_answer_next = 1
    with pytest.raises(Unavailable):
        await host.delete("a")
    assert await host.tag("a") is None
    await host.put("a", b"1")
    host.faults.ignores_conditions = True
    await host.put_if("a", b"2", None)
    assert await host.get("a", LIMIT) == b"2"


async def test_faults_can_be_for_shards_only() -> None:
    host = faulty()
    host.faults.gone, host.faults.only = "away", shards_only
    await host.put("fusefs-host.json", b"1")
    with pytest.raises(Unavailable):
        await host.put("volumes/x/sectors/ab/abc", b"1")
