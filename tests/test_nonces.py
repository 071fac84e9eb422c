"""Nonces (I1): whatever happens to a volume's directory, no (key, nonce) ever seals two different things."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import Fenced
from storage.sealing import ShardHeader
from tests import crash_points
from tests.crash_points import DeadFrom, Run
from tests.metadata_rig import quick_directory
from tests.nonces import Nonces
from tests.rig import PASSPHRASE


@pytest.fixture
def base() -> Iterator[Path]:
    before = crash_points.hasten()
    try:
        with quick_directory() as path:
            yield path
    finally:
        crash_points.restore(before)


@pytest.mark.parametrize("seed", range(2))
async def test_no_pair_of_key_and_nonce_ever_seals_two_things(base: Path, seed: int) -> None:
    """Kills anywhere, merges, old copies of the directory put back, recoveries; every put is on record, whatever was deleted since."""
    chance = random.Random(seed)
    run = Run(base / "run")
    await run.make()
    volume, backup = run.base / "v", base / "backup"
    restored = 0
    for round_ in range(5):
        await run.live(DeadFrom(int(10 ** chance.uniform(2, 3.5))), lambda script: script.long(60), chance.getrandbits(32))
        if round_ % 2 == 0:
            shutil.rmtree(backup, ignore_errors=True)
            shutil.copytree(volume, backup)
        await run.check()
        if round_ % 2 == 1:
            # Last week's copy comes back: refused if the hosts know better, and recovered then; else it goes on from there.
            shutil.rmtree(volume)
            shutil.copytree(backup, volume)
            run.model.passphrases = [PASSPHRASE, crash_points.NEW_PASSPHRASE]
            try:
                await run.check(recovered=True)
            except Fenced:
                await run.lose_machine()
                restored += 1
        elif chance.random() < 0.4:
            await run.lose_machine(DeadFrom(chance.randint(5, 100)))
    for number in range(3):
        run.nonces.host_directory(run.base / f"host{number}")
    run.nonces.journal(volume)
    run.nonces.check()
    assert restored
    assert all(run.nonces.counts[kind] > 1 for kind in ("shard", "tail", "object", "superblock")), run.nonces


def test_the_checker_notices() -> None:
    header = ShardHeader(bytes(16), bytes([7]) * 16, 1, 100, 5)
    nonces = Nonces()
    name = "volumes/00/sectors/ab/abcd"
    nonces.object(name, header.encode() + b"one")
    nonces.object(name, header.encode() + b"one")
    nonces.object(name, ShardHeader(bytes(16), bytes([8]) * 16, 1, 100, 5).encode() + b"two")
    nonces.check()
    assert nonces.counts == {"shard": 2}
    nonces.object(name, header.encode() + b"two")
    with pytest.raises(AssertionError, match="shard"):
        nonces.check()
