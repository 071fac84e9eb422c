"""What stands in staging is damaged, or removed by hand, before, during and after its upload: what hosts have makes it good again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.checking import Finding, check_volume
from storage.metadata.keys import UNDERREPLICATED, prefix_end
from storage.sectors.staging import STAGED
from storage.volume import Volume
from tests.fakes import make_seams
from tests.rig import PASSPHRASE, noise
from tests.test_staging import SIZE, Remote, forget, is_full, puts_of_shards, read, remote, shards_of, until, write


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


def remove_all(path: Path) -> None:
    """The whole directory."""
    while path.name != "staging":
        path = path.parent
    shutil.rmtree(path)


HARMS = [flip, cut, remove]


def files_of(made: Remote, roots: set[str]) -> list[Path]:
    return sorted(path for path in made.path.glob("staging/volumes/*/sectors/*/*") if path.name in roots)


async def check(made: Remote, *, repair: bool = True, data: bool = True) -> list[Finding]:
    """What it finds; notes are left out."""
    found: list[Finding] = []
    made.seed += 1
    await check_volume(
        made.path,
        passphrase=PASSPHRASE,
        opener=made.opener,
        seams=make_seams(seed=1000 + made.seed),
        repair=repair,
        data=data,
        on_finding=found.append,
    )
    return [finding for finding in found if not finding.note]


def kinds(findings: list[Finding]) -> set[tuple[str, bool]]:
    return {(finding.kind, finding.repaired) for finding in findings}


def staged_marks(volume: Volume) -> int:
    return len(volume.store.scan(STAGED, prefix_end(STAGED), 100))


async def roots_of(volume: Volume, name: bytes) -> set[str]:
    return {shard.root.hex() for shard in shards_of(volume, name)}


class Story:
    """A file on its hosts, and two that are staged: `harmed`, and one that nothing is done to."""

    def __init__(self, made: Remote) -> None:
        self.made = made
        self.content = {name: noise(SIZE) for name in (b"there", b"harmed", b"other")}
        self.roots: set[str] = set()

    async def begin(self, *, gone: Callable[[int], bool]) -> None:
        """The two are staged while the hosts for which `gone` holds take no shards."""
        async with self.made.opened() as volume:
            await write(volume, b"there", self.content[b"there"])
            await until(lambda: is_full(volume))
            for number, url in enumerate(self.made.urls):
                fault = self.made.opener.faults[url]
                fault.gone, fault.only = ("it takes nothing" if gone(number) else None), puts_of_shards
            for name in (b"harmed", b"other"):
                await write(volume, name, self.content[name])
            await until(lambda: volume.sectors.drain.stalled() or not volume.staging.below)
            self.roots = await roots_of(volume, b"harmed")
        assert self.roots <= self.made.staged()

    def files(self) -> list[Path]:
        return files_of(self.made, self.roots)

    async def all_is_well(self) -> None:
        """Everything gets to its hosts by itself, staging keeps nothing for ever, and hosts alone give it back."""
        self.made.each(gone=None)
        async with self.made.opened() as volume:
            await until(lambda: is_full(volume) and not staged_marks(volume))
            shutil.rmtree(self.made.path / "staging")
            forget(volume)
            for name, data in self.content.items():
                assert await read(volume, name) == data
        assert await check(self.made, repair=False) == []


@pytest.mark.parametrize("harm", [*HARMS, remove_all])
@pytest.mark.parametrize("replication", ["2", "2+1"])
async def test_before_upload_it_is_named_with_its_file_and_nothing_else_is_harmed(
    tmp_path: Path, autojump_clock: object, replication: str, harm: Callable[[Path], None]
) -> None:
    story = Story(await remote(tmp_path, 3, replication))
    await story.begin(gone=lambda _: True)
    for path in story.files():
        if path.exists():
            harm(path)
    harmed = {path: path.read_bytes() for path in story.files()}
    found = await check(story.made)
    lost = {b"harmed", b"other"} if harm is remove_all else {b"harmed"}
    assert {finding.where.encode() for finding in found if finding.kind == "unreadable"} == {b"/" + name for name in lost}
    assert kinds(found) == {("staged-copy", False), ("unreadable", False)}
    assert {path: path.read_bytes() for path in story.files()} == harmed, "what is good of it may be all there is"
    story.made.each(gone=None)
    async with story.made.opened() as volume:
        # Breaks if what is lost is tried for ever, and the history that knows it is never published.
        await until(lambda: set(volume.staging.losses) == {entry.sector_id for entry in volume.staging.entries()})
        assert len(volume.staging.losses) == len(lost)
        await volume.flush()
        assert volume.publisher is not None and volume.publisher.published_sequence == volume.store.durable_sequence
        for name in story.content.keys() - lost:
            assert await read(volume, name) == story.content[name]


@pytest.mark.parametrize("harm", [*HARMS, remove_all])
@pytest.mark.parametrize("replication", ["2", "2+1"])
@pytest.mark.parametrize("checked", [True, False])
async def test_cut_short_during_upload_it_is_made_again_of_what_hosts_have_and_no_record_names(
    tmp_path: Path, autojump_clock: object, replication: str, harm: Callable[[Path], None], checked: bool
) -> None:
    """`checked` False: a mount does as much, by itself."""
    story = Story(await remote(tmp_path, 3, replication))
    await story.begin(gone=lambda _: True)
    for number, path in enumerate(sorted(story.made.path.glob("staging/volumes/*/sectors/*/*"))):
        # One host has it, or, coded, one each; the machine went down before the record said so.
        where = Path(story.made.urls[number % 3].removeprefix("dir:")) / path.relative_to(story.made.path / "staging")
        where.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, where)
    for path in story.files():
        if path.exists():
            harm(path)
    if checked:
        told = kinds(await check(story.made, repair=False))
        assert told == {("staged-damage", False)}
        assert kinds(await check(story.made)) == {("staged-damage", True)}
        assert await check(story.made) == []
    await story.all_is_well()


@pytest.mark.parametrize("harm", HARMS)
async def test_one_shard_of_several_is_made_again_of_the_others_in_staging(
    tmp_path: Path, autojump_clock: object, harm: Callable[[Path], None]
) -> None:
    story = Story(await remote(tmp_path, 3, "2+1"))
    await story.begin(gone=lambda _: True)
    harm(story.files()[0])
    assert kinds(await check(story.made)) == {("staged-damage", True)}
    assert await check(story.made) == []
    await story.all_is_well()


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("replication", ["3", "1+2"])
async def test_on_its_write_quorum_it_is_put_there_again_until_all_hosts_have_it(
    tmp_path: Path, autojump_clock: object, replication: str, harm: Callable[[Path], None]
) -> None:
    story = Story(await remote(tmp_path, 3, replication))
    await story.begin(gone=lambda number: number == 2)
    harmed = story.files()
    for path in harmed:
        harm(path)
    found = await check(story.made)
    assert ("few-copies", False) in kinds(found)
    assert (("staged-damage", True) in kinds(found)) == (harm is not remove), "what is gone is needed no more"
    assert "unreadable" not in {finding.kind for finding in found}
    # Now that the last host takes it, it is at full replication, and only cached from then on.
    story.made.each(gone=None)
    assert ("few-copies", True) in kinds(await check(story.made))
    assert await check(story.made) == []
    await story.all_is_well()


@pytest.mark.parametrize("harm", [flip, cut])
async def test_what_was_only_cached_is_removed(tmp_path: Path, autojump_clock: object, harm: Callable[[Path], None]) -> None:
    story = Story(await remote(tmp_path, 3, "3"))
    await story.begin(gone=lambda _: False)
    async with story.made.opened() as volume:
        await until(lambda: not staged_marks(volume))
    (path,) = story.files()
    harm(path)
    assert kinds(await check(story.made, repair=False, data=harm is flip)) == {("staged-damage", False)}
    assert kinds(await check(story.made, data=harm is flip)) == {("staged-damage", True)}
    assert not path.exists() and len(story.made.staged()) == 2
    assert await check(story.made) == []
    await story.all_is_well()


@pytest.mark.parametrize("harm", [flip, cut])
async def test_a_read_that_meets_a_damaged_cached_shard_asks_hosts_and_removes_it(
    tmp_path: Path, autojump_clock: object, harm: Callable[[Path], None]
) -> None:
    """Breaks if it stays: nobody counts it, and it is met again after each mount."""
    story = Story(await remote(tmp_path, 3, "3"))
    await story.begin(gone=lambda _: False)
    async with story.made.opened() as volume:
        await until(lambda: not staged_marks(volume))
        await volume.staging.files.tidy()
    async with story.made.opened() as volume:
        (path,) = story.files()
        harm(path)
        assert await read(volume, b"harmed") == story.content[b"harmed"]
        assert not path.exists()
        assert volume.staging.files.size == sum(file.stat().st_size for file in story.made.path.glob("staging/volumes/*/sectors/*/*"))


async def test_what_hosts_have_lost_is_made_again_of_what_is_cached(tmp_path: Path, autojump_clock: object) -> None:
    story = Story(await remote(tmp_path, 3, "3"))
    await story.begin(gone=lambda _: False)
    async with story.made.opened() as volume:
        await until(lambda: not staged_marks(volume))
    for url in story.made.urls:
        for path in Path(url.removeprefix("dir:")).glob("volumes/*/sectors/*/*"):
            if path.name in story.roots:
                path.unlink()
    assert kinds(await check(story.made)) == {("missing-copy", True)}
    await story.all_is_well()


async def test_a_mark_that_an_earlier_check_left_behind_is_found_and_taken_off(tmp_path: Path, autojump_clock: object) -> None:
    """Breaks if what it marks stays in staging for ever, where room is needed."""
    story = Story(await remote(tmp_path, 3, "3"))
    await story.begin(gone=lambda number: number == 2)
    story.made.each(gone=None)
    async with story.made.opened() as volume:
        marks = volume.store.scan(STAGED, prefix_end(STAGED), 100)
        assert marks
        await until(lambda: is_full(volume) and not staged_marks(volume))
        for key, raw in marks:
            volume.store._memtable.apply([(key, raw)])
        await volume.commit()
        assert not volume.store.scan(UNDERREPLICATED, prefix_end(UNDERREPLICATED), 1)
    assert kinds(await check(story.made)) == {("staged-mark", True)}
    await story.all_is_well()
