"""What a volume says of itself, `status` above all, is so: nothing is called lost, missing, good or done that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusefs.cli.status import _summary
from storage.errors import Unavailable
from storage.status import VolumeStatus
from storage.volume import Volume
from tests.rig import append, host_dirs, make, new_value, opened


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
