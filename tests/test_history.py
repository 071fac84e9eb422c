"""The history on hosts: what is published, when nothing is, who may go on, and what may be deleted (I3, I4, I5)."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from storage.errors import BadArgument, Fenced, Unavailable
from storage.history import checkpoint as checkpoint_module
from storage.history import draft as draft_module
from storage.history.host_side import UNREAD
from storage.history.log import FAN
from storage.history.objects import metadata_prefix
from storage.history.publisher import Publisher
from storage.history.superblock import parse_superblock
from storage.hosts.faults import Faults
from storage.interfaces import Batch
from storage.keyfile import CHEAP, KEY_FILE, change_passphrase
from storage.metadata.keys import LOST, SETTING, u32
from storage.recovery import recover_volume
from storage.volume import Volume
from storage.wiring import open_volume
from tests.host_rig import FaultyOpener, Stored
from tests.rig import PASSPHRASE, QUIET, append, contents, free, host_dirs, make, new_value, noise, published


@asynccontextmanager
async def opened(path: Path, opener: FaultyOpener | None = None) -> AsyncIterator[Volume]:
    async with open_volume(path, passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        yield volume


def publisher_of(volume: Volume) -> Publisher:
    assert volume.publisher is not None
    return volume.publisher


def superblocks(url: str) -> list[str]:
    return Stored(url).names("/superblock.")


def newest(url: str) -> bytes:
    """The latest superblock of a host; what it is called counts on that host alone."""
    return Stored(url).read(superblocks(url)[-1])


def metadata(url: str, volume: Volume) -> set[str]:
    return set(Stored(url).names(metadata_prefix(volume.config.volume_id_bytes)))


def held(url: str, volume: Volume) -> set[str]:
    """Metadata objects by their own names."""
    return {name.rsplit("/", 1)[1] for name in metadata(url, volume)}


def named(url: str, publisher: Publisher) -> set[str]:
    """What the latest superblock of a host names."""
    body = parse_superblock(newest(url), "it").open(publisher._keys.superblock_key(), "it")
    return {ref.name for entry in body.log for ref in entry.parts} | {body.checkpoint.name if body.checkpoint else ""}


async def write(volume: Volume, name: str, data: bytes) -> None:
    fd = await volume.files.open(name, write=True)
    await volume.files.append(fd, data)
    await volume.files.commit(fd)
    await volume.files.close(fd)


async def read(volume: Volume, name: str) -> bytes:
    fd = await volume.files.open(name, existing=True)
    try:
        return await volume.files.read_at(fd, 0, 1 << 24)
    finally:
        await volume.files.close(fd)


# --------------------------------------------------------------------------------------------------------------------
# What is on the hosts


async def test_every_host_has_two_generations_and_every_object_they_name(tmp_path: Path) -> None:
    """I4: whoever finds any one host finds everything its superblocks name."""
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "2")
    async with opened(tmp_path / "v") as volume:
        publisher = publisher_of(volume)
        for i in range(30):
            await write(volume, f"file{i}", noise(100))
            await publisher.publish()
        for url in urls:
            assert len(superblocks(url)) == 2
            raw = Stored(url).read(superblocks(url)[-1])
            block = parse_superblock(raw, "it")
            body = block.open(publisher._keys.superblock_key(), "it")
            named = {ref.name for entry in body.log for ref in entry.parts} | {body.checkpoint.name if body.checkpoint else ""}
            have = {name.rsplit("/", 1)[1] for name in metadata(url, volume)}
            assert named <= have
            assert block.sequence == publisher.draft.sequence == volume.store.published
            # Eight of a level become one: thirty rounds are a handful of entries.
            assert len(body.log) < 16
            assert len(have) < 40


async def test_an_idle_volume_sends_nothing(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls, "2")
    opener = FaultyOpener()
    async with opened(tmp_path / "v", opener) as volume:
        value = new_value(volume)
        await append(volume, value, noise(5000))
        await volume.flush()
        free(volume, value)
        while volume.values._reclaimer.step():
            pass
        await volume.commit()
        for _ in range(12):
            await published(volume)
            await volume.deleter.drain()
            await volume.commit()
        before = [dict(opener.hosts[url].calls) for url in urls]
        for _ in range(5):
            await published(volume)
            await volume.deleter.drain()
            await volume.commit()
        assert [dict(opener.hosts[url].calls) for url in urls] == before
        assert not publisher_of(volume).dirty


async def test_statistics_of_hosts_alone_are_no_reason_to_send(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        await publisher_of(volume).publish()
        generation = publisher_of(volume).generation
        batch = Batch()
        volume.hostdb.save(batch)
        volume.store.apply(batch)
        await volume.commit()
        await published(volume)
        assert publisher_of(volume).generation == generation
        batch = Batch()
        batch.put(SETTING + b"something", b"1")
        volume.store.apply(batch)
        await published(volume)
        assert publisher_of(volume).generation == generation + 1


async def test_a_checkpoint_replaces_a_log_that_has_outgrown_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_module, "MIN_LOG", 4096)
    monkeypatch.setattr(checkpoint_module, "TARGET_BODY", 2000)
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    async with opened(tmp_path / "v") as volume:
        publisher = publisher_of(volume)
        first = publisher.draft.base
        for i in range(60):
            await write(volume, f"a file with a name of some length {i:05}", noise(50))
            await publisher.publish()
            if publisher.draft.writing is not None:
                await publisher.draft.writing.wait()
        assert publisher.draft.base is not first
        assert publisher.draft.base is not None
        assert len(publisher.draft.base.chunks) > 3
        assert publisher.draft.log.size <= max(4096, publisher.draft.base.stored // 2) + 3000
        await publisher.publish()
        await publisher.publish()
        assert len(metadata(url, volume)) <= 2 * (len(publisher.draft.base.chunks) + 40)


async def test_a_checkpoint_broken_off_leaves_nothing_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one that is finished sweeps what nothing names, of this history's epochs."""
    monkeypatch.setattr(checkpoint_module, "TARGET_BODY", 500)
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    opener = FaultyOpener()
    async with opened(tmp_path / "v", opener) as volume:
        publisher = publisher_of(volume)
        for i in range(40):
            await write(volume, f"file{i}", b"x")
        await publisher.publish()
        writing = publisher.draft.begin_checkpoint()
        assert writing is None
        for _ in range(200):
            await trio.lowlevel.checkpoint()
            if publisher.draft.next is not None and len(publisher.draft.next.chunks) > 2:
                opener.faults[url].gone = "away"
                break
            await trio.sleep(0.005)
        while publisher.draft.writing is not None:
            await publisher.draft.writing.wait()
            await trio.lowlevel.checkpoint()
        opener.faults[url].gone = None
        await volume.hosts.retry_once()
        for i in range(4):
            await write(volume, f"more{i}", b"y")
            await publisher.publish()
        named = {ref.name for ref in publisher.draft.refs()}
        have = {name.rsplit("/", 1)[1] for name in metadata(url, volume)}
        assert len(have - named) <= 3


# --------------------------------------------------------------------------------------------------------------------
# Deletions (I3)


async def test_a_freed_sector_stays_while_a_superblock_refers_to_it(tmp_path: Path) -> None:
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    async with opened(tmp_path / "v") as volume:
        publisher = publisher_of(volume)
        value = new_value(volume)
        await append(volume, value, noise(5000))
        await volume.flush()
        await publisher.publish()
        shard = Stored(url).shards()
        assert len(shard) == 1
        free(volume, value)
        while volume.values._reclaimer.step():
            pass
        await volume.commit()
        for expected in (shard, shard):
            await volume.deleter.drain()
            assert Stored(url).shards() == expected
            await write(volume, f"something{publisher.generation}", b"x")
            await publisher.publish()
        await published(volume)
        await volume.deleter.drain()
        assert shard[0] not in Stored(url).shards()


async def test_a_host_that_is_away_holds_deletions_back_until_it_is_marked_lost(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "1")
    opener = FaultyOpener()
    async with opened(tmp_path / "v", opener) as volume:
        publisher = publisher_of(volume)
        value = new_value(volume, "3")
        await append(volume, value, noise(5000))
        await volume.flush()
        opener.faults[urls[2]].gone = "away"
        await volume.hosts.retry_once()
        free(volume, value)
        while volume.values._reclaimer.step():
            pass
        for i in range(5):
            await write(volume, f"a{i}", b"x")
            await publisher.publish()
            await volume.deleter.drain()
        assert [len(Stored(url).shards()) for url in urls[:2]] == [1, 1]
        publisher.fleet.mark_lost(3, True)
        assert volume.store.get(LOST + u32(3)) is not None
        for i in range(3):
            await write(volume, f"b{i}", b"x")
            await publisher.publish()
            await volume.deleter.drain()
        assert [len(Stored(url).shards()) for url in urls[:2]] == [0, 0]


async def test_a_superblock_whose_answer_was_lost_holds_back_what_it_names(tmp_path: Path) -> None:
    """I3, I4: it stands there, whether or not the host says so, and gives it when it is asked. Later it goes, like any other."""
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "1")
    opener = FaultyOpener()
    async with opened(tmp_path / "v", opener) as volume:
        publisher = publisher_of(volume)
        value = new_value(volume, "3")
        await append(volume, value, noise(5000))
        await volume.flush()
        opener.faults[urls[0]].only = lambda _operation, name: "/superblock." in name
        opener.faults[urls[0]].lose_answer_next = 1
        await write(volume, "sent", b"x")
        await publisher.publish()
        sent = superblocks(urls[0])[-1]
        assert len(superblocks(urls[0])) == 3, "it arrived, and what it follows was not tidied away"
        names = named(urls[0], publisher)
        free(volume, value)
        while volume.values._reclaimer.step():
            pass
        opener.faults[urls[0]].truncating = 1_000_000
        for i in range(3 * FAN):
            await write(volume, f"a{i}", noise(100))
            await publisher.publish()
            await volume.deleter.drain()
        assert sent in superblocks(urls[0])
        assert names <= held(urls[0], volume)
        assert [len(Stored(url).shards()) for url in urls] == [1, 1, 1]
        opener.faults[urls[0]].truncating = 0
        for i in range(4):
            await write(volume, f"b{i}", b"x")
            await publisher.publish()
            await volume.deleter.drain()
        assert sent not in superblocks(urls[0])
        assert len(superblocks(urls[0])) == 2
        assert [len(Stored(url).shards()) for url in urls] == [0, 0, 0]


async def test_a_superblock_that_was_read_once_holds_back_what_it_names_while_it_is_not_given(tmp_path: Path) -> None:
    """Also one whose answer was lost."""
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "1")
    opener = FaultyOpener()
    async with opened(tmp_path / "v", opener) as volume:
        publisher, faults = publisher_of(volume), opener.faults[urls[0]]
        for i in range(FAN - 2):
            await write(volume, f"before{i}", noise(100))
            await publisher.publish()
        faults.only, faults.lose_answer_next = (lambda _operation, name: "/superblock." in name), 1
        await write(volume, "sent", b"x")
        await publisher.publish()
        sent, names = superblocks(urls[0])[-1], named(urls[0], publisher)
        # It is read, and nothing comes after it.
        faults.only, faults.error_rate = (lambda operation, name: operation == "put" and "/metadata/" in name), 1.0
        for i in range(3):
            publisher.fleet.sides()[0].examined = False
            await write(volume, f"a{i}", noise(100))
            await publisher.publish()
        assert superblocks(urls[0])[-1] == sent
        faults.only, faults.error_rate = (lambda _operation, name: "/superblock." in name), 0.0
        faults.truncating, faults.lose_answer_next = 1_000_000, 1
        for i in range(3 * FAN):
            await write(volume, f"b{i}", noise(100))
            await publisher.publish()
            await volume.deleter.drain()
            assert sent not in superblocks(urls[0]) or names <= held(urls[0], volume)
        assert sent not in superblocks(urls[0])


@pytest.mark.parametrize("what", ["garbage", "torn"])
async def test_what_will_never_be_a_superblock_holds_nothing_back_for_ever(tmp_path: Path, what: str) -> None:
    """Where one was to be put: somebody else's, or half of it."""
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "1")
    opener = FaultyOpener()
    async with opened(tmp_path / "v", opener) as volume:
        publisher, faults = publisher_of(volume), opener.faults[urls[0]]
        value = new_value(volume, "3")
        await append(volume, value, noise(5000))
        await volume.flush()
        latest = superblocks(urls[0])[-1]
        following = latest[:-20] + f"{int(latest[-20:]) + 1:020d}"
        if what == "garbage":
            Stored(urls[0]).write(following, b"junk")
        else:
            faults.only, faults.lose_answer_next = (lambda _operation, name: "/superblock." in name), 1
        await write(volume, "sent", b"x")
        await publisher.publish()
        if what == "torn":
            raw = Stored(urls[0]).read(following)
            Stored(urls[0]).write(following, raw[: len(raw) // 2])
        free(volume, value)
        while volume.values._reclaimer.step():
            pass
        for i in range(UNREAD + 4):
            await write(volume, f"a{i}", noise(100))
            await publisher.publish()
            await volume.deleter.drain()
        assert [len(Stored(url).shards()) for url in urls] == [0, 0, 0]
        assert len(held(urls[0], volume)) <= len(held(urls[1], volume)) + 1
        generation = publisher.generation
        for _ in range(5):
            await publisher.tick()
        assert publisher.generation == generation
        # Not ours to remove, perhaps.
        assert following in superblocks(urls[0])


async def test_nothing_is_deleted_on_a_host_with_anothers_superblock(tmp_path: Path) -> None:
    """I3, I5: re-read right before."""
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        await append(volume, value, noise(5000))
        await volume.flush()
        free(volume, value)
        while volume.values._reclaimer.step():
            pass
        for i in range(3):
            await write(volume, f"a{i}", b"x")
            await publisher_of(volume).publish()
        latest = superblocks(url)[-1]
        following = latest[:-20] + f"{int(latest[-20:]) + 1:020d}"
        Stored(url).write(following, Stored(url).read(latest))
        shards = Stored(url).shards()
        assert len(shards) == 1
        await volume.deleter.drain()
        assert Stored(url).shards() == shards
        Stored(url).remove(following)


# --------------------------------------------------------------------------------------------------------------------
# One writer (I5)


async def test_a_second_writer_fences_the_first(tmp_path: Path) -> None:
    """The first notices at its next superblock, keeps what it has, and says how to go on."""
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "2")
    with pytest.raises(Fenced, match="fusefs recover"):
        async with opened(tmp_path / "v") as first:
            await write(first, "both", b"know")
            await first.flush()
            report = await recover_volume(tmp_path / "w", urls, passphrase=PASSPHRASE)
            assert report.majority
            async with opened(tmp_path / "w") as second:
                await write(second, "second", b"2")
                await second.flush()
            await write(first, "first", b"1")
            with pytest.raises(Fenced, match="another machine"):
                await first.flush()
            with trio.fail_after(10):
                while first.store.failure is None:
                    await trio.sleep(0.01)
            assert "mount --read-only" in (await first.status()).read_only_reason
            assert await read(first, "first") == b"1"
            await write(first, "more", b"3")
    async with opened(tmp_path / "w") as second:
        assert await read(second, "second") == b"2"
        assert sorted(await second.files.list()) == ["both", "second"]
    with pytest.raises(Fenced, match="fusefs recover"):
        async with opened(tmp_path / "v"):
            pass


async def test_a_directory_put_back_from_an_old_backup_is_refused(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls, "2")
    shutil.copytree(tmp_path / "v", tmp_path / "old")
    async with opened(tmp_path / "v") as volume:
        await write(volume, "file", b"new")
        await volume.flush()
    before = {url: Stored(url).names() for url in urls}
    with pytest.raises(Fenced, match="recover"):
        async with opened(tmp_path / "old"):
            pass
    assert {url: Stored(url).names() for url in urls} == before
    async with opened(tmp_path / "v") as volume:
        assert await read(volume, "file") == b"new"


async def test_without_a_majority_it_writes_and_catches_up(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "1")
    opener = FaultyOpener()
    async with opened(tmp_path / "v", opener) as volume:
        await write(volume, "a", b"1")
        await volume.flush()
        for url in urls[1:]:
            opener.faults[url].gone = "away"
        await volume.hosts.retry_once()
        await write(volume, "b", b"2")
        with pytest.raises(Unavailable, match="1 of 3"):
            await publisher_of(volume).publish()
        assert any("metadata" in reason for reason in (await volume.flush()).reasons)
        for url in urls[1:]:
            opener.faults[url].gone = None
        await volume.hosts.retry_once()
        await published(volume)
        assert publisher_of(volume).draft.published_all
        assert len({newest(url) for url in urls}) == 1


def cut_off(*urls: str) -> FaultyOpener:
    """A machine that does not reach these hosts."""
    opener = FaultyOpener()
    for url in urls:
        opener.faults[url] = Faults(gone="cut off")
    return opener


async def test_two_machines_that_each_reach_some_of_the_hosts(tmp_path: Path) -> None:
    """The one with the majority goes on, and passes over what the other wrote; the other is fenced. Nothing is mixed."""
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "1")
    async with opened(tmp_path / "v") as volume:
        await write(volume, "both", b"know")
        known = metadata(urls[0], volume)
    many, few = cut_off(urls[0]), cut_off(*urls[1:])
    report = await recover_volume(tmp_path / "w", urls[:1], passphrase=PASSPHRASE, opener=few)
    assert not report.majority
    with pytest.raises(Fenced):
        async with opened(tmp_path / "w", few) as minority:
            await write(minority, "only here", b"minority")
            assert (await minority.flush()).reasons
            theirs = metadata(urls[0], minority) - known
            assert theirs
            async with opened(tmp_path / "v", many) as majority:
                await write(majority, "kept", b"majority")
                assert not [reason for reason in (await majority.flush()).reasons if "metadata" in reason]
                many.faults[urls[0]].gone = None
                await majority.hosts.retry_once()
                await published(majority)
                assert len({newest(url) for url in urls}) == 1
                for url in urls[1:]:
                    few.faults[url].gone = None
                await minority.hosts.retry_once()
                await write(minority, "more", b"x")
                with pytest.raises(Fenced):
                    await publisher_of(minority).publish()
                await write(majority, "goes on", b"x")
                for number in range(3):
                    await publisher_of(majority).publish()
                    await write(majority, f"generation {number}", b"x")
                # Nobody's superblock names them any more; they are not ours to delete (I5).
                assert theirs <= metadata(urls[0], majority)
            with trio.fail_after(10):
                while minority.store.failure is None:
                    await trio.sleep(0.01)
            await write(minority, "refused", b"x")
    await recover_volume(tmp_path / "x", urls, passphrase=PASSPHRASE)
    async with opened(tmp_path / "x") as volume:
        assert sorted(await volume.files.list()) == ["both", *(f"generation {number}" for number in range(3)), "goes on", "kept"]


async def test_a_host_that_replays_an_old_superblock_is_brought_up_to_date(tmp_path: Path) -> None:
    """Old sectors and superblocks of last week: an ancestor, never a second history."""
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "2")
    shutil.copytree(tmp_path / "host0", tmp_path / "last week", copy_function=shutil.copy2)
    async with opened(tmp_path / "v") as volume:
        for i in range(5):
            await write(volume, f"file{i}", noise(3000))
            await volume.flush()
    shutil.rmtree(tmp_path / "host0")
    (tmp_path / "last week").rename(tmp_path / "host0")
    report = await recover_volume(tmp_path / "w", urls, passphrase=PASSPHRASE)
    assert report.files == 5
    async with opened(tmp_path / "w") as volume:
        assert sorted(await volume.files.list()) == [f"file{i}" for i in range(5)]
        assert len({newest(url) for url in urls}) == 1


async def test_the_epoch_is_on_the_hosts_as_soon_as_it_is_open(tmp_path: Path) -> None:
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    async with opened(tmp_path / "v") as volume:
        raw = Stored(url).read(superblocks(url)[-1])
        assert parse_superblock(raw, "it").epoch == volume.epochs.current.number == 2


async def test_after_a_kill_the_log_goes_on_without_a_new_checkpoint(tmp_path: Path) -> None:
    """The journal still has what was not published."""
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    async with opened(tmp_path / "v") as volume:
        await write(volume, "a", b"1")
        await volume.flush()
        await write(volume, "b", b"2")
        shutil.copytree(tmp_path / "v", tmp_path / "killed")
        volume.publisher = None
    async with opened(tmp_path / "killed") as volume:
        publisher = publisher_of(volume)
        base = publisher.draft.base
        assert base is not None
        await publisher.publish()
        assert publisher.draft.base is base
        assert publisher.draft.published_all


async def test_a_host_away_at_the_opening_is_gone_on_with_later(tmp_path: Path) -> None:
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        await append(volume, value, b"tail in the journal")
        await volume.commit()
    Path(url.removeprefix("dir:")).rename(tmp_path / "away")
    async with opened(tmp_path / "v") as volume:
        assert await contents(volume, value) == b"tail in the journal"
        await write(volume, "a", b"1")
        (tmp_path / "away").rename(tmp_path / "host0")
        await volume.hosts.retry_once()
        await published(volume)
        assert publisher_of(volume).draft.published_all


async def test_a_changed_passphrase_is_on_the_hosts_after_a_flush(tmp_path: Path) -> None:
    urls = host_dirs(tmp_path, 2)
    await make(tmp_path / "v", urls, "2")
    async with opened(tmp_path / "v") as volume:
        await volume.flush()
        change_passphrase(tmp_path / "v" / KEY_FILE, volume.volume_id, PASSPHRASE, "another", volume.seams, CHEAP)
        await volume.flush()
        volume.publisher = None
    await recover_volume(tmp_path / "w", urls, passphrase="another")


async def test_a_flush_with_nothing_new_sends_no_superblock(tmp_path: Path) -> None:
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with opened(tmp_path / "v") as volume:
        await volume.flush()
        generation = publisher_of(volume).generation
        volume.store.apply(Batch())
        await volume.flush()
        assert publisher_of(volume).generation == generation


async def test_a_fenced_volume_refuses_attributes_as_well(tmp_path: Path) -> None:
    """What is set in memory only would be lost without a word."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    with pytest.raises(Fenced):
        async with opened(tmp_path / "v") as volume:
            ino = volume.namespace.create(1, b"file", 0o644, 0, 0)
            await volume.commit()
            volume.store.fence("fenced by a test")
            with pytest.raises(Fenced):
                volume.namespace.set_attributes(ino, mode=0o600)
            assert volume.namespace.attributes(ino).mode & 0o777 == 0o644
            raise Fenced("the end")


@pytest.mark.parametrize("how", ["gone", "cut off"])
@pytest.mark.parametrize("where", ["one host", "every host", "every host, but for the index"])
async def test_metadata_objects_that_hosts_lost_are_made_good(tmp_path: Path, how: str, where: str) -> None:
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "volume", urls, replication="2")
    async with opened(tmp_path / "volume") as volume:
        await write(volume, "first", b"one" * 1000)
        await volume.flush()
        await write(volume, "second", b"two" * 1000)
        await volume.flush()
        prefix = metadata_prefix(volume.config.volume_id_bytes)
        base = publisher_of(volume).draft.base
        assert base is not None
        assert base.index is not None
        index = base.index.name
    for url in urls[:1] if where == "one host" else urls:
        for name in Stored(url).names(prefix):
            if where.endswith("index") and name.endswith(index):
                continue
            if how == "gone":
                Stored(url).remove(name)
            else:
                Stored(url).write(name, Stored(url).read(name)[:-7])
    async with opened(tmp_path / "volume") as volume:
        await write(volume, "third", b"three" * 1000)
        assert (await volume.flush()).reasons == ()
    # The host that lost them is enough for all of it.
    for url in urls[1:]:
        Path(url.removeprefix("dir:")).rename(url.removeprefix("dir:") + ".away")
    await recover_volume(tmp_path / "again", urls[:1], passphrase=PASSPHRASE, argon2=CHEAP)
    for url in urls[1:]:
        Path(url.removeprefix("dir:") + ".away").rename(url.removeprefix("dir:"))
    async with opened(tmp_path / "again") as volume:
        assert await volume.files.list() == {"first": 3000, "second": 3000, "third": 5000}


async def test_a_name_alone_is_no_superblock(tmp_path: Path) -> None:
    """A host that shows the highest name there can be harms nobody but itself."""
    urls = host_dirs(tmp_path, 3)
    await make(tmp_path / "v", urls, "1")
    async with opened(tmp_path / "v") as volume:
        latest = superblocks(urls[0])[-1]
        for name in ("9" * 20, f"{2**63:020d}"):
            Stored(urls[0]).write(latest[:-20] + name, b"nothing")
        publisher_of(volume).fleet.sides()[0].examined = False
        for i in range(3):
            await write(volume, f"file{i}", b"x")
            await publisher_of(volume).publish()
        assert publisher_of(volume).draft.published_all
        assert "none can stand above" in publisher_of(volume).fleet.troubles()
        assert len({newest(url) for url in urls[1:]}) == 1
    async with opened(tmp_path / "v") as volume:
        assert sorted(await volume.files.list()) == ["file0", "file1", "file2"]
    await recover_volume(tmp_path / "w", urls, passphrase=PASSPHRASE)


async def test_a_damaged_newest_superblock_is_passed(tmp_path: Path) -> None:
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    latest = superblocks(url)[-1]
    Stored(url).write(latest, Stored(url).read(latest)[:-1])
    async with opened(tmp_path / "v") as volume:
        await write(volume, "file", b"x")
        await publisher_of(volume).publish()
        assert publisher_of(volume).draft.published_all


async def test_a_superblock_of_a_newer_fusefs_is_not_taken_for_damage(tmp_path: Path) -> None:
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    latest = superblocks(url)[-1]
    raw = Stored(url).read(latest)
    Stored(url).write(latest, raw[:8] + (99).to_bytes(4, "big") + raw[12:])
    with pytest.raises(BadArgument, match="newer fusefs"):
        async with opened(tmp_path / "v"):
            pass
    assert superblocks(url)[-1] == latest


async def test_tails_written_to_the_journal_once_more_stay_in_the_log(tmp_path: Path) -> None:
    """Between the two a checkpoint may begin: what was acknowledged is durable all the time, so the hosts get it."""
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    async with opened(tmp_path / "v") as volume:
        value = new_value(volume)
        await append(volume, value, b"acknowledged")
        await volume.values.commit(value)
        tail = volume.values._tails[value]
        volume.values.shipper.mark(tail, tail.sealed)
        assert [(t.value_id, t.data) for t in volume.values.take_unlogged(True)] == [(value, b"acknowledged")]
        assert volume.values.take_unlogged(False) == []
        await volume.commit()
        assert volume.values.take_unlogged(False) == []


async def test_a_tail_that_landed_after_the_cut_stays_in_a_merged_entry(tmp_path: Path) -> None:
    """Its extent is in no entry yet: a superblock without the one and the other would have lost what was acknowledged."""
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    async with opened(tmp_path / "v") as volume:
        publisher = publisher_of(volume)
        await publisher.publish()
        while not publisher.draft.log.entries or publisher.draft.log.entries[-1].level == 0:
            await write(volume, f"before{publisher.generation}", b"x")
            await publisher.publish()
        fd = await volume.files.open("file", write=True)
        await volume.files.append(fd, b"acknowledged")
        await volume.files.commit(fd)
        await publisher.publish()
        for i in range(FAN - 1):
            await write(volume, f"other{i}", b"x")
            if i < FAN - 2:
                await publisher.publish()
        # As if the sector landed between the cut and the merge.
        async with publisher._lock:
            await publisher.draft.cut()
            await volume.values.flush()
            await publisher.draft.log.merge(publisher.fleet.fetch)
            await publisher._round()
        volume.publisher = None
        shutil.rmtree(tmp_path / "v" / "metadata")
    await recover_volume(tmp_path / "w", [url], passphrase=PASSPHRASE)
    async with opened(tmp_path / "w") as volume:
        assert await read(volume, "file") == b"acknowledged"
