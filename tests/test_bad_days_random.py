"""Several hosts with bad days at a time, of all kinds, switched on and off within what the replication bears, while the volume is in use.

A phase: as many hosts as the replication can do without are chosen; their faults come and go while programs write, read, remove and flush;
every answer is compared. Then all faults are off, and everything is at full replication again without anyone doing anything. Then others
are chosen. Virtual time, seeds reported; more: FUSEFS_BAD_DAYS phases, `FUSEFS_BAD_DAYS_SEED` for one that is to be seen again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from storage.history.publisher import COMPARE_SECONDS
from storage.hosts.faults import Faults, shards_only
from storage.hosts.memory import forget_memory_hosts, memory_content
from tests.bad_days import World

KINDS = ["slow", "errors", "lies", "cuts", "replays", "full", "gone", "hangs", "forgets", "loses answers"]
PHASES = int(os.environ.get("FUSEFS_BAD_DAYS", "1"))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    forget_memory_hosts()
    yield
    forget_memory_hosts()


def bad(chance: random.Random) -> Faults:
    """Something is wrong with a host, or several things."""
    faults = Faults()
    for what in chance.sample(KINDS, chance.choice((1, 1, 2))):
        match what:
            case "slow":
                faults.latency = chance.choice((0.1, 2.0, 15.0, 40.0))
            case "errors":
                faults.error_rate = chance.choice((0.05, 0.5, 1.0))
            case "lies":
                faults.lying = chance.choice((0.1, 1.0))
            case "cuts":
                faults.truncating = chance.choice((1, 100, 100_000))
            case "replays":
                faults.replay = True
            case "full":
                faults.quota = chance.choice((0, 200_000))
            case "gone":
                faults.gone = "gone"
            case "hangs":
                faults.hang = True
            case "forgets":
                faults.losing = True
            case "loses answers":
                faults.lose_answer_next = 20
    if chance.random() < 0.3:
        faults.only = shards_only
    return faults


def spoil(url: str, chance: random.Random) -> None:
    """What the host has got damaged, or lost, where it stands."""
    objects = memory_content(url.removeprefix("mem:")).objects
    for name in [name for name in objects if "/sectors/" in name]:
        if chance.random() < 0.2:
            if chance.random() < 0.5:
                del objects[name]
            else:
                at = chance.randrange(len(objects[name]))
                objects[name] = objects[name][:at] + bytes([objects[name][at] ^ 1]) + objects[name][at + 1 :]


@pytest.mark.timeout(60 + 60 * PHASES)
@pytest.mark.parametrize(("replication", "count", "may_fail"), [("2", 4, 1), ("3", 5, 2), ("4+2", 7, 2)])
async def test_bad_days_of_several_hosts(tmp_path: Path, autojump_clock: MockClock, replication: str, count: int, may_fail: int) -> None:
    seed = int(os.environ.get("FUSEFS_BAD_DAYS_SEED") or random.SystemRandom().randrange(1 << 32))
    print("seed", seed)
    chance = random.Random(seed)
    urls = [f"mem:{number}" for number in range(count)]
    world = World(tmp_path, urls, replication, seed=seed, scrub_interval=1200.0)
    await world.make()
    for phase in range(PHASES):
        async with world.opened():
            await world.work(30)
            victims = chance.sample(urls, may_fail)
            for _ in range(3):
                for url in victims:
                    faults = bad(chance) if chance.random() < 0.8 else Faults()
                    print(phase, url, faults)
                    world.set(url, faults)
                    if chance.random() < 0.15:
                        print(phase, url, "spoiled")
                        spoil(url, chance)
                await world.work(chance.choice((20, 60, 200)))
            world.heal()
            await world.work(20)
            await world.settled()
            # What a host lost of the metadata without a word shows only then.
            await trio.sleep(1.5 * COMPARE_SECONDS)
            await world.settled()
            await world.compare()
        await world.checked()
