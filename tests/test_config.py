"""volume.json, and the durable writing of small files under it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.config import encode_config, load_config, new_config, parse_config, save_config
from storage.documents import encode_document
from storage.durable import fsync_dir, read_small_file, sweep_temporaries, write_file_atomic
from storage.errors import BadArgument, Corrupt, NotADirectory, NotFound

GOLDEN = Path(__file__).parent / "golden"
VOLUME = bytes.fromhex("00112233445566778899aabbccddeeff")
NOW = 1_790_000_000_123_456_789
CONFIG = new_config(VOLUME, NOW, replication="4+2", sector_size=1 << 20, contract_days=30)
GOOD = encode_config(CONFIG)


@given(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**63 - 1),
    st.sampled_from(["1", "2", "255", "1+1", "10+20"]),
    st.integers(16, 8192).map(lambda n: n * 4096),
    st.floats(0, 36525, exclude_min=True),
)
def test_what_is_written_is_read(volume: bytes, now: int, replication: str, size: int, days: float) -> None:
    made = new_config(volume, now, replication=replication, sector_size=size, contract_days=days)
    assert parse_config(encode_config(made)) == made
    assert made.volume_id_bytes == volume


def test_save_and_load(tmp_path: Path) -> None:
    save_config(tmp_path, CONFIG)
    assert load_config(tmp_path) == CONFIG
    assert stat.S_IMODE((tmp_path / "volume.json").stat().st_mode) == 0o600


def test_defaults() -> None:
    made = new_config(VOLUME, NOW)
    assert (made.sector_size, made.replication, made.contract_days, made.format_version) == (4 * 1024 * 1024, "1", 90.0, 3)


@pytest.mark.parametrize(
    "values",
    [
        {"sector_size": 0},
        {"sector_size": -4096},
        {"sector_size": 65535},
        {"sector_size": 65536 + 1},
        {"sector_size": 64 * 1024 * 1024},
        {"replication": ""},
        {"replication": "0"},
        {"replication": "4+"},
        {"contract_days": 0},
        {"contract_days": -1},
        {"contract_days": float("nan")},
        {"contract_days": float("inf")},
    ],
)
def test_values_that_make_no_sense_are_refused_and_damage_when_read(values: dict[str, object]) -> None:
    with pytest.raises(BadArgument):
        new_config(VOLUME, NOW, **values)  # type: ignore[arg-type]
    with pytest.raises(Corrupt, match=r"volume\.json is damaged"):
        parse_config(encode_document(msgspec.structs.replace(CONFIG, **values)))


def test_bad_ids_and_clocks_are_refused() -> None:
    for volume, now in ((b"", NOW), (VOLUME, -1), (VOLUME, 2**63)):
        with pytest.raises(BadArgument):
            new_config(volume, now)


def test_what_is_no_volume_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(BadArgument, match="is not a fusefs volume"):
            load_config(path)
    (tmp_path / "volume.json").write_text('{"name": "some docker volume"}')
    with pytest.raises(BadArgument, match=r"volume\.json is not in the format 'fusefs volume'"):
        load_config(tmp_path)


def test_a_newer_format_says_that_a_newer_fusefs_is_needed() -> None:
    with pytest.raises(BadArgument, match=r"format version 4, this fusefs knows up to 3: a newer fusefs is needed$"):
        parse_config(encode_document(msgspec.structs.replace(CONFIG, format_version=4)))
    # Also where the newer format has other fields and another checksum.
    with pytest.raises(BadArgument, match="a newer fusefs is needed"):
        parse_config(b'{"format": "fusefs volume", "format_version": 9, "sum": [1, 2]}')


@pytest.mark.parametrize("version", [1, 2])
def test_what_was_made_before_the_first_release_is_refused_and_not_taken_for_damaged(version: int) -> None:
    with pytest.raises(BadArgument, match=r"an earlier fusefs made the volume.*copy the files out with that one"):
        parse_config(encode_document(msgspec.structs.replace(CONFIG, format_version=version)))


def test_every_flipped_bit_is_damage() -> None:
    for bit in range(8 * len(GOOD)):
        bad = bytearray(GOOD)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises((Corrupt, BadArgument)):
            parse_config(bytes(bad))


@pytest.mark.parametrize("raw", [GOOD[:-1], GOOD + b"\n", GOOD.replace(b"  ", b" "), GOOD.replace(b"1048576", b"1048576.0")])
def test_anything_written_otherwise_is_damage(raw: bytes) -> None:
    with pytest.raises(Corrupt, match="damaged"):
        parse_config(raw)


def test_unknown_fields_and_missing_ones_are_damage() -> None:
    fields = msgspec.json.decode(encode_document(CONFIG))
    assert isinstance(fields, dict)

    class Odd(msgspec.Struct):
        format: str = "fusefs volume"
        format_version: int = 1
        surprise: int = 1

    with pytest.raises(Corrupt):
        parse_config(encode_document(Odd()))  # type: ignore[arg-type]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["format", "format_version", "checksum", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.one_of(st.binary(max_size=200), json_values.map(msgspec.json.encode)))
def test_no_bytes_make_the_parser_raise_anything_else(raw: bytes) -> None:
    with pytest.raises((Corrupt, BadArgument)) as caught:
        parse_config(raw)
    assert "\n" not in str(caught.value)


def test_the_golden_volume_json() -> None:
    assert (GOLDEN / "volume.json").read_bytes() == GOOD
    assert parse_config((GOLDEN / "volume.json").read_bytes()) == CONFIG


# --------------------------------------------------------------------------------------------------------------------
# storage/durable.py


def test_a_file_is_replaced_whole_with_the_mode_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    old_mask = os.umask(0o077)
    try:
        write_file_atomic(path, b"one" * 100_000, 0o644)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    finally:
        os.umask(old_mask)
    write_file_atomic(path, memoryview(b"two"))
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_order_of_the_steps_is_flush_rename_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the data is not flushed before the rename, or the directory not after it: either loses a file to a power cut."""
    steps: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        steps.append("fsync directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        real_fsync(fd)

    def rename(src: Path, dst: Path) -> None:
        steps.append("rename")
        real_rename(src, dst)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write_file_atomic(tmp_path / "file", b"x")
    assert steps == ["fsync file", "rename", "fsync directory"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.errors import IOFailure, NoSpace

    path = tmp_path / "file"
    write_file_atomic(path, b"old")
    for number, kind in ((28, NoSpace), (122, NoSpace), (5, IOFailure)):

        def fail(fd: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(kind, match=r"writing .*file"):
                write_file_atomic(path, b"new")
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_leftovers_of_a_crash_do_not_get_in_the_way_and_are_swept(tmp_path: Path) -> None:
    left = [tmp_path / f".file.{os.getpid()}.{n}.tmp" for n in range(2000)]
    for path in left:
        path.touch()
    for name in (".file.tmp", ".file.x.1.tmp", "file.1.1.tmp", ".file.1.1.tmpx"):
        (tmp_path / name).touch()
    write_file_atomic(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"
    assert sorted(sweep_temporaries(tmp_path)) == sorted(left)
    assert {p.name for p in tmp_path.iterdir()} == {"file", ".file.tmp", ".file.x.1.tmp", "file.1.1.tmp", ".file.1.1.tmpx"}


def test_reading_small_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_small_file(path, 5) == b"12345"
    with pytest.raises(Corrupt, match="longer than 4 bytes"):
        read_small_file(path, 4)
    with pytest.raises(NotFound):
        read_small_file(tmp_path / "none", 5)
    with pytest.raises(NotADirectory):
        read_small_file(path / "below", 5)
    os.mkfifo(tmp_path / "fifo")
    for odd in (tmp_path / "fifo", tmp_path):
        with pytest.raises(BadArgument, match="not a regular file"):
            read_small_file(odd, 5)
    with pytest.raises(NotFound):
        fsync_dir(tmp_path / "none")
