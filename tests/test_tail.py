"""Tails in memory: what was appended is what is read, wherever it was cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from storage.values.tail import CHUNK, SMALL, ChunkBuffer, Flight, FlightState, Tail

SIZES = st.one_of(st.integers(0, 40), st.integers(SMALL - 3, SMALL + 3), st.integers(CHUNK - 5, CHUNK + 5))


def _bytes(seed: int, size: int) -> bytes:
    return bytes((seed * 31 + i * 7) & 0xFF for i in range(size))


@given(
    st.lists(
        st.one_of(st.tuples(st.just("append"), SIZES), st.tuples(st.just("take"), SIZES), st.tuples(st.just("read"), SIZES)), max_size=30
    )
)
def test_a_buffer_is_the_concatenation_of_what_was_appended(steps: list[tuple[str, int]]) -> None:
    buffer, model = ChunkBuffer(), b""
    for seed, (what, size) in enumerate(steps):
        if what == "append":
            data = _bytes(seed, size)
            buffer.append(data)
            model += data
        elif what == "take":
            assert b"".join(buffer.take(size)) == model[:size]
            model = model[size:]
        else:
            start = size % (len(model) + 1)
            assert b"".join(buffer.read(start, size)) == model[start : start + size]
        assert buffer.length == len(model)
    assert b"".join(buffer.read(0, len(model))) == model


def test_what_was_taken_no_longer_changes_when_more_is_appended() -> None:
    buffer = ChunkBuffer()
    buffer.append(b"abcdef")
    taken = buffer.take(4)
    buffer.append(b"gh")
    assert b"".join(taken) == b"abcd"
    assert b"".join(buffer.read(0, 9)) == b"efgh"


def test_what_the_caller_may_still_change_is_copied_what_nobody_can_is_not() -> None:
    for piece in (bytearray(b"abc"), memoryview(bytearray(b"abc"))):
        buffer = ChunkBuffer()
        buffer.append(piece)
        piece[0] = 0
        assert b"".join(buffer.read(0, 3)) == b"abc"
    buffer, data = ChunkBuffer(), b"abc"
    buffer.append(data)
    assert buffer.take(3)[0] is data
    # Not even where more was gathered behind it.
    buffer.append(data)
    buffer.append(b"def")
    assert (b"".join(buffer.read(0, 6)), data) == (b"abcdef", b"abc")


def test_ten_thousand_small_appends_are_few_objects() -> None:
    buffer = ChunkBuffer()
    for _ in range(10_000):
        buffer.append(b"x" * 100)
    assert len(buffer._chunks) <= 10_000 * 100 // CHUNK + 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 60), st.integers(0, 60))
def test_a_flight_gives_any_range_of_its_bytes(sizes: list[int], low: int, high: int) -> None:
    data = _bytes(1, sum(sizes))
    parts, at = [], 0
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    flight = Flight(Tail(1, 1, "1", 0), 10, list(parts), len(data))
    expected = data[max(low - 10, 0) : max(high - 10, 0)]
    assert b"".join(flight.read(low, high)) == expected


def test_nobody_waits_for_a_flight_behind_a_parked_one() -> None:
    tail = Tail(1, 1, "1", 0)
    for offset, state in ((0, FlightState.PARKED), (4, FlightState.FLYING)):
        flight = Flight(tail, offset, [b"abcd"], 4)
        flight.state = state
        tail.flights.append(flight)
    assert tail.first_flying(8) is None
    tail.flights[0].state = FlightState.WAITING
    assert tail.first_flying(8) is tail.flights[1]
    assert tail.first_flying(4) is None
