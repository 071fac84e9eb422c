"""kill -9 and lost machines on S3 hosts: what is staged when it dies is as durable as anything, and gets to the hosts afterwards.

What is compared: tests/torture_rig.py. Hundreds: scripts/torture kill 300 --hosts s3, and lost.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.torture_hosts import SeaweedFS
from tests.torture_rig import KillRounds, LostRounds, temporary

ROUNDS = int(os.environ.get("FUSEFS_TORTURE_ROUNDS", "3"))
LIMIT = 120 + 60 * ROUNDS


@pytest.fixture
def base() -> Iterator[Path]:
    with temporary() as path:
        yield path


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("kind", [KillRounds, LostRounds])
def test_nothing_acknowledged_is_lost_with_hosts_that_are_far_slow_or_cut_off(kind: type[KillRounds], base: Path) -> None:
    with closing(SeaweedFS(base)) as place, kind(base, random.SystemRandom().randrange(1 << 32), place=place) as rounds:
        for _ in range(ROUNDS):
            print(rounds.round())
        # That something was staged is seen in longer runs: three rounds may have been lucky.
        rounds.far = False
        rounds.finish()
