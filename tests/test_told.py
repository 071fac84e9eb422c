"""What a volume says of itself, `status` above all, is so: nothing is called lost, missing, good or done that is not."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fusefs.cli.status import _summary
from storage.errors import Unavailable
from storage.status import VolumeStatus
from storage.volume import Volume
from tests.rig import QUIET, append, host_dirs, make, new_value, opened


def line(now: VolumeStatus, label: str) -> str:
    """Of `fusefs status`, the one line with this label."""
    return dict(_summary(now, None))[label]


# -------------------------------------------------------------------------------------------------------------- pending


async def told_pending(volume: Volume) -> tuple[int, int, str]:
    now = await volume.status()
    return now.pending_bytes, now.logged_bytes, line(now, "pending")


async def test_what_is_in_the_log_on_the_hosts_is_not_called_pending(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "2")
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        await append(volume, value, b"9 bytes..")
        await volume.values.commit(value)
        assert await told_pending(volume) == (9, 0, "9 B on too few hosts yet")
        await volume.publish()
        assert await told_pending(volume) == (0, 9, "nothing: what was written is on its hosts, 9 B of it in their log")
        # What comes behind it is on no host before it is published as well.
        await append(volume, value, b"5 byt")
        await volume.values.commit(value)
        assert await told_pending(volume) == (5, 9, "5 B on too few hosts yet; 9 B more in the log on the hosts")
        await volume.publish()
        assert (await told_pending(volume))[:2] == (0, 14)
        await volume.flush()
        assert await told_pending(volume) == (0, 0, "nothing: what was written is on its hosts")


async def test_what_no_majority_of_the_hosts_has_in_its_log_is_pending(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "2")
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        await append(volume, value, b"9 bytes..")
        for number in (1, 2):
            (tmp_path / f"host{number}").rename(tmp_path / f"away{number}")
        await volume.values.commit(value)
        with pytest.raises(Unavailable):
            await volume.publish()
        assert (await told_pending(volume))[:2] == (9, 0)
        for number in (1, 2):
            (tmp_path / f"away{number}").rename(tmp_path / f"host{number}")
        await volume.hosts.retry_once()
        await volume.publish()
        assert (await told_pending(volume))[:2] == (0, 9)


# --------------------------------------------------------------------------------------------------------- too few copies


async def leave(volume: Volume, number: int) -> None:
    await volume.leave_host(str(number), leave=True)


async def lose(volume: Volume, number: int) -> None:
    await volume.mark_host(str(number), lost=True)


@pytest.mark.parametrize(("give_up", "why"), [(leave, "is being left"), (lose, "is lost")])
async def test_a_flush_says_why_hosts_that_answer_take_nothing(
    tmp_path: Path, give_up: Callable[[Volume, int], Awaitable[None]], why: str
) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "3")
    async with opened(tmp_path / "v") as volume:
        await give_up(volume, 1)
        value = new_value(volume)
        await append(volume, value, b"two copies")
        first = str(await volume.flush())
        assert re.fullmatch(rf"1 sector with too few copies: sector \d+ has 2 of 3 copies: no other .* \({urls[0]} {why}\)", first)
    # Another process did not see it happen.
    async with opened(tmp_path / "v") as volume:
        report = await volume.flush()
        assert str(report).startswith("1 sector with too few copies: ")
        assert f"({urls[0]} {why})" in str(report)
        assert "answer" not in str(report)
        await volume.add_host(f"dir:{tmp_path / 'another'}")
        await volume.repair()
        assert str(await volume.flush()) == ""
        assert (await volume.status()).warnings == []


async def test_what_was_said_of_a_sector_is_forgotten_once_it_has_its_copies(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 3), "3")
    async with opened(tmp_path / "v") as volume:
        await leave(volume, 1)
        await append(volume, new_value(volume), b"two copies")
        await volume.flush()
        assert any("has 2 of 3 copies" in warning for warning in (await volume.status()).warnings)
        await volume.add_host(f"dir:{tmp_path / 'another'}")
        assert (await volume.repair()).pending == 0
        assert (await volume.status()).warnings == []


async def test_a_host_can_be_added_when_those_there_are_too_few_for_what_is_staged(tmp_path: Path) -> None:
    """As the message says that refuses: it must not keep from doing it."""
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls, "2")
    options = replace(QUIET, staging=8 * 1024 * 1024)
    async with opened(tmp_path / "v", options=options) as volume:
        await volume.flush()
        await lose(volume, 2)
        await append(volume, new_value(volume), b"on no host yet")
        with pytest.raises(Unavailable, match=rf"can be used now: 1 \({urls[1]} is lost\); .*add one \(fusefs hosts VOLUME add URL\)"):
            await volume.flush()
    async with opened(tmp_path / "v", options=options) as volume:
        await volume.add_host(f"dir:{tmp_path / 'another'}")
        assert str(await volume.flush()) == ""
        assert (await volume.status()).degraded_sectors == 0
