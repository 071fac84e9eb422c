"""What a Contractor promises (storage.interfaces.Contractor), over memory and directory hosts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from storage.errors import BadArgument, Corrupt, Fenced, FusefsError, NoSpace, NotFound, Unavailable
from storage.hosts.layout import contract_name, decode_contract_file
from storage.hosts.memory import forget_memory_hosts
from tests.fakes import BASE_NS, Crash, CrashAt, ManualClock, make_seams
from tests.host_rig import DAY, VOLUME_ID, Rig, Stored


@pytest.fixture(params=["memory", "directory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    forget_memory_hosts()
    return "mem:one" if request.param == "memory" else f"dir:{tmp_path / 'one'}"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def rig(clock: ManualClock) -> Rig:
    return Rig(seams=make_seams(clock=clock))


async def test_a_contract_is_in_force_from_now_to_its_end(rig: Rig, url: str, clock: ManualClock) -> None:
    number = await rig.registry.add(url)
    contract_id = await rig.contractor.conclude_contract(url, 10 * DAY)
    contract = rig.contractor.contract(contract_id)
    assert (contract.start_ns, contract.end_ns) == (BASE_NS, BASE_NS + 10 * 86400 * 10**9)
    assert (contract.host_number, contract.lineage) == (number, contract_id)
    assert rig.contractor.contracts() == [contract_id]
    clock.advance(10 * DAY - 1)
    assert rig.contractor.contracts() == [contract_id]
    clock.advance(1)
    assert rig.contractor.contracts() == []
    assert rig.contractor.all_contracts() == [contract]
    assert rig.contractor.contract_for(number) == contract


async def test_it_is_on_the_host_for_others_to_read(rig: Rig, url: str) -> None:
    contract_id = await rig.add(url)
    raw = Stored(url).read(contract_name(VOLUME_ID, contract_id))
    stored, here = decode_contract_file(raw, "x"), rig.contractor.contract(contract_id)
    assert (stored.contract, stored.volume, stored.host) == (contract_id, VOLUME_ID.hex(), rig.registry.record(1).host_id)
    assert (stored.start_ns, stored.end_ns, stored.lineage, stored.renewed_from) == (here.start_ns, here.end_ns, contract_id, None)


async def test_hosts_go_by_number_id_or_url(rig: Rig, url: str) -> None:
    number = await rig.registry.add(url)
    for name in (str(number), rig.registry.record(number).host_id, url, url + "#domain=rack1"):
        contract_id = await rig.contractor.conclude_contract(name, DAY)
        assert rig.contractor.contract(contract_id).host_number == number
    for name in ("7", "mem:other", "f" * 32, "", "nonsense", "s3://x", "99999999999999999999", "-1", "²"):
        with pytest.raises(NotFound):
            await rig.contractor.conclude_contract(name, DAY)


@pytest.mark.parametrize("duration", [0, -1, math.nan, math.inf, -math.inf, 101 * 366 * DAY])
async def test_durations_are_positive_and_bounded(rig: Rig, url: str, duration: float) -> None:
    contract_id = await rig.add(url)
    with pytest.raises(BadArgument):
        await rig.contractor.conclude_contract("1", duration)
    with pytest.raises(BadArgument):
        await rig.contractor.renew_contract(contract_id, duration)
    assert len(rig.contractor.all_contracts()) == 1


async def test_renewal_overlaps_and_keeps_the_lineage(rig: Rig, url: str, clock: ManualClock) -> None:
    first = await rig.add(url, days=9)
    clock.advance(6 * DAY)
    second = await rig.contractor.renew_contract(first, 9 * DAY)
    assert rig.contractor.contracts() == [first, second]
    renewed = rig.contractor.contract(second)
    assert renewed.lineage == first
    assert renewed.start_ns == clock.time_ns()
    best = rig.contractor.contract_for(1)
    assert best is not None
    assert best.contract_id == second
    third = await rig.contractor.renew_contract(second, DAY)
    assert rig.contractor.contract(third).lineage == first


async def test_an_ended_contract_is_renewable_while_its_host_has_its_record(rig: Rig, url: str, clock: ManualClock) -> None:
    first = await rig.add(url, days=1)
    clock.advance(365 * DAY)
    second = await rig.contractor.renew_contract(first, DAY)
    assert rig.contractor.contracts() == [second]
    Stored(url).remove(contract_name(VOLUME_ID, first))
    with pytest.raises(NotFound, match="conclude a new one"):
        await rig.contractor.renew_contract(first, DAY)
    with pytest.raises(NotFound, match="no contract"):
        await rig.contractor.renew_contract("f" * 32, DAY)


async def test_a_damaged_or_foreign_record_on_the_host_is_not_renewed(rig: Rig, url: str) -> None:
    first = await rig.add(url)
    other = await rig.contractor.conclude_contract("1", DAY)
    stored = Stored(url)
    name = contract_name(VOLUME_ID, first)
    good = stored.read(name)
    for bad in (b"", b"{}", good[:-5], good.replace(b'_ns": 1', b'_ns": 2'), stored.read(contract_name(VOLUME_ID, other)), b"[" * 100_000):
        stored.write(name, bad)
        with pytest.raises(Corrupt):
            await rig.contractor.renew_contract(first, DAY)
    assert len(rig.contractor.all_contracts()) == 2


async def test_a_host_that_is_away_concludes_and_renews_nothing(rig: Rig, url: str) -> None:
    first = await rig.add(url)
    before, here = Stored(url).names(), rig.store.content()
    rig.faults(first).gone = "unplugged"
    with pytest.raises(Unavailable, match="unplugged"):
        await rig.contractor.conclude_contract("1", DAY)
    with pytest.raises(Unavailable, match="unplugged"):
        await rig.contractor.renew_contract(first, DAY)
    rig.faults(first).gone = None
    rig.faults(first).quota = 0
    with pytest.raises(NoSpace):
        await rig.contractor.renew_contract(first, DAY)
    assert (Stored(url).names(), rig.store.content()) == (before, here)
    assert rig.contractor.contracts() == [first]


async def test_contracts_survive_into_the_next_process(rig: Rig, url: str) -> None:
    first = await rig.add(url)
    second = await rig.contractor.renew_contract(first, DAY)
    following = await rig.again(crash=True)
    assert following.contractor.all_contracts() == rig.contractor.all_contracts()
    assert following.contractor.claim(second) == rig.contractor.claim(second)
    assert following.contractor.latest_ordinal == 2


@pytest.mark.parametrize("step", ["contract.before_host", "contract.before_apply", "contract.before_commit"])
async def test_a_crash_leaves_the_contract_on_the_host_first(url: str, step: str) -> None:
    """Never one here that the host does not know: its record there is what renewal needs."""
    rig = Rig(seams=make_seams(failpoints=CrashAt(step, nth=2)))
    await rig.add(url)
    with pytest.raises(Crash):
        await rig.contractor.conclude_contract("1", DAY)
    following = await rig.again(crash=True)
    assert len(following.contractor.all_contracts()) == 1
    assert len(Stored(url).names("/contracts/")) == (1 if step == "contract.before_host" else 2)
    await following.contractor.renew_contract(following.contractor.contracts()[0], DAY)


@pytest.mark.parametrize("error", [NoSpace("journal full"), Fenced("failed")])
async def test_a_failed_commit_is_told(rig: Rig, url: str, error: FusefsError) -> None:
    await rig.add(url)
    rig.store.commit_error = error
    with pytest.raises(type(error)):
        await rig.contractor.conclude_contract("1", DAY)
