"""Power cuts under volume and hosts: nothing acknowledged is lost, whatever the disk kept of what was not flushed.

Hundreds: scripts/torture. And the test of the test: with any one flush taken out, it fails.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from storage import create_volume, open_volume
from storage.keyfile import CHEAP
from tests.mount_child import PASSPHRASE
from tests.mounting import Mounted, MountFailed, wait_until
from tests.power_rig import Power, power_in
from tests.torture_rig import Lost, PowerRounds, temporary

ROUNDS = int(os.environ.get("FUSEFS_TORTURE_ROUNDS", "12"))
#: Seconds; a round takes three or four on a slow machine.
LIMIT = 60 + 15 * ROUNDS
#: Cuts within which a missing flush must show.
NOTICED_WITHIN = 8
#: What the files have that nobody calls fsync for.
CLOSED, OPEN = bytes(range(256)) * 500, b"a line in a log\n" * 3


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


def written_and_left_alone(base: Path, power: Power, flush_interval: float, without: Sequence[str] = ()) -> dict[str, bytes]:
    """Files nobody calls fsync for, one closed and one still open, until the mount has committed by itself; then the power is cut, and
    what was not flushed is gone. Returns what the next mount has. MountFailed: it cannot be mounted."""
    volume, mountpoint = power.mountpoint / "volume", base / "mnt"
    host = power.mountpoint / "host"
    mountpoint.mkdir()
    host.mkdir()

    async def make() -> None:
        await create_volume(volume, PASSPHRASE, hosts=[f"dir:{host}"], replication="1", argon2=CHEAP)

    trio.run(make)
    power.cut(None)
    power.end()
    power.start()
    mounted = Mounted(base / "run1", volume, mountpoint, f"commit_interval=0.3,flush_interval={flush_interval}", without)
    opened = -1
    try:
        (mountpoint / "closed").write_bytes(CLOSED)
        opened = os.open(mountpoint / "open", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(opened, OPEN)
        wait_until(lambda: sum(length for _, length, _ in mounted.writes(mountpoint / "open")) >= len(OPEN), "the dirty page comes", 20)
        with mounted.control() as control:
            # The next commit may have been on its way already, the one after it has all that was written before now.
            enough = control.status().volume.commit + 2
            for number in range(100_000):
                if control.status().volume.commit >= enough:
                    break
                if number % 20 == 0:
                    (mountpoint / f"more{number}").touch()
                time.sleep(0.02)
            assert control.status().volume.commit >= enough
        power.cut(None)
    finally:
        mounted.kill()
        if opened >= 0:
            with suppress(OSError):
                os.close(opened)
    power.end()
    power.start()
    again = Mounted(base / "run2", volume, mountpoint, "commit_interval=600", ())
    try:
        return {name: (mountpoint / name).read_bytes() for name in ("closed", "open") if (mountpoint / name).exists()}
    finally:
        again.kill()


@pytest.mark.parametrize("flush_interval", [pytest.param(600.0, id="in the journal alone"), pytest.param(0.2, id="in sectors, too")])
def test_what_is_written_and_left_alone_survives_a_cut_after_the_commit_interval(base: Path, flush_interval: float) -> None:
    with power_in(base) as power:
        assert written_and_left_alone(base, power, flush_interval) == {"closed": CLOSED, "open": OPEN}


def test_without_the_journals_flush_it_would_not(base: Path) -> None:
    with power_in(base) as power:
        try:
            found = written_and_left_alone(base, power, 600.0, ["journal-fdatasync"])
        except MountFailed as error:
            # The journal has less than hosts or the database know of, and that is noticed.
            assert str(error).startswith(("Corrupt:", "Fenced:"))
        else:
            assert found != {"closed": CLOSED, "open": OPEN}


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
