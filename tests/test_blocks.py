"""Small commits past the page cache: the file is what was written, whatever the filesystem can do, and what is durable is never changed."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.buffers import ALIGNMENT
from storage.interfaces import Buffer
from storage.metadata.blocks import ROOM, Blocks
from storage.metadata.segments import Segment, write_at
from tests.metadata_rig import quick_directory

SIZE = 256 * 1024
#: How a write past the page cache ends: as it should, refused, or short.
ENDS = st.sampled_from(["good"] * 6 + ["refused", "short"])
STEPS = st.lists(
    st.tuples(st.lists(st.integers(1, 3000) | st.integers(1, 2 * ROOM), min_size=1, max_size=4), ENDS), min_size=1, max_size=20
)


def segment_in(directory: Path, residue: bytes = b"\xaa") -> Segment:
    """Full of what an earlier life has left."""
    path = directory / "segment"
    path.write_bytes(residue * SIZE)
    return Segment(1, path, os.open(path, os.O_RDWR), SIZE)


@pytest.fixture
def direct(tmp_path: Path) -> Path:
    """A directory whose filesystem has such writes."""
    segment = segment_in(tmp_path)
    try:
        fcntl.fcntl(segment.fd, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        pytest.skip("this filesystem has no O_DIRECT")
    finally:
        os.close(segment.fd)
    return tmp_path


def written(blocks: Blocks, segment: Segment, pieces: list[bytes]) -> bool:
    """As the journal does it. True: past the page cache."""
    end = segment.used + sum(map(len, pieces))
    past = blocks.write(segment, pieces, end)
    if not past:
        write_at(segment.fd, *blocks.through_cache(segment, pieces, end))
    os.fdatasync(segment.fd)
    segment.used = end
    return past


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_the_segment_holds_what_was_written_and_durable_bytes_are_only_repeated(steps: list[tuple[list[int], str]]) -> None:
    with quick_directory() as directory, pytest.MonkeyPatch.context() as patch:
        segment, blocks, reference = segment_in(directory), Blocks(), bytearray()
        real, how = os.pwritev, "good"

        def pwritev(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
            if offset < segment.used:
                repeated = b"".join(map(bytes, buffers))[: segment.used - offset]
                assert repeated == reference[offset : offset + len(repeated)], "what is durable was overwritten with something else"
            if segment.past_cache and how == "refused":
                raise OSError(errno.EINVAL, "not past the page cache")
            if segment.past_cache and how == "short":
                return real(fd, [memoryview(buffers[0])[:ALIGNMENT]], offset) if len(buffers[0]) > ALIGNMENT else 0
            return real(fd, buffers, offset)

        patch.setattr(os, "pwritev", pwritev)
        for number, (sizes, how) in enumerate(steps, 1):
            pieces = [bytes([number]) * size for size in sizes]
            if segment.used + sum(sizes) > SIZE:
                break
            before = len(reference)
            past = written(blocks, segment, pieces)
            reference += b"".join(pieces)
            there = segment.path.read_bytes()
            assert there[: segment.used] == reference, (before, sizes, how)
            # Nothing of what the buffer held before.
            assert not past or not any(there[segment.used : -(-segment.used // ALIGNMENT) * ALIGNMENT])
        # One buffer for all: what is used of the last block is at its beginning.
        last = segment.used % ALIGNMENT
        assert bytes(blocks._view[:last]) == reference[len(reference) - last :]
        os.close(segment.fd)


def test_small_ones_go_past_the_page_cache_here_and_large_ones_do_not(direct: Path) -> None:
    segment, blocks = segment_in(direct), Blocks()
    assert written(blocks, segment, [b"small"])
    assert fcntl.fcntl(segment.fd, fcntl.F_GETFL) & os.O_DIRECT
    assert not written(blocks, segment, [b"l" * 2 * ROOM])
    assert not fcntl.fcntl(segment.fd, fcntl.F_GETFL) & os.O_DIRECT
    assert written(blocks, segment, [b"small", b" again"])
    # Nothing of an earlier life stands between its end and the block's.
    rest = segment.path.read_bytes()[segment.used : -(-segment.used // ALIGNMENT) * ALIGNMENT]
    assert rest == bytes(len(rest))
    os.close(segment.fd)


def test_the_last_block_of_a_file_that_is_no_multiple_of_a_block_goes_through_the_page_cache(direct: Path) -> None:
    segment, blocks = segment_in(direct), Blocks()
    os.ftruncate(segment.fd, ALIGNMENT + 800)
    segment.size = ALIGNMENT + 800
    assert written(blocks, segment, [b"a" * ALIGNMENT])
    assert not written(blocks, segment, [b"b" * 800])
    assert segment.path.read_bytes() == b"a" * ALIGNMENT + b"b" * 800
    os.close(segment.fd)


def test_what_the_disk_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment, blocks = segment_in(tmp_path), Blocks()

    def full(_fd: int, _buffers: Sequence[Buffer], _offset: int) -> int:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="broken"):
        blocks.write(segment, [b"x"], 1)
    os.close(segment.fd)
