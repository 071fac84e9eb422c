"""The table at the end of a sector: round trips, golden bytes, and no other error than Corrupt on anything else."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import Corrupt
from storage.sectors.label import LABEL_SIZE, check_label, encode_label
from storage.sectors.records import SectorRecord, ShardRecord, decode_sector
from storage.values.packing import ENTRY_BYTES, TABLE_BYTES, TRAILER_SIZE, TableEntry, encode_table, parse_table
from storage.values.records import Extent, ValueRecord, decode_extent, decode_sealed, decode_value

GOLDEN = Path(__file__).parent / "golden"

U63 = st.integers(0, 2**63)
ENTRIES = st.lists(
    st.builds(
        TableEntry,
        path=st.binary(max_size=80),
        value_id=U63,
        offset=U63,
        length=st.integers(0, 20),
        position=st.integers(0, 80),
        commit=U63,
    ),
    max_size=40,
)


@given(ENTRIES)
def test_a_table_comes_back_and_fits_in_what_was_reserved(entries: list[TableEntry]) -> None:
    table = encode_table(entries)
    assert parse_table(bytes(100) + table) == entries
    assert len(table) <= TABLE_BYTES + sum(ENTRY_BYTES + len(entry.path) for entry in entries)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_corrupt(raw: bytes) -> None:
    try:
        parse_table(raw)
    except Corrupt:
        pass


@given(ENTRIES, st.data())
def test_a_damaged_table_is_corrupt_or_still_within_the_sector(entries: list[TableEntry], data: st.DataObject) -> None:
    sector = bytearray(bytes(100) + encode_table(entries))
    at = data.draw(st.integers(100, len(sector) - 1))
    sector[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = parse_table(bytes(sector))
    except Corrupt:
        return
    assert all(entry.position + entry.length <= len(sector) for entry in found)


def test_a_table_that_unpacks_to_gigabytes_is_refused_by_its_length() -> None:
    bomb = zlib.compress(bytes(200 * 1024 * 1024), 9)
    trailer = encode_table([])[-TRAILER_SIZE:]
    for claimed in (10, 200 * 1024 * 1024):
        raw = bomb + trailer[:8] + len(bomb).to_bytes(4, "big") + claimed.to_bytes(4, "big")
        with pytest.raises(Corrupt):
            parse_table(raw)


def test_formats_are_the_golden_ones() -> None:
    entries = [TableEntry(b"logs/today", 7, 0, 5, 0, 42), TableEntry(b"", 8, 4096, 3, 5, 42)]
    table = encode_table(entries)
    sector = SectorRecord(1, "2", 4096, 4000, 3000, [ShardRecord(9, 4128, bytes(range(32)), [1, 3])])
    value = ValueRecord(1, 77, "2", 123456)
    extent = Extent(7, 4096, 9, 32, 4000)
    label = encode_label(9, 4096, k=4, m=2, number=5)
    lines = {
        "label": label.hex(),
        "sector": sector.encode().hex(),
        "value": value.encode().hex(),
        "extent": (extent.key + extent.encode()).hex(),
        "trailer": table[-TRAILER_SIZE : -TRAILER_SIZE + 8].hex(),
    }
    golden = dict(line.split("=") for line in (GOLDEN / "sectors.txt").read_text().split())
    assert lines == golden
    assert parse_table(b"helloabc" + bytes.fromhex((GOLDEN / "table.hex").read_text())) == entries
    assert decode_sector(sector.encode(), 9) == sector
    assert decode_value(value.encode(), 7) == value
    assert decode_extent(extent.key, extent.encode()) == extent


@given(st.binary(max_size=120))
def test_parsers_of_records_raise_corrupt_and_nothing_else(raw: bytes) -> None:
    for parse in (lambda: decode_sector(raw, 1), lambda: decode_value(raw, 1), lambda: decode_extent(raw[:17], raw[17:])):
        try:
            parse()
        except Corrupt:
            pass


def test_a_label_of_another_sector_is_refused() -> None:
    raw = encode_label(9, 4096)
    assert len(raw) == LABEL_SIZE
    check_label(b"data" + raw, 9, 4096)
    for sector_id, length, number in ((8, 4096, 0), (9, 4095, 0), (9, 4096, 1)):
        with pytest.raises(Corrupt):
            check_label(raw, sector_id, length, number=number)


@given(st.integers(0, 4), st.integers(0, 20), st.integers(0, 255), st.integers(0, 20))
def test_value_records_decoded_together_are_as_decoded_one_by_one(which: int, at: int, flip: int, cut: int) -> None:
    good = ValueRecord(1, 5, "4+2", 1 << 40).encode()
    damaged = bytearray(good)
    damaged[at % len(good)] ^= flip
    for odd in (bytes(damaged), good[:cut], ValueRecord(2, 5, "1", 0).encode(), ValueRecord(1, 5, "no replication", 0).encode()):
        raws = [good] * which + [odd] + [good] * 2
        ids = list(range(7, 7 + len(raws)))
        try:
            expected: object = [decode_value(raw, value_id).sealed for raw, value_id in zip(raws, ids, strict=True)]
        except Corrupt as error:
            with pytest.raises(Corrupt, match=re.escape(str(error))):
                decode_sealed(raws, ids)
        else:
            assert decode_sealed(raws, ids) == expected
    assert decode_sealed([], []) == []
