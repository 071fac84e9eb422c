"""Finding mounts by /proc/self/mountinfo."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusefs import mounts
from fusefs.mounts import Mount, decode_source, encode_source, find_mount, mount_above, mount_at, mount_of_volume, parse_mountinfo

LINE = b"36 35 0:42 / %s rw,nosuid shared:7 - %s %s rw,user_id=0\n"


def test_a_mount_is_read_with_its_escapes() -> None:
    text = LINE % (b"/mnt/a\\040b\\134c", b"fuse.fusefs", b"/data/my%20volume")
    assert parse_mountinfo(text) == [Mount(Path("/mnt/a b\\c"), Path("/data/my volume"), 36, "0:42")]


def test_other_filesystems_and_broken_lines_are_skipped() -> None:
    text = LINE % (b"/mnt", b"fuse.sshfs", b"host:") + b"\n36 35\n - \n" + b"x 35 0:42 / /m rw - fuse.fusefs /v rw\n" + b"\xff\xfe\n"
    assert parse_mountinfo(text) == []


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).map(lambda text: Path("/" + text)))
def test_a_volume_path_survives_the_mount_table(path: Path) -> None:
    source = encode_source(path)
    assert source.isascii()
    assert not set(source) & set(", \\\t\n#")
    assert decode_source(source) == path


@given(st.binary(max_size=300))
def test_any_bytes_are_a_mount_table(text: bytes) -> None:
    parse_mountinfo(text)


def test_the_mount_a_person_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point, volume = tmp_path / "mnt", tmp_path / "vol"
    (point / "below").mkdir(parents=True)
    volume.mkdir()
    table = tmp_path / "mountinfo"
    table.write_bytes(LINE % (bytes(point), b"fuse.fusefs", encode_source(volume).encode()))
    monkeypatch.setattr(mounts, "MOUNTINFO", table)
    for path in (point, point / "below", point / "below" / "deeper", volume):
        found = find_mount(path)
        assert found is not None, path
        assert found.volume == volume
    assert mount_at(point / "below") is None
    assert mount_at(point) is not None
    assert mount_of_volume(point) is None
    assert mount_above(volume) is None
    assert find_mount(tmp_path) is None
    (tmp_path / "link").symlink_to(volume)
    assert mount_of_volume(tmp_path / "link") is not None
