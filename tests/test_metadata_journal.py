"""The journal: what a crash may take, what damage may not hide, and that its format is what it was."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import BadArgument, Corrupt, FusefsError, IOFailure
from storage.interfaces import TailPiece
from storage.metadata.journal import Group, Journal
from storage.metadata.records import (
    HASH,
    HEADER_SIZE,
    RECORD_HEAD,
    Op,
    SegmentHeader,
    TailEntry,
    decode_body,
    decode_segment_header,
    digest,
    encode_body,
    read_record,
)
from storage.metadata.replay import RecoveredTails, Replayed, replay
from storage.seams import InlineWorker, NoFailpoints
from tests.metadata_rig import journal_key, piece, quick_directory, segments

GOLDEN = Path(__file__).parent / "golden" / "journal_segment.bin"
SALT = bytes(range(16))
WORKER = InlineWorker()


def load(directory: Path, held: int = 0, chain: bytes = bytes(HASH)) -> tuple[Replayed, list[list[Op]]]:
    """What replay finds in directory/journal; the files are closed again."""
    found: list[list[Op]] = []
    result = replay(directory / "journal", held, chain, found.append)
    return result, found


def closed(result: Replayed) -> Replayed:
    for segment in result.live:
        segment.close()
    return result


async def written(
    directory: Path, groups: list[Group], epoch: int = 1, salt: bytes = SALT, segment_size: int = 8192, limit: int = 1 << 22
) -> Journal:
    """A journal that goes on from what is in the directory, with these commits more; still open."""
    (directory / "journal").mkdir(exist_ok=True)
    before, _ = load(directory)
    journal = Journal(
        directory / "journal",
        segment_size=segment_size,
        limit_bytes=limit,
        failpoints=NoFailpoints(),
        live=before.live,
        spares=before.spares,
        chain=before.chain,
        next_number=before.next_number,
    )
    journal.begin_epoch(epoch, salt, journal_key(salt))
    for group in groups:
        ops = sum(len(key) + len(value or b"") + 16 for key, value in group.ops)
        sizes = journal.needed(ops, sum(tail.length for tail in group.tails), len(group.tails))
        await journal.prepare(sizes, WORKER)
        await journal.write(group, WORKER)
    return journal


def group(sequence: int, *tails: TailPiece) -> Group:
    return whole(sequence, [(b"key%d" % sequence, b"value"), (b"gone", None)], list(tails))


def whole(sequence: int, ops: list[Op], tails: list[TailPiece]) -> Group:
    return Group(sequence, ops, tails, sum(tail.length for tail in tails))


def ops_of(*sequences: int) -> list[list[Op]]:
    return [group(sequence).ops for sequence in sequences]


def tails_of(result: Replayed) -> dict[int, list[tuple[int, bytes]]]:
    return dict(RecoveredTails(result.tails, lambda value_id, end: True, journal_key))


# ------------------------------------------------------------------------------------------------------------- format


async def test_a_segment_has_the_bytes_it_always_had(tmp_path: Path) -> None:
    journal = await written(
        tmp_path, [group(1, piece(7, 0, b"hello ", b"world")), group(2), group(3, piece(7, 11, b"!"), piece(8, 0, b"x"))]
    )
    journal.close()
    (path,) = segments(tmp_path)
    raw = path.read_bytes()
    used = raw.rstrip(b"\0")
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_bytes(used)
    assert used == GOLDEN.read_bytes()


def test_the_golden_segment_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / f"segment-{1:016x}").write_bytes(GOLDEN.read_bytes().ljust(8192, b"\0"))
    result, found = load(tmp_path)
    assert found == ops_of(1, 2, 3)
    assert tails_of(result) == {7: [(0, b"hello world"), (11, b"!")], 8: [(0, b"x")]}
    assert (result.sequence, result.live[0].epoch, result.live[0].salt) == (3, 1, SALT)
    closed(result)


def test_contents_are_sealed_and_names_are_not() -> None:
    raw = GOLDEN.read_bytes()
    assert b"hello" not in raw
    assert b"key1" in raw


def test_a_newer_format_is_refused_not_taken_for_damage() -> None:
    raw = bytearray(SegmentHeader(1, 1, 1, SALT, bytes(HASH)).encode())
    raw[11] = 2
    raw[80:112] = digest(raw[:80])
    with pytest.raises(BadArgument, match="format 2"):
        decode_segment_header(bytes(raw), "here")


# ------------------------------------------------------------------------------------------------------------- crashes


async def last_record(directory: Path) -> tuple[Path, bytes, int, int]:
    """Three commits: the segment's path, its bytes, and where its last record begins and ends."""
    journal = await written(
        directory, [group(1, piece(5, 0, b"a" * 40)), group(2, piece(5, 40, b"b" * 40)), group(3, piece(5, 80, b"c" * 40))]
    )
    journal.close()
    (path,) = segments(directory)
    raw = path.read_bytes()
    at, ends = HEADER_SIZE, []
    while (head := read_record(memoryview(raw), at)) is not None:
        ends.append(head)
        at = head.end
    assert len(ends) == 3
    return path, raw, ends[2].at, ends[2].sealed_at + ends[2].sealed_length


@pytest.mark.parametrize("rest", ["zeros", "garbage", "nothing"])
async def test_a_commit_torn_at_any_byte_is_dropped_and_the_ones_before_stay(rest: str) -> None:
    with quick_directory() as directory:
        path, raw, start, end = await last_record(directory)
        for cut in range(start, end + 1):
            after = {"zeros": bytes(len(raw) - cut), "garbage": b"\xa5" * (len(raw) - cut), "nothing": b""}[rest]
            path.write_bytes(raw[:cut] + after)
            result, found = load(directory)
            whole = 3 if raw[:end] == (raw[:cut] + after)[:end] else 2
            assert found == ops_of(*range(1, whole + 1))
            assert tails_of(result)[5] == [(0, b"a" * 40), (40, b"b" * 40), (80, b"c" * 40)][:whole]
            closed(result)


async def test_a_bit_gone_wrong_in_the_last_commit_never_becomes_data() -> None:
    with quick_directory() as directory:
        path, raw, start, end = await last_record(directory)
        for at in range(start, end):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
            result, found = load(directory)
            assert found == ops_of(1, 2)
            closed(result)


async def test_a_bit_gone_wrong_before_the_last_commit_is_said() -> None:
    with quick_directory() as directory:
        path, raw, start, _ = await last_record(directory)
        for at in range(start):
            if not 112 <= at < HEADER_SIZE and read_record(memoryview(raw), at) is None and raw[at] == 0 and at % 8:
                continue  # possibly padding: checked by nobody, means nothing
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
            with pytest.raises(FusefsError, match=path.name) as raised:
                load(directory)
            assert isinstance(raised.value, (Corrupt, BadArgument))


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False))
def test_sectors_of_the_last_commit_may_reach_the_disk_in_any_order(rng: random.Random) -> None:
    async def main() -> None:
        with quick_directory() as directory:
            journal = await written(directory, [group(1, piece(1, 0, b"x" * 700))])
            before = segments(directory)[0].read_bytes()
            journal.close()
        with quick_directory() as directory:
            big = group(2, piece(1, 700, b"y" * 1500), piece(2, 0, b"z" * 300))
            journal = await written(directory, [group(1, piece(1, 0, b"x" * 700)), big])
            journal.close()
            (path,) = segments(directory)
            after = path.read_bytes()
            mixed = b"".join((after if rng.random() < 0.7 else before)[at : at + 512] for at in range(0, len(after), 512))
            path.write_bytes(mixed)
            result, found = load(directory)
            assert found == ([group(1).ops, big.ops] if mixed == after else [group(1).ops])
            closed(result)

    trio.run(main)


async def test_the_log_goes_on_after_a_torn_commit_and_after_that_too(tmp_path: Path) -> None:
    journal = await written(tmp_path, [group(1), group(2)])
    journal.close()
    path = segments(tmp_path)[0]
    raw = path.read_bytes()
    end = read_record(memoryview(raw), HEADER_SIZE)
    assert end is not None
    path.write_bytes(raw[: end.end + 50] + bytes(len(raw) - end.end - 50))
    other = whole(2, [(b"other", b"2")], [])
    (await written(tmp_path, [other], epoch=2, salt=b"2" * 16)).close()
    result, found = load(tmp_path)
    assert found == [group(1).ops, other.ops]
    closed(result)


async def test_a_commit_of_many_records_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(30_000)  # several segments of 8 KiB
    journal = await written(tmp_path, [group(1), group(2, piece(3, 0, data))])
    journal.close()
    stored = {path.name: path.read_bytes() for path in segments(tmp_path)}
    assert len(stored) > 3
    result, found = load(tmp_path)
    assert found == ops_of(1, 2)
    assert b"".join(part for _, part in tails_of(result)[3]) == data
    closed(result)
    # A segment is begun only once the one before is durable: a crash leaves whole ones, then at most one that is not.
    used = [name for name, raw in stored.items() if raw.strip(b"\0")]
    for last in range(len(used)):
        for kept in (0, 600, 3000):
            copy = tmp_path / f"copy{last}-{kept}"
            (copy / "journal").mkdir(parents=True)
            for index, name in enumerate(used[: last + 1]):
                raw = stored[name]
                (copy / "journal" / name).write_bytes(raw if index < last else raw[:kept].ljust(len(raw), b"\0"))
            result, found = load(copy)
            assert found == (ops_of(1) if last or kept > HEADER_SIZE + 200 else [])
            assert not tails_of(result)
            closed(result)


async def test_an_operation_larger_than_a_segment_gets_one_of_its_own_size(tmp_path: Path) -> None:
    big = whole(2, [(b"big", b"v" * 50_000)], [piece(1, 0, b"t" * 9000)])
    journal = await written(tmp_path, [group(1), big, group(3)])
    journal.close()
    result, found = load(tmp_path)
    assert found == [group(1).ops, big.ops, group(3).ops]
    assert [segment.number for segment in result.live] == sorted(segment.number for segment in result.live)
    closed(result)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 3000), max_size=3), st.lists(st.integers(1, 5000), max_size=8)), min_size=1, max_size=8))
def test_the_room_a_commit_is_said_to_need_is_enough(plan: list[tuple[list[int], list[int]]]) -> None:
    async def main() -> None:
        with quick_directory() as directory:
            groups = [
                whole(
                    sequence,
                    [(b"k%d" % i, bytes(size)) for i, size in enumerate(values)],
                    [piece(1 + i, 0, b"d" * size) for i, size in enumerate(tails)],
                )
                for sequence, (values, tails) in enumerate(plan, 1)
            ]
            (await written(directory, groups, segment_size=4096)).close()
            result, found = load(directory)
            assert found == [g.ops for g in groups]
            closed(result)

    trio.run(main)


# ------------------------------------------------------------------------------------------------------------- damage


async def three_segments(directory: Path) -> list[Path]:
    (await written(directory, [group(n, piece(n, 0, b"t" * 3000)) for n in range(1, 7)])).close()
    paths = segments(directory)
    assert len(paths) >= 3
    return paths


async def test_a_missing_segment_is_said(tmp_path: Path) -> None:
    paths = await three_segments(tmp_path)
    for path in paths[:-1]:
        raw = path.read_bytes()
        path.unlink()
        with pytest.raises(Corrupt, match="recover"):
            load(tmp_path)
        path.write_bytes(raw)


async def test_damage_before_a_later_segment_is_said_wherever_it_is(tmp_path: Path) -> None:
    paths = await three_segments(tmp_path)
    rng = random.Random(5)
    for path in paths[:-1]:
        raw = path.read_bytes()
        used = len(raw.rstrip(b"\0"))
        for at in [0, 9, 20, 50, 100, HEADER_SIZE, *(rng.randrange(HEADER_SIZE, used - 8) for _ in range(40))]:
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
            with pytest.raises((Corrupt, BadArgument), match=path.name):
                load(tmp_path)
        path.write_bytes(raw)
    result, found = load(tmp_path)
    assert len(found) == 6
    closed(result)


async def test_a_journal_older_than_the_metadata_is_said(tmp_path: Path) -> None:
    (await written(tmp_path, [group(1), group(2)])).close()
    result, _ = load(tmp_path)
    closed(result)
    with pytest.raises(Corrupt, match="metadata hold commit 3"):
        load(tmp_path, held=3, chain=b"x" * HASH)
    with pytest.raises(Corrupt, match="do not belong together"):
        load(tmp_path, held=1, chain=b"x" * HASH)
    closed(load(tmp_path, held=2, chain=result.chain)[0])
    for path in segments(tmp_path):
        path.unlink()
    with pytest.raises(Corrupt, match="the journal is gone"):
        load(tmp_path, held=2, chain=result.chain)


async def test_operations_larger_than_a_segment_take_one_of_their_own_and_no_more(tmp_path: Path) -> None:
    """Where the journal is nearly full, another would not fit beside it."""
    journal = await written(tmp_path, [group(n) for n in range(1, 80)], segment_size=4096)
    assert [size > 9000 for size in journal.needed(9000, 0, 0)] == [True]
    assert len(journal.needed(9000, 100, 1)) > 1


async def test_records_of_an_earlier_life_of_a_file_never_come_back(tmp_path: Path) -> None:
    """A recycled segment is full of whole records; only the new header stands between them and a replay."""
    journal = await written(tmp_path, [group(n) for n in range(1, 320)], segment_size=16 * 1024)
    chain = journal._chain
    assert len(journal.live) > 2
    while journal.oldest() is not None:
        await journal.recycle(WORKER)
    used_again = 0
    for n in range(320, 520):
        await journal.prepare(journal.needed(200, 0, 0), WORKER)
        await journal.write(group(n), WORKER)
        if n in (320, 400, 519):
            copy = tmp_path / str(n)
            shutil.copytree(tmp_path / "journal", copy / "journal")
            result, found = load(copy, held=319, chain=chain)
            assert found == ops_of(*range(320, n + 1))
            closed(result)
        used_again = max(used_again, journal.live[-1].path.read_bytes()[journal.live[-1].used :].count(b"fJR1"))
    assert used_again > 5, "no recycled segment had old records behind the new ones: this test has checked nothing"
    journal.close()


async def test_an_epoch_or_salt_is_never_used_twice(tmp_path: Path) -> None:
    (await written(tmp_path, [group(1)], epoch=3)).close()
    for epoch, salt in ((3, b"n" * 16), (2, b"n" * 16), (4, SALT)):
        with pytest.raises(BadArgument, match="used before"):
            await written(tmp_path, [], epoch=epoch, salt=salt)


async def test_no_nonce_is_used_twice_in_an_epoch_even_after_a_failed_write(tmp_path: Path) -> None:
    journal = await written(tmp_path, [group(1, piece(1, 0, b"x"))])
    seen = journal._nonce
    with pytest.raises(OSError, match="boom"):
        await _failing(journal, group(2, piece(1, 1, b"y")))
    assert journal._nonce > seen
    journal.close()


async def _failing(journal: Journal, g: Group) -> None:
    class Boom(NoFailpoints):
        def hit(self, name: str) -> None:
            if name == "journal.append.before_fsync":
                raise OSError(5, "boom")

    journal._failpoints = Boom()
    await journal.write(g, WORKER)


async def test_a_tail_that_was_tampered_with_does_not_open(tmp_path: Path) -> None:
    (await written(tmp_path, [group(1, piece(5, 0, b"secret"))])).close()
    path = segments(tmp_path)[0]
    raw = bytearray(path.read_bytes())
    head = read_record(memoryview(bytes(raw)), HEADER_SIZE)
    assert head is not None
    raw[head.sealed_at] ^= 1
    # Even by somebody who makes the chain fit.
    raw[head.at + 72 : head.at + RECORD_HEAD] = digest(
        raw[head.at : head.at + 72], raw[head.at + RECORD_HEAD : head.sealed_at + head.sealed_length]
    )
    path.write_bytes(bytes(raw))
    result, _ = load(tmp_path)
    with pytest.raises(Corrupt, match="value 5"):
        tails_of(result)
    closed(result)


# ------------------------------------------------------------------------------------------------------------- anything


def survives(build: Callable[[Path], object]) -> None:
    with quick_directory() as directory:
        (directory / "journal").mkdir()
        build(directory / "journal")
        try:
            result, _ = load(directory)
        except (Corrupt, BadArgument, IOFailure):
            return
        closed(result)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=2000), min_size=1, max_size=3))
def test_arbitrary_files_raise_nothing_but_our_errors(files: list[bytes]) -> None:
    def build(journal: Path) -> None:
        for number, raw in enumerate(files, 1):
            (journal / f"segment-{number:016x}").write_bytes(raw)

    survives(build)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 1600))
def test_a_segment_changed_anywhere_raises_nothing_but_our_errors(changes: list[tuple[int, int]], cut: int) -> None:
    raw = bytearray(GOLDEN.read_bytes())
    for at, byte in changes:
        raw[at % len(raw)] = byte
    survives(lambda journal: journal.joinpath(f"segment-{1:016x}").write_bytes(bytes(raw[: cut or None])))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_an_arbitrary_body_is_decoded_or_corrupt(raw: bytes) -> None:
    try:
        decode_body(raw, 0, "here")
    except Corrupt:
        return


def test_a_body_whose_lengths_do_not_agree_is_corrupt() -> None:
    with pytest.raises(Corrupt, match="sealed bytes"):
        decode_body(encode_body([], [TailEntry(1, 0, 10, 0)]), 25, "here")
    for entry in (TailEntry(0, 0, 10, 0), TailEntry(1, -1, 10, 0), TailEntry(1, 0, 0, 0), TailEntry(1, 1 << 63, 10, 0)):
        with pytest.raises(Corrupt, match="impossible"):
            decode_body(encode_body([], [entry]), entry.length + 16, "here")
    with pytest.raises(Corrupt, match="impossible length"):
        decode_body(encode_body([(b"", b"x")], []), 0, "here")
