"""The namespace's formats: as in the golden file, and whatever a disk may hold decodes or is Corrupt."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import Corrupt
from storage.namespace.records import (
    MAX_OFFSET,
    CountsRecord,
    Dirent,
    HandingDownRecord,
    InodeRecord,
    MapRecord,
    Places,
    cookie_key,
    decode_counts,
    decode_dirent,
    decode_handing_down,
    decode_inode,
    decode_inodes,
    decode_map,
    decode_place,
    decode_places,
    decode_straight,
    encode_counts,
    encode_dirent,
    encode_handing_down,
    encode_inode,
    encode_map,
    encode_place,
    handing_down_key,
    inode_key,
    map_key,
    name_key,
    orphan_key,
    xattr_key,
)

GOLDEN = Path(__file__).parent / "golden" / "namespace-records-1.json"


def inode(**changes: object) -> InodeRecord:
    fields: dict[str, object] = {
        "mode": stat.S_IFREG | 0o640,
        "nlink": 2,
        "uid": 1000,
        "gid": 100,
        "rdev": 0,
        "value": 77,
        "map": 12,
        "size": 1 << 40,
        "map_bound": 5000,
        "counted": 4999,
        "atime": 1_735_689_600_000_000_000,
        "mtime": -1,
        "ctime": 1_735_689_600_123_456_789,
        "parent": 1,
        "name": b"name \xff",
        "flags": 2,
        "replication": "",
        "target": b"",
    }
    return InodeRecord(**(fields | changes))  # type: ignore[arg-type]


def samples() -> dict[str, bytes]:
    return {
        "inode: mapped file": encode_inode(inode()),
        "inode: directory": encode_inode(
            inode(mode=stat.S_IFDIR | 0o2755, value=0, map=0, size=0, map_bound=0, counted=0, flags=1, replication="4+2")
        ),
        "inode: symlink": encode_inode(
            inode(mode=stat.S_IFLNK | 0o777, value=0, map=0, size=0, map_bound=0, counted=0, flags=0, target=b"to/where")
        ),
        "directory entry": encode_dirent(Dirent(ino=70000, type=stat.S_IFREG, cookie=3)),
        "place": encode_place(b"name \xff", 70000, stat.S_IFREG),
        "map entry": encode_map(MapRecord(length=1 << 33, value_offset=9)),
        "counts": encode_counts(CountsRecord(inodes=3, files=1, bytes=4999)),
        "handing down": encode_handing_down(HandingDownRecord(replication="4+2", after=77)),
        "key: handing down": handing_down_key(258),
        "key: inode": inode_key(258),
        "key: name": name_key(1, b"name"),
        "key: cookie": cookie_key(1, 3),
        "key: map entry": map_key(12, 1 << 32),
        "key: orphan": orphan_key(258),
        "key: attribute": xattr_key(258, b"user.x"),
    }


def test_formats_are_as_in_the_golden_file() -> None:
    """Breaks if a volume written by an earlier program would read differently. A new format needs a new version and a new file."""
    golden: dict[str, str] = json.loads(GOLDEN.read_text())
    assert {name: raw.hex() for name, raw in samples().items()} == golden
    assert decode_inode(1, bytes.fromhex(golden["inode: mapped file"])) == inode()
    assert decode_dirent(1, bytes.fromhex(golden["directory entry"])) == Dirent(ino=70000, type=stat.S_IFREG, cookie=3)
    assert decode_place(cookie_key(1, 3), bytes.fromhex(golden["place"])) == (b"name \xff", Dirent(ino=70000, type=stat.S_IFREG, cookie=3))
    assert decode_map(1, 0, bytes.fromhex(golden["map entry"])) == MapRecord(length=1 << 33, value_offset=9)
    assert decode_handing_down(1, bytes.fromhex(golden["handing down"])) == HandingDownRecord(replication="4+2", after=77)
    assert decode_counts(bytes.fromhex(golden["counts"])) == CountsRecord(inodes=3, files=1, bytes=4999)


def test_an_ordinary_inode_record_is_small() -> None:
    assert len(encode_inode(inode())) < 90


decoders: list[Callable[[bytes], object]] = [
    lambda raw: decode_inode(1, raw),
    lambda raw: decode_dirent(1, raw),
    lambda raw: decode_place(cookie_key(1, 3), raw),
    lambda raw: decode_place(raw, encode_place(b"name", 5, stat.S_IFREG)),
    lambda raw: decode_map(1, 5, raw),
    decode_counts,
    lambda raw: decode_handing_down(1, raw),
]


@given(st.sampled_from(decoders), st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda raw: b"\1" + raw)))
def test_any_bytes_decode_or_are_corrupt(decode: Callable[[bytes], object], raw: bytes) -> None:
    try:
        decode(raw)
    except Corrupt:
        pass


@given(st.sampled_from(sorted(samples().items())), st.integers(0, 200), st.integers(1, 255), st.integers(0, 200))
def test_damaged_records_decode_or_are_corrupt(sample: tuple[str, bytes], at: int, flip: int, cut: int) -> None:
    raw = bytearray(sample[1])
    raw[at % len(raw)] ^= flip
    for damaged in (bytes(raw), bytes(raw[: cut % len(raw)])):
        for decode in decoders:
            try:
                decode(damaged)
            except Corrupt:
                pass


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": 0o644},
        {"mode": 0o170000},
        {"value": 0},
        {"mode": stat.S_IFDIR, "value": 5, "map": 0},
        {"mode": stat.S_IFDIR, "value": 0, "map": 0, "parent": 0},
        {"mode": stat.S_IFLNK, "value": 0, "map": 7},
        {"name": b"x" * 256},
        {"target": b"x" * 4096},
        {"uid": -1},
        {"size": MAX_OFFSET + 1},
        {"replication": "1" * 16},
    ],
)
def test_records_that_contradict_themselves_are_corrupt(changes: dict[str, object]) -> None:
    with pytest.raises(Corrupt, match="inode 5"):
        decode_inode(5, encode_inode(inode(**changes)))


def rows(places: Places) -> list[tuple[bytes, int, int]]:
    """What `decode_places` says, one by one."""
    return list(zip(*places, strict=True))


TOGETHER: list[tuple[bytes, Callable[[list[bytes]], object], Callable[[int, bytes], object]]] = [
    (encode_inode(inode()), lambda raws: decode_inodes(range(5, 5 + len(raws)), raws), decode_inode),
    (
        encode_place(b"name", 70000, stat.S_IFREG),
        lambda raws: rows(decode_places([(cookie_key(9, 5 + number), raw) for number, raw in enumerate(raws)])),
        lambda number, raw: decode_place(cookie_key(9, number), raw),
    ),
    (
        cookie_key(9, 3),
        lambda keys: rows(decode_places([(key, encode_place(b"name", 7, stat.S_IFDIR)) for key in keys])),
        lambda _, key: decode_place(key, encode_place(b"name", 7, stat.S_IFDIR)),
    ),
]


@given(
    st.sampled_from(TOGETHER),
    st.lists(st.sampled_from(sorted(samples().values())), max_size=3),
    st.integers(0, 3),
    st.integers(0, 200),
    st.integers(0, 255),
)
def test_records_decoded_together_are_as_decoded_one_by_one(
    kind: tuple[bytes, Callable[[list[bytes]], object], Callable[[int, bytes], object]], raws: list[bytes], which: int, at: int, flip: int
) -> None:
    """Also in what is wrong, and with which of them."""
    good, together, single = kind
    damaged = bytearray(good)
    damaged[at % len(good)] ^= flip
    for odd in (raws, [bytes(damaged)], [bytes(damaged[:at])], [encode_inode(inode(value=0))], []):
        some = [good] * which + odd + [good] * 2
        expected = _outcome(lambda some=some: [row(single(5 + number, raw)) for number, raw in enumerate(some)])
        assert _outcome(lambda some=some: together(some)) == expected


def _outcome(decode: Callable[[], object]) -> object:
    try:
        return decode()
    except Corrupt as error:
        return str(error)


def row(decoded: object) -> object:
    """What `decode_places` has of what `decode_place` says; anything else as it is."""
    match decoded:
        case (name, Dirent() as entry):
            return name, entry.ino, entry.cookie
    return decoded


@given(
    st.lists(
        st.sampled_from([inode(), inode(mode=stat.S_IFREG | 0o4755, uid=1, rdev=2**40, atime=-(2**63)), inode(name=bytes(255))]), max_size=4
    ),
    st.none() | st.sampled_from([inode(map=9), inode(mode=stat.S_IFDIR | 0o755, value=0, parent=7), inode(value=0), inode(nlink=0)]),
    st.integers(0, 200),
    st.integers(0, 255),
)
def test_what_a_listing_shows_of_straight_files_is_what_their_records_say(
    records: list[InodeRecord], odd: InodeRecord | None, at: int, flip: int
) -> None:
    """And where they are something else, or damaged where it is looked at, it is left to those who look at all of them."""
    raws = [encode_inode(record) for record in [*records, *([] if odd is None else [odd])]]
    if raws:
        damaged = bytearray(raws[-1])
        damaged[at % len(damaged)] ^= flip
        raws[-1] = bytes(damaged)
    found = decode_straight(raws)
    try:
        whole = [decode_inode(5, raw) for raw in raws]
    except Corrupt:
        # Damage behind what is shown is passed over.
        assert found is None or len(found) == len(raws)
        return
    if any(record.map or not record.is_regular for record in whole):
        assert found is None
        return
    assert found is not None
    for name in ("mode", "nlink", "uid", "gid", "rdev", "value", "map", "atime", "mtime", "ctime"):
        assert [getattr(record, name) for record in found] == [getattr(record, name) for record in whole]


def test_numbers_where_records_should_be_are_no_records() -> None:
    with pytest.raises(Corrupt):
        decode_inodes([4, 5], [b"\1\1", encode_inode(inode())])
    assert decode_inodes([], []) == []


def test_map_entries_reach_nowhere_beyond_a_file() -> None:
    with pytest.raises(Corrupt):
        decode_map(1, 10, encode_map(MapRecord(length=MAX_OFFSET - 9, value_offset=0)))
    with pytest.raises(Corrupt):
        decode_map(1, 0, encode_map(MapRecord(length=2, value_offset=MAX_OFFSET - 1)))
    with pytest.raises(Corrupt):
        decode_map(1, 0, encode_map(MapRecord(length=0, value_offset=0)))
