"""A lost machine: the volume comes back from its hosts as it was when they last had it, or a person is told why not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from storage.errors import BadArgument, Exists, FusefsError, NotFound, Unavailable, WrongPassphrase
from storage.history.finding import list_volumes
from storage.metadata.keys import COUNTER, prefix_end, read_u64
from storage.recovery import COUNTERS, JUMP, RECOVERING_FILE
from storage.seams import Seams
from tests import rig
from tests.fakes import Crash, CrashAt, RecordingFailpoints
from tests.recovery_rig import ROOT, Lost, lose, plant, tree
from tests.test_crash_fuzz import _leaves


def objects(lost: Lost) -> set[str]:
    """Everything of the volume on all hosts."""
    return {str(path) for number in range(len(lost.urls)) for path in lost.below(number).rglob("*") if path.is_file()}


async def check(lost: Lost, path: Path) -> None:
    """It is a volume like any other, with the tree it had, and can be written to."""
    async with rig.opened(path) as volume:
        assert await tree(volume) == lost.expected
        await plant(volume, b"after")
        await volume.flush()
        after = await tree(volume)
    async with rig.opened(path) as volume:
        assert await tree(volume) == after


@pytest.mark.parametrize("host", [0, 1, 2])
async def test_comes_back_from_any_single_host(tmp_path: Path, host: int) -> None:
    lost = await lose(tmp_path, hosts=3, replication="2")
    report = await lost.recover(tmp_path / "new", host)
    assert (report.files, report.majority, report.trouble) == (13, True, "")
    # The other hosts were found through the superblock.
    assert report.silent == () and report.degraded.unreadable == 0
    await check(lost, tmp_path / "new")


async def test_comes_back_with_one_host_lost_for_good(tmp_path: Path) -> None:
    lost = await lose(tmp_path, hosts=2, replication="2")
    shutil.rmtree(lost.host(0))
    report = await lost.recover(tmp_path / "new", 1)
    assert len(report.silent) == 1 and lost.urls[0] in report.silent[0]
    assert report.degraded.fewer == report.sectors > 0 and report.degraded.unreadable == 0
    # One of two is no majority, so the other machine cannot be shut out for certain; and it says so.
    assert not report.majority and report.trouble
    async with rig.opened(tmp_path / "new") as volume:
        assert await tree(volume) == lost.expected


async def test_says_what_cannot_be_read(tmp_path: Path) -> None:
    """Replication 1 on two hosts, one of them gone: the names are all there, and the files with bytes on it are counted and named."""
    lost = await lose(tmp_path, hosts=2, replication="1")
    shutil.rmtree(lost.host(0))
    report = await lost.recover(tmp_path / "new", 1)
    assert report.degraded.unreadable > 0 and report.degraded.paths
    assert all(path.startswith("dir") for path in report.degraded.paths)
    assert (tmp_path / "new" / "volume.json").exists()


async def test_deletes_nothing_on_any_host(tmp_path: Path) -> None:
    lost = await lose(tmp_path)
    before = objects(lost)
    await lost.recover(tmp_path / "new", 0)
    assert before <= objects(lost)


async def test_moved_hosts_are_known_by_their_id(tmp_path: Path) -> None:
    lost = await lose(tmp_path)
    for number in range(2):
        lost.host(number).rename(tmp_path / f"moved{number}")
        lost.urls[number] = f"dir:{tmp_path / f'moved{number}'}"
    report = await lost.recover(tmp_path / "new", 0, 1)
    assert report.silent == () and report.majority
    async with rig.opened(tmp_path / "new") as volume:
        assert [record.url for record in volume.hosts.records()] == lost.urls
        assert await tree(volume) == lost.expected


async def test_the_phrase_opens_it_and_sets_a_new_passphrase(tmp_path: Path) -> None:
    lost = await lose(tmp_path)
    await lost.recover(tmp_path / "new", 0, phrase=lost.phrase.upper(), new_passphrase=rig.PASSPHRASE)
    await check(lost, tmp_path / "new")


async def test_numbers_of_the_lost_machine_are_not_given_out_again(tmp_path: Path) -> None:
    lost = await lose(tmp_path, keep=True)
    async with rig.opened(tmp_path / "volume") as volume:
        pairs = volume.store.scan(COUNTER, prefix_end(COUNTER), 100)
        assert {key[1:] for key, _ in pairs} <= set(COUNTERS)
        before = {key: read_u64(value) for key, value in pairs}
    await lost.recover(tmp_path / "new", 0)
    async with rig.opened(tmp_path / "new") as volume:
        after = {key: read_u64(value) for key, value in volume.store.scan(COUNTER, prefix_end(COUNTER), 100)}
        assert set(after) == {COUNTER + name for name in COUNTERS}
        assert all(after[key] >= number + JUMP for key, number in before.items())
        epochs = volume.epochs.all()
        assert len({epoch.salt for epoch in epochs}) == len(epochs)
        await plant(volume, b"x")
        await volume.flush()


async def test_the_lost_machine_is_shut_out_when_it_comes_back(tmp_path: Path) -> None:
    lost = await lose(tmp_path, keep=True)
    await lost.recover(tmp_path / "new", 0)
    with pytest.raises(FusefsError, match="another machine"):
        async with rig.opened(tmp_path / "volume"):
            raise AssertionError("it was opened")
    async with rig.opened(tmp_path / "new") as volume:
        assert await tree(volume) == lost.expected


async def test_again_and_again(tmp_path: Path) -> None:
    """Each recovery goes on from the one before, claims that never shipped anything included."""
    lost = await lose(tmp_path)
    epochs = set()
    for _ in range(3):
        path = lost.new_path()
        epochs.add((await lost.recover(path, lost.made % 2)).epoch)
        async with rig.opened(path) as volume:
            assert await tree(volume) == lost.expected
            lost.expected |= {}
        shutil.rmtree(path)
    assert len(epochs) == 3


# --------------------------------------------------------------------------------------------------------------------
# Crashes


async def crashes(lost: Lost, path: Path, seams: Seams) -> bool:
    try:
        await lost.recover(path, 0, seams=seams)
    except BaseException as error:
        leaves = _leaves(error)
        if not any(isinstance(leaf, Crash) for leaf in leaves):
            raise
        return True
    return False


async def test_a_crash_at_any_point_and_recovery_starts_over(tmp_path: Path) -> None:
    """At every failpoint a recovery passes, once: the next recover into that directory gives the volume back (or it is there already)."""
    lost = await lose(tmp_path, rounds=1)
    pristine = tmp_path / "pristine"
    pristine.mkdir()
    for number in range(2):
        shutil.copytree(lost.host(number), pristine / f"host{number}", symlinks=True)

    def hosts_as_before() -> None:
        for number in range(2):
            shutil.rmtree(lost.host(number))
            shutil.copytree(pristine / f"host{number}", lost.host(number), symlinks=True)

    points = RecordingFailpoints()
    await lost.recover(lost.new_path(), 0, seams=Seams(failpoints=points))
    names = [name for name in dict.fromkeys(points.hits) if not name.startswith("journal.settle")]
    assert {"recover.before_marker", "recover.restored", "restore.before_last", "recover.before_config"} <= set(names)
    crashed = 0
    for name in names:
        hosts_as_before()
        path = lost.new_path()
        if not await crashes(lost, path, Seams(failpoints=CrashAt(name))):
            continue
        crashed += 1
        if not (path / "volume.json").exists():
            await lost.recover(path, 1)
        assert (path / "volume.json").exists(), name
        async with rig.opened(path) as volume:
            assert await tree(volume) == lost.expected, name
        shutil.rmtree(path)
    assert crashed >= 10


async def test_a_failed_recovery_leaves_nothing(tmp_path: Path) -> None:
    lost = await lose(tmp_path)
    with pytest.raises(WrongPassphrase):
        await lost.recover(tmp_path / "new", 0, passphrase="wrong")
    assert not (tmp_path / "new").exists()
    for number in range(2):
        shutil.rmtree(lost.below(number) / "metadata")
    with pytest.raises((Unavailable, NotFound, FusefsError), match="--salvage"):
        await lost.recover(tmp_path / "new", 0)
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------------------------------
# What is refused


async def test_an_existing_volume_is_never_overwritten(tmp_path: Path) -> None:
    lost = await lose(tmp_path, keep=True)
    with pytest.raises(Exists, match="is a volume already"):
        await lost.recover(tmp_path / "volume", 0)
    async with rig.opened(tmp_path / "volume") as volume:
        assert await tree(volume) == lost.expected


async def test_a_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    lost = await lose(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "thesis.txt").write_text("mine")
    for marker in (False, True):
        if marker:
            (tmp_path / "new" / RECOVERING_FILE).write_text("{}")
        with pytest.raises(BadArgument, match=r"thesis\.txt"):
            await lost.recover(tmp_path / "new", 0)
    assert (tmp_path / "new" / "thesis.txt").read_text() == "mine"


async def test_several_volumes_on_a_host_have_to_be_told_apart(tmp_path: Path) -> None:
    lost = await lose(tmp_path)
    await rig.make(tmp_path / "other", lost.urls)
    listed = await list_volumes(lost.urls[:1])
    assert len(listed) == 2 and lost.volume_id in {volume.volume_id for volume in listed}
    with pytest.raises(BadArgument, match=f"--volume ID.*{lost.volume_id}"):
        await lost.recover(tmp_path / "new", 0)
    with pytest.raises(NotFound, match="zz"):
        await lost.recover(tmp_path / "new", 0, volume_id="zz")
    await lost.recover(tmp_path / "new", 0, volume_id=lost.volume_id[:20])
    async with rig.opened(tmp_path / "new") as volume:
        assert await tree(volume) == lost.expected


async def test_the_phrase_of_another_volume_opens_nothing(tmp_path: Path) -> None:
    lost = await lose(tmp_path)
    other = await rig.make(tmp_path / "other", [])
    with pytest.raises(WrongPassphrase, match="another volume's"):
        await lost.recover(tmp_path / "new", 0, phrase=other, new_passphrase="new")
    with pytest.raises(BadArgument, match="word"):
        await lost.recover(tmp_path / "new", 0, phrase="not a phrase", new_passphrase="new")
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------------------------------
# Old, damaged and lying hosts


async def test_a_damaged_superblock_is_passed_over(tmp_path: Path) -> None:
    lost = await lose(tmp_path)
    for block in lost.superblocks(0):
        raw = bytearray(block.read_bytes())
        raw[-1] ^= 1
        block.write_bytes(raw)
    report = await lost.recover(tmp_path / "new", 0, 1)
    assert any("does not verify" in note for note in report.notes)
    async with rig.opened(tmp_path / "new") as volume:
        assert await tree(volume) == lost.expected


async def test_damaged_metadata_are_fetched_from_the_other_host(tmp_path: Path) -> None:
    lost = await lose(tmp_path)
    for path in (lost.below(0) / "metadata").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    report = await lost.recover(tmp_path / "new", 0, 1)
    assert any(lost.urls[0] in note for note in report.notes)
    async with rig.opened(tmp_path / "new") as volume:
        assert await tree(volume) == lost.expected


async def test_a_host_of_last_week_does_not_win(tmp_path: Path) -> None:
    """It replays an old superblock with all that belongs to it; the other host has gone on."""
    urls = rig.host_dirs(tmp_path, 3)
    phrase = await rig.make(tmp_path / "volume", urls, "2")
    async with rig.opened(tmp_path / "volume") as volume:
        await plant(volume, b"old")
        await volume.flush()
        lost = Lost(tmp_path, urls, phrase, volume.volume_id)
    shutil.copytree(tmp_path / "host0", tmp_path / "old")
    async with rig.opened(tmp_path / "volume") as volume:
        await plant(volume, b"new")
        await volume.flush()
    async with rig.opened(tmp_path / "volume") as volume:
        lost.expected = await tree(volume)
    shutil.rmtree(tmp_path / "volume")
    # Metadata and superblocks are last week's; sectors are on two of three hosts anyway.
    shutil.rmtree(tmp_path / "host0")
    (tmp_path / "old").rename(tmp_path / "host0")
    report = await lost.recover(tmp_path / "new", 0)
    assert report.majority
    async with rig.opened(tmp_path / "new") as volume:
        assert await tree(volume) == lost.expected


async def test_without_the_newest_objects_an_older_generation_comes_back_and_is_said_to_be_old(tmp_path: Path) -> None:
    lost = await lose(tmp_path, keep=True)
    async with rig.opened(tmp_path / "volume") as volume:
        assert volume.publisher is not None
        before = {path.name for path in (lost.below(0) / "metadata").iterdir()}
        volume.namespace.mkdir(ROOT, b"newest", 0o700, 0, 0)
        await volume.commit()
        await volume.publisher.publish()
        # The log entry with it, on both hosts, before anything is tidied.
        newest = {path.name for path in (lost.below(0) / "metadata").iterdir()} - before
        assert newest
        for number in range(2):
            shutil.copytree(lost.below(number), tmp_path / f"copy{number}")
    for number in range(2):
        shutil.rmtree(lost.below(number))
        shutil.copytree(tmp_path / f"copy{number}", lost.below(number))
        for name in newest:
            (lost.below(number) / "metadata" / name).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "volume")
    report = await lost.recover(tmp_path / "new", 0, 1)
    assert any("older state" in note for note in report.notes)
    assert report.majority
    async with rig.opened(tmp_path / "new") as volume:
        assert await tree(volume) == lost.expected
        await plant(volume, b"on")
        await volume.flush()


async def test_two_histories_without_a_majority_are_for_a_person_to_choose_between(tmp_path: Path) -> None:
    """Two machines each went on with one of two hosts. Neither is mixed with, nor silently preferred to, the other."""
    lost = await lose(tmp_path)
    for number in range(2):
        shutil.copytree(lost.host(number), tmp_path / f"apart{number}")
    async with rig.opened(await _recovered(lost, 0)) as volume:
        await plant(volume, b"left")
        await volume.flush()
        left = await tree(volume)
    # The second machine sees the hosts as they were before the first.
    for number in range(2):
        lost.host(number).rename(tmp_path / f"left{number}")
        (tmp_path / f"apart{number}").rename(lost.host(number))
    async with rig.opened(await _recovered(lost, 1)) as volume:
        await plant(volume, b"right")
        await volume.flush()
    shutil.rmtree(lost.host(0))
    (tmp_path / "left0").rename(lost.host(0))
    with pytest.raises(BadArgument, match="2 different histories") as caught:
        await lost.recover(tmp_path / "new", 0, 1)
    names = [word.rstrip(":") for word in str(caught.value).split() if word.endswith(":") and "-" in word and word[0].isdigit()]
    assert len(names) == 2, caught.value
    # Chosen by a person, it goes on, and passes the other over.
    report = await lost.recover(tmp_path / "new", 0, 1, superblock=names[0])
    assert report.majority
    async with rig.opened(tmp_path / "new") as volume:
        top = {name for name in await tree(volume) if b"/" not in name}
        await plant(volume, b"on")
        await volume.flush()
    assert top == {b"dir0", b"dir1", b"tail"} | ({b"dirleft"} if b"dirleft" in top else {b"dirright"})
    assert {b"dirleft"} <= {name for name in left if b"/" not in name}


async def _recovered(lost: Lost, host: int) -> Path:
    path = lost.new_path()
    await lost.recover(path, host)
    return path
