"""The volume's hosts: one host, one number; what is not itself any more is not used; what comes back is used again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from storage.errors import BadArgument, Corrupt, Exists, NoSpace, NotFound, Unavailable
from storage.hosts.identity import claim_identity, probe, read_identity
from storage.hosts.layout import HOST_FILE
from storage.hosts.memory import MemoryHost, forget_memory_hosts, memory_content
from storage.hosts.registry import HostRegistry
from storage.interfaces import Host
from storage.seams import SystemClock
from tests.fakes import Crash, CrashAt, SeededRandom, make_seams
from tests.host_rig import VOLUME_ID, FaultyOpener, Rig


@pytest.fixture(autouse=True)
def _fresh() -> None:
    forget_memory_hosts()


async def test_added_hosts_are_numbered_and_survive(tmp_path: Path) -> None:
    rig = Rig()
    assert await rig.registry.add(f"dir:{tmp_path}/one#domain=rack1") == 1
    assert await rig.registry.add("mem:two") == 2
    following = await rig.again(crash=True)
    assert following.registry.records() == rig.registry.records()
    assert following.registry.numbers() == [1, 2]
    record = following.registry.record(1)
    assert (record.url, record.domain, record.capabilities.conditional_put) == (f"dir:{tmp_path}/one", "rack1", True)
    assert (await read_identity(following.registry.get(1))).id == record.host_id
    assert [following.registry.state(n) for n in (1, 2)] == ["ok", "ok"]
    assert following.registry.reason(1) == ""
    # What is left on the host is its identity, not the probe's leavings.
    assert [name async for name, _ in following.registry.get(2).list("")] == [HOST_FILE]


async def test_two_urls_of_one_host_are_one_host(tmp_path: Path) -> None:
    rig = Rig()
    await rig.registry.add(f"dir:{tmp_path}/one")
    (tmp_path / "alias").symlink_to(tmp_path / "one")
    with pytest.raises(Exists) as caught:
        await rig.registry.add(f"dir:{tmp_path}/alias")
    assert f"dir:{tmp_path}/one" in str(caught.value)
    assert f"dir:{tmp_path}/alias" in str(caught.value)
    with pytest.raises(Exists):
        await rig.registry.add(f"dir:{tmp_path}/x/../one#domain=other")
    assert rig.registry.numbers() == [1]


async def test_two_urls_added_at_the_same_time_are_one_host(tmp_path: Path) -> None:
    rig = Rig()
    (tmp_path / "one").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "one")
    outcomes: list[str] = []

    async def add(name: str) -> None:
        try:
            await rig.registry.add(f"dir:{tmp_path}/{name}")
            outcomes.append("added")
        except Exists:
            outcomes.append("exists")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(add, "one")
        nursery.start_soon(add, "alias")
    assert sorted(outcomes) == ["added", "exists"]
    assert rig.registry.numbers() == [1]


async def test_several_volumes_share_a_host(tmp_path: Path) -> None:
    first, second = Rig(), Rig(seams=make_seams(seed=5))
    await first.registry.add(f"dir:{tmp_path}/one")
    await second.registry.add(f"dir:{tmp_path}/one")
    assert first.registry.record(1).host_id == second.registry.record(1).host_id


async def test_of_many_who_claim_a_host_all_get_one_id() -> None:
    host = MemoryHost()
    ids: list[str] = []

    async def claim(seed: int) -> None:
        ids.append((await claim_identity(host, make_seams(random=SeededRandom(seed)))).id)

    async with trio.open_nursery() as nursery:
        for seed in range(10):
            nursery.start_soon(claim, seed)
    assert len(ids) == 10
    assert len(set(ids)) == 1


@pytest.mark.parametrize("text", ["ftp://x", "s3://b", "/tmp", "", "dir:"])
async def test_a_bad_url_adds_nothing(text: str) -> None:
    rig = Rig()
    with pytest.raises(BadArgument):
        await rig.registry.add(text)
    assert rig.registry.records() == []


async def test_a_host_that_cannot_be_used_is_not_added(tmp_path: Path) -> None:
    rig = Rig()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unavailable):
        await rig.registry.add(f"dir:{tmp_path}/file")
    memory_content("damaged").objects[HOST_FILE] = b"{"
    with pytest.raises(Corrupt, match="mem:damaged"):
        await rig.registry.add("mem:damaged")
    memory_content("full").capacity = 10
    with pytest.raises(NoSpace):
        await rig.registry.add("mem:full")
    assert rig.registry.records() == []
    assert rig.store.content().keys() == Rig().store.content().keys()


async def test_a_host_is_probed_for_what_it_really_does() -> None:
    async def probed(**faults: object) -> bool:
        opener = FaultyOpener()
        host = await opener((await _parsed("mem:x")), make_seams())
        for name, value in faults.items():
            setattr(opener.faults["mem:x"], name, value)
        return (await probe(host, make_seams())).conditional_put

    assert await probed() is True
    assert await probed(ignores_conditions=True) is False
    with pytest.raises(Unavailable, match="keep"):
        await probed(losing=True)
    with pytest.raises(Unavailable):
        await probed(lying=1.0)
    assert memory_content("x").objects == {}


async def _parsed(url: str):  # type: ignore[no-untyped-def]
    from storage.hosts.urls import parse_url

    return parse_url(url)


async def test_what_is_away_is_unavailable_with_a_reason_and_comes_back(tmp_path: Path) -> None:
    rig = Rig()
    for name in ("one", "two"):
        await rig.registry.add(f"dir:{tmp_path}/{name}")
    os.rename(tmp_path / "one", tmp_path / "away")
    following = await rig.again()
    registry = following.registry
    assert [registry.available(n) for n in (1, 2)] == [False, True]
    assert registry.state(1) == "unavailable"
    with pytest.raises(Unavailable, match="one"):
        registry.get(1)
    assert await registry.retry_once() == []
    os.rename(tmp_path / "away", tmp_path / "one")
    assert await registry.retry_once() == [1]
    assert await read_identity(registry.get(1))


async def test_another_host_at_its_url_is_foreign_and_not_used(tmp_path: Path) -> None:
    rig = Rig()
    await rig.registry.add(f"dir:{tmp_path}/one")
    os.rename(tmp_path / "one", tmp_path / "away")
    (tmp_path / "one").mkdir()
    following = await rig.again()
    # An empty directory (its disk is not mounted) is not claimed, and not used.
    assert following.registry.state(1) == "unavailable"
    assert HOST_FILE in following.registry.reason(1)
    assert os.listdir(tmp_path / "one") == []
    other = Rig(seams=make_seams(seed=9))
    await other.registry.add(f"dir:{tmp_path}/one")
    assert await following.registry.retry_once() == []
    assert following.registry.state(1) == "foreign"
    assert rig.registry.record(1).host_id in following.registry.reason(1)
    with pytest.raises(Unavailable, match="another host"):
        following.registry.get(1)


async def test_a_suspect_is_looked_at_again(tmp_path: Path) -> None:
    rig = Rig()
    await rig.registry.add(f"dir:{tmp_path}/one")
    registry = rig.registry
    registry.suspect(1)
    assert await registry.retry_once() == []
    assert registry.available(1)
    os.rename(tmp_path / "one", tmp_path / "away")
    assert await registry.retry_once() == []
    assert registry.available(1)
    registry.suspect(1)
    await registry.retry_once()
    assert not registry.available(1)
    os.rename(tmp_path / "away", tmp_path / "one")
    assert await registry.retry_once() == [1]


async def test_a_disk_that_was_away_and_back_between_two_looks_is_used_again(tmp_path: Path) -> None:
    """Unmounted and mounted again it is another directory to the system, and the same host."""
    rig = Rig()
    await rig.registry.add(f"dir:{tmp_path}/one")
    identity = (tmp_path / "one" / HOST_FILE).read_bytes()
    os.rename(tmp_path / "one", tmp_path / "away")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / HOST_FILE).write_bytes(identity)
    host: Host = rig.registry.get(1)
    with pytest.raises(Unavailable):
        await host.put("a", b"1")
    rig.registry.suspect(1)
    await rig.registry.retry_once()
    assert rig.registry.available(1)
    await rig.registry.get(1).put("a", b"1")


async def test_hosts_that_hang_do_not_keep_the_others_waiting(autojump_clock: trio.testing.MockClock) -> None:
    seams = make_seams(clock=SystemClock())
    rig = Rig(seams=seams)
    for name in ("a", "b", "c", "d"):
        await rig.registry.add(f"mem:{name}")
    for name in ("a", "b", "c"):
        rig.opener.faults[f"mem:{name}"].hang = True
    before = trio.current_time()
    following = await rig.again()
    assert trio.current_time() - before < 15
    assert [following.registry.available(n) for n in (1, 2, 3, 4)] == [False, False, False, True]
    assert "did not answer" in following.registry.reason(1)
    with pytest.raises(Exists):
        await following.registry.add("mem:a")
    rig.opener.faults["mem:a"].hang = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(following.registry.retry)
        await trio.sleep(60)
        assert following.registry.available(1)
        nursery.cancel_scope.cancel()


async def test_a_crash_while_adding_leaves_a_host_that_can_be_added() -> None:
    for step in ("identity.before_put", "registry.add.before_commit"):
        forget_memory_hosts()
        rig = Rig(seams=make_seams(failpoints=CrashAt(step)))
        with pytest.raises(Crash):
            await rig.registry.add("mem:one")
        following = Rig(rig.store.crash())
        assert following.registry.records() == []
        assert await following.registry.add("mem:one") == 1


async def test_unknown_numbers_are_not_found_and_closing_closes() -> None:
    rig = Rig()
    await rig.registry.add("mem:one")
    for call in (rig.registry.get, rig.registry.record):
        with pytest.raises(NotFound, match=r"1 \(mem:one\)"):
            call(2)
    assert rig.registry.url(2) == "2"
    await rig.registry.aclose()
    with pytest.raises(Unavailable, match="closed"):
        rig.registry.get(1)
    unopened = HostRegistry(VOLUME_ID, rig.store, rig.seams)
    with pytest.raises(Unavailable, match="not been opened"):
        unopened.get(1)
