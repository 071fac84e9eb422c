"""HostDB: learns from successes only, forgets failures with time, ranks the best first and keeps trying the others."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import Unavailable
from storage.hosts.days import DAY_NS, DAYS, Day
from storage.hosts.histogram import Histogram
from storage.hosts.hostdb import ENOUGH, HALF_LIFE, STALE, STALL, HostDB
from storage.interfaces import Batch
from tests.fakes import ManualClock, MemoryStore, SeededRandom, make_seams

ERROR = Unavailable("away")
GB = 10**9


def make(seed: int = 0) -> tuple[HostDB, ManualClock]:
    clock = ManualClock()
    return HostDB(MemoryStore(), make_seams(clock=clock, random=SeededRandom(seed))), clock


def often_first(db: HostDB, numbers: list[int], times: int = 400) -> Counter[int]:
    return Counter(db.rank(numbers)[0] for _ in range(times))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("success"), st.integers(0, 10**7), st.floats(0, 100)),
            st.tuples(st.just("given up"), st.integers(0, 10**7), st.floats(0, 100)),
        ),
        max_size=60,
    )
)
def test_a_read_that_was_given_up_never_improves_anything(events: list[tuple[str, int, float]]) -> None:
    db, clock = make()
    for what, size, seconds in events:
        before = db.stats(1)
        clock.advance(seconds)
        if what == "success":
            db.succeeded(1, "read", size, seconds)
            continue
        known = before.reads > 0
        slow = [db.slow_after(1, bytes_) for bytes_ in (1000, 10**6)]
        trouble = db.troubled(1)
        db.gave_up(1, size, seconds)
        after = db.stats(1)
        for older, newer in ((before.latency, after.latency), (before.median, after.median), (before.p95, after.p95)):
            assert (older or 0) <= (newer or 0) and (known or older is not None or newer is None or newer >= STALL / 10)
        assert (before.throughput or 1e99) >= (after.throughput or 1e99)
        assert all((older or 0) <= (newer or 0) for older, newer in zip(slow, [db.slow_after(1, n) for n in (1000, 10**6)], strict=True))
        assert (after.reads, after.failed, after.last_error) == (before.reads, before.failed, before.last_error)
        assert after.failures == pytest.approx(0)
        assert db.troubled(1) >= trouble


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("success"), st.integers(0, 10**7), st.floats(0, 100)),
            st.tuples(st.just("failure"), st.just(0), st.floats(0, 100)),
        )
    )
)
def test_a_failed_call_never_changes_a_latency_or_improves_anything(events: list[tuple[str, int, float]]) -> None:
    db, clock = make()
    for what, size, seconds in events:
        before = db.stats(1)
        clock.advance(seconds)
        if what == "success":
            db.succeeded(1, "read", size, seconds)
        else:
            db.failed(1, ERROR)
            after = db.stats(1)
            assert (after.latency, after.throughput, after.reads) == (before.latency, before.throughput, before.reads)
            assert after.failures >= 1
            assert after.failed == before.failed + 1
        assert sorted(db.rank([1, 2])) == [1, 2]


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=30))
def test_an_average_lies_between_the_samples(samples: list[float]) -> None:
    db, _ = make()
    for seconds in samples:
        db.succeeded(1, "read", 1000, seconds)
    latency = db.stats(1).latency
    assert latency is not None
    assert min(samples) * 0.999 <= latency <= max(samples) * 1.001


def test_failures_decay_by_half_a_minute_after_minute() -> None:
    db, clock = make()
    for _ in range(4):
        db.failed(1, ERROR)
    assert db.stats(1).failures == pytest.approx(4)
    clock.advance(HALF_LIFE)
    assert db.stats(1).failures == pytest.approx(2)
    clock.advance(10 * HALF_LIFE)
    assert db.stats(1).failures < 0.01


def test_the_quickest_is_asked_first_and_a_failing_one_last_until_it_is_forgiven() -> None:
    db, clock = make()
    for number, seconds in ((1, 0.1), (2, 0.01), (3, 1.0)):
        db.succeeded(number, "read", 1000, seconds)
    assert db.rank([1, 2, 3]) == [2, 1, 3]
    db.failed(2, ERROR)
    assert db.rank([1, 2, 3]) == [1, 3, 2]
    # A host that fails fast does not climb.
    for _ in range(10):
        db.failed(2, ERROR)
        assert db.rank([1, 2, 3])[-1] == 2
    clock.advance(8 * HALF_LIFE)
    assert db.rank([3, 2, 1]) == [2, 1, 3]


def test_throughput_counts_for_what_is_large() -> None:
    db, _ = make()
    db.succeeded(1, "read", 1000, 0.001)
    db.succeeded(1, "read", 1_000_000, 10.0)
    db.succeeded(2, "read", 1000, 0.05)
    db.succeeded(2, "read", 100_000_000, 1.0)
    assert db.rank([1, 2]) == [2, 1]
    # Of writes alone nothing is known yet, though it would do for a guess.
    assert db.stats(1).read_throughput is not None and db.stats(1).write_throughput is None


def test_unknown_hosts_are_tried_now_and_then() -> None:
    db, _ = make()
    db.succeeded(1, "read", 1000, 0.1)
    first = often_first(db, [1, 2, 3])
    assert 5 < first[2] + first[3] < 60
    assert first[1] > 300
    # Once known, and slower, no more.
    db.succeeded(2, "read", 1000, 0.2)
    db.succeeded(3, "read", 1000, 0.2)
    assert often_first(db, [1, 2, 3]) == {1: 400}


def test_what_was_known_long_ago_is_tried_again() -> None:
    db, clock = make()
    db.succeeded(2, "read", 1000, 5.0)
    clock.advance(STALE + 1)
    db.succeeded(1, "read", 1000, 0.1)
    assert often_first(db, [1, 2])[2] > 5


def test_ranking_is_deterministic_by_the_seams_randomness() -> None:
    def ranks(seed: int) -> list[list[int]]:
        db, _ = make(seed)
        db.succeeded(1, "read", 1000, 0.1)
        return [db.rank([1, 2]) for _ in range(100)] + [db.rank_for_write([1, 2, 3], {1: GB}) for _ in range(100)]

    assert ranks(1) == ranks(1) != ranks(2)


@given(st.lists(st.integers(1, 9)), st.dictionaries(st.integers(1, 9), st.integers(0, 10**15)))
def test_a_ranking_has_everybody_once(numbers: list[int], space: dict[int, int]) -> None:
    db, _ = make()
    db.succeeded(1, "read", 1000, 0.1)
    db.succeeded(2, "write", 10**7, 0.1)
    db.failed(3, ERROR)
    assert sorted(db.rank(numbers)) == sorted(set(numbers))
    assert sorted(db.rank_for_write(numbers, space)) == sorted(set(numbers))


def test_writes_go_where_there_is_room_and_not_to_the_full_or_failing() -> None:
    db, _ = make()
    first = Counter(db.rank_for_write([1, 2], {1: 900 * GB, 2: 100 * GB})[0] for _ in range(1000))
    assert 850 < first[1] < 950
    for _ in range(50):
        assert db.rank_for_write([1, 2, 3], {1: 1000, 2: GB, 3: GB})[-1] == 1
    db.failed(2, ERROR)
    for _ in range(50):
        assert db.rank_for_write([1, 2, 3], {1: 1000, 2: GB, 3: GB}) == [3, 1, 2]


def test_a_slow_host_gets_less_but_something() -> None:
    db, _ = make()
    db.succeeded(1, "write", 4_000_000, 0.1)
    db.succeeded(2, "write", 4_000_000, 100.0)
    first = Counter(db.rank_for_write([1, 2], {})[0] for _ in range(1000))
    assert 40 < first[2] < 200


def test_a_full_host_still_reads_as_well_as_before() -> None:
    db, _ = make()
    db.succeeded(1, "read", 1000, 0.1)
    db.succeeded(2, "read", 1000, 0.2)
    db.failed(1, ERROR, ("write",))
    assert db.rank([1, 2]) == [1, 2]


async def test_experience_survives_and_is_saved_only_when_it_changed() -> None:
    db, _ = make()
    store = MemoryStore()
    db.succeeded(1, "read", 1000, 0.1)
    db.failed(2, ERROR)
    batch = Batch()
    db.save(batch)
    store.apply(batch)
    again = Batch()
    db.save(again)
    assert again.ops == []
    later = HostDB(store, make_seams(clock=ManualClock()))
    assert later.stats(1).latency == 0.1
    assert later.stats(2).last_error == "away"
    assert later.stats(3).latency is None


# ---- how reads are distributed


@given(st.lists(st.floats(1e-4, 1000), min_size=1, max_size=400), st.floats(0.01, 1))
def test_a_quantile_is_told_to_within_a_fifth_and_never_too_low(samples: list[float], share: float) -> None:
    histogram = Histogram()
    for sample in samples:
        histogram.add(sample)
    told = histogram.quantile(share)
    exact = sorted(samples)[max(0, -int(-share * len(samples) // 1) - 1)]
    assert told is not None and exact <= told * 1.000001 and told <= exact * 1.2


def test_a_distribution_follows_a_host_that_changes_and_is_bounded() -> None:
    histogram = Histogram()
    for _ in range(100_000):
        histogram.add(0.1)
    for _ in range(3000):
        histogram.add(0.001)
    after = histogram.quantile(0.95)
    assert after is not None and after < 0.002
    assert histogram.samples <= 512
    assert Histogram(histogram.weights()).quantile(0.95) == after


def test_slow_is_what_95_of_100_are_not_and_unknown_hosts_are_never_slow() -> None:
    db, _ = make()
    for i in range(100):
        assert (db.slow_after(1, 1000) is None) == (i < ENOUGH)
        db.succeeded(1, "read", 1000, 0.5 if i % 25 == 0 else 0.01)
    slow = db.slow_after(1, 1000)
    assert slow is not None and 0.01 <= slow < 0.012
    rarer = db.slow_after(1, 1000, 0.99)
    assert rarer is not None and 0.5 <= rarer < 0.6
    # Larger reads take their bytes' time besides.
    assert db.slow_after(1, 4_000_000) is None
    for _ in range(ENOUGH):
        db.succeeded(1, "read", 1_000_000, 1.0)
    large = db.slow_after(1, 4_000_000)
    assert large is not None and 3.8 < large < 5


def test_only_far_beyond_slow_is_it_taken_to_hang() -> None:
    db, _ = make()
    assert db.stalled_after(1, 0) == STALL
    for _ in range(ENOUGH):
        db.succeeded(1, "read", 1000, 5.0)
        db.succeeded(2, "read", 1000, 0.001)
    assert db.stalled_after(1, 1000) > 15
    assert STALL <= db.stalled_after(2, 1000) < STALL + 0.1


def test_a_host_that_hung_is_asked_last_for_a_while_and_has_not_failed() -> None:
    db, clock = make()
    db.succeeded(1, "read", 1000, 0.01)
    db.succeeded(2, "read", 1000, 0.5)
    assert not db.gave_up(1, 1000, 0.4)
    assert db.rank([1, 2]) == [1, 2]
    for _ in range(50):
        assert db.gave_up(1, 1000, STALL + 1)
    assert db.rank([1, 2]) == [2, 1] and db.troubled(1)
    assert db.stats(1).failed == 0
    clock.advance(4 * HALF_LIFE)
    assert not db.troubled(1)


# ---- days


def test_requests_and_bytes_are_counted_per_day_for_a_bounded_number_of_days() -> None:
    db, clock = make()
    for day in range(2 * DAYS):
        for _ in range(day + 1):
            db.requested(1, 10, 100)
        clock.advance(86_400)
    days = db.stats(1).days
    assert [day.requests for day in days] == list(range(DAYS + 1, 2 * DAYS + 1))
    assert all(day.sent == 10 * day.requests and day.received == 100 * day.requests for day in days)
    assert days[-1].day == clock.time_ns() // DAY_NS - 1


def test_a_clock_that_was_wrong_for_a_while_does_not_keep_today_from_being_counted() -> None:
    db, clock = make()
    db.requested(1, 1, 1)
    for _ in range(DAYS + 5):
        clock.advance(86_400)
        db.requested(1, 1, 1)
    clock.advance(-30 * 86_400)
    db.requested(1, 5, 0)
    assert db.stats(1).days[-1] == Day(clock.time_ns() // DAY_NS, 1, 5, 0)


async def test_distributions_and_days_survive_and_counting_alone_is_no_reason_to_save() -> None:
    db, clock = make()
    store = MemoryStore()
    for i in range(100):
        db.succeeded(1, "read", 1000, 0.01 * (i + 1))
        db.succeeded(1, "read", 1_000_000, 0.01 * (i + 1))
    db.requested(1, 5, 6)
    db.hedged(1)
    db.overtaken(1)
    batch = Batch()
    db.save(batch)
    store.apply(batch)
    db.requested(2, 1, 1)
    idle = Batch()
    db.save(idle, counts=False)
    assert idle.ops == []
    db.save(idle)
    assert len(idle.ops) == 1
    later = HostDB(store, make_seams(clock=clock))
    for size in (1000, 5_000_000):
        assert later.slow_after(1, size) == db.slow_after(1, size) is not None
    assert (later.stats(1).days, later.stats(1).hedged, later.stats(1).overtaken) == (db.stats(1).days, 1, 1)


async def test_hosts_of_an_earlier_process_are_ranked_by_what_was_known_of_them() -> None:
    db, clock = make()
    store = MemoryStore()
    for number, seconds in ((1, 0.5), (2, 0.01), (3, 0.1)):
        db.succeeded(number, "read", 1000, seconds)
    batch = Batch()
    db.save(batch)
    store.apply(batch)
    later = HostDB(store, make_seams(clock=clock))
    assert later.rank([1, 2, 3]) == [2, 3, 1]
    # Now and then one of which nothing is known.
    first = often_first(later, [1, 2, 3, 4])
    assert first[4] > 5 and first[2] > 300
