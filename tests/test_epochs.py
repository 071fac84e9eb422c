"""Epochs: every sector id leads to the epoch that sealed under it."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.epochs import Epoch, Epochs, decode_epoch, encode_epoch
from storage.errors import BadArgument, Corrupt, NotFound
from storage.interfaces import Batch
from storage.keys import Keys
from storage.sealing import open_shard, seal

GOLDEN = Path(__file__).parent / "golden"
VOLUME = bytes(range(16))
TOP = 2**64 - 1


def salt(n: int) -> bytes:
    return n.to_bytes(16, "big")


class FakeStore:
    """A MetadataReader over a sorted list; gives at most two pairs at a time, to be asked again."""

    def __init__(self) -> None:
        self.data: dict[bytes, bytes] = {b"d\xff": b"below", b"f": b"above"}

    def take(self, batch: Batch) -> None:
        for key, value in batch.ops:
            assert value is not None
            self.data[key] = value

    def get(self, key: bytes) -> bytes | None:
        return self.data.get(key)

    def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        assert not reverse
        order = sorted(self.data)
        picked = order[bisect_left(order, start) : bisect_left(order, stop)]
        return [(key, self.data[key]) for key in picked[: min(limit, 2)]]


@given(st.lists(st.lists(st.integers(1, 50), max_size=3), min_size=1, max_size=12), st.booleans())
def test_every_id_leads_to_the_epoch_that_reserved_it(tenures: list[list[int]], reload: bool) -> None:
    """Each tenure opens the volume, begins an epoch at the counter, and reserves some ranges, or none."""
    store = FakeStore()
    counter = 1
    owner: dict[int, int] = {}
    for number, reservations in enumerate(tenures, 1):
        epochs, batch = Epochs.load(store), Batch()
        begun = epochs.begin(batch, salt(number), counter, number)
        store.take(batch)
        assert epochs.current == begun
        assert begun.number == number
        for size in reservations:
            owner.update(dict.fromkeys(range(counter, counter + size), number))
            counter += size
    if reload:
        epochs = Epochs.load(store)
    assert [epoch.number for epoch in epochs.all()] == list(range(1, len(tenures) + 1))
    for sector_id, number in owner.items():
        assert epochs.for_sector(sector_id).number == number


def test_an_epoch_that_reserved_nothing_owns_nothing() -> None:
    epochs = Epochs([Epoch(1, salt(1), 1, 0), Epoch(2, salt(2), 100, 0), Epoch(3, salt(3), 100, 0), Epoch(4, salt(4), 100, 0)])
    assert [epochs.for_sector(i).number for i in (1, 99, 100, 101, TOP)] == [1, 1, 4, 4, 4]


def test_an_id_before_every_epoch_is_not_found() -> None:
    with pytest.raises(NotFound, match="sector 5"):
        Epochs([]).for_sector(5)
    with pytest.raises(NotFound, match="sector 5"):
        Epochs([Epoch(1, salt(1), 6, 0)]).for_sector(5)
    with pytest.raises(NotFound):
        _ = Epochs.load(FakeStore()).current


def test_a_counter_or_a_generator_that_went_back_is_not_begun_with() -> None:
    """I1: else one nonce would seal twice under one key."""
    epochs = Epochs([Epoch(1, salt(1), 1, 0), Epoch(2, salt(2), 100, 0)])
    for bad_salt, first, kind in (
        (salt(3), 99, Corrupt),
        (salt(3), 0, Corrupt),
        (salt(3), TOP + 1, Corrupt),
        (salt(1), 200, Corrupt),
        (salt(2), 200, Corrupt),
        (b"short", 200, BadArgument),
    ):
        batch = Batch()
        with pytest.raises(kind):
            epochs.begin(batch, bad_salt, first, 5)
        assert not batch.ops
        assert epochs.current.number == 2
    assert epochs.begin(Batch(), salt(3), 100, 5).number == 3


def test_epochs_that_contradict_one_another_are_corrupt() -> None:
    for bad in (
        [Epoch(2, salt(1), 1, 0), Epoch(1, salt(2), 1, 0)],
        [Epoch(1, salt(1), 1, 0), Epoch(1, salt(2), 1, 0)],
        [Epoch(1, salt(1), 9, 0), Epoch(2, salt(2), 8, 0)],
        [Epoch(1, salt(1), 1, 0), Epoch(2, salt(1), 8, 0)],
        [Epoch(0, salt(1), 1, 0)],
        [Epoch(2**32, salt(1), 1, 0)],
    ):
        with pytest.raises(Corrupt):
            Epochs(bad)


def test_what_one_epoch_sealed_later_ones_open() -> None:
    keys = Keys(bytes(32))
    epochs = Epochs([Epoch(1, salt(1), 1, 0)])
    header = epochs.header_for(VOLUME, 50, 3)
    assert (header.epoch, header.salt, header.sector_id, header.plaintext_length, header.volume_id) == (1, salt(1), 50, 3, VOLUME)
    sealed = seal(epochs.key_for(50, keys), header, [b"abc"])
    epochs.begin(Batch(), salt(2), 51, 5)
    assert epochs.header_for(VOLUME, 50, 3) == header
    assert open_shard(epochs.key_for(50, keys), epochs.header_for(VOLUME, 50, 3), sealed) == b"abc"
    assert epochs.key_for(51, keys) != epochs.key_for(50, keys)


@given(st.integers(1, 2**32 - 1), st.binary(min_size=16, max_size=16), st.integers(1, TOP), st.integers(0, 2**63 - 1))
def test_records_come_back(number: int, some_salt: bytes, first: int, started: int) -> None:
    epoch = Epoch(number, some_salt, first, started)
    assert decode_epoch(*encode_epoch(epoch)) == epoch


@given(st.one_of(st.binary(max_size=6), st.binary(min_size=4, max_size=4).map(lambda b: b"e" + b)), st.binary(max_size=40))
def test_no_bytes_make_the_codec_raise_anything_else(key: bytes, value: bytes) -> None:
    with pytest.raises(Corrupt):
        decode_epoch(key, value)


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_a_damaged_record_never_raises_anything_else(at: int, patch: bytes) -> None:
    key, value = encode_epoch(Epoch(1, salt(1), 300, 2**40))
    at %= len(value)
    try:
        epoch = decode_epoch(key, value[:at] + patch + value[at + len(patch) :])
    except Corrupt:
        return
    assert epoch.number == 1


def test_records_off_their_bounds_are_corrupt() -> None:
    import msgspec

    key, value = encode_epoch(Epoch(1, salt(1), 300, 7, 9))
    good = msgspec.msgpack.decode(value)
    assert good == [2, salt(1), 300, 7, 9]
    for bad in (
        [3, *good[1:]],
        good[:3],
        [*good, 1],
        [2, b"x", 300, 7, 9],
        [2, salt(1), 0, 7, 9],
        [2, salt(1), 300, -1, 9],
        [2, salt(1), 300, 7, -1],
        {},
        None,
    ):
        with pytest.raises(Corrupt):
            decode_epoch(key, msgspec.msgpack.encode(bad))
    with pytest.raises(Corrupt):
        decode_epoch(b"e\0\0\0\0", value)


def test_the_golden_record() -> None:
    epoch = Epoch(0x01020304, bytes(range(16)), 2**40 + 5, 1_790_000_000_123_456_789, 77)
    key, value = encode_epoch(epoch)
    assert key == b"e\x01\x02\x03\x04"
    assert value == (GOLDEN / "epoch_record-2.bin").read_bytes()
    assert decode_epoch(key, value) == epoch


def test_a_record_of_the_first_format_is_read() -> None:
    epoch = Epoch(0x01020304, bytes(range(16)), 2**40 + 5, 1_790_000_000_123_456_789, 0)
    assert decode_epoch(b"e\x01\x02\x03\x04", (GOLDEN / "epoch_record.bin").read_bytes()) == epoch
