"""What the kernel is told of an inode is what the namespace says."""

from __future__ import annotations

from types import SimpleNamespace

import pyfuse3
from hypothesis import given
from hypothesis import strategies as st

from fusefs.entries import CACHE_SECONDS, entries_of, entry_of, shown
from storage import Attributes, Listed

U32 = st.one_of(st.integers(0, 2), st.integers(0, 2**32 - 1))
SIZES = st.integers(0, 2**62)
#: Nanoseconds; pyfuse3 has seconds and their rest.
TIMES = st.integers(0, 2**62)


def row(entry: pyfuse3.EntryAttributes) -> tuple[object, ...]:
    """What the kernel is told with it."""
    return (
        *(entry.st_ino, entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid, entry.st_rdev, entry.st_size, entry.st_blocks),
        *(entry.st_blksize, entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns, entry.entry_timeout, entry.attr_timeout),
    )


@given(
    ino=st.integers(1, 2**62),
    mode=U32,
    nlink=U32,
    uid=U32,
    gid=U32,
    rdev=U32,
    size=SIZES,
    stored=SIZES,
    times=st.tuples(TIMES, TIMES, TIMES),
)
def test_every_attribute_is_told(
    ino: int, mode: int, nlink: int, uid: int, gid: int, rdev: int, size: int, stored: int, times: tuple[int, int, int]
) -> None:
    """Those as well that pyfuse3 has a value for from the beginning."""
    atime, mtime, ctime = times
    entry = entry_of(Attributes(ino, mode, nlink, uid, gid, rdev, size, stored, atime, mtime, ctime))
    assert (entry.st_ino, entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid, entry.st_rdev) == (ino, mode, nlink, uid, gid, rdev)
    assert (entry.st_size, entry.st_blocks, entry.st_blksize) == (size, (stored + 511) // 512, 4096)
    assert (entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns) == times
    assert (entry.entry_timeout, entry.attr_timeout) == (CACHE_SECONDS, CACHE_SECONDS)


@given(st.lists(st.builds(Attributes, *[st.integers(1, 9)] * 8, *[st.sampled_from([-1, 0, 1, 2**40])] * 3), max_size=6))
def test_what_is_listed_is_told_as_if_each_were_asked_for(files: list[Attributes]) -> None:
    """Whatever of it is as in the entry before."""
    # The inodes' times are called otherwise.
    inodes = [
        SimpleNamespace(
            **{name: getattr(file, name) for name in ("mode", "nlink", "uid", "gid", "rdev")},
            atime=file.atime_ns,
            mtime=file.mtime_ns,
            ctime=file.ctime_ns,
        )
        for file in files
    ]
    listed = Listed(
        [b"name"] * len(files),
        [file.ino for file in files],
        range(len(files)),
        inodes,
        [file.size for file in files],
        [file.stored for file in files],
    )
    expected = [row(entry_of(file)) for file in files]
    assert [row(entry) for entry in shown(listed)] == expected
    assert [row(entry) for entry in entries_of(listed)] == expected
