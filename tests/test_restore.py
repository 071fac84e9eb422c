"""Checkpoint and log from hosts into a new database: exactly what was cut, from whichever host has it, or an error that says why not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.epochs import Epoch, encode_epoch
from storage.errors import Corrupt, Exists, NotFound, Unavailable
from storage.history.objects import (
    CHUNK,
    INDEX,
    LOG,
    Delta,
    Ref,
    Tail,
    Writer,
    encode_chunk,
    encode_delta,
    encode_index,
    object_name,
    seal_object,
)
from storage.history.restore import Restored, restore
from storage.history.superblock import BODY_VERSION, Body, KnownEpoch, LogEntry, Superblock, encode_superblock
from storage.hosts.memory import MemoryContent, MemoryHost
from storage.interfaces import Batch, MetadataReader
from storage.keyfile import CHEAP, make_keyfile, make_slot
from storage.keys import Keys
from storage.metadata.keys import LOCAL, u64
from storage.metadata.lmdb_base import MAP_SIZE, LmdbBase
from storage.metadata.opening import open_store
from storage.metadata.records import Op
from storage.metadata.store import RESTORED_KEY
from storage.values.records import VERSION, ValueRecord, sealed_end, tail_needed, value_key
from tests.fakes import Crash, CrashAt, SeededRandom, make_seams

VOLUME = bytes(range(16))
KEYS = Keys(bytes(32))
SALT = b"s" * 16
RANDOM = SeededRandom(1)
EPOCH = Epoch(1, SALT, 1, 1_000, 1)
SLOTS = make_keyfile(VOLUME.hex(), (make_slot(bytes(32), "x", VOLUME.hex(), RANDOM, CHEAP),))


@dataclass
class Rig:
    """Hosts in memory, and superblocks made by hand."""

    contents: list[MemoryContent] = field(default_factory=lambda: [MemoryContent(), MemoryContent()])

    def hosts(self) -> list[MemoryHost]:
        return [MemoryHost(f"mem:h{number}", content) for number, content in enumerate(self.contents)]

    def put(self, kind: int, body: bytes) -> Ref:
        sealed = seal_object(KEYS.metadata_key(), Writer(VOLUME, 1, SALT), kind, body, RANDOM)
        for content in self.contents:
            content.objects[object_name(VOLUME, sealed.ref.name)] = sealed.data
        return sealed.ref

    def checkpoint(self, pairs: dict[bytes, bytes], sequence: int, chunk: int = 3, records: int | None = None) -> Ref:
        ordered = sorted(pairs.items())
        chunks = [self.put(CHUNK, encode_chunk(ordered[at : at + chunk])) for at in range(0, len(ordered), chunk)]
        return self.put(INDEX, encode_index(sequence, len(pairs) if records is None else records, 0, chunks))

    def entry(self, *parts: Delta) -> LogEntry:
        return LogEntry(parts[0].after, parts[0].upto, 0, [self.put(LOG, encode_delta(part)) for part in parts])

    def block(
        self, checkpoint: Ref | None, log: list[LogEntry], sequence: int, epochs: list[KnownEpoch] | None = None
    ) -> tuple[Superblock, Body]:
        body = Body(
            version=BODY_VERSION,
            predecessor=b"",
            config=b"",
            checkpoint=checkpoint,
            log=log,
            hosts=[],
            epochs=epochs or [KnownEpoch(1, SALT, 1)],
            machine="m",
            directory="d",
        )
        block = encode_superblock(
            KEYS.superblock_key(), volume_id=VOLUME, generation=1, sequence=sequence, written_ns=5, keys=SLOTS, body=body, random=RANDOM
        )
        return block, body

    async def restore(self, path: Path, made: tuple[Superblock, Body], **options: object) -> Restored:
        options.setdefault("seams", make_seams(real_threads=True))
        path.mkdir(exist_ok=True)
        return await restore(path, self.hosts(), KEYS, *made, sealed_of=sealed_end, **options)  # type: ignore[arg-type]


def content(path: Path) -> dict[bytes, bytes]:
    """What the database has that is the volume's."""
    base = LmdbBase(path / "metadata", MAP_SIZE)
    try:
        return {key: value for key, value in base.scan(b"\0", b"\xff", 10_000) if key[:1] not in (b"J", LOCAL)}
    finally:
        base.close()


def base_records() -> dict[bytes, bytes]:
    return dict([encode_epoch(EPOCH)])


def value(sealed: int) -> bytes:
    return ValueRecord(VERSION, 1, "1", sealed).encode()


_Ops = st.lists(st.tuples(st.integers(0, 12), st.one_of(st.none(), st.binary(max_size=6))), max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=_Ops, later=st.lists(_Ops, max_size=4), seen=st.integers(0, 4), chunk=st.integers(1, 5))
def test_a_fuzzy_checkpoint_and_the_log_since_give_the_exact_state(
    tmp_path_factory: pytest.TempPathFactory,
    first: list[tuple[int, bytes | None]],
    later: list[list[tuple[int, bytes | None]]],
    seen: int,
    chunk: int,
) -> None:
    """Whatever moment each record of the scan is of: here the even keys are of the beginning, the odd ones of up to `seen` deltas later."""

    def apply(state: dict[bytes, bytes], ops: list[tuple[int, bytes | None]]) -> dict[bytes, bytes]:
        state = dict(state)
        for number, data in ops:
            key = b"x%02d" % number
            if data is None:
                state.pop(key, None)
            else:
                state[key] = data
        return state

    states = [apply(base_records(), first)]
    for ops in later:
        states.append(apply(states[-1], ops))
    old, new = states[0], states[min(seen, len(later))]
    fuzzy = {k: v for k, v in old.items() if k[-1] % 2 == 0 or k[:1] == b"e"} | {k: v for k, v in new.items() if k[-1] % 2}
    rig = Rig()
    log = []
    for number, ops in enumerate(later):
        newest: dict[bytes, bytes | None] = {b"x%02d" % key: data for key, data in ops}
        log.append(rig.entry(Delta(10 + number, 11 + number, list(newest.items()))))
    made = rig.block(rig.checkpoint(fuzzy, 10, chunk), log, 10 + len(later))
    path = tmp_path_factory.mktemp("restored")
    trio.run(lambda: rig.restore(path, made))
    assert content(path) == states[-1]


async def test_a_store_opens_what_was_restored_and_goes_on_from_its_commit(tmp_path: Path) -> None:
    rig = Rig()
    made = rig.block(rig.checkpoint(base_records() | {b"xa": b"1"}, 7), [], 7)
    await rig.restore(tmp_path / "new", made)
    async with open_store(tmp_path / "new", make_seams(real_threads=True), journal_key=KEYS.journal_key, tail_needed=tail_needed) as store:
        assert store.get(b"xa") == b"1" and store.durable_sequence == 7
        store.begin_epoch(2, b"t" * 16)
        store.apply(Batch([(b"xa", b"2")]))
        assert await store.commit() == 8
    async with open_store(tmp_path / "new", make_seams(real_threads=True), journal_key=KEYS.journal_key, tail_needed=tail_needed) as store:
        assert store.get(b"xa") == b"2"


async def test_what_the_caller_amends_is_in_it(tmp_path: Path) -> None:
    rig = Rig()

    def amend(reader: MetadataReader, restored: Restored) -> Batch:
        assert reader.get(b"xa") == b"1" and restored.records == 2
        return Batch([(b"xa", b"amended")])

    await rig.restore(tmp_path / "new", rig.block(rig.checkpoint(base_records() | {b"xa": b"1"}, 7), [], 7), amend=amend)
    assert content(tmp_path / "new")[b"xa"] == b"amended"


async def test_an_object_damaged_on_one_host_comes_from_the_other(tmp_path: Path) -> None:
    rig = Rig()
    made = rig.block(rig.checkpoint(base_records() | {b"x%d" % n: b"v" for n in range(9)}, 7), [], 7)
    for number, name in enumerate(sorted(rig.contents[0].objects)):
        del rig.contents[number % 2].objects[name]
    name = next(iter(rig.contents[0].objects))
    rig.contents[1].objects[name] = b"?" * len(rig.contents[0].objects[name])
    result = await rig.restore(tmp_path / "new", made)
    assert len(content(tmp_path / "new")) == 10 and result.notes


async def test_an_object_nobody_has_is_named(tmp_path: Path) -> None:
    rig = Rig()
    made = rig.block(rig.checkpoint(base_records(), 7), [], 7)
    checkpoint = made[1].checkpoint
    assert checkpoint is not None
    rig.contents[0].objects[object_name(VOLUME, checkpoint.name)] = b"damaged"
    with pytest.raises(Corrupt, match=checkpoint.name[:26]):
        await _with(rig, [0], tmp_path / "one", made)
    for content_ in rig.contents:
        content_.objects.clear()
    with pytest.raises(Unavailable, match=checkpoint.name[:26]):
        await rig.restore(tmp_path / "two", made)


async def _with(rig: Rig, hosts: list[int], path: Path, made: tuple[Superblock, Body]) -> Restored:
    return await Rig([rig.contents[number] for number in hosts]).restore(path, made)


async def test_tails_are_what_is_in_no_sector(tmp_path: Path) -> None:
    """Of value 1 bytes from 100 on; value 2 is all in sectors by now; value 3 has gone."""
    rig = Rig()
    start = base_records() | {value_key(n): value(100) for n in (1, 2, 3)}
    log = [
        rig.entry(Delta(7, 8, [], [Tail(1, 90, b"a" * 30), Tail(2, 100, b"b" * 10), Tail(3, 100, b"c")])),
        # Two parts of one entry, overlapping what came before, out of order.
        rig.entry(
            Delta(8, 9, [(value_key(2), value(110))], [Tail(1, 130, b"e" * 5)]),
            Delta(8, 9, [(value_key(3), None)], [Tail(1, 110, b"a" * 10 + b"d" * 10)]),
        ),
    ]
    result = await rig.restore(tmp_path / "new", rig.block(rig.checkpoint(start, 7), log, 9))
    assert set(result.tails) == {1}
    at = 100
    for offset, data in result.tails[1]:
        assert offset == at
        at += len(data)
    assert b"".join(data for _, data in result.tails[1]) == b"a" * 20 + b"d" * 10 + b"e" * 5


async def test_a_gap_in_the_tails_is_no_volume(tmp_path: Path) -> None:
    rig = Rig()
    log = [rig.entry(Delta(7, 8, [], [Tail(1, 101, b"late")]))]
    made = rig.block(rig.checkpoint(base_records() | {value_key(1): value(100)}, 7), log, 8)
    with pytest.raises(Corrupt, match="lacks bytes 100 to 101 of value 1"):
        await rig.restore(tmp_path / "new", made)


async def test_a_claim_is_an_epoch_the_metadata_do_not_have(tmp_path: Path) -> None:
    rig = Rig()
    claim = KnownEpoch(4, b"c" * 16, 9)
    made = rig.block(rig.checkpoint(base_records(), 7), [], 7, [KnownEpoch(1, SALT, 1), claim])
    assert (await rig.restore(tmp_path / "new", made)).claims == [claim]


@pytest.mark.parametrize(
    "epochs",
    [
        [KnownEpoch(1, b"x" * 16, 1)],
        [KnownEpoch(1, SALT, 2)],
        [KnownEpoch(1, b"x" * 16, 1), KnownEpoch(2, SALT, 3)],
    ],
)
async def test_another_historys_epochs_are_not_mixed_in(tmp_path: Path, epochs: list[KnownEpoch]) -> None:
    """I5: superblock and metadata must tell one history."""
    rig = Rig()
    with pytest.raises(Corrupt, match="epoch"):
        await rig.restore(tmp_path / "new", rig.block(rig.checkpoint(base_records(), 7), [], 7, epochs))


async def test_an_epoch_missing_in_the_middle_is_no_claim(tmp_path: Path) -> None:
    rig = Rig()
    later = dict([encode_epoch(Epoch(3, b"t" * 16, 5, 1, 5))])
    epochs = [KnownEpoch(1, SALT, 1), KnownEpoch(2, b"m" * 16, 3), KnownEpoch(3, b"t" * 16, 5)]
    with pytest.raises(Corrupt, match="epoch 3"):
        await rig.restore(tmp_path / "new", rig.block(rig.checkpoint(base_records() | later, 7), [], 7, epochs))
    with pytest.raises(Corrupt, match="does not name"):
        await rig.restore(tmp_path / "other", rig.block(rig.checkpoint(base_records() | later, 7), [], 7, epochs[:1]))


async def test_checkpoint_and_log_that_do_not_meet_are_refused(tmp_path: Path) -> None:
    rig = Rig()
    checkpoint = rig.checkpoint(base_records(), 7)
    late = rig.entry(Delta(8, 9, []))
    early = rig.entry(Delta(3, 6, []))
    for number, (log, sequence) in enumerate([([late], 9), ([early], 6), ([], 8)]):
        with pytest.raises(Corrupt, match="checkpoint is of commit 7"):
            await rig.restore(tmp_path / f"new{number}", rig.block(checkpoint, log, sequence))
    with pytest.raises(NotFound, match="knows no checkpoint"):
        await rig.restore(tmp_path / "none", rig.block(None, [], 7))
    with pytest.raises(Corrupt, match="1 records instead of 2"):
        await rig.restore(tmp_path / "short", rig.block(rig.checkpoint(base_records(), 7, records=2), [], 7))


async def test_an_entry_under_anothers_place_in_the_log_is_refused(tmp_path: Path) -> None:
    rig = Rig()
    entry = rig.entry(Delta(7, 8, [(b"xa", b"1")]))
    swapped = LogEntry(7, 9, 0, entry.parts)
    with pytest.raises(Corrupt, match="not 7 to 9"):
        await rig.restore(tmp_path / "new", rig.block(rig.checkpoint(base_records(), 7), [swapped], 9))


@pytest.mark.parametrize("op", [(LOCAL + b"published", u64(1)), (b"Jsequence", u64(99)), (RESTORED_KEY, u64(8))])
async def test_records_of_another_directory_alone_are_refused(tmp_path: Path, op: Op) -> None:
    rig = Rig()
    with pytest.raises(Corrupt, match="no host is ever given"):
        await rig.restore(tmp_path / "new", rig.block(rig.checkpoint(base_records(), 7), [rig.entry(Delta(7, 8, [op]))], 8))


async def test_an_interrupted_restore_opens_as_nothing(tmp_path: Path) -> None:
    """At each of its steps: what is left is no store, unless the last step was done; and nothing is restored on top of it."""
    rig = Rig()
    log = [rig.entry(Delta(7, 8, [(b"xb", b"2")]))]
    made = rig.block(rig.checkpoint(base_records() | {b"xa": b"1"}, 7), log, 8)
    crashes = 0
    for nth in range(1, 20):
        path = tmp_path / f"new{nth}"
        points = CrashAt(None, nth)
        try:
            await rig.restore(path, made, seams=make_seams(real_threads=True, failpoints=points))
        except BaseException as error:
            if not isinstance(error, Crash):
                raise
            crashes += 1
        else:
            break
        if points.hits[-1] != "restore.done":
            seams = make_seams(real_threads=True)
            if (path / "metadata" / "data.mdb").exists() and points.hits.count("restore.before_write") > 1:
                with pytest.raises(Corrupt, match="the journal is gone"):
                    async with open_store(path, seams, journal_key=KEYS.journal_key, tail_needed=tail_needed):
                        raise AssertionError("it opened")
        with pytest.raises(Exists):
            await rig.restore(path, made)
    assert crashes >= 5


async def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    rig = Rig()
    seen: list[tuple[int, int]] = []
    log = [rig.entry(Delta(7, 8, [(b"xb", b"2")]))]
    made = rig.block(rig.checkpoint(base_records() | {b"x%d" % n: b"v" for n in range(20)}, 7), log, 8)
    await rig.restore(tmp_path / "new", made, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(done for done, _ in seen)
