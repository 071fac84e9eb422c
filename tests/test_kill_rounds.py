"""kill -9 of the mount at random moments: nothing acknowledged is lost, nothing is there that was not written.

Hundreds: scripts/torture.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torture_rig import KillRounds, temporary

ROUNDS = int(os.environ.get("FUSEFS_TORTURE_ROUNDS", "12"))
#: Seconds; a round takes two or three on a slow machine.
LIMIT = 60 + 15 * ROUNDS


@pytest.fixture
def base() -> Iterator[Path]:
    with temporary() as path:
        yield path


@pytest.mark.timeout(LIMIT)
def test_kill_9_at_any_moment_loses_nothing_acknowledged(base: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    with KillRounds(base, seed) as rounds:
        for _ in range(ROUNDS):
            print(rounds.round())
        rounds.finish()
        # Else it would say nothing of sectors that are replaced while the process dies.
        assert rounds.deleted > 0
