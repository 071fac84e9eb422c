"""Hosts that have bad days, one kind at a time, under a volume in use: nothing lost, nothing wrong returned, mended by itself, and seen in
`status`. Virtual time throughout."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from storage.history.host_side import GENERATIONS, HostSide
from storage.history.publisher import COMPARE_SECONDS
from storage.hosts.faults import Faults, shards_only
from storage.hosts.memory import forget_memory_hosts, memory_content
from storage.interfaces import Host
from storage.status import HostStatus
from storage.volume import Volume
from tests.bad_days import SECTOR, World
from tests.complete import records
from tests.rig import noise

BAD = "mem:bad"
URLS = [BAD, "mem:b", "mem:c"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    forget_memory_hosts()
    yield
    forget_memory_hosts()


@asynccontextmanager
async def good_in_the_end(tmp_path: Path, **options: object) -> AsyncIterator[World]:
    """In use before, during and after the block, which sees no error; then without faults: whole again by itself, and `check` finds
    nothing."""
    world = World(tmp_path, URLS, "2", seed=7, **options)
    await world.make()
    async with world.opened():
        await world.work(60)
        yield world
        world.heal()
        await world.work(30)
        await world.settled()
        await world.compare()
    await world.checked()


@dataclass(frozen=True)
class Kind:
    """What a host does, and how that is seen in `status`."""

    name: str
    faults: Callable[[Faults], None]
    seen: Callable[[HostStatus], bool]


def _set(**what: object) -> Callable[[Faults], None]:
    def change(faults: Faults) -> None:
        for name, value in what.items():
            setattr(faults, name, value)

    return change


KINDS = [
    Kind("slow", _set(latency=3.0), lambda host: host.latency_ms is not None and host.latency_ms > 100),
    Kind("slower than is waited for", _set(latency=30.0), lambda host: "did not answer" in host.error),
    Kind("errors", _set(error_rate=0.6), lambda host: "by chance" in host.error),
    Kind("wrong bytes", _set(lying=1.0), lambda host: "sector" in host.error or "superblock" in host.error),
    Kind("half an object", _set(truncating=100), lambda host: "sector" in host.error or "superblock" in host.error),
    # What hosts hold is never replaced under its name, so the old is what there is: nothing to be seen.
    Kind("old bytes", _set(replay=True), lambda host: host.state == "ok"),
    Kind("full", _set(quota=0), lambda host: host.free == 0 and "is full" in host.error),
    Kind("hung", _set(hang=True), lambda host: host.state == "unavailable" and "did not answer" in host.error),
    Kind("unplugged", _set(gone="unplugged"), lambda host: host.state == "unavailable" and "unplugged" in host.error),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_a_host_with_a_bad_day(tmp_path: Path, autojump_clock: MockClock, kind: Kind) -> None:
    async with good_in_the_end(tmp_path) as world:
        kind.faults(world.faults(BAD))
        await world.work(240)
        host = await world.host(BAD)
        assert kind.seen(host), host


async def test_a_host_that_comes_back_after_a_week(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with good_in_the_end(tmp_path) as world:
        # What nobody touches meanwhile: all else is replaced by what programs do.
        files, data = world.volume.files, noise(10 * SECTOR)
        fd = await files.open("kept", write=True)
        await files.append(fd, data)
        await files.close(fd)
        await world.volume.flush()
        number = (await world.host(BAD)).number
        on_it = [sector for sector, record in records(world.volume).items() if number in record.shards[0].hosts]
        world.faults(BAD).gone = "unplugged"
        # Longer than the grace, with everything that programs do; then the calendar alone.
        await world.work(1200)
        world.clock.jump(7 * 86400)
        await world.work(60)
        # Long since, everything is on the others.
        assert (await world.status()).degraded_sectors == 0
        assert set(on_it) & set(records(world.volume))
        assert {len(set(shard.hosts) - {number}) for record in records(world.volume).values() for shard in record.shards} == {2}
        assert (await world.host(BAD)).state == "unavailable"
        fd = await files.open("kept", existing=True)
        assert await files.read_at(fd, 0, len(data)) == data
        await files.close(fd)
        await files.delete("kept")


async def test_what_a_host_acknowledged_and_forgot_is_made_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Also what nobody reads: the scrub in the background finds it."""
    async with good_in_the_end(tmp_path, scrub_interval=1800.0) as world:
        kept = len(memory_content("bad").objects)
        world.faults(BAD).losing = True
        await world.work(120)
        assert len(memory_content("bad").objects) <= kept


async def test_a_host_that_is_put_back_to_what_it_had_gets_what_it_lacks(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with good_in_the_end(tmp_path, scrub_interval=1800.0) as world:
        before = dict(memory_content("bad").objects)
        await world.work(240)
        memory_content("bad").objects = before
        await world.work(60)


async def test_a_host_that_lost_what_was_put_right_is_trusted_again_once_it_is_well(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with good_in_the_end(tmp_path, scrub_interval=600.0) as world:
        world.set(BAD, Faults(losing=True, only=shards_only))
        objects = memory_content("bad").objects
        for name in [name for name in objects if "/sectors/" in name]:
            del objects[name]
        await world.work(900)
        assert (await world.host(BAD)).state == "failing"


@pytest.mark.parametrize("what", [{"quota": 0}, {"gone": "unplugged"}], ids=["full", "away"])
async def test_all_hosts_and_then_none_again(tmp_path: Path, autojump_clock: MockClock, what: dict[str, object]) -> None:
    """Programs write and read on; only a flush says why not. When hosts are well again everything drains by itself."""
    async with good_in_the_end(tmp_path) as world:
        # What is on the hosts alone cannot be read meanwhile.
        if "gone" in what:
            await world.clear()
        world.flush_may_fail = True
        for url in URLS:
            world.set(url, Faults(**what))  # type: ignore[arg-type]
        for _ in range(40):
            await world.write(size=5000)
            await world.flush()
            await trio.sleep(3)
        assert world.refused or world.reports[-1].reasons
        world.flush_may_fail = False


async def test_hosts_come_and_go_while_programs_work(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with good_in_the_end(tmp_path) as world:
        await world.volume.leave_host(BAD, leave=True)
        await world.work(20)
        # Everything there is goes through these two now.
        await world.volume.add_host("mem:d")
        await world.work(20)
        await world.volume.mark_host("mem:b", lost=True)
        world.faults("mem:b").gone = "thrown away"
        await world.work(20)
        await world.volume.add_host("mem:e#domain=elsewhere")
        await world.work(60)
        await world.settled()
        assert [host.state for host in (await world.status()).hosts] == ["left", "lost", "ok", "ok", "ok"]


async def test_of_two_failure_domains_one_goes(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A copy of everything is in the other; it is made again there, and goes back once the first is."""
    world = World(tmp_path, [f"mem:{name}#domain={name[0]}" for name in ("a1", "a2", "b1", "b2")], "2", seed=3)
    await world.make()
    async with world.opened():
        await world.work(60)
        await world.settled()
        for name in ("a1", "a2"):
            world.faults(f"mem:{name}").gone = "the rack is dark"
        await world.work(1500)
        await world.compare()
        assert (await world.status()).degraded_sectors == 0
        world.heal()
        await world.work(60)
        await world.settled()
        await world.compare()
    await world.checked()


# ---- what a host lost of the metadata, and does not say


def _metadata(url: str) -> dict[str, bytes]:
    """The metadata objects it has, by name."""
    return {name: data for name, data in memory_content(url.removeprefix("mem:")).objects.items() if "/metadata/" in name}


@asynccontextmanager
async def published(tmp_path: Path) -> AsyncIterator[tuple[World, Volume]]:
    """Everything is on the hosts, and nobody writes any more."""
    world = World(tmp_path, URLS, "2", seed=9)
    await world.make()
    async with world.opened() as volume:
        await world.work(60)
        await volume.flush()
        await volume.publish()
        yield world, volume


@pytest.mark.parametrize("how", ["removed", "cut off"])
@pytest.mark.parametrize("urls", [[BAD], URLS], ids=["one host", "every host"])
async def test_metadata_that_hosts_lost_in_silence_are_there_again(
    tmp_path: Path, autojump_clock: MockClock, how: str, urls: list[str]
) -> None:
    """A disk lost what it had acknowledged, and nobody has a reason to look: nothing is written any more."""
    async with published(tmp_path) as (world, volume):
        for url in urls:
            objects = memory_content(url.removeprefix("mem:")).objects
            names = list(_metadata(url))
            assert names
            for name in names:
                if how == "removed":
                    del objects[name]
                else:
                    objects[name] = objects[name][:-1]
        await trio.sleep(1.5 * COMPARE_SECONDS)
        there = [_metadata(url) for url in URLS]
        assert there[0]
        assert there[0] == there[1] == there[2]
        if len(urls) > 1:
            # A checkpoint is there in its place. The generation before named what nobody has any more; it goes with the next ones.
            for _ in range(GENERATIONS):
                await world.write()
                await volume.flush()
                await volume.publish()
    await world.checked()
    async with world.opened():
        await world.compare()


async def test_whether_hosts_have_their_metadata_is_looked_at_seldom(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day of nothing: a list each hour from each host, and no object is sent."""
    asked: list[int] = []
    look_again = HostSide.look_again

    async def counted(side: HostSide) -> None:
        asked.append(side.number)
        await look_again(side)

    monkeypatch.setattr(HostSide, "look_again", counted)
    async with published(tmp_path):
        before = {url: _metadata(url) for url in URLS}
        await trio.sleep(86_400)
        assert {url: _metadata(url) for url in URLS} == before
    assert 20 * len(URLS) < len(asked) <= 24 * len(URLS)


async def test_what_is_put_while_a_host_lists_what_it_has_counts(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is written beside it."""
    async with published(tmp_path) as (_, volume):
        assert volume.publisher is not None
        side = volume.publisher.fleet.sides()[0]
        objects = HostSide._objects

        async def slow(self: HostSide, host: Host) -> dict[str, int]:
            there = await objects(self, host)
            self.present["put meanwhile"] = 7
            return there

        monkeypatch.setattr(HostSide, "_objects", slow)
        side.present["lost"] = 8
        before = dict(side.present)
        await side.look_again()
        assert side.present == {name: size for name, size in before.items() if name != "lost"} | {"put meanwhile": 7}
        monkeypatch.undo()
        await side.look_again()
