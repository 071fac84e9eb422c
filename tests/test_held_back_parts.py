"""Holding back, and what a full journal is asked for, looked at one by one (I7)."""

from __future__ import annotations

import logging
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from storage.errors import NoSpace
from storage.hosts.memory import memory_content
from storage.interfaces import Batch, Buffer
from storage.metadata.keys import SECTOR, u64
from storage.read_only import ReadOnlySource, open_read_only
from storage.values import shipping
from storage.volume import Volume
from tests.metadata_rig import copy
from tests.rig import PASSPHRASE, QUIET, append, contents, free, host_dirs, make, new_value, noise, opened


async def in_journal(volume: Volume, count: int) -> list[int]:
    """Values of a few bytes each, which only the journal has."""
    values = [new_value(volume) for _ in range(count)]
    for value in values:
        await append(volume, value, b"only here")
    await volume.commit()
    return values


class FullFor:
    """A journal that is full for all but urgent commits; what was asked of it."""

    def __init__(self, volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[bool] = []
        commit = volume.store.commit

        async def refusing(urgent: bool = False) -> int:
            self.asked.append(urgent)
            if not urgent:
                raise NoSpace("full, on purpose")
            return await commit(urgent)

        monkeypatch.setattr(volume.store, "commit", refusing)


async def test_what_is_removed_while_a_commit_is_written_may_use_the_reserve_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        first, second, third = await in_journal(volume, 3)
        free(volume, first)
        commit = volume.store.commit

        async def meanwhile(urgent: bool = False) -> int:
            sequence = await commit(urgent)
            free(volume, second)
            return sequence

        with monkeypatch.context() as patch:
            patch.setattr(volume.store, "commit", meanwhile)
            await volume.values.admission.commit()
        full = FullFor(volume, monkeypatch)
        await volume.values.admission.commit()
        assert full.asked == [False, True]
        # Once that is durable, nothing is removed that what comes next could point to.
        volume.values.set_replication(batch := Batch(), third, "2")
        volume.store.apply(batch)
        with pytest.raises(NoSpace):
            await volume.values.admission.commit()
        assert full.asked == [False, True, False]
        monkeypatch.undo()
        await volume.commit()


async def test_what_was_removed_is_not_taken_for_committed_where_only_the_database_was_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then catching up makes no commit; and the one that is to come may use the reserve still."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        (value,) = await in_journal(volume, 1)
        free(volume, value)

        async def catch_up(urgent: bool = False) -> None:
            await trio.lowlevel.checkpoint()

        with monkeypatch.context() as patch:
            patch.setattr(type(volume.store), "overdue", property(lambda _store: True))
            patch.setattr(volume.store, "catch_up", catch_up)
            await volume.values.keep_pace(removing=True)
        with monkeypatch.context() as patch:
            full = FullFor(volume, patch)
            await volume.values.admission.commit()
        assert full.asked == [False, True]


async def test_a_full_journal_is_asked_once_for_all_parts_of_a_landing_and_they_come_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer takes up to half a minute each time; and coming down is what makes the commit fit."""
    monkeypatch.setattr(shipping, "LANDING", 16)
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        values = await in_journal(volume, 100)
        asked = 0

        async def refusing(urgent: bool = False) -> None:
            nonlocal asked
            asked += urgent
            raise NoSpace("full, on purpose")

        with monkeypatch.context() as patch:
            patch.setattr(volume.store, "catch_up", refusing)
            with trio.fail_after(20):
                await volume.flush()
        assert asked == 1
        assert volume.values.accepting()
        assert not volume.values._tails
        for value in values:
            assert await contents(volume, value) == b"only here"


async def test_hosts_that_refused_what_is_gone_by_now_are_not_said_to_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next append might be refused for it, although nothing has been tried since."""
    monkeypatch.setattr(shipping, "RETRY_FIRST", 0.05)
    await make(tmp_path / "v", ["mem:gone"])
    content = memory_content("gone")
    async with opened(tmp_path / "v", options=replace(QUIET, commit_interval=None)) as volume:
        value = new_value(volume)
        await append(volume, value, noise(1000))
        content.capacity = content.used()
        with pytest.raises(NoSpace):
            await volume.flush()
        assert volume.values.shipper.trouble is not None
        free(volume, value)
        with trio.fail_after(10):
            while volume.values.shipper._cargos:
                await trio.sleep(0.05)
        assert volume.values.shipper.trouble is None
        content.capacity = None


@pytest.mark.parametrize("removed", [False, True])
async def test_a_damaged_record_of_a_sector_does_not_keep_its_file_from_being_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, removed: bool
) -> None:
    """Refused half way, the file would stay without the bytes that were in memory. Its second sector is there, its first is not."""
    caplog.set_level(logging.ERROR)
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        write, go, data = volume.sectors.write_sector, trio.Event(), noise(2 * volume.values.shipper.payload_limit)
        second = 0

        async def held(sector_id: int, parts: Sequence[Buffer], replication: str) -> None:
            nonlocal second
            if bytes(parts[0][:32]) == data[:32]:
                await go.wait()
            elif not second:
                second = sector_id
            await write(sector_id, parts, replication)

        monkeypatch.setattr(volume.sectors, "write_sector", held)
        value, other = new_value(volume), new_value(volume)
        await append(volume, value, data)
        with trio.fail_after(10):
            while volume.values._tails[value].flights[1].state is not shipping.FlightState.WAITING:
                await trio.sleep(0.01)
        batch = Batch()
        if removed:
            batch.delete(SECTOR + u64(second))
        else:
            batch.put(SECTOR + u64(second), b"damaged")
        volume.store.apply(batch)
        free(volume, value)
        assert f"sector {second}" in caplog.text
        go.set()
        await append(volume, other, b"and on")
        with trio.fail_after(20):
            await volume.flush()
        assert await contents(volume, other) == b"and on"
        assert not volume.values.shipper._cargos


async def test_what_was_learned_of_hosts_is_given_up_at_the_end_rather_than_what_waits_for_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where more is pending than the journal may hold, nothing further can be applied; but what is pending can be committed."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    refused: list[str] = []
    async with opened(tmp_path / "v") as volume:
        ino = volume.namespace.create(1, b"file", stat.S_IFREG | 0o644, 0, 0)
        apply = volume.store.apply

        def once(batch: Batch, tails: Sequence[object] = ()) -> None:
            if not refused:
                refused.append("bookkeeping")
                raise NoSpace("more waits for a commit than the journal can hold, on purpose")
            apply(batch, tails)  # type: ignore[arg-type]

        assert volume.store.applied_sequence > volume.store.durable_sequence
        monkeypatch.setattr(volume.store, "apply", once)
    assert refused == ["bookkeeping"]
    async with opened(tmp_path / "v") as volume:
        assert volume.namespace.lookup(1, b"file") == ino


async def test_a_rename_over_a_file_does_not_wait_for_the_sector_of_what_the_journal_has_or_of_a_few_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of very many small files a sector takes seconds to come down. The bytes are in the commit of the rename all the same (I6); what is
    large, and nowhere else, is not written twice: it is waited for."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    written = {b"few": b"a few bytes", b"journaled": noise(100_000), b"large": noise(100_000)}
    async with opened(tmp_path / "v") as volume:
        write, go = volume.sectors.write_sector, trio.Event()

        async def held(sector_id: int, parts: Sequence[Buffer], replication: str) -> None:
            await go.wait()
            await write(sector_id, parts, replication)

        monkeypatch.setattr(volume.sectors, "write_sector", held)
        names = volume.namespace
        for name, content in written.items():
            names.create(1, name, stat.S_IFREG | 0o644, 0, 0)
            ino = names.create(1, name + b".new", stat.S_IFREG | 0o644, 0, 0)
            await names.append(ino, content)
            if name == b"journaled":
                await names.commit(ino)
        await volume.values.shipper.gather()
        with trio.fail_after(10):
            for name in (b"few", b"journaled"):
                await names.rename(1, name + b".new", 1, name)
            await volume.store.commit()
        with trio.move_on_after(0.3) as waiting:
            await names.rename(1, b"large.new", 1, b"large")
        assert waiting.cancelled_caught
        copy(tmp_path / "v", tmp_path / "killed")
        go.set()
        await names.rename(1, b"large.new", 1, b"large")
        await volume.flush()
        for name, content in written.items():
            assert await names.read(names.lookup(1, name), 0, 1 << 20) == content
    source = ReadOnlySource(tmp_path / "killed", passphrase=PASSPHRASE)
    async with open_read_only(source, scratch=tmp_path / "scratch", options=QUIET) as found:
        for name in (b"few", b"journaled"):
            assert found.namespace.find(1, name + b".new") is None
            assert await found.namespace.read(found.namespace.lookup(1, name), 0, 1 << 20) == written[name]
        assert found.namespace.attributes(found.namespace.lookup(1, b"large")).size == 0
