"""Tails in memory: what was appended is what is read, wherever it was cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from storage.interfaces import Buffer
from storage.values.tail import CHUNK, SMALL, Block, ChunkBuffer, Flight, FlightState, Tail

SIZES = st.one_of(st.integers(0, 40), st.integers(SMALL - 3, SMALL + 3), st.integers(CHUNK - 5, CHUNK + 5))


def _bytes(seed: int, size: int) -> bytes:
    return bytes((seed * 31 + i * 7) & 0xFF for i in range(size))


STEPS = st.sampled_from(["append", "append in", "take", "read"])


@given(st.lists(st.tuples(STEPS, SIZES), max_size=30))
def test_a_buffer_is_the_concatenation_of_what_was_appended(steps: list[tuple[str, int]]) -> None:
    """Whether it stands in memory of its own or in a block; and what was taken stays as it is."""
    buffer, model, taken = ChunkBuffer(), b"", list[tuple[list[Buffer], bytes]]()
    block = Block(memoryview(bytearray(2 * CHUNK)))
    for seed, (what, size) in enumerate(steps):
        if what == "append":
            data = _bytes(seed, size)
            buffer.append(data)
            model += data
        elif what == "append in":
            data = _bytes(seed, size)
            if block.left < size:
                block = Block(memoryview(bytearray(2 * CHUNK)))
            buffer.append_in(block, data)
            model += data
        elif what == "take":
            taken.append((buffer.take(size), model[:size]))
            model = model[size:]
        else:
            start = size % (len(model) + 1)
            assert b"".join(buffer.read(start, size)) == model[start : start + size]
        assert buffer.length == len(model)
    assert b"".join(buffer.read(0, len(model))) == model
    for pieces, expected in taken:
        assert b"".join(pieces) == expected


def test_what_follows_in_a_block_is_one_chunk_and_cannot_be_written_to() -> None:
    """Where a sector stands is told by its pieces; and a reader has a view of them."""
    buffer, block = ChunkBuffer(), Block(memoryview(bytearray(CHUNK)))
    for number in range(8):
        buffer.append_in(block, bytes([number]) * 100)
    (piece,) = buffer.take(700)
    assert bytes(piece) == b"".join(bytes([number]) * 100 for number in range(7))
    assert isinstance(piece, memoryview) and piece.readonly
    buffer.append(b"x" * 100)
    buffer.append_in(block, b"y" * 100)
    assert b"".join(buffer.take(300)) == b"\7" * 100 + b"x" * 100 + b"y" * 100


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
