"""Redundancy: any k of k+m shards are the sector; small reads touch one host; what is lost is made again, byte for byte."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from storage.checking import Finding, check_volume
from storage.coprocess.pair import ARENA
from storage.errors import BadArgument, Corrupt, FusefsError, Unavailable
from storage.interfaces import Buffer, Host, QuickHost, RangeOpening
from storage.recovery import recover_volume
from storage.salvage import salvage_volume
from storage.sealing import BLOCK
from storage.sectors import isal, redundancy
from storage.sectors.label import parse_label
from storage.sectors.redundancy import ALIGNMENT, Layout, layout_of
from storage.volume import Volume
from tests.rig import PASSPHRASE, QUIET, append, contents, host_dirs, make, new_value, noise, opened, published
from tests.test_reconcile import delete_freed, records, there

SPECS = ["1", "3", "1+1", "2+1", "4+2", "10+4", "3+5"]


def joined(layout_shards: list[list[bytes]]) -> list[bytes]:
    return [b"".join(bytes(part) for part in shard) for shard in layout_shards]


# ---- the arithmetic


@given(
    spec=st.sampled_from(SPECS),
    length=st.one_of(st.integers(0, 300), st.integers(0, 70_000), st.integers(255_900, 256_100)),
    data=st.data(),
)
def test_any_k_shards_make_every_other_and_every_range_is_found(spec: str, length: int, data: st.DataObject) -> None:
    layout = layout_of(spec, length)
    content = os.urandom(length)
    plains = joined(layout.plaintexts(77, [content[: length // 3], content[length // 3 :]]))  # type: ignore[arg-type]
    assert len(plains) == layout.shards and {len(plain) for plain in plains} == {layout.shard_length}
    for number, plain in enumerate(plains):
        layout.check(77, number, plain)
        assert parse_label(plain).number == number
    # Every range is where it is said to be, and nowhere but in data shards.
    offset = data.draw(st.integers(0, length))
    wanted = data.draw(st.integers(0, length - offset))
    parts = layout.locate(offset, wanted)
    assert b"".join(plains[part.shard][part.offset : part.offset + part.length] for part in parts) == content[offset : offset + wanted]
    assert all(part.shard < max(layout.needed, 1) for part in parts)
    # Any columns of any k others are enough.
    if layout.shards > 1:
        number = data.draw(st.integers(0, layout.shards - 1))
        others = data.draw(st.permutations([other for other in range(layout.shards) if other != number]))[: layout.needed]
        first = data.draw(st.integers(0, layout.shard_length - 1))
        size = data.draw(st.integers(1, layout.shard_length - first))
        columns = {other: plains[other][first : first + size] for other in others}
        assert layout.rebuild(77, number, first, columns) == plains[number][first : first + size]


@given(
    k=st.integers(1, 20),
    m=st.integers(1, 10),
    pieces=st.integers(1, 400),
)
def test_parity_is_what_pyeclib_makes_whether_it_or_isal_is_asked(k: int, m: int, pieces: int) -> None:
    """A volume is written with one and repaired with the other."""
    content = os.urandom(k * pieces * ALIGNMENT)
    coded = redundancy._Coded(k, m)
    found = [b"".join(map(bytes, piece)) for piece in coded.pieces([content], pieces * ALIGNMENT)]
    # Where this fails ISA-L was not found, and encoding is several times slower.
    assert coded._encoder is not None
    assert b"".join(found) == content + b"".join(coded._parity(content))
    coded._encoder = None
    assert [b"".join(map(bytes, piece)) for piece in coded.pieces([content], pieces * ALIGNMENT)] == found


def _lent(content: bytes) -> memoryview:
    """The same, where the coprocess sees it."""
    lent = ARENA.lend(max(1, len(content)))[: len(content)]
    lent[:] = content
    return lent


@given(
    k=st.integers(1, 12),
    m=st.integers(1, 6),
    pieces=st.integers(1, 400),
    cuts=st.lists(st.integers(0, 1 << 20), max_size=40),
    short=st.integers(0, 5_000),
    kinds=st.lists(st.sampled_from([bytes, bytearray, memoryview, _lent]), min_size=1, max_size=5),
)
def test_a_sector_is_encoded_where_its_buffers_stand_however_it_is_cut(
    k: int, m: int, pieces: int, cuts: list[int], short: int, kinds: list[Callable[[bytes], Buffer]]
) -> None:
    """Appends of any length, in memory that can be written to or not, make the shards that one buffer makes."""
    content = os.urandom(max(0, k * pieces * ALIGNMENT - short))
    at = [0, *sorted(cut % (len(content) + 1) for cut in cuts), len(content)]
    parts = [kinds[number % len(kinds)](content[begin:end]) for number, (begin, end) in enumerate(itertools.pairwise(at))]
    coded = redundancy._Coded(k, m)
    wanted = coded._parity(content + bytes(k * pieces * ALIGNMENT - len(content)))
    for most in (redundancy._PARTS, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(redundancy, "_PARTS", most)
            found = [b"".join(map(bytes, piece)) for piece in coded.pieces(parts, pieces * ALIGNMENT)]
        assert b"".join(found[:k])[: len(content)] == content
        assert found[k:] == wanted


def test_isal_that_does_something_else_than_pyeclib_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    assert isal.encoder(3, 2, lambda sample: [sample, sample]) is None
    assert '"3+2"; pyeclib encodes' in caplog.text
    caplog.clear()


def test_every_choice_of_k_shards_of_a_small_code() -> None:
    layout = layout_of("3+3", 1000)
    content = os.urandom(1000)
    plains = joined(layout.plaintexts(1, [content]))  # type: ignore[arg-type]
    for kept in itertools.combinations(range(6), 3):
        found = {number: plains[number] for number in kept}
        assert [found.get(number) or layout.rebuild(1, number, 0, found) for number in range(6)] == plains


def test_lengths_and_labels_are_checked_before_the_codec_sees_anything() -> None:
    layout = layout_of("2+2", 1000)
    plains = joined(layout.plaintexts(5, [bytes(1000)]))  # type: ignore[arg-type]
    bad: list[dict[int, bytes]] = [
        {},
        {1: plains[1]},
        {1: plains[1], 2: plains[2][:-1]},
        {1: plains[1] + b"x", 2: plains[2] + b"x"},
        {1: plains[1], 9: plains[2]},
        {1: plains[2], 2: plains[1]},
        {1: b"", 2: b"x"},
    ]
    for columns in bad:
        with pytest.raises(Corrupt):
            layout.rebuild(5, 0, 0, columns)
    with pytest.raises(Corrupt):
        layout.check(5, 0, plains[1])
    with pytest.raises(Corrupt):
        layout.check(6, 0, plains[0])


def test_a_piece_is_no_longer_than_it_has_to_be() -> None:
    assert layout_of("4+2", 4 << 20).piece == 1 << 20
    assert layout_of("4+2", 1).piece == ALIGNMENT
    assert layout_of("4+2", 4 * ALIGNMENT + 1).piece == 2 * ALIGNMENT
    assert layout_of("2", 17).piece == 17


# ---- volumes


@asynccontextmanager
async def a_volume(tmp_path: Path, spec: str = "4+2", hosts: int = 6, **options: object) -> AsyncIterator[tuple[Volume, list[str]]]:
    urls = host_dirs(tmp_path, hosts)
    await make(tmp_path / "volume", urls, replication=spec)
    async with opened(tmp_path / "volume", options=replace(QUIET, cache=0, **options)) as volume:  # type: ignore[arg-type]
        yield volume, urls


async def fill(volume: Volume, count: int = 4, size: int = 200_000) -> dict[int, bytes]:
    content: dict[int, bytes] = {}
    for _ in range(count):
        value = new_value(volume)
        content[value] = noise(size)
        await append(volume, value, content[value])
        await volume.flush()
    await volume.sectors.wait_uploads()
    return content


async def all_there(volume: Volume, content: dict[int, bytes]) -> bool:
    return all([await contents(volume, value) == data for value, data in content.items()])


def complete(volume: Volume, urls: list[str]) -> bool:
    """Every shard of every sector on exactly one host, all distinct, on record as on the disks."""
    held = {number: there(url) for number, url in enumerate(urls, 1)}
    for record in records(volume).values():
        hosts = [host for shard in record.shards for host in shard.hosts]
        if len(hosts) != len(record.shards) or len(set(hosts)) != len(hosts):
            return False
        if any(shard.root.hex() not in held[host] for shard in record.shards for host in shard.hosts):
            return False
    return True


async def look(volume: Volume) -> None:
    """Notice which hosts are there."""
    for number in volume.hosts.numbers():
        volume.hosts.suspect(number)
    await volume.hosts.retry_once()


def forget(url: str) -> None:
    """The host loses everything it keeps, and stays."""
    for volume in Path(url.removeprefix("dir:")).glob("volumes/*/sectors"):
        shutil.rmtree(volume)


async def test_each_shard_is_on_a_host_of_its_own_under_an_id_of_its_own(tmp_path: Path) -> None:
    async with a_volume(tmp_path) as (volume, urls):
        content = await fill(volume)
        assert await all_there(volume, content) and complete(volume, urls)
        for sector_id, record in records(volume).items():
            assert [shard.shard_id for shard in record.shards] == list(range(sector_id, sector_id + 6))
        # What is stored is 1.5 times what was written, not twice.
        stored = sum(path.stat().st_size for url in urls for path in Path(url.removeprefix("dir:")).glob("volumes/*/sectors/*/*"))
        assert stored < 1.6 * sum(map(len, content.values()))


async def test_any_two_hosts_may_go_and_reads_and_writes_go_on(tmp_path: Path) -> None:
    async with a_volume(tmp_path) as (volume, urls):
        content = await fill(volume)
        for gone in itertools.combinations(range(6), 2):
            saved = {}
            for at in gone:
                root = Path(urls[at].removeprefix("dir:"))
                saved[at] = root.rename(root.with_name(f"{root.name}.away"))
            assert await all_there(volume, content), gone
            for at, moved in saved.items():
                moved.rename(moved.with_name(f"host{at}"))
            await look(volume)


async def test_lost_shards_are_made_again_and_have_the_roots_they_had(tmp_path: Path) -> None:
    async with a_volume(tmp_path, hosts=8) as (volume, urls):
        content = await fill(volume)
        before = {sector: [shard.root for shard in record.shards] for sector, record in records(volume).items()}
        for number in ("2", "5"):
            shutil.rmtree(urls[int(number) - 1].removeprefix("dir:"))
            await volume.mark_host(number, lost=True)
        report = await volume.repair()
        assert report.pending == 0 and report.trouble == ""
        assert complete(volume, urls)
        hosts = {host for record in records(volume).values() for shard in record.shards for host in shard.hosts}
        assert not hosts & {2, 5}
        assert {sector: [shard.root for shard in record.shards] for sector, record in records(volume).items()} == before
        assert await all_there(volume, content)


async def test_a_shard_that_is_made_again_otherwise_goes_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I1: its id is a nonce, and sealed one thing once. So a codec that came to make other bytes makes an error, and nothing else."""
    async with a_volume(tmp_path, "2+1", hosts=4) as (volume, urls):
        content = await fill(volume, 1)
        roots = {shard.root.hex() for record in records(volume).values() for shard in record.shards}
        rebuild = Layout.rebuild

        def otherwise(self: Layout, sector_id: int, number: int, first: int, ranges: Mapping[int, bytes]) -> bytes:
            right = rebuild(self, sector_id, number, first, ranges)
            return right[:-1] + bytes([right[-1] ^ 1])

        monkeypatch.setattr(Layout, "rebuild", otherwise)
        (held, *_) = [number for number, url in enumerate(urls, 1) if there(url)]
        shutil.rmtree(urls[held - 1].removeprefix("dir:"))
        await volume.mark_host(str(held), lost=True)
        report = await volume.repair()
        assert report.pending == 1 and "root" in report.trouble
        left = [url for number, url in enumerate(urls, 1) if number != held]
        assert set().union(*map(there, left)) < roots
        monkeypatch.undo()
        report = await volume.repair()
        assert report.pending == 0 and complete(volume, urls)
        assert set().union(*map(there, left)) == roots
        assert await all_there(volume, content)


async def test_a_host_that_is_left_loses_its_shards_to_others(tmp_path: Path) -> None:
    async with a_volume(tmp_path, "2+1", 4) as (volume, urls):
        content = await fill(volume, 6)
        await volume.leave_host("1", leave=True)
        await volume.repair()
        await delete_freed(volume)
        assert complete(volume, urls) and not there(urls[0])
        assert await all_there(volume, content)


async def test_damaged_ranges_are_made_of_the_same_columns_of_others(tmp_path: Path) -> None:
    async with a_volume(tmp_path, "4+2", 6) as (volume, urls):
        content = await fill(volume, 1, 1_000_000)
        # Every second block of the first two hosts' shards is wrong.
        for url in urls[:2]:
            for path in Path(url.removeprefix("dir:")).glob("volumes/*/sectors/*/*"):
                raw = bytearray(path.read_bytes())
                raw[len(raw) // 2] ^= 1
                path.chmod(0o600)
                path.write_bytes(raw)
        assert await all_there(volume, content)
        # A third one is too many: an error of our own, and never wrong bytes.
        forget(urls[2])
        (value,) = content
        with suppress(Corrupt, Unavailable):
            assert await contents(volume, value) == content[value]


Fetched = TypeVar("Fetched", bytes, memoryview)


def watch_fetches(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes read from each host from now on, by URL."""
    fetched: dict[str, int] = {}

    def watch(host: Host) -> None:
        get_range, get = host.get_range, host.get

        def count(raw: Fetched) -> Fetched:
            fetched[host.url] = fetched.get(host.url, 0) + len(raw)
            return raw

        async def ranges(name: str, at: int, size: int) -> bytes:
            return count(await get_range(name, at, size))

        async def whole(name: str, limit: int) -> bytes:
            return count(await get(name, limit))

        monkeypatch.setattr(host, "get_range", ranges)
        monkeypatch.setattr(host, "get", whole)
        if isinstance(host, QuickHost):
            ranges_now, ranges_opened = host.get_range_now, host.get_range_opened

            def now(name: str, at: int, size: int) -> memoryview | None:
                raw = ranges_now(name, at, size)
                return None if raw is None else count(raw)

            async def opened(name: str, at: int, size: int, step: int, opening: RangeOpening) -> int:
                got = await ranges_opened(name, at, size, step, opening)
                fetched[host.url] = fetched.get(host.url, 0) + got
                return got

            monkeypatch.setattr(host, "get_range_now", now)
            monkeypatch.setattr(host, "get_range_opened", opened)

    for number in volume.hosts.numbers():
        watch(volume.hosts.get(number))
    return fetched


async def test_a_cold_read_of_64_kib_fetches_at_most_three_blocks_from_one_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_volume(tmp_path) as (volume, _):
        sector = await volume.sectors.allocate_sector("4+2")
        data = noise(2_000_000) if volume.sectors.sector_size >= 2_000_000 else noise(volume.sectors.sector_size)
        await volume.sectors.write_sector(sector, data, "4+2")
        # Until then some shard may be on no host: the next test.
        await volume.sectors.wait_uploads()
        # Nor is another way tried because this machine is so busy that a disk seems to hang.
        monkeypatch.setattr(volume.hostdb, "stalled_after", lambda _number, _size: 1e6)
        fetched = watch_fetches(volume, monkeypatch)
        for offset in [0, 1, 65_535, len(data) // 4 - 30_000, len(data) - 65_536]:
            fetched.clear()
            assert await volume.sectors.insecure_read_sector_at(sector, offset, BLOCK) == data[offset : offset + BLOCK]
            assert max(fetched.values()) <= 3 * (BLOCK + 16) and len(fetched) <= 2


async def test_a_shard_still_on_its_way_is_read_from_memory_and_not_made_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_volume(tmp_path) as (volume, _):
        fetched = watch_fetches(volume, monkeypatch)
        # Whichever shard a host is to hold: it is not there when the write is done, at five of six.
        for number in volume.hosts.numbers():
            slow, held = volume.hosts.get(number), trio.Event()

            def hold(host: Host, until: trio.Event) -> Callable[[str, Buffer], Awaitable[str]]:
                put = host.put

                async def held_put(name: str, sealed: Buffer) -> str:
                    await until.wait()
                    return await put(name, sealed)

                return held_put

            with monkeypatch.context() as patch:
                patch.setattr(slow, "put", hold(slow, held))
                sector = await volume.sectors.allocate_sector("4+2")
                data = noise(volume.sectors.sector_size)
                await volume.sectors.write_sector(sector, data, "4+2")
                assert volume.sectors.uploading(sector)
                assert [shard.hosts for shard in volume.sectors.record(sector).shards].count([]) == 1
                for offset in range(0, len(data), BLOCK):
                    assert await volume.sectors.insecure_read_sector_at(sector, offset, BLOCK) == data[offset : offset + BLOCK]
                assert await volume.sectors.read_sector(sector) == data
                held.set()
                await volume.sectors.wait_uploads()
        assert fetched == {}


async def test_the_write_quorum_is_k_plus_one_and_the_rest_follows(tmp_path: Path) -> None:
    async with a_volume(tmp_path, "2+2", 4) as (volume, urls):
        shutil.rmtree(urls[3].removeprefix("dir:"))
        await look(volume)
        content = await fill(volume, 2)
        assert volume.sectors.degraded() == 2
        assert await all_there(volume, content)
        Path(urls[2].removeprefix("dir:")).rename(tmp_path / "away")
        await look(volume)
        with pytest.raises(FusefsError, match=r"hosts are needed: 3, can be used now: 2"):
            await volume.sectors.write_sector(await volume.sectors.allocate_sector("2+2"), b"x", "2+2")
        (tmp_path / "away").rename(urls[2].removeprefix("dir:"))
        await look(volume)
        await volume.add_host(f"dir:{tmp_path / 'host9'}")
        await volume.mark_host("4", lost=True)
        report = await volume.repair()
        assert report.pending == 0
        assert volume.sectors.degraded() == 0 and await all_there(volume, content)


async def test_an_id_allocated_for_copies_is_not_enough_for_shards(tmp_path: Path) -> None:
    async with a_volume(tmp_path, "2+1", 3) as (volume, _):
        sector = await volume.sectors.allocate_sector()
        with pytest.raises(BadArgument, match="allocated"):
            await volume.sectors.write_sector(sector, b"data", "2+1")
        # I1: nothing was sealed, the id still serves.
        await volume.sectors.write_sector(sector, b"data", "1")
        following = await volume.sectors.allocate_sector("2+1")
        assert await volume.sectors.allocate_sector() == following + 3


async def test_a_lost_machine_with_a_lost_host(tmp_path: Path) -> None:
    async with a_volume(tmp_path, "2+1", 3) as (volume, urls):
        fd = await volume.files.open("a/file", write=True)
        data = noise(500_000)
        await volume.files.append(fd, data)
        await volume.files.close(fd)
        await volume.flush()
    shutil.rmtree(tmp_path / "volume")
    shutil.rmtree(urls[1].removeprefix("dir:"))
    report = await recover_volume(tmp_path / "new", [urls[0], urls[2]], passphrase=PASSPHRASE)
    assert report.degraded.unreadable == 0 and report.degraded.fewer > 0
    async with opened(tmp_path / "new") as again:
        fd = await again.files.open("a/file")
        assert await again.files.read_at(fd, 0, len(data)) == data
        await again.files.close(fd)


async def test_salvage_puts_sectors_together_from_any_k_shards(tmp_path: Path) -> None:
    async with a_volume(tmp_path, "2+2", 4) as (volume, urls):
        data = {f"file{i}": noise(150_000 + i) for i in range(3)}
        for name, content in data.items():
            fd = await volume.files.open(name, write=True)
            await volume.files.append(fd, content)
            await volume.files.close(fd)
            await volume.flush()
    for url in urls:
        superblocks = list(Path(url.removeprefix("dir:")).glob("volumes/*/superblock.*"))
        assert superblocks
        for path in superblocks:
            path.unlink()
    shutil.rmtree(urls[0].removeprefix("dir:"))
    report = await salvage_volume(tmp_path / "out", [urls[1], urls[2]], passphrase=PASSPHRASE, keyfile=tmp_path / "volume" / "keys.json")
    assert report.damaged == 0 and report.files == 3
    assert {name: (tmp_path / "out" / name).read_bytes() for name in data} == data


async def test_check_finds_and_mends_missing_and_damaged_shards(tmp_path: Path) -> None:
    async with a_volume(tmp_path, "2+1", 3) as (volume, urls):
        data = noise(500_000)
        fd = await volume.files.open("file", write=True)
        await volume.files.append(fd, data)
        await volume.files.close(fd)
        await volume.flush()
        await published(volume)
    forget(urls[1])
    (victim, *_) = Path(urls[0].removeprefix("dir:")).glob("volumes/*/sectors/*/*")

    async def check(*, repair: bool = True) -> list[tuple[str, bool]]:
        found: list[Finding] = []
        await check_volume(tmp_path / "volume", passphrase=PASSPHRASE, repair=repair, data=True, on_finding=found.append)
        return [(finding.kind, finding.repaired) for finding in found if not finding.note]

    assert set(await check()) == {("missing-copy", True)}
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.chmod(0o600)
    victim.write_bytes(raw)
    assert await check() == [("damaged-copy", True)]
    assert await check(repair=False) == []
    async with opened(tmp_path / "volume") as volume:
        assert complete(volume, urls)
        fd = await volume.files.open("file")
        assert await volume.files.read_at(fd, 0, len(data)) == data
        await volume.files.close(fd)
