"""Two writers at the same moment, and answers that are late or lost: one history at most has a majority, and what it acknowledged stays (I5)."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from storage.errors import Fenced, FusefsError, Unavailable
from storage.hosts.faults import Faults
from storage.recovery import recover_volume
from storage.volume import Volume, open_volume
from tests.host_rig import FaultyOpener
from tests.rig import PASSPHRASE, QUIET, host_dirs, make
from tests.test_history import opened, publisher_of, write


def reaching(every: list[str], reached: list[str]) -> FaultyOpener:
    opener = FaultyOpener()
    for url in every:
        opener.faults[url] = Faults(gone=None if url in reached else "cut off")
    return opener


def superblocks_alone(operation: str, name: str) -> bool:
    return operation == "put_if" and "/superblock." in name


async def acknowledged(volume: Volume) -> bool:
    """A flush; is everything on a majority?"""
    try:
        report = await volume.flush()
    except Fenced:
        return False
    return not any(reason.startswith("metadata") for reason in report.reasons)


async def test_a_writer_whose_superblocks_failed_for_a_while_does_not_write_above_anothers(tmp_path: Path) -> None:
    """The generations it made elsewhere meanwhile are no licence to leave out those the host has had from another."""
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "2")
    first = reaching(urls, urls[:2])
    said = False
    try:
        async with opened(tmp_path / "v", first) as a:
            await write(a, "both", b"know")
            assert await acknowledged(a)
            first.faults[urls[1]].only = superblocks_alone
            first.faults[urls[1]].fail_next = 8
            for i in range(8):
                await write(a, f"first{i}", b"1")
                assert not await acknowledged(a)
            assert first.faults[urls[1]].fail_next == 0
            second = reaching(urls, urls[1:])
            assert (await recover_volume(tmp_path / "w", urls[1:], passphrase=PASSPHRASE, opener=second)).majority
            async with opened(tmp_path / "w", second) as b:
                await write(b, "second", b"2")
                assert await acknowledged(b)
                await write(a, "first", b"1")
                print(publisher_of(a).generation, publisher_of(b).generation)
                said = await acknowledged(a)
                print(said, publisher_of(a).generation, publisher_of(b).generation, publisher_of(a).trouble)
                await write(b, "more", b"2")
                assert await acknowledged(b)
    except Fenced as error:
        print(error)
    assert not said
