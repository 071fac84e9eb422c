"""What HostIO promises (storage.interfaces.HostIO), over memory and directory hosts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from storage.errors import BadArgument, Corrupt, Expired, FusefsError, NoSpace, NotFound, Unavailable
from storage.hosts.memory import forget_memory_hosts
from storage.sealed_ids import SealedIds
from storage.sealing import BLOCK, HEADER_SIZE, TAG_SIZE, seal
from storage.seams import SystemClock
from tests.fakes import Crash, CrashAt, ManualClock, make_seams
from tests.host_rig import DAY, VOLUME_ID, Rig, Stored

DATA = bytes(range(251)) * 1200  # 301,200 bytes: five blocks, the last one short


@pytest.fixture(params=["memory", "directory"])
def kind(request: pytest.FixtureRequest) -> str:
    forget_memory_hosts()
    kind: str = request.param
    return kind


@pytest.fixture
def urls(kind: str, tmp_path: Path) -> list[str]:
    return ["mem:one", "mem:two"] if kind == "memory" else [f"dir:{tmp_path}/one", f"dir:{tmp_path}/two"]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def rig(clock: ManualClock) -> Rig:
    return Rig(seams=make_seams(clock=clock))


# ------------------------------------------------------------------------------------------------- writing and reading


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 300_000])
async def test_what_is_written_is_read(rig: Rig, urls: list[str], size: int) -> None:
    contract = await rig.add(urls[0])
    sector, data = rig.sector_id(), (DATA * 2)[:size]
    root = await rig.io.write(contract, data, sector)
    assert Stored(urls[0]).shards() == [root]
    assert await rig.io.read(contract, root, sector) == data
    for known in (size, None):
        for offset, length in [(0, size), (0, 1), (size - 1, 5), (size, 1), (size + 10, 1), (BLOCK - 1, 2), (0, 0), (100, 10**9)]:
            if offset >= 0:
                part = await rig.io.insecure_read(contract, root, sector, offset, length, plaintext_length=known)
                assert part == data[offset : offset + length], (known, offset, length)


async def test_nothing_readable_is_on_the_host(rig: Rig, urls: list[str]) -> None:
    contract = await rig.add(urls[0])
    await rig.io.write(contract, b"secret words " * 1000, rig.sector_id())
    stored = Stored(urls[0])
    assert all(b"secret words" not in stored.read(name) for name in stored.names())


async def test_a_known_length_asks_for_just_the_blocks(rig: Rig, urls: list[str]) -> None:
    contract = await rig.add(urls[0])
    sector = rig.sector_id()
    root = await rig.io.write(contract, DATA, sector)
    host = rig.host(contract)
    asked: list[tuple[int, int]] = []
    real = host.inner.get_range

    async def get_range(name: str, offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return await real(name, offset, length)

    host.inner.get_range = get_range  # type: ignore[method-assign]
    await rig.io.insecure_read(contract, root, sector, BLOCK + 5, 10, plaintext_length=len(DATA))
    assert asked == [(HEADER_SIZE + BLOCK + TAG_SIZE, BLOCK + TAG_SIZE)]
    asked.clear()
    await rig.io.insecure_read(contract, root, sector, BLOCK + 5, 10)
    assert asked == [(0, HEADER_SIZE), (HEADER_SIZE + BLOCK + TAG_SIZE, BLOCK + TAG_SIZE)]
    asked.clear()
    assert await rig.io.insecure_read(contract, root, sector, len(DATA), 10, plaintext_length=len(DATA)) == b""
    assert asked == []


async def test_copies_are_sealed_once_and_byte_identical(rig: Rig, urls: list[str]) -> None:
    contracts = [await rig.add(url) for url in urls]
    shard = rig.io.seal([DATA[:1000], DATA[1000:]], rig.sector_id())
    for contract in contracts:
        await rig.io.write_sealed(contract, shard)
    first, second = (Stored(url).read(Stored(url).shard(shard.root)) for url in urls)
    assert first == second == bytes(shard.sealed)
    assert shard.plaintext_length == len(DATA)


async def test_writing_the_same_again_is_harmless(rig: Rig, urls: list[str]) -> None:
    contract = await rig.add(urls[0])
    sector = rig.sector_id()
    assert await rig.io.write(contract, DATA, sector) == await rig.io.write(contract, DATA, sector)


async def test_an_id_seals_one_content_only(rig: Rig, urls: list[str]) -> None:
    """I1: within a process by memory, across processes by epoch."""
    contract = await rig.add(urls[0])
    sector = rig.sector_id()
    root = await rig.io.write(contract, DATA, sector)
    for other in (DATA[:-1], DATA + b"x", b"", bytes(len(DATA))):
        with pytest.raises(BadArgument, match="nonce"):
            await rig.io.write(contract, other, sector)
    assert Stored(urls[0]).shards() == [root]
    following = await rig.again()
    with pytest.raises(BadArgument, match="epoch"):
        await following.io.write(contract, b"other", sector)
    assert await following.io.read(contract, root, sector) == DATA
    with pytest.raises((BadArgument, NotFound)):
        await following.io.write(contract, b"other", 0)


async def test_ids_forgotten_count_as_spent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = SealedIds(remembered=4)
    for sector in range(1, 9):
        spent.spend(sector, bytes([sector]) * 32)
    spent.spend(8, bytes([8]) * 32)
    for sector in (1, 4):
        with pytest.raises(BadArgument):
            spent.spend(sector, bytes([99]) * 32)
    spent.spend(9, bytes(32))


# ------------------------------------------------------------------------------------------------------ never wrong bytes


def _flip(at: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "first byte": _flip(0),
    "salt": _flip(30),
    "length": _flip(47),
    "sector id": _flip(55),
    "reserved": _flip(63),
    "first block": _flip(HEADER_SIZE + 10),
    "first tag": _flip(HEADER_SIZE + BLOCK),
    "last byte": _flip(-1),
    "cut by one": lambda raw: raw[:-1],
    "cut to blocks": lambda raw: raw[: HEADER_SIZE + 2 * (BLOCK + TAG_SIZE)],
    "cut in the header": lambda raw: raw[:20],
    "empty": lambda raw: b"",
    "longer": lambda raw: raw + b"x",
    "zeros": lambda raw: bytes(len(raw)),
    "blocks swapped": lambda raw: (
        raw[:HEADER_SIZE]
        + raw[HEADER_SIZE + BLOCK + TAG_SIZE : HEADER_SIZE + 2 * (BLOCK + TAG_SIZE)]
        + raw[HEADER_SIZE : HEADER_SIZE + BLOCK + TAG_SIZE]
        + raw[HEADER_SIZE + 2 * (BLOCK + TAG_SIZE) :]
    ),
}


@pytest.mark.parametrize("damage", _DAMAGE)
async def test_a_damaged_shard_is_corrupt_and_never_wrong_bytes(rig: Rig, urls: list[str], damage: str) -> None:
    contract = await rig.add(urls[0])
    sector = rig.sector_id()
    root = await rig.io.write(contract, DATA, sector)
    Stored(urls[0]).damage(root, _DAMAGE[damage])
    with pytest.raises(Corrupt) as caught:
        await rig.io.read(contract, root, sector)
    assert urls[0] in str(caught.value)
    assert f"sector {sector}" in str(caught.value)
    assert root[:12] in str(caught.value)
    for known in (len(DATA), None):
        for offset in range(0, len(DATA) + BLOCK, BLOCK // 2):
            try:
                part = await rig.io.insecure_read(contract, root, sector, offset, 100, plaintext_length=known)
            except Corrupt:
                continue
            # Blocks that are as they were may come out; nothing else.
            assert part == DATA[offset : offset + 100]


async def test_swapped_moved_and_foreign_shards_do_not_verify(rig: Rig, urls: list[str]) -> None:
    contract = await rig.add(urls[0])
    sectors = [rig.sector_id(), rig.sector_id()]
    datas = [DATA, DATA[::-1]]
    roots = [await rig.io.write(contract, data, sector) for data, sector in zip(datas, sectors, strict=True)]
    stored = Stored(urls[0])
    first, second = (stored.read(stored.shard(root)) for root in roots)
    stored.damage(roots[0], lambda _: second)
    stored.damage(roots[1], lambda _: first)
    for root, sector in zip(roots, sectors, strict=True):
        for known in (len(DATA), None):
            with pytest.raises(Corrupt):
                await rig.io.insecure_read(contract, root, sector, 0, 10, plaintext_length=known)
        with pytest.raises(Corrupt):
            await rig.io.read(contract, root, sector)
    with pytest.raises(Corrupt, match="another shard's header"):
        await rig.io.insecure_read(contract, roots[0], sectors[0], 0, 10)
    # The right root under another sector's id: its bytes are whole, and not that sector.
    stored.damage(roots[0], lambda _: first)
    with pytest.raises(Corrupt):
        await rig.io.read(contract, roots[0], sectors[1])
    # From another epoch of the same keys.
    following = await rig.again()
    other = following.io.seal([DATA], following.first_sector_id)
    stored.damage(roots[0], lambda _: bytes(other.sealed))
    with pytest.raises(Corrupt):
        await rig.io.insecure_read(contract, roots[0], sectors[0], 0, 10, plaintext_length=len(DATA))


async def test_another_content_under_the_same_key_and_id_is_not_the_root(rig: Rig, urls: list[str]) -> None:
    """As a cloned machine would seal it (outside I1): every tag is good, and it is not what was written."""
    contract = await rig.add(urls[0])
    sector = rig.sector_id()
    root = await rig.io.write(contract, DATA, sector)
    header = rig.epochs.header_for(VOLUME_ID, sector, len(DATA))
    other = seal(rig.epochs.key_for(sector, rig.keys), header, [DATA[::-1]])
    Stored(urls[0]).damage(root, lambda _: other)
    with pytest.raises(Corrupt, match="root"):
        await rig.io.read(contract, root, sector)


async def test_a_lying_end_does_not_cut_anything_off(rig: Rig, urls: list[str]) -> None:
    """Without a known length the header's is believed only once a block has verified with it, also where nothing is to be read."""
    contract = await rig.add(urls[0])
    sector = rig.sector_id()
    root = await rig.io.write(contract, DATA, sector)
    for length in (0, 10, BLOCK, 2 * BLOCK):
        shorter = length.to_bytes(4, "big")
        Stored(urls[0]).damage(root, lambda raw, shorter=shorter: raw[:44] + shorter + raw[48:])  # type: ignore[misc]
        with pytest.raises(Corrupt):
            await rig.io.insecure_read(contract, root, sector, 2 * BLOCK, 10)


async def test_a_shard_that_is_gone_is_not_found_and_counts_as_a_failure(rig: Rig, urls: list[str]) -> None:
    contract = await rig.add(urls[0])
    sector = rig.sector_id()
    root = await rig.io.write(contract, DATA, sector)
    Stored(urls[0]).remove(Stored(urls[0]).shard(root))
    with pytest.raises(NotFound, match=root[:12]):
        await rig.io.read(contract, root, sector)
    with pytest.raises(NotFound):
        await rig.io.insecure_read(contract, root, sector, 0, 1, plaintext_length=len(DATA))
    assert rig.hostdb.stats(1).failed == 2


@pytest.mark.parametrize("root", ["", "ab", "G" * 64, "A" * 64, "a" * 65, "../" + "a" * 61, "a" * 63 + "\n"])
async def test_what_is_no_root_is_refused(rig: Rig, urls: list[str], root: str) -> None:
    contract = await rig.add(urls[0])
    for call in (
        rig.io.read(contract, root, 1),
        rig.io.insecure_read(contract, root, 1, 0, 1),
        rig.io.delete(contract, root),
        rig.io.replace(contract, b"", rig.sector_id(), root),
    ):
        with pytest.raises(BadArgument):
            await call


# ---------------------------------------------------------------------------------------------------------- contracts


async def test_writing_needs_a_contract_in_force_reading_does_not(rig: Rig, urls: list[str], clock: ManualClock) -> None:
    contract = await rig.add(urls[0], days=1)
    sector = rig.sector_id()
    root = await rig.io.write(contract, DATA, sector)
    clock.advance(DAY)
    with pytest.raises(Expired, match=contract):
        await rig.io.write(contract, b"x", rig.sector_id())
    with pytest.raises(Expired):
        await rig.io.replace(contract, b"x", rig.sector_id(), root)
    with pytest.raises(Expired):
        await rig.io.write_sealed(contract, rig.io.seal([b"x"], rig.sector_id()))
    assert await rig.io.read(contract, root, sector) == DATA
    assert await rig.io.insecure_read(contract, root, sector, 5, 5) == DATA[5:10]
    renewed = await rig.contractor.renew_contract(contract, DAY)
    assert await rig.io.read(renewed, root, sector) == DATA
    await rig.io.write(renewed, b"x", rig.sector_id())


async def test_an_unknown_contract_is_not_found(rig: Rig, urls: list[str]) -> None:
    for call in (
        rig.io.read("f" * 32, "a" * 64, 1),
        rig.io.insecure_read("f" * 32, "a" * 64, 1, 0, 1),
        rig.io.write("f" * 32, b"", 1),
        rig.io.delete("f" * 32, "a" * 64),
    ):
        with pytest.raises(NotFound, match="contract"):
            await call


async def test_replace_keeps_the_old_until_the_new_is_there(rig: Rig, urls: list[str]) -> None:
    contract = await rig.add(urls[0])
    old = await rig.io.write(contract, DATA, rig.sector_id())
    rig.faults(contract).fail_next = 1
    with pytest.raises(Unavailable):
        await rig.io.replace(contract, b"new", rig.sector_id(), old)
    assert Stored(urls[0]).shards() == [old]
    sector = rig.sector_id()
    new = await rig.io.replace(contract, b"new", sector, old)
    assert Stored(urls[0]).shards() == [new]
    assert await rig.io.replace(contract, b"new", sector, new) == new
    assert Stored(urls[0]).shards() == [new]


async def test_a_crash_in_replace_leaves_the_old(urls: list[str]) -> None:
    rig = Rig(seams=make_seams(failpoints=CrashAt("host_io.replace.before_delete")))
    contract = await rig.add(urls[0])
    old = await rig.io.write(contract, DATA, rig.sector_id())
    with pytest.raises(Crash):
        await rig.io.replace(contract, b"new", rig.sector_id(), old)
    assert old in Stored(urls[0]).shards()


# ------------------------------------------------------------------------------------------------------------ deleting


async def test_deleting_unlinks_on_this_host_only(rig: Rig, urls: list[str]) -> None:
    contracts = [await rig.add(url) for url in urls]
    shard = rig.io.seal([DATA], rig.sector_id())
    for contract in contracts:
        await rig.io.write_sealed(contract, shard)
    await rig.io.delete(contracts[0], shard.root)
    assert Stored(urls[0]).shards() == []
    assert Stored(urls[1]).shards() == [shard.root]
    await rig.io.delete(contracts[0], shard.root)
    await rig.io.delete(contracts[0], "0" * 64)


async def test_deleting_removes_what_nobody_knows_of(rig: Rig, urls: list[str]) -> None:
    """A write whose answer was lost left a shard that no record names."""
    contract = await rig.add(urls[0])
    shard = rig.io.seal([DATA], rig.sector_id())
    rig.faults(contract).lose_answer_next = 1
    with pytest.raises(Unavailable):
        await rig.io.write_sealed(contract, shard)
    assert Stored(urls[0]).shards() == [shard.root]
    await rig.io.delete(contract, shard.root)
    assert Stored(urls[0]).shards() == []


async def test_two_lineages_on_one_host_hold_independently(rig: Rig, urls: list[str]) -> None:
    one = await rig.add(urls[0])
    two = await rig.contractor.conclude_contract("1", DAY)
    never_wrote = await rig.contractor.conclude_contract("1", DAY)
    shard = rig.io.seal([DATA], rig.sector_id())
    await rig.io.write_sealed(one, shard)
    await rig.io.write_sealed(two, shard)
    await rig.io.delete(never_wrote, shard.root)
    await rig.io.delete(one, shard.root)
    await rig.io.delete(one, shard.root)
    assert Stored(urls[0]).shards() == [shard.root]
    await rig.io.delete(two, shard.root)
    assert Stored(urls[0]).shards() == []


async def test_a_renewal_holds_what_its_predecessor_held(rig: Rig, urls: list[str]) -> None:
    old = await rig.add(urls[0])
    kept = await rig.io.write(old, b"kept", rig.sector_id())
    new = await rig.contractor.renew_contract(old, DAY)
    later = await rig.io.write(old, b"written through the old one after the renewal", rig.sector_id())
    for root in (kept, later):
        await rig.io.delete(old, root)
    assert set(Stored(urls[0]).shards()) == {kept, later}
    for root in (kept, later):
        await rig.io.delete(new, root)
    assert Stored(urls[0]).shards() == []


async def test_a_renewal_does_not_hold_what_was_released_before_it(rig: Rig, urls: list[str]) -> None:
    old = await rig.add(urls[0])
    other = await rig.contractor.conclude_contract("1", DAY)
    shard = rig.io.seal([DATA], rig.sector_id())
    await rig.io.write_sealed(old, shard)
    await rig.io.write_sealed(other, shard)
    await rig.io.delete(old, shard.root)
    await rig.contractor.renew_contract(old, DAY)
    await rig.io.delete(other, shard.root)
    assert Stored(urls[0]).shards() == []


async def test_ended_contracts_do_not_hold(rig: Rig, urls: list[str], clock: ManualClock) -> None:
    short = await rig.add(urls[0], days=1)
    long = await rig.contractor.conclude_contract("1", 10 * DAY)
    shard = rig.io.seal([DATA], rig.sector_id())
    await rig.io.write_sealed(short, shard)
    await rig.io.write_sealed(long, shard)
    clock.advance(2 * DAY)
    await rig.io.delete(long, shard.root)
    assert Stored(urls[0]).shards() == []


async def test_deleting_through_an_ended_contract_spares_what_one_in_force_holds(rig: Rig, urls: list[str], clock: ManualClock) -> None:
    old = await rig.add(urls[0], days=1)
    root = await rig.io.write(old, DATA, rig.sector_id())
    new = await rig.contractor.renew_contract(old, 10 * DAY)
    clock.advance(2 * DAY)
    await rig.io.delete(old, root)
    assert Stored(urls[0]).shards() == [root]
    await rig.io.delete(new, root)
    assert Stored(urls[0]).shards() == []


async def test_a_deletion_that_did_not_reach_the_host_can_be_repeated(rig: Rig, urls: list[str]) -> None:
    contract = await rig.add(urls[0])
    root = await rig.io.write(contract, DATA, rig.sector_id())
    rig.faults(contract).fail_next = 1
    with pytest.raises(Unavailable):
        await rig.io.delete(contract, root)
    following = await rig.again()
    await following.io.delete(contract, root)
    assert Stored(urls[0]).shards() == []


async def test_who_holds_what_survives_into_the_next_process(rig: Rig, urls: list[str]) -> None:
    old = await rig.add(urls[0])
    root = await rig.io.write(old, DATA, rig.sector_id())
    new = await rig.contractor.renew_contract(old, DAY)
    await rig.io.delete(old, root)
    following = await rig.again()
    await following.io.delete(old, root)
    assert Stored(urls[0]).shards() == [root]
    await following.io.delete(new, root)
    assert Stored(urls[0]).shards() == []


async def test_a_write_and_a_deletion_at_the_same_time_end_in_one_or_the_other(
    urls: list[str], autojump_clock: trio.testing.MockClock
) -> None:
    rig = Rig(seams=make_seams(clock=SystemClock()))
    contract = await rig.add(urls[0])
    sector = rig.sector_id()
    shard = rig.io.seal([DATA], sector)
    await rig.io.write_sealed(contract, shard)
    rig.faults(contract).latency = 1.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.io.delete, contract, shard.root)
        await trio.sleep(0.5)
        # Quick enough to be overtaken by nothing but an order of their own.
        rig.faults(contract).latency = 0.1
        nursery.start_soon(rig.io.write_sealed, contract, shard)
    # Written last: so it is there, and known to be held.
    rig.faults(contract).latency = 0.0
    assert await rig.io.read(contract, shard.root, sector) == DATA
    other = await rig.contractor.conclude_contract("1", DAY)
    await rig.io.delete(other, shard.root)
    assert Stored(urls[0]).shards() == [shard.root]


# --------------------------------------------------------------------------------------------------------- bad hosts


async def test_a_host_that_is_away_or_full_is_named_with_sector_and_reason(rig: Rig, urls: list[str]) -> None:
    contract = await rig.add(urls[0])
    sector = rig.sector_id()
    root = await rig.io.write(contract, DATA, sector)
    rig.faults(contract).gone = "unplugged"

    async def message(kind: type[FusefsError], call: object) -> str:
        with pytest.raises(kind) as caught:
            await call  # type: ignore[misc]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for call in (rig.io.read(contract, root, sector), rig.io.insecure_read(contract, root, sector, 0, 1)):
        text = await message(Unavailable, call)
        assert all(part in text for part in (urls[0], f"sector {sector}", root[:12], "unplugged"))
    text = await message(Unavailable, rig.io.write(contract, b"x", rig.sector_id()))
    assert "unplugged" in text
    rig.faults(contract).gone, rig.faults(contract).quota = None, 10
    text = await message(NoSpace, rig.io.write(contract, b"x", rig.sector_id()))
    assert urls[0] in text
    assert await rig.io.read(contract, root, sector) == DATA


async def test_a_host_that_hangs_is_given_up(urls: list[str], autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig(seams=make_seams(clock=SystemClock()))
    contract = await rig.add(urls[0])
    sector = rig.sector_id()
    root = await rig.io.write(contract, DATA, sector)
    rig.faults(contract).hang = True
    before = trio.current_time()
    with pytest.raises(Unavailable, match="did not answer within"):
        await rig.io.read(contract, root, sector)
    with pytest.raises(Unavailable, match="did not answer within"):
        await rig.io.write(contract, b"x", rig.sector_id())
    assert 20 < trio.current_time() - before < 100


async def test_every_call_is_recorded(urls: list[str], autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig(seams=make_seams(clock=SystemClock()))
    contract = await rig.add(urls[0])
    sector = rig.sector_id()
    rig.faults(contract).latency = 0.5
    root = await rig.io.write(contract, b"small", sector)
    await rig.io.read(contract, root, sector)
    stats = rig.hostdb.stats(1)
    assert (stats.reads, stats.writes, stats.failed) == (1, 1, 0)
    assert stats.latency == pytest.approx(0.5)
    assert stats.bytes_read == stats.bytes_written == HEADER_SIZE + 5 + TAG_SIZE
    # Fast failures and lies improve nothing.
    rig.faults(contract).latency = 0.0
    rig.faults(contract).lying = 1.0
    with pytest.raises(Corrupt):
        await rig.io.read(contract, root, sector)
    rig.faults(contract).gone = "away"
    with pytest.raises(Unavailable):
        await rig.io.read(contract, root, sector)
    after = rig.hostdb.stats(1)
    assert after.latency == stats.latency
    assert (after.reads, after.failed) == (1, 2)
    assert "away" in after.last_error
