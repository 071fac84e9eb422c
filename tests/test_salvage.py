"""No superblock is left: the sectors' own tables bring back what the sectors hold, named as well as they can say."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import BadArgument, FusefsError, NotFound, WrongPassphrase
from storage.salvage import salvage_volume
from storage.salvage_index import INDEX_DIRECTORY, LOST_AND_FOUND, Index, SalvageReport, Sector, gaps
from storage.values.packing import TableEntry
from tests import rig
from tests.recovery_rig import FILE, ROOT, Lost, lose


def contents(path: Path) -> dict[bytes, bytes]:
    """Path -> bytes of every file below."""
    top = os.fsencode(path)
    found = {}
    for directory, _, names in os.walk(top):
        for name in names:
            full = os.path.join(directory, name)
            found[os.path.relpath(full, top)] = Path(os.fsdecode(full)).read_bytes()
    return found


def forget_superblocks(lost: Lost) -> None:
    for number in range(len(lost.urls)):
        shutil.rmtree(lost.below(number) / "metadata")
        for block in lost.superblocks(number):
            block.unlink()


async def salvage(lost: Lost, path: Path, *hosts: int, phrase: str | None = None, **options: object) -> SalvageReport:
    return await salvage_volume(path, [lost.urls[n] for n in hosts], phrase=phrase or lost.phrase, **options)  # type: ignore[arg-type]


async def small(tmp_path: Path, files: dict[bytes, bytes], hosts: int = 2) -> Lost:
    """A volume with these files, flushed; its directory and superblocks are gone."""
    urls = rig.host_dirs(tmp_path, hosts)
    phrase = await rig.make(tmp_path / "volume", urls, str(hosts))
    async with rig.opened(tmp_path / "volume") as volume:
        for name, content in files.items():
            parent = ROOT
            *folders, last = name.split(b"/")
            for folder in folders:
                parent = volume.namespace.mkdir(parent, folder, 0o755, 0, 0)
            await volume.namespace.append(volume.namespace.create(parent, last, FILE, 0, 0), content)
        await volume.flush()
        lost = Lost(tmp_path, urls, phrase, volume.volume_id)
    shutil.copy(tmp_path / "volume" / "keys.json", tmp_path / "keys.json")
    shutil.rmtree(tmp_path / "volume")
    forget_superblocks(lost)
    return lost


FILES = {b"a": rig.noise(10), b"d/e/f": rig.noise(3 * rig.SECTOR + 5), b"\xff name": rig.noise(100_000)}


@pytest.mark.parametrize("host", [0, 1])
async def test_every_file_comes_back_under_its_name(tmp_path: Path, host: int) -> None:
    lost = await small(tmp_path, FILES)
    report = await salvage(lost, tmp_path / "out", host)
    assert contents(tmp_path / "out") == FILES
    assert (report.files, report.bytes, report.damaged, report.with_holes) == (3, sum(map(len, FILES.values())), 0, 0)
    assert not (tmp_path / "out" / INDEX_DIRECTORY).exists()


async def test_of_a_whole_tree_all_that_sectors_hold_comes_back(tmp_path: Path) -> None:
    """Names, modes and links of the rest are not in sectors; every straight file with content is."""
    lost = await lose(tmp_path)
    forget_superblocks(lost)
    await salvage(lost, tmp_path / "out", 0)
    back = contents(tmp_path / "out")
    for number in range(2):
        for name in (b"file1", b"file3", b"file4"):
            path = b"dir%d/%s" % (number, name)
            assert back[path] == lost.expected[path].content
    # Shipped when it had 5000 bytes; what was appended later was in the log only.
    assert lost.expected[b"dir0/file2"].content.startswith(back[b"dir0/file2"]) and len(back[b"dir0/file2"]) == 5000


async def test_the_passphrase_needs_key_slots(tmp_path: Path) -> None:
    lost = await small(tmp_path, {b"a": b"x" * 1000})
    hosts = [lost.urls[0]]
    with pytest.raises(BadArgument, match="--keyfile"):
        await salvage_volume(tmp_path / "out", hosts, passphrase=rig.PASSPHRASE)
    with pytest.raises(WrongPassphrase):
        await salvage_volume(tmp_path / "out", hosts, passphrase="wrong", keyfile=tmp_path / "keys.json")
    assert not (tmp_path / "out").exists()
    await salvage_volume(tmp_path / "out", hosts, passphrase=rig.PASSPHRASE, keyfile=tmp_path / "keys.json")
    assert contents(tmp_path / "out") == {b"a": b"x" * 1000}


async def test_another_volumes_phrase_opens_no_sector(tmp_path: Path) -> None:
    lost = await small(tmp_path, {b"a": b"x"})
    other = await rig.make(tmp_path / "other", [])
    with pytest.raises(WrongPassphrase, match="another volume's"):
        await salvage(lost, tmp_path / "out", 0, phrase=other)


async def test_a_lost_sector_is_a_hole_that_is_reported(tmp_path: Path) -> None:
    content = rig.noise(3 * rig.SECTOR)
    lost = await small(tmp_path, {b"big": content}, hosts=1)
    # The middle of the file: the sector that has neither its beginning nor its end.
    shards = sorted((lost.below(0) / "sectors").glob("??/*"))
    holes = 0
    for number, shard in enumerate(shards):
        raw = shard.read_bytes()
        shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        report = await salvage(lost, tmp_path / f"out{number}", 0)
        shard.write_bytes(raw)
        assert report.damaged == 1 and any(shard.name[:16] in note for note in report.notes)
        back = contents(tmp_path / f"out{number}")[b"big"]
        missing = dict(report.holes).get("big", 0)
        # Either cut off at the end, or with zeros in place of exactly what is missing.
        assert sum(1 for a, b in zip(back, content, strict=False) if a != b) <= missing
        assert missing or content.startswith(back)
        holes += bool(missing)
    assert holes >= 2


async def test_a_damaged_copy_is_taken_from_the_other_host(tmp_path: Path) -> None:
    lost = await small(tmp_path, FILES)
    for shard in (lost.below(0) / "sectors").glob("??/*"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    report = await salvage(lost, tmp_path / "out", 0, 1)
    assert contents(tmp_path / "out") == FILES and report.damaged == 0 and report.notes


async def test_of_several_contents_of_a_name_the_newest_has_it(tmp_path: Path) -> None:
    urls = rig.host_dirs(tmp_path, 1)
    phrase = await rig.make(tmp_path / "volume", urls)
    async with rig.opened(tmp_path / "volume") as volume:
        lost = Lost(tmp_path, urls, phrase, volume.volume_id)
        ino = volume.namespace.create(ROOT, b"log", FILE, 0, 0)
        for content in (b"first" * 9, b"second" * 9, b"third" * 9):
            volume.namespace.truncate(ino, 0)
            await volume.namespace.append(ino, content)
            # No superblock, so nothing is released for deletion: all sectors stay.
            await volume.values.flush()
    forget_superblocks(lost)
    report = await salvage(lost, tmp_path / "out", 0)
    back = contents(tmp_path / "out")
    assert back.pop(b"log") == b"third" * 9
    assert report.versions == len(back) > 0
    assert all(name.startswith(b"log.value-") for name in back)
    assert set(back.values()) <= {b"first" * 9, b"second" * 9}


async def test_merged_sectors_agree_with_what_they_were_merged_from(tmp_path: Path) -> None:
    urls = rig.host_dirs(tmp_path, 1)
    phrase = await rig.make(tmp_path / "volume", urls)
    content = b""
    async with rig.opened(tmp_path / "volume") as volume:
        lost = Lost(tmp_path, urls, phrase, volume.volume_id)
        ino = volume.namespace.create(ROOT, b"log", FILE, 0, 0)
        for _ in range(40):
            line = rig.noise(2000)
            content += line
            await volume.namespace.append(ino, line)
            await volume.values.flush()
    forget_superblocks(lost)
    report = await salvage(lost, tmp_path / "out", 0)
    assert contents(tmp_path / "out") == {b"log": content}
    assert report.with_holes == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_of_two_sectors_with_other_bytes_at_one_place_the_later_counts_in_whatever_order_they_come(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    """One was put on hosts and never committed; its process died, and what came after it appended something else there."""
    (tmp_path / LOST_AND_FOUND).mkdir()
    (tmp_path / INDEX_DIRECTORY).mkdir()
    index = Index(tmp_path)
    never, later, end = rig.noise(100), rig.noise(60), rig.noise(40)
    sectors = [
        Sector(1, memoryview(never), [TableEntry(b"old name", 7, 0, 100, 0, 9)]),
        Sector(2, memoryview(later), [TableEntry(b"name", 7, 0, 60, 0, 9)]),
        Sector(2, memoryview(end), [TableEntry(b"name", 7, 60, 40, 0, 10)]),
    ]
    for at in order:
        index.take(sectors[at])
    report = index.finish("", 3, 0, [])
    index.close()
    assert (report.files, report.versions, report.with_holes) == (1, 0, 0)
    assert (tmp_path / "name").read_bytes() == later + end


async def test_nothing_is_written_outside_or_over(tmp_path: Path) -> None:
    lost = await small(tmp_path, {b"a": b"x"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(BadArgument, match="not an empty directory"):
        await salvage(lost, tmp_path / "out", 0)
    assert (tmp_path / "out" / "mine").read_text() == "mine"


async def test_hosts_without_the_volume_say_so(tmp_path: Path) -> None:
    lost = await small(tmp_path, {b"a": b"x"})
    shutil.rmtree(lost.host(0) / "volumes")
    with pytest.raises(NotFound, match="no volume"):
        await salvage(lost, tmp_path / "out", 0)
    shutil.rmtree(lost.below(1) / "sectors")
    with pytest.raises(FusefsError, match="no sector"):
        await salvage(lost, tmp_path / "out", 1)


async def test_the_hosts_are_not_changed(tmp_path: Path) -> None:
    lost = await small(tmp_path, FILES)
    before = contents(lost.host(0))
    await salvage(lost, tmp_path / "out", 0)
    assert contents(lost.host(0)) == before


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10))), st.integers(0, 30), st.integers(0, 20))
def test_gaps_and_what_covers_make_up_the_whole(covered: list[tuple[int, int]], start: int, length: int) -> None:
    ranges = sorted((begin, begin + size) for begin, size in covered)
    found = [byte for begin, end in gaps(start, start + length, ranges) for byte in range(begin, end)]
    inside = {byte for begin, end in ranges for byte in range(begin, end)}
    assert found == [byte for byte in range(start, start + length) if byte not in inside]
