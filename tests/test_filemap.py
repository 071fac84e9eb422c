"""The file map: bytes stand where they were written, each is written once, and a crash never turns one into another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import Fenced, NotPermitted
from storage.metadata.keys import MAP, read_u64
from storage.namespace.filemap import DROP_AT_ONCE
from storage.namespace.records import decode_map
from tests.namespace_rig import Rig, make_rig


def entries(rig: Rig) -> list[tuple[int, int, int]]:
    """(file offset, length, value offset) of all map entries; tests here have one mapped file."""
    found = []
    for key, raw in rig.store.scan(MAP, b"n", 10**9):
        record = decode_map(read_u64(key, 1), read_u64(key, 9), raw)
        found.append((read_u64(key, 9), record.length, record.value_offset))
    return found


class Model:
    """What a file should be: bytes, and which of them were written."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.mask = bytearray()

    def grow(self, size: int) -> None:
        missing = size - len(self.data)
        if missing > 0:
            self.data += bytes(missing)
            self.mask += bytes(missing)

    def write(self, offset: int, data: bytes) -> bool:
        """False if it must be refused."""
        for i, byte in enumerate(data, offset):
            if i < len(self.data) and self.mask[i] and self.data[i] != byte:
                return False
        self.grow(offset + len(data))
        self.data[offset : offset + len(data)] = data
        self.mask[offset : offset + len(data)] = b"\1" * len(data)
        return True


async def apply_write(rig: Rig, ino: int, model: Model, offset: int, data: bytes) -> None:
    if not data:
        return
    if model.write(offset, data):
        await rig.ns.write(ino, offset, data)
    else:
        with pytest.raises(NotPermitted, match="offset"):
            await rig.ns.write(ino, offset, data)


# Two letters only: overlapping writes agree often enough.
writes = st.tuples(st.integers(0, 48), st.text("ab", min_size=1, max_size=12).map(str.encode))
lengths = st.tuples(st.none(), st.integers(0, 80))


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    trio.run(body)


@given(st.lists(st.one_of(writes, lengths), max_size=20))
@settings(max_examples=150, deadline=None)
def test_each_byte_is_written_once_and_read_where_it_was_written(steps: list[Any]) -> None:
    async def body() -> None:
        rig = make_rig()
        ino = rig.file()
        model = Model()
        for offset, what in steps:
            if offset is None:
                if what == len(model.data) or what > len(model.data):
                    rig.ns.truncate(ino, what)
                    model.grow(what)
                elif what:
                    with pytest.raises(NotPermitted):
                        rig.ns.truncate(ino, what)
            else:
                await apply_write(rig, ino, model, offset, what)
            assert await rig.content(ino) == model.data
            assert rig.size(ino) == len(model.data)
            assert rig.ns.attributes(ino).stored == sum(model.mask)
        for start in range(0, len(model.data) + 2, 7):
            assert await rig.ns.read(ino, start, 11) == model.data[start : start + 11]
        found = entries(rig)
        if found:
            # N3: every byte of the value has exactly one place.
            assert sum(length for _, length, _ in found) == sum(model.mask)
            assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(found))
        after = await rig.committed()
        assert await after.content(ino) == model.data
        assert after.ns.counts() == (2, sum(model.mask))

    run(body)


@given(
    st.lists(writes, min_size=1, max_size=10),
    st.lists(st.integers(0, 60), max_size=3),
    st.integers(0, 40),
    st.lists(writes, min_size=1, max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_after_a_crash_lost_bytes_are_holes_and_never_come_back_as_others(
    before: list[tuple[int, bytes]], handed: list[int], keep: int, after: list[tuple[int, bytes]]
) -> None:
    """Breaks if the map is not cut off before the value grows again, or reaches the store after the bytes."""

    async def body() -> None:
        rig = make_rig()
        ino = rig.file()
        await rig.store.commit()
        model = Model()
        order: list[tuple[int, int]] = []  # file offset and byte, in the order they were appended to the value
        hand_overs = list(handed)
        for step, (offset, data) in enumerate(before):
            fresh = [i for i in range(offset, offset + len(data)) if i >= len(model.mask) or not model.mask[i]]
            if model.write(offset, data):
                await rig.ns.write(ino, offset, data)
                order += [(i, data[i - offset]) for i in fresh]
            if hand_overs and step % 2:
                value = rig.ns._inodes.get(ino).rec.value
                rig.values.hand_over(value, min(hand_overs.pop(), rig.values.size_of(value)))
            if step % 3 == 2:
                await rig.store.commit()
        rig = rig.after_crash(keep)
        survived = rig.ns.attributes(ino).stored
        model = Model()
        for offset, byte in order[:survived]:
            assert model.write(offset, bytes([byte]))
        got = await rig.content(ino)
        assert len(got) == rig.size(ino) == len(model.data)
        assert got == model.data
        for offset, data in after:
            await apply_write(rig, ino, model, offset, data)
            assert await rig.content(ino) == model.data
        # Once more, with nothing lost, and with everything since lost.
        rig.ns.set_attributes(ino, mode=0o600)
        again = await rig.committed()
        assert await again.content(ino) == model.data
        if keep == 0:
            # Totals need whole commits, as the store's are; they are right again once the file has changed.
            assert again.ns.counts() == (2, sum(model.mask))
        await again.ns.append(ino, b"lost")
        assert await again.after_crash().content(ino) == model.data

    run(body)


async def test_appending_to_a_mapped_file_makes_its_last_entry_longer() -> None:
    rig = make_rig()
    ino = rig.file()
    await rig.ns.write(ino, 100, b"x")
    for _ in range(50):
        await rig.ns.append(ino, b"0123456789")
    assert entries(rig) == [(100, 501, 0)]
    assert rig.size(ino) == 601


async def test_appends_in_order_need_no_map() -> None:
    rig = make_rig()
    ino = rig.file()
    for i in range(50):
        await rig.ns.write(ino, i * 3, b"abc")
    # The kernel sends a page again with more at its end.
    await rig.ns.write(ino, 148, b"bc+")
    assert entries(rig) == []
    assert rig.ns.attributes(ino).stored == rig.size(ino) == 151


async def test_out_of_order_halves_fill_their_hole() -> None:
    rig = make_rig()
    ino = rig.file()
    await rig.ns.write(ino, 4, b"5678")
    assert await rig.content(ino) == b"\0\0\0\x005678"
    await rig.ns.write(ino, 0, b"1234")
    assert await rig.content(ino) == b"12345678"
    with pytest.raises(NotPermitted, match="offset 3 "):
        await rig.ns.write(ino, 0, b"123x")
    assert await rig.content(ino) == b"12345678"


async def test_a_hole_costs_nothing() -> None:
    rig = make_rig()
    ino = rig.file()
    rig.ns.truncate(ino, 1 << 40)
    await rig.ns.write(ino, 1 << 50, b"end")
    assert rig.size(ino) == (1 << 50) + 3
    assert rig.ns.attributes(ino).stored == 3
    assert await rig.ns.read(ino, (1 << 50) - 2, 100) == b"\0\0end"


async def test_a_large_map_goes_in_slices_and_does_not_mix_with_the_next_one() -> None:
    rig = make_rig()
    ino = rig.file()
    for i in range(DROP_AT_ONCE * 3, 0, -1):
        await rig.ns.write(ino, i * 10, b"x")
    rig.ns.truncate(ino, 0)
    assert rig.keys(MAP) == DROP_AT_ONCE * 2
    await rig.ns.write(ino, 5, b"new")
    assert await rig.content(ino) == b"\0\0\0\0\0new"
    rig = await rig.committed()
    assert await rig.ns.reap_orphans() == 1
    assert entries(rig) == [(5, 3, 0)]
    assert await rig.content(ino) == b"\0\0\0\0\0new"
    assert await rig.ns.reap_orphans() == 0


async def test_a_map_longer_than_a_page_is_cut_off_after_a_crash() -> None:
    rig = make_rig()
    ino = rig.file()
    count = 700
    for i in range(count, 0, -1):
        await rig.ns.write(ino, i * 10, b"%09d" % i)
    value = rig.ns._inodes.get(ino).rec.value
    rig.values.hand_over(value, 300 * 9 + 4)
    await rig.store.commit()
    rig = rig.after_crash()
    first = count - 300
    assert rig.ns.attributes(ino).stored == 300 * 9 + 4
    await rig.ns.write(ino, 2, b"more")
    assert len(entries(rig)) == 302
    assert sum(length for _, length, _ in entries(rig)) == 300 * 9 + 4 + 4
    assert await rig.ns.read(ino, 0, 10) == b"\0\0more\0\0\0\0"
    assert await rig.ns.read(ino, first * 10, 10) == (b"%09d" % first)[:4] + bytes(6)


async def test_a_store_that_fails_leaves_the_file_as_it_was() -> None:
    rig = make_rig()
    ino = rig.file()
    await rig.ns.append(ino, b"abc")
    rig.store.failed = True
    with pytest.raises(Fenced):
        await rig.ns.write(ino, 10, b"x")
    assert await rig.content(ino) == b"abc"
    rig.store.failed = False
    await rig.ns.write(ino, 10, b"x")
    rig.store.failed = True
    with pytest.raises(Fenced):
        await rig.ns.write(ino, 20, b"y")
    with pytest.raises(Fenced):
        rig.ns.truncate(ino, 0)
    assert await rig.content(ino) == b"abc\0\0\0\0\0\0\0x"
