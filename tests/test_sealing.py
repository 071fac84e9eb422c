"""Sealed shards: what comes out is what went in, or nothing."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import sealing
from storage.buffers import ALIGNMENT, aligned, is_aligned
from storage.errors import BadArgument, Corrupt
from storage.interfaces import Buffer
from storage.lending import Buffers
from storage.sealing import (
    BLOCK,
    HEADER_SIZE,
    MAX_PLAINTEXT,
    MAX_SEALED,
    TAG_SIZE,
    Opening,
    ShardHeader,
    block_count,
    block_range,
    check_header,
    open_blocks,
    open_range,
    open_shard,
    root_of,
    sealed_length,
    with_length,
)

GOLDEN = Path(__file__).parent / "golden"

KEY = bytes(range(32))
VOLUME = bytes.fromhex("00112233445566778899aabbccddeeff")
SALT = bytes.fromhex("ffeeddccbbaa99887766554433221100")


def seal(key: bytes, header: ShardHeader, data: Sequence[Buffer]) -> bytes:
    """As bytes, to be cut and put together."""
    return bytes(sealing.seal(key, header, data))


def header(length: int, sector_id: int = 7, epoch: int = 3) -> ShardHeader:
    return ShardHeader(VOLUME, SALT, epoch, length, sector_id)


def content(length: int) -> bytes:
    """Bytes in which no two blocks are alike."""
    return b"".join(n.to_bytes(4, "big") for n in range(length // 4 + 1))[:length]


#: Lengths around everything that matters: nothing, one byte, block borders.
lengths = st.one_of(
    st.integers(0, 40),
    st.builds(lambda blocks, off: max(0, blocks * BLOCK + off), st.integers(1, 4), st.integers(-17, 17)),
    st.integers(0, 3 * BLOCK),
)


@st.composite
def cut_up(draw: st.DrawFn) -> tuple[bytes, list[bytes | bytearray | memoryview]]:
    """Some bytes, and the same in pieces of several kinds."""
    data = content(draw(lengths))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    edges = [0, *cuts, len(data)]
    kinds = draw(st.lists(st.sampled_from([bytes, bytearray, memoryview]), min_size=len(edges), max_size=len(edges)))
    return data, [kind(data[a:b]) for a, b, kind in zip(edges, edges[1:], kinds, strict=False)]


@given(cut_up())
def test_what_is_sealed_in_any_pieces_opens_as_it_was(case: tuple[bytes, list[bytes | bytearray | memoryview]]) -> None:
    data, pieces = case
    sealed = seal(KEY, header(len(data)), pieces)
    assert len(sealed) == sealed_length(len(data))
    assert sealed == seal(KEY, header(len(data)), [data]), "I1: the pieces must not change what is sealed"
    assert open_shard(KEY, header(len(data)), sealed) == data
    assert open_shard(KEY, header(len(data)), bytearray(sealed)) == data
    assert open_shard(KEY, header(len(data)), memoryview(sealed)) == data


@given(lengths, st.data())
def test_every_range_equals_the_slice(length: int, draw: st.DataObject) -> None:
    data = content(length)
    sealed = seal(KEY, header(length), [data])
    offset = draw.draw(st.integers(0, length + 10))
    size = draw.draw(st.integers(0, length + 10))
    first, count, at, taken = block_range(offset, size, length)
    assert not taken or at + taken <= len(sealed)  # an empty range, beyond the end perhaps, names no bytes
    assert open_range(KEY, header(length), offset, size, sealed[at : at + taken]) == data[offset : offset + size]
    if count:
        plain = open_blocks(KEY, header(length), first, sealed[at : at + taken])
        assert plain == data[first * BLOCK : (first + count) * BLOCK]
    # Without knowing the length the same bytes are asked for, or more than there are.
    unclipped_first, unclipped_count, unclipped_at, unclipped = block_range(offset, size)
    assert (unclipped_first, unclipped_at) == (first, at)
    assert unclipped >= taken
    assert unclipped_count >= count
    if count:
        assert sealed[at : at + unclipped] == sealed[at : at + taken]


@given(st.sampled_from([0, 1, 100, BLOCK, BLOCK + 1, 2 * BLOCK + 5]), st.data())
def test_no_flipped_bit_verifies(length: int, draw: st.DataObject) -> None:
    sealed = bytearray(seal(KEY, header(length), [content(length)]))
    bit = draw.draw(st.integers(0, 8 * len(sealed) - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Corrupt, match="sector 7"):
        open_shard(KEY, header(length), sealed)


def test_every_flipped_bit_of_a_short_shard_is_refused() -> None:
    good = seal(KEY, header(3), [b"abc"])
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Corrupt):
            open_shard(KEY, header(3), bad)


@given(st.sampled_from([0, 1, BLOCK, 2 * BLOCK + 5]), st.data())
def test_a_cut_off_or_longer_shard_is_refused(length: int, draw: st.DataObject) -> None:
    sealed = seal(KEY, header(length), [content(length)])
    cut = draw.draw(st.integers(0, len(sealed) - 1))
    with pytest.raises(Corrupt):
        open_shard(KEY, header(length), sealed[:cut])
    with pytest.raises(Corrupt):
        open_shard(KEY, header(length), sealed + bytes(draw.draw(st.integers(1, 100))))
    # Cut at a block, and the reader told a length that fits: the header is associated data of every block.
    if length > BLOCK:
        shorter = sealed_length(BLOCK)
        with pytest.raises(Corrupt):
            open_blocks(KEY, header(BLOCK), 0, sealed[HEADER_SIZE:shorter])


def test_blocks_that_changed_places_are_refused() -> None:
    sealed = bytearray(seal(KEY, header(2 * BLOCK), [content(2 * BLOCK)]))
    step = BLOCK + TAG_SIZE
    swapped = sealed[:HEADER_SIZE] + sealed[HEADER_SIZE + step :] + sealed[HEADER_SIZE : HEADER_SIZE + step]
    with pytest.raises(Corrupt, match="sector 7: block 0 does not verify"):
        open_shard(KEY, header(2 * BLOCK), swapped)
    with pytest.raises(Corrupt, match="sector 7: block 1 does not verify"):
        open_blocks(KEY, header(2 * BLOCK), 1, sealed[HEADER_SIZE : HEADER_SIZE + step])


@pytest.mark.parametrize("length", [0, 100])
@pytest.mark.parametrize(
    ("field", "value"),
    [("volume_id", bytes(16)), ("salt", bytes(16)), ("epoch", 4), ("sector_id", 8), ("plaintext_length", 99)],
)
def test_no_other_header_than_the_expected_one_is_accepted(length: int, field: str, value: object) -> None:
    ours = header(length)
    theirs = dataclasses.replace(ours, **{field: value})
    foreign = seal(KEY, theirs, [content(theirs.plaintext_length)])
    with pytest.raises(Corrupt, match="sector 7"):
        open_shard(KEY, ours, foreign)
    # Nor does it help to put the expected header in front of foreign blocks: every block is bound to its own.
    dressed = (ours.encode() + foreign[HEADER_SIZE:])[: sealed_length(length)].ljust(sealed_length(length), b"\0")
    with pytest.raises(Corrupt, match="sector 7"):
        open_shard(KEY, ours, dressed)


def test_a_header_that_differs_is_described() -> None:
    with pytest.raises(Corrupt, match="another shard's header \\(of sector 8\\): epoch, sector id differ"):
        check_header(header(5), header(5, sector_id=8, epoch=9).encode())


def test_many_small_pieces_seal_to_the_same() -> None:
    data = content(BLOCK + 1000)
    pieces = [memoryview(data)[n : n + 100] for n in range(0, len(data), 100)]
    assert seal(KEY, header(len(data)), pieces) == seal(KEY, header(len(data)), [data])


def test_another_key_does_not_open() -> None:
    with pytest.raises(Corrupt):
        open_shard(bytes(32), header(0), seal(KEY, header(0), []))


def test_an_empty_shard_is_authenticated_too() -> None:
    sealed = seal(KEY, header(0), [b"", b""])
    assert len(sealed) == HEADER_SIZE + TAG_SIZE
    assert open_shard(KEY, header(0), sealed) == b""
    with pytest.raises(Corrupt):
        open_shard(KEY, header(0), sealed[:HEADER_SIZE] + bytes(TAG_SIZE))


@pytest.mark.parametrize("length", [1, BLOCK, BLOCK + 1])
def test_blocks_that_are_not_whole_are_refused(length: int) -> None:
    blocks = seal(KEY, header(length), [content(length)])[HEADER_SIZE:]
    for bad in (b"", blocks[:-1], blocks + b"\0", blocks[:TAG_SIZE], blocks[: TAG_SIZE - 1]):
        with pytest.raises(Corrupt, match="sector 7"):
            open_blocks(KEY, header(length), 0, bad)


def test_a_range_from_which_blocks_are_missing_is_refused() -> None:
    length = 3 * BLOCK
    sealed = seal(KEY, header(length), [content(length)])
    _, _, at, taken = block_range(10, 2 * BLOCK, length)
    for size in (0, BLOCK + TAG_SIZE, taken - 1):
        with pytest.raises(Corrupt):
            open_range(KEY, header(length), 10, 2 * BLOCK, sealed[at : at + size])


@given(st.one_of(st.binary(max_size=100), st.binary(min_size=64, max_size=64)))
def test_no_bytes_make_the_header_parser_raise_anything_but_corrupt(raw: bytes) -> None:
    try:
        parsed = ShardHeader.parse(raw)
    except Corrupt:
        return
    assert parsed.encode() == raw


@given(
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**32 - 1),
    st.integers(0, MAX_PLAINTEXT),
    st.integers(1, 2**64 - 1),
    st.integers(0, 511),
)
def test_headers_come_back_and_damaged_ones_differ(volume: bytes, salt: bytes, epoch: int, length: int, sector: int, bit: int) -> None:
    made = ShardHeader(volume, salt, epoch, length, sector)
    raw = bytearray(made.encode())
    assert len(raw) == HEADER_SIZE
    assert ShardHeader.parse(raw) == made
    raw[bit // 8] ^= 1 << bit % 8
    try:
        assert ShardHeader.parse(raw) != made
    except Corrupt:
        pass


@pytest.mark.parametrize(
    ("offset", "field"), [(0, b"NONE"), (4, b"\0\1"), (6, b"\0\1"), (44, b"\4\0\0\1"), (48, bytes(8)), (56, b"\0\0\0\0\0\0\0\1")]
)
def test_a_header_with_anything_off_is_refused(offset: int, field: bytes) -> None:
    raw = bytearray(header(5).encode())
    raw[offset : offset + len(field)] = field
    with pytest.raises(Corrupt):
        ShardHeader.parse(raw)


@given(st.binary(max_size=200), st.integers(0, 3), st.sampled_from([0, 1, 100, BLOCK + 1]))
def test_no_bytes_make_a_reader_return_or_raise_anything_else(raw: bytes, first: int, length: int) -> None:
    with pytest.raises(Corrupt):
        open_shard(KEY, header(length), raw)
    with pytest.raises((Corrupt, BadArgument)):
        open_blocks(KEY, header(length), first, raw)


def test_bad_arguments_are_told() -> None:
    for bad in (
        lambda: seal(KEY, header(5), [b"abcd"]),
        lambda: seal(KEY[:16], header(4), [b"abcd"]),
        lambda: header(-1),
        lambda: header(MAX_PLAINTEXT + 1),
        lambda: header(1, sector_id=0),
        lambda: header(1, sector_id=2**64),
        lambda: header(1, epoch=2**32),
        lambda: ShardHeader(b"", SALT, 1, 1, 1),
        lambda: ShardHeader(VOLUME, SALT, 1, 1, 1, codec=1),
        lambda: block_range(-1, 5),
        lambda: block_range(1, -5),
    ):
        with pytest.raises(BadArgument):
            bad()


def test_lengths() -> None:
    assert [block_count(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [1, 1, 1, 2]
    assert sealed_length(BLOCK + 1) == HEADER_SIZE + BLOCK + 1 + 2 * TAG_SIZE
    assert sealed_length(MAX_PLAINTEXT) == MAX_SEALED
    assert with_length(header(1), 2) == header(2)


def test_the_golden_shard() -> None:
    """The format on disk: a change here is a new format version, and readers of the old one stay."""
    data = content(BLOCK + 100)
    golden = (GOLDEN / "sealed_shard.bin").read_bytes()
    assert golden[:HEADER_SIZE].hex() == (
        "465353480003000000112233445566778899aabbccddeeffffeeddccbbaa99887766554433221100000000030000406400000000000000070000000000000000"
    )
    assert seal(KEY, header(len(data)), [data]) == golden
    assert open_shard(KEY, header(len(data)), golden) == data
    assert root_of(golden) == "b52b31aa3b908aef3041633c8d603094b7bafa4dd2e87ddba22853afee828d22"


def test_whole_blocks_into_memory_of_their_own_are_the_same_and_verify() -> None:
    length = 3 * BLOCK + 77
    data = content(length)
    sealed = seal(KEY, header(length), [data])
    for first, size in ((0, length), (0, BLOCK), (BLOCK, 2 * BLOCK), (3 * BLOCK, 77), (2 * BLOCK, 10 * BLOCK)):
        _, _, at, taken = block_range(first, size, length)
        raw = sealed[at : at + taken]
        for step in (BLOCK + 16, 2 * (BLOCK + 16), taken):
            plain = opened_in_steps(length, first, size, raw, step)
            assert plain.readonly
            assert bytes(plain) == data[first : first + size]
            for broken in (raw[:-1], raw + b"\0", raw[:-100], raw[:50] + bytes([raw[50] ^ 1]) + raw[51:], b""):
                with pytest.raises(Corrupt):
                    opened_in_steps(length, first, size, broken, step)
        if taken > BLOCK:
            with pytest.raises(Corrupt):
                opened_in_steps(length, first, size, raw, BLOCK)  # no whole blocks
    for nowhere in (5, 4 * BLOCK):
        with pytest.raises(BadArgument):
            opened_in_steps(length, nowhere, BLOCK, sealed[64 : 64 + BLOCK + 16], BLOCK + 16)


def opened_in_steps(length: int, first: int, size: int, raw: bytes, step: int) -> memoryview:
    opening = Opening(KEY, header(length), first, size, lambda size: memoryview(bytearray(size)))
    for at in range(0, len(raw), step):
        opening.take(memoryview(raw)[at : at + step])
    return opening.plain()


@given(st.integers(0, 3 * BLOCK))
def test_what_is_sealed_lies_where_a_disk_can_take_it_and_nobody_writes_to_it(length: int) -> None:
    sealed = sealing.seal(KEY, header(length), [content(length)])
    assert is_aligned(sealed)
    assert isinstance(sealed, memoryview)
    assert sealed.readonly


def test_what_is_sealed_into_lent_memory_is_the_same_for_a_disk_and_stays_while_anybody_has_a_view_of_it() -> None:
    lent, data = Buffers(1 << 20), content(300_000)
    first = sealing.seal(KEY, header(len(data)), [data], lent.lend)
    assert is_aligned(first) and first == sealing.seal(KEY, header(len(data)), [data])
    view, copy = memoryview(first)[1000:], bytes(first)
    del first
    # Not the same memory, for as long as there is the view.
    second = sealing.seal(KEY, header(len(data), 8), [data], lent.lend)
    assert view == copy[1000:] and second != copy


def test_aligned_buffers_are_aligned_and_their_own() -> None:
    buffers = [aligned(size) for size in (0, 1, ALIGNMENT, 100_000)]
    for number, buffer in enumerate(buffers):
        if buffer:
            assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % ALIGNMENT == 0
        buffer[:] = bytes([number]) * len(buffer)
    assert [bytes(buffer) for buffer in buffers] == [b"", b"\1", bytes([2]) * ALIGNMENT, bytes([3]) * 100_000]
    assert not is_aligned(memoryview(bytearray(10)))
