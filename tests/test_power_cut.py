"""Power cuts under volume and hosts: nothing acknowledged is lost, whatever the disk kept of what was not flushed.

Hundreds: scripts/torture. And the test of the test: with any one flush taken out, it fails.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import create_volume, open_volume
from storage.keyfile import CHEAP
from tests.mount_child import PASSPHRASE
from tests.power_rig import power_in
from tests.torture_rig import Lost, PowerRounds, temporary

ROUNDS = int(os.environ.get("FUSEFS_TORTURE_ROUNDS", "20"))
#: Seconds; a round takes three or four on a slow machine.
LIMIT = 60 + 15 * ROUNDS
#: Cuts within which a missing flush must show.
NOTICED_WITHIN = 8


@pytest.fixture
def base() -> Iterator[Path]:
    with temporary() as path:
        yield path


@pytest.mark.timeout(LIMIT)
def test_power_cuts_at_any_moment_lose_nothing_acknowledged(base: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    with PowerRounds(base, seed) as rounds:
        for _ in range(ROUNDS):
            print(rounds.round())
        rounds.finish()
        # Else it would say nothing of sectors that are replaced while the power fails.
        assert rounds.deleted > 0


@pytest.mark.parametrize("rule", ["journal-fdatasync", "host-fsync", "host-dirsync"])
def test_a_flush_that_is_taken_out_is_noticed(base: Path, rule: str) -> None:
    with PowerRounds(base, random.SystemRandom().randrange(1 << 32), [rule], "drop") as rounds:
        with pytest.raises(Lost) as lost:
            for _ in range(NOTICED_WITHIN):
                rounds.round()
            rounds.finish()
        print(str(lost.value)[:1000])
        # By what is missing, not because the test itself does not work.
        said = str(lost.value)
        assert "bytes of incarnation" in said or "is gone" in said or "is not there" in said or "Corrupt:" in said or "Fenced:" in said


async def test_a_volume_is_whole_when_it_is_made(base: Path) -> None:
    with power_in(base) as power:
        volume = power.mountpoint / "volume"
        await create_volume(volume, PASSPHRASE, argon2=CHEAP)
        power.cut(None)
        power.end()
        # Its metadata would come back from the journal, as long as that holds the first commit.
        assert (power.backing / "volume" / "metadata" / "data.mdb").stat().st_size > 0
        power.start()
        async with open_volume(volume, passphrase=PASSPHRASE) as opened:
            await opened.flush()
