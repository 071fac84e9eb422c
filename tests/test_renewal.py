"""Contracts are renewed in time by themselves; what refuses is said, tried again within limits, and left in time. All in virtual time."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio

from storage import renewal
from storage.errors import Expired, Unavailable
from storage.interfaces import Contract
from storage.metadata.keys import UNDERREPLICATED, prefix_end
from storage.status import RenewalStatus
from tests.contract_rig import DAY, Volumes, copies, in_virtual_time, last
from tests.rig import append, new_value, noise
from tests.test_reconcile import records


def test_a_contract_is_renewed_when_a_third_of_its_time_is_left_and_not_before(tmp_path: Path) -> None:
    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make("ab", "2")
        async with it.mounted() as volume:
            await it.write(volume)
            first = last(volume, 1)
            await it.days(59)
            assert last(volume, 1) == first
            await it.days(1)
            second = last(volume, 1)
            assert second.contract_id != first.contract_id
            assert second.lineage == first.lineage
            assert volume.contractor.renewed_from(second.contract_id) == first.contract_id
            assert second.end_ns - second.start_ns == first.end_ns - first.start_ns
            # The old one runs on to its end, and the next is due by its own time.
            assert first.active(it.clock.time_ns())
            assert it.stored("a").names("/contracts/") and len(it.stored("a").names("/contracts/")) == 2
            await it.days(58)
            assert last(volume, 1) == second
            await it.days(3)
            assert last(volume, 1) != second
            # What was written under the first is held by the latest.
            assert await it.readable(volume)
            assert volume.standing.keeping() == {1, 2}
        async with it.mounted() as volume:
            assert len(volume.contractor.all_contracts()) == 6

    in_virtual_time(work)


def test_a_machine_that_was_off_past_the_end_reads_renews_and_writes_on(tmp_path: Path) -> None:
    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make("ab", "2")
        async with it.mounted() as volume:
            await it.write(volume, 3)
        it.clock.jump(400 * DAY)
        async with it.mounted() as volume:
            # No time has passed since it was opened.
            assert sorted(contract.host_number for contract in volume.contractor.in_force().values()) == [1, 2]
            assert await it.readable(volume)
            await it.write(volume)
            assert not volume.renewal.warnings()

    in_virtual_time(work)


def test_without_renewal_everything_stays_readable_and_writing_is_refused_as_expired(tmp_path: Path) -> None:
    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make("ab", "2")
        async with it.mounted() as volume:
            await it.write(volume, 3)
            it.refuse("a")
            it.refuse("b")
        it.clock.jump(400 * DAY)
        async with it.mounted() as volume:
            assert await it.readable(volume)
            value = new_value(volume)
            await append(volume, value, data := noise(100_000))
            with pytest.raises(Expired, match=r"mem:a, mem:b have ended.*renew --all"):
                await volume.flush()
            states = [host.state for host in (await volume.status()).hosts]
            assert states == ["ended", "ended"]
            await volume.commit()
            it.content[value] = data
            # It stays with us until a host takes it.
            it.refuse("a", None)
            it.refuse("b", None)
            assert [outcome.renewed for outcome in await volume.renew_contracts()] == [True, True]
            await volume.flush()
            assert await it.readable(volume)
            assert copies(volume) == {2}

    in_virtual_time(work)


def test_a_refusal_is_said_with_the_date_until_it_succeeds_also_after_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make("abc", "2")
        async with it.mounted() as volume:
            await it.write(volume)
            it.refuse("b")
            await it.days(61)
            (warning,) = volume.renewal.warnings()
            for part in ("mem:b", "ends on 2025-04-01", "since 2025-03-03", "it takes no more contracts"):
                assert part in warning, warning
            assert warning in (await volume.status()).warnings
            assert any("mem:b ends on 2025-04-01" in record.message for record in caplog.records if record.levelno == logging.WARNING)
            (trouble,) = [contract for contract in (await volume.status()).contracts if contract.trouble]
            assert (trouble.host_number, trouble.state) == (2, "due")
        caplog.clear()
        it.clock.jump(2 * DAY)
        async with it.mounted() as volume:
            # Said at once, and since when is known.
            (warning,) = volume.renewal.warnings()
            assert "since 2025-03-03" in warning
            assert any("mem:b ends on" in record.message for record in caplog.records)
            it.refuse("b", None)
            await it.days(1)
            assert not volume.renewal.warnings()
            assert not last(volume, 2).due(it.clock.time_ns())
        async with it.mounted() as volume:
            assert not volume.renewal.warnings()
            assert volume.store.get(renewal.trouble_key(2)) is None

    in_virtual_time(work)


def test_attempts_have_limits_and_an_idle_volume_stays_silent(tmp_path: Path) -> None:
    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make("ab", "2")
        async with it.mounted() as volume:
            await it.write(volume)
            it.refuse("b")
            await it.days(61)
            host = it.opener.hosts["mem:b"]
            asked, sequence = host.calls["put"], volume.store.applied_sequence
            await trio.sleep(DAY)
            # Every hour, or somewhat oftener by chance.
            assert 20 <= host.calls["put"] - asked <= 50
            assert volume.store.applied_sequence == sequence
            # A host that was away is asked again as soon as it is back.
            it.refuse("b", None)
            it.opener.faults["mem:b"].only, it.opener.faults["mem:b"].gone = None, "unplugged"
            volume.hosts.suspect(2)
            await trio.sleep(7200)
            it.opener.faults["mem:b"].gone = None
            await trio.sleep(60)
            assert not last(volume, 2).due(it.clock.time_ns())

    in_virtual_time(work)


def test_a_host_that_refuses_is_left_before_the_end_and_is_back_once_it_renews(tmp_path: Path) -> None:
    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make("abc", "2")
        async with it.mounted() as volume:
            await it.write(volume, 8)
            it.refuse("a")
            await it.days(70)
            assert volume.standing.keeping() == {1, 2, 3}
            await it.days(6)
            assert volume.standing.keeping() == {2, 3}
            assert last(volume, 1).active(it.clock.time_ns())
            # In time: its sectors are on the others while it is still in force.
            assert all(set(record.shards[0].hosts) == {2, 3} for record in records(volume).values())
            assert [host.state for host in (await volume.status()).hosts] == ["ending", "ok", "ok"]
            assert "and the host is being left" in volume.renewal.warnings()[0]
            await it.write(volume, 2)
            assert all(set(record.shards[0].hosts) == {2, 3} for record in records(volume).values())
            await it.days(20)
            assert "ended on" in volume.renewal.warnings()[0]
            assert await it.readable(volume)
            it.refuse("a", None)
            await it.days(0)
            assert volume.standing.keeping() == {1, 2, 3}
            assert await it.readable(volume)

    in_virtual_time(work)


def test_an_ending_host_takes_what_no_other_can_and_gives_it_away_when_there_is_one(tmp_path: Path) -> None:
    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make("ab", "2")
        async with it.mounted() as volume:
            it.refuse("a")
            await it.days(80)
            assert volume.standing.keeping() == {2}
            # Writes go on to the last day.
            await it.write(volume, 3)
            assert all(set(record.shards[0].hosts) == {1, 2} for record in records(volume).values())
            assert len(volume.store.scan(UNDERREPLICATED, prefix_end(UNDERREPLICATED), 10)) == 3
            assert volume.sectors.degraded() == 0
            assert not (await volume.flush()).degraded_sectors
            await volume.add_host("mem:c")
            await it.days(0)
            assert all(set(record.shards[0].hosts) == {2, 3} for record in records(volume).values())
            assert await it.readable(volume)

    in_virtual_time(work)


def test_lost_and_left_hosts_are_not_renewed_and_one_that_is_still_needed_is(tmp_path: Path) -> None:
    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make("abcd", "2")
        async with it.mounted() as volume:
            await it.write(volume, 8)
            await volume.mark_host("1", lost=True)
            await volume.leave_host("2", leave=True)
            await it.days(61)
            assert sorted(outcome.host_number for outcome in await volume.renew_contracts()) == [1, 2, 3, 4]
            assert [last(volume, host).due(it.clock.time_ns()) for host in (1, 2, 3, 4)] == [True, True, False, False]
            # Left with nowhere to go to: its sectors depend on it, contract and all.
            await volume.leave_host("3", leave=True)
            await it.days(61)
            assert [last(volume, host).due(it.clock.time_ns()) for host in (3, 4)] == [False, False]
            assert await it.readable(volume)

    in_virtual_time(work)


def test_hosts_that_are_not_to_be_renewed_keep_nobody_awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost host's contract is in its last third for a month: nothing is looked at every second for its sake."""

    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make("abc", "2")
        async with it.mounted() as volume:
            await volume.mark_host("1", lost=True)
            await it.days(61)
            real, looks = volume.renewal.renew_due, 0

            async def counted(*, only_ready: bool = False) -> list[RenewalStatus]:
                nonlocal looks
                looks += 1
                return await real(only_ready=only_ready)

            monkeypatch.setattr(volume.renewal, "renew_due", counted)
            await trio.sleep(3 * renewal.LOOK)
            assert last(volume, 1).due(it.clock.time_ns())
            assert looks <= 4

    in_virtual_time(work)


def test_renewing_by_hand_and_concluding_take_the_trouble_away(tmp_path: Path) -> None:
    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make("ab", "1")
        async with it.mounted() as volume:
            it.refuse("a")
            it.refuse("b")
            await it.days(61)
            assert len(volume.renewal.warnings()) == 2
            it.refuse("a", None)
            it.refuse("b", None)
            await volume.contractor.conclude_contract("1", 200 * DAY)
            await volume.contractor.renew_contract(last(volume, 2).contract_id, 200 * DAY)
            assert not volume.renewal.warnings()
            assert not volume.renewal.due()

    in_virtual_time(work)


def test_a_contract_of_seconds_is_renewed_to_a_day() -> None:
    assert renewal.SHORTEST == DAY


@pytest.mark.parametrize(
    ("left", "due", "ending"), [(31.0, False, False), (30.0, True, False), (15.1, True, False), (15.0, True, True), (-1.0, True, True)]
)
def test_when_a_contract_is_due_and_ending(left: float, due: bool, ending: bool) -> None:
    day = round(DAY * 1e9)
    contract = Contract("00" * 16, 1, 1000 * day, 1090 * day, "00" * 16)
    now = contract.end_ns - round(left * day)
    assert (contract.due(now), contract.ending(now)) == (due, ending)


def test_an_away_host_s_contract_is_said_to_need_it(tmp_path: Path) -> None:
    async def work() -> None:
        it = Volumes(tmp_path / "v")
        await it.make("abc", "2")
        async with it.mounted() as volume:
            await it.write(volume)
        it.opener.faults["mem:a"].gone = "unplugged"
        it.clock.jump(61 * DAY)
        async with it.mounted() as volume:
            (warning,) = volume.renewal.warnings()
            assert "unplugged" in warning
            with pytest.raises(Unavailable):
                await volume.contractor.renew_contract(last(volume, 1).contract_id, DAY)

    in_virtual_time(work)
