"""kill -9, power cuts and lost machines on volumes whose sectors are cut into shards (k+m): the same promises as with copies.

What is compared: tests/torture_rig.py. Hundreds: scripts/torture kill 300 --replication 2+1, and power, lost.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nonces import Nonces
from tests.torture_hosts import DirectoryHost
from tests.torture_rig import KillRounds, LostRounds, PowerRounds, Rounds, temporary

ROUNDS = int(os.environ.get("FUSEFS_TORTURE_ROUNDS", "2"))
LIMIT = 60 + 30 * ROUNDS


@pytest.fixture
def base() -> Iterator[Path]:
    with temporary() as path:
        yield path


def go(rounds: Rounds) -> None:
    """I1 too: shards have ids of their own, and those of the same sector must not meet another's."""
    nonces = Nonces()
    for _ in range(ROUNDS):
        print(rounds.round())
        # After a power cut they are away until the next round.
        for host in rounds.hosts:
            if isinstance(host, DirectoryHost) and host.path.is_dir():
                nonces.host_directory(host.path)
    rounds.finish()
    nonces.check()
    assert nonces.counts["shard"] > 0 or isinstance(rounds, PowerRounds)


@pytest.mark.timeout(LIMIT)
def test_kill_9_loses_nothing_acknowledged(base: Path) -> None:
    with KillRounds(base, random.SystemRandom().randrange(1 << 32), "2+1") as rounds:
        go(rounds)


@pytest.mark.timeout(LIMIT)
def test_power_cuts_lose_nothing_acknowledged(base: Path) -> None:
    with PowerRounds(base, random.SystemRandom().randrange(1 << 32), replication="2+1") as rounds:
        go(rounds)


@pytest.mark.timeout(LIMIT)
def test_what_was_acknowledged_comes_back_without_the_machine(base: Path) -> None:
    """And, every other time, without a host."""
    with LostRounds(base, random.SystemRandom().randrange(1 << 32), "2+1") as rounds:
        go(rounds)
