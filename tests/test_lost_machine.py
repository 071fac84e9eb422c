"""The machine is lost at random moments, and every other time a host with it: what `-o fsync=hosts` acknowledged comes back from the rest.

Hundreds: scripts/torture lost.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torture_rig import LostRounds, temporary

ROUNDS = int(os.environ.get("FUSEFS_TORTURE_ROUNDS", "8"))
LIMIT = 60 + 30 * ROUNDS


@pytest.fixture
def base() -> Iterator[Path]:
    with temporary() as path:
        yield path


@pytest.mark.timeout(LIMIT)
def test_what_fsync_acknowledged_comes_back_without_the_machine(base: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    with LostRounds(base, seed) as rounds:
        for _ in range(ROUNDS):
            print(rounds.round())
        rounds.finish()
