"""With many hosts: what is asked for each sector, or in each round, is one pass over them and no more, and says what it always said."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Set
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.contractor import Contractor, encode_contract
from storage.hosts.hostdb import TYPICAL_WRITE, HostDB
from storage.hosts.registry import HostRecord, HostRegistry, encode_record
from storage.interfaces import Batch, Contract, HostCapabilities
from storage.metadata.keys import SECTOR, u64
from storage.replication import parse_replication
from storage.sectors.placement import Placement
from storage.sectors.plan import spread
from storage.sectors.records import VERSION, SectorRecord, ShardRecord
from storage.standing import Standing
from tests.fakes import BASE_NS, ManualClock, MemoryStore, make_seams
from tests.test_reconcile import a_volume

VOLUME_ID = bytes(16)
HOUR_NS = 3600 * 10**9


class Counted(int):
    """A host number that knows how often numbers were compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return int(self) == other

    def __hash__(self) -> int:
        return hash(int(self))


def one_by_one(
    hosts: Collection[int], count: int, domain: Callable[[int], str], domains: Collection[str], load: Mapping[int, int] | None
) -> list[int]:
    """What `spread` says that it does, done just so."""
    left = sorted(hosts, key=lambda host: load.get(host, 0)) if load is not None else list(hosts)
    used, chosen = set(domains), list[int]()
    while left and len(chosen) < count:
        following = next((host for host in left if domain(host) not in used), left[0])
        left.remove(following)
        used.add(domain(following))
        chosen.append(following)
    return chosen


@given(
    hosts=st.lists(st.integers(1, 30), unique=True),
    count=st.integers(0, 30),
    racks=st.integers(1, 6),
    used=st.sets(st.integers(0, 6).map(str)),
    load=st.none() | st.dictionaries(st.integers(1, 30), st.integers(0, 3)),
)
def test_domains_take_turns(hosts: list[int], count: int, racks: int, used: set[str], load: dict[int, int] | None) -> None:
    def rack(host: int) -> str:
        return str(host % racks)

    assert spread(hosts, count, rack, used, load) == one_by_one(hosts, count, rack, used, load)


class WallClock(ManualClock):
    """One that somebody sets."""

    def set(self, now_ns: int) -> None:
        self._base_ns = now_ns


class Many:
    """A volume's hosts, two racks of them, and what places sectors there."""

    def __init__(self, hosts: int) -> None:
        store, seams = MemoryStore(), make_seams(clock=ManualClock())
        batch = Batch()
        for number in range(1, hosts + 1):
            key = f"{number:032x}"
            batch.put(*encode_record(HostRecord(number, key, f"mem:{number}", f"rack{number % 2}", 0, HostCapabilities(True, True))))
            batch.put(*encode_contract(Contract(key, number, BASE_NS, BASE_NS + 90 * 24 * HOUR_NS, key), number, None))
        store.apply(batch)
        self.registry = Registry(VOLUME_ID, store, seams)
        self.contractor = Contractor(VOLUME_ID, store, self.registry, seams)
        self.standing = Standing(store, self.registry, self.contractor, seams)
        self.hostdb = HostDB(store, seams)
        for number in self.registry.numbers():
            self.hostdb.succeeded(number, "write", TYPICAL_WRITE, 0.1)
        self.placement = Placement(self.registry, self.contractor, self.hostdb, self.standing)


class Registry(HostRegistry):
    """All hosts are there; how often it was asked for a domain."""

    asked = 0

    def available(self, number: int) -> bool:
        return number in self._records

    def domain(self, number: int) -> str:
        self.asked += 1
        return super().domain(number)


def test_placing_a_sector_is_one_pass_over_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Many(300)
    monkeypatch.setattr(HostDB, "rank_for_write", lambda _self, numbers, _space: [Counted(number) for number in numbers])
    Counted.compared = 0
    assert len({contract.host_number for contract in many.placement.candidates(parse_replication("2"))}) == 300
    assert many.registry.asked <= 2 * 300
    others = many.placement.others([1], many.standing.keeping())
    assert len(others) == 299
    # Those of the other rack first.
    assert {contract.host_number % 2 for contract in others[:150]} == {0}
    assert many.registry.asked <= 4 * 300 + 1
    assert Counted.compared <= 4 * 300


def test_who_is_in_force_is_found_again_when_time_or_a_contract_changes_it_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    many, found = Many(50), 0
    look = Contractor._force_at

    def counting(self: Contractor, now: int) -> object:
        nonlocal found
        found += 1
        return look(self, now)

    monkeypatch.setattr(Contractor, "_force_at", counting)
    for _ in range(10):
        assert len(many.standing.keeping()) == 50
        assert many.placement.candidates(parse_replication("2"))
    assert found == 1
    number = many.contractor.latest_ordinal + 1
    many.contractor._know(Contract("f" * 32, 1, BASE_NS, BASE_NS + HOUR_NS * 10**4, "f" * 32), number, None)
    assert many.contractor.in_force()[1].contract_id == "f" * 32
    assert found == 2


@pytest.mark.parametrize("seed", range(5))
def test_what_is_kept_of_contracts_is_what_a_look_at_all_of_them_says(seed: int) -> None:
    """At any time, also where the wall clock is set back, and whenever a contract is added."""
    chance, clock = random.Random(seed), WallClock()
    store, seams = MemoryStore(), make_seams(clock=clock)
    contractor = Contractor(VOLUME_ID, store, HostRegistry(VOLUME_ID, store, seams), seams)
    every: list[Contract] = []
    for step in range(300):
        now = clock.time_ns()
        if chance.random() < 0.2:
            start = now + chance.randrange(-20, 5)
            contract_id = f"{chance.getrandbits(128):032x}"
            every.append(Contract(contract_id, chance.randrange(1, 6), start, start + chance.randrange(1, 40), contract_id))
            contractor._know(every[-1], step + 1, None)
        clock.set(now + chance.choice([0, 1, 1, 2, 5, -1, -3]))
        now = clock.time_ns()
        last: dict[int, Contract] = {}
        for contract in sorted(every, key=lambda one: (one.end_ns, one.contract_id)):
            if contract.active(now):
                last[contract.host_number] = contract
        assert contractor.in_force() == last
        assert contractor.going_on() == {
            number for number, one in last.items() if 6 * (one.end_ns - now) > one.end_ns - one.start_ns
        }  # by the words of `ending`
        assert contractor.all_contracts() == sorted(every, key=lambda one: (one.host_number, one.end_ns, one.contract_id))
        for number in range(1, 7):
            on_host = [one for one in contractor.all_contracts() if one.host_number == number]
            assert contractor.on_host(number) == on_host
            assert contractor.contract_for(number) == last.get(number, on_host[-1] if on_host else None)


async def test_a_look_at_all_sectors_does_not_copy_all_hosts_for_each(tmp_path: Path) -> None:
    class Hosts(frozenset[int]):
        def __sub__(self, without: Set[object]) -> frozenset[int]:
            raise AssertionError(f"a copy of all hosts, to take away {without}")

    async with a_volume(tmp_path, 3, "2") as (volume, _urls):
        batch = Batch()
        for sector_id in range(10**6, 10**6 + 10):
            shard = ShardRecord(sector_id, 100, sector_id.to_bytes(32, "big"), [1, 2])
            batch.put(SECTOR + u64(sector_id), SectorRecord(VERSION, "2", 100, 100, 100, [shard]).encode())
        volume.store.apply(batch)
        await volume.reconciler._look(Hosts([1, 2]))
        batch = Batch()
        for sector_id in range(10**6, 10**6 + 10):
            batch.delete(SECTOR + u64(sector_id))
        volume.store.apply(batch)
