"""A year of contract life, in virtual time: renewals, hosts that refuse, expiry with its grace, prunings; nothing readable is ever lost.

Four hosts, two copies. Each week the owner of every host prunes what he may. The mount comes and goes, with up to eight weeks off:
contracts of 90 days, renewed when 30 are left at the latest, have then ended 26 days ago at most, which is within the grace of 30. One
host at a time refuses for months, so that its contract ends, its grace too, and what it held is gone: by then it has been left, or, if
nobody was there, the other copy is at hand, and its owner finds out. When it is well again a new contract is concluded with it.

`FUSEFS_CONTRACT_YEARS` more years are lived if it is set.
"""

from __future__ import annotations

import os
import random
import secrets
from collections import Counter
from pathlib import Path

from storage.metadata.keys import UNDERREPLICATED, prefix_end
from storage.volume import Volume
from tests.contract_rig import Volumes, copies, in_virtual_time, last
from tests.test_pruning import prune
from tests.test_reconcile import records

YEARS = 1 + int(os.environ.get("FUSEFS_CONTRACT_YEARS", "0"))
WEEK = 7.0
#: Weeks: see the module for why not more.
LONGEST_OFF = 8
HOSTS = "abcd"


class Year:
    """What happens, and how often."""

    def __init__(self, it: Volumes, chance: random.Random) -> None:
        self.it = it
        self.chance = chance
        self.refusing = ""
        self.until = 0.0
        self.week = 0
        self.seen: Counter[str] = Counter()

    async def passes(self, volume: Volume | None) -> None:
        """One week, at whose end every host's owner prunes what he may."""
        if volume is None:
            self.it.clock.jump(WEEK * 86400)
        else:
            await self.it.days(WEEK)
        self.week += 1
        for host in HOSTS:
            self.seen["prunings"] += sum(held.pruned for held in await prune(self.it, host))

    def turn(self) -> None:
        """The host that refuses has come round, or the next one begins to."""
        if self.week < self.until:
            return
        if self.refusing:
            self.it.refuse(self.refusing, None)
            self.refusing, self.until = "", self.week + self.chance.randint(1, 3)
        else:
            self.refusing, self.until = self.chance.choice(HOSTS), self.week + self.chance.randint(12, 24)
            self.it.refuse(self.refusing)
            self.seen["refusals"] += 1

    async def mounted(self, weeks: int) -> None:
        """The volume is at work: everything is there when it begins, and well protected when it ends."""
        async with self.it.mounted() as volume:
            assert await self.it.readable(volume), f"week {self.week}"
            for _ in range(weeks):
                await self.it.write(volume, self.chance.randint(0, 2), size=20_000)
                await self.passes(volume)
                self.turn()
                await self.conclude(volume)
                assert await self.it.readable(volume), f"week {self.week}"
            await volume.repair()
            self.check(volume)
            self.seen["contracts"] = len(volume.contractor.all_contracts())
            self.seen["ended while mounted"] += len(volume.standing.ended())

    async def conclude(self, volume: Volume) -> None:
        """What its owner is told to do where a host has pruned everything: as soon as it takes contracts again."""
        for outcome in await volume.renew_contracts():
            if outcome.error and HOSTS[outcome.host_number - 1] != self.refusing:
                assert "conclude a new one" in outcome.error
                assert not last(volume, outcome.host_number).active(self.it.clock.time_ns())
                await volume.contractor.conclude_contract(str(outcome.host_number), 90 * 86400.0)
                self.seen["new contracts"] += 1

    def check(self, volume: Volume) -> None:
        """Every sector has its two copies, on hosts that keep them, on record as in truth."""
        keeping = volume.standing.keeping()
        assert len(keeping) >= 3, self.refusing
        assert all(set(record.shards[0].hosts) <= keeping for record in records(volume).values())
        assert copies(volume) <= {2, 3}  # a third is still to be deleted (I3)
        assert not volume.store.scan(UNDERREPLICATED, prefix_end(UNDERREPLICATED), 1)
        assert not volume.doubts.missing()


def test_a_year_of_contract_life_in_which_nothing_readable_is_lost(tmp_path: Path) -> None:
    seed = int(os.environ.get("FUSEFS_SEED", secrets.randbits(32)))
    print(f"FUSEFS_SEED={seed}")

    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make(HOSTS, "2")
        year = Year(it, random.Random(seed))
        async with it.mounted() as volume:
            await it.write(volume, 4, size=20_000)
        while year.week < 52 * YEARS:
            await year.mounted(year.chance.randint(1, 6))
            for _ in range(year.chance.randint(0, LONGEST_OFF)):
                await year.passes(None)
                year.turn()
        await year.mounted(1)
        print(dict(year.seen))
        # Renewals happened, and refusals; every host's first contract alone would be four.
        assert year.seen["contracts"] >= 4 + 4 * 3
        assert year.seen["refusals"]

    in_virtual_time(work)


def test_a_host_that_refuses_for_long_ends_is_pruned_after_the_grace_and_is_filled_again(tmp_path: Path) -> None:
    """The part of the year that chance may leave out, in this order."""

    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make(HOSTS, "2")
        async with it.mounted() as volume:
            await it.write(volume, 8, size=20_000)
            it.refuse("a")
        pruned: list[int] = []
        # 90 days of the contract, 30 of grace; nobody is there until the day before its end.
        for week in range(19):
            if week == 12:
                async with it.mounted() as volume:
                    assert len(volume.renewal.warnings()) == 1
                    await volume.repair()
                    assert volume.standing.keeping() == {2, 3, 4}
                    assert it.stored("a").shards()
                    assert await it.readable(volume)
            it.clock.jump(WEEK * 86400)
            if (await prune(it, "a"))[0:1] and not it.stored("a").names("volumes/"):
                pruned.append(week)
        assert pruned[0] == 17, pruned
        it.refuse("a", None)
        async with it.mounted() as volume:
            assert await it.readable(volume)
            await volume.contractor.conclude_contract("1", 90 * 86400.0)
            await it.write(volume, 8, size=20_000)
            await volume.repair()
            assert it.stored("a").shards()
            assert not volume.renewal.warnings()
            assert await it.readable(volume)

    in_virtual_time(work)
