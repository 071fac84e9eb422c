"""Targets of what the loops note down for the next process: how far they are, what is to be done, and why something was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import msgspec
import trio

from storage.interfaces import Batch
from storage.metadata.keys import DOUBTED, MISPLACED, SECTOR, SETTING, prefix_end, read_u64, u32, u64
from storage.namespace.records import HandingDownRecord, decode_handing_down, encode_handing_down
from storage.renewal import Trouble, _day, decode_trouble
from storage.sectors.damage import BAD, BadRecord, Copy, Damages
from storage.sectors.doubts import MISSING, Doubts
from storage.sectors.reconcile import Reconciler
from storage.sectors.records import SectorRecord, ShardRecord
from storage.sectors.scrub import VERSION, PassRecord, Scrubber, _Pass
from storage.sectors.staging import STAGED, Staging
from storage.values.rewrite import Rewriter
from tests.fakes import ManualClock, MemoryStore, make_seams
from tests.fuzz.frames import VOLUME_ID
from tests.fuzz.target import Target, golden, same

_ID = "0123456789abcdef" * 2
_SEAMS = make_seams(clock=ManualClock())
_RECORD = SectorRecord(1, "2", 9, 9, 9, [ShardRecord(5, 41, bytes(32), [1, 2])]).encode()
#: In the place of what a loop has and its marks do not need.
_NOTHING = cast(Any, None)
#: Sector of the records that are there.
_SECTOR = 5


def _store(content: dict[bytes, bytes]) -> MemoryStore:
    return MemoryStore({SECTOR + u64(_SECTOR): _RECORD} | content)


def _renewal(data: bytes) -> None:
    """What is damaged is none."""
    found = decode_trouble(data)
    if found is not None:
        same(decode_trouble(found.encode()), found)
        _day(found.since_ns)


def _scrub_pass(data: bytes) -> None:
    """How far a pass was; what is damaged is forgotten, and a pass that goes on from it can be noted again."""
    store = _store({b"Lscrub.pass": data, b"Lscrub.last": data})
    damages: Any = Damages.__new__(Damages)
    damages.status, damages.listed = _Status(), 0
    scrubber = Scrubber(store=store, damages=damages, registry=_NOTHING, standing=_NOTHING, seams=_SEAMS, interval=60.0)
    msgspec.json.encode(scrubber.status())
    resumed = scrubber._resumed()
    scrubber._background = resumed
    batch = Batch()
    scrubber.save(batch)
    store.apply(batch)
    u64(min(resumed.following, 2**64 - 1))
    assert isinstance(resumed, _Pass)

    async def walked() -> None:
        await scrubber._some(resumed, 0, _NOTHING, _NOTHING)

    trio.run(walked)


class _Status:
    found = mended = 0
    lost: frozenset[int] = frozenset()
    trouble = ""


def _bad_copies(data: bytes) -> None:
    """A key on the list of bad copies."""
    damages: Any = Damages.__new__(Damages)
    damages._store, damages.listed = _store({BAD + u64(_SECTOR) + data: b""}), 1
    for host in damages.hosts(_SECTOR):
        u32(host)
    copy = Copy.of_key(BAD + data)
    same(copy.key, BAD + data)
    damages._named(copy)


def _staged(data: bytes) -> None:
    """Marks of staged sectors: by what follows the name in the key, and by the sector's record."""
    keys = [data, u64(_SECTOR)]
    for key in keys:
        store = _store({STAGED + key: b""} | ({SECTOR + u64(6): data, STAGED + u64(6): b""} if key is not data else {}))
        staging = Staging(Path("/nonexistent"), VOLUME_ID, store, _NOTHING, _SEAMS, limit=0)
        staging._load()
        staging.begin()
        for entry in staging.entries():
            assert entry.to_send >= 0
            staging.is_whole(entry)
        staging.following(0.0, ())


def _doubts(data: bytes) -> None:
    """The mark of a forgetful host, and of a doubted place, with whatever stands in their keys and values."""
    store = _store({SETTING + b"doubted." + data[:400]: data, DOUBTED + u64(_SECTOR) + data[:4]: data, DOUBTED + data[:400]: data})
    doubts = Doubts(store, _NOTHING, _NOTHING)
    doubts.of(_SECTOR)
    doubts.missing()
    trio.run(doubts.walk)
    batch = Batch()
    doubts.clear(batch, _SECTOR)
    store.apply(batch)


def _looking(data: bytes) -> None:
    """How far reconcile's look at all sectors has come; what is damaged begins anew."""
    reconciler: Any = Reconciler.__new__(Reconciler)
    reconciler._store = _store({SETTING + b"reconcile.look": data, SETTING + b"reconcile.keeping": data})
    u64(reconciler._resume([1, 2]))


def _misplaced(data: bytes) -> None:
    """The mark of a value that is being rewritten: value and key."""
    store = _store({MISPLACED + u64(7): data, MISPLACED + data[:400]: data})
    rewriter: Any = Rewriter.__new__(Rewriter)
    rewriter._store, rewriter._files, rewriter._pending, rewriter._done = store, 0, 0, 0
    rewriter._group, rewriter._wake, rewriter._trouble = _Group(), trio.Event(), ""
    trio.run(rewriter._count)
    batch = Batch()
    rewriter.mark(batch, 7, 2**40)
    rewriter._moved(batch, {7: 5})
    rewriter.forget(batch, 7)
    store.apply(batch)
    rewriter.status()
    for key, _ in store.scan(MISPLACED, prefix_end(MISPLACED), 10):
        read_u64(key, 1)


class _Group:
    values: dict[int, bool] = {}  # noqa: RUF012 - nobody writes to it


def _handing_down(data: bytes) -> None:
    record = decode_handing_down(5, data)
    same(decode_handing_down(5, encode_handing_down(record)), record)
    u64(record.after)


def _look_seeds() -> list[bytes]:
    return [msgspec.msgpack.encode([[1, 2], 5]), msgspec.msgpack.encode([1, 2])]


def _pass_seeds() -> list[bytes]:
    made = PassRecord(VERSION, 1, 0, 5, False, 1, 2, 3, 0, 0, 0, 0)
    lines = [bytes.fromhex(line.split("=")[1]) for line in golden("scrub.txt").decode().split() if "=" in line]
    return [msgspec.msgpack.encode(made), *lines]


TARGETS = (
    Target(
        "renewal",
        _renewal,
        lambda: [golden("renewal_trouble.bin"), Trouble(_ID, 1, "Unavailable", "why").encode()],
        shape="msgpack",
    ),
    Target("scrub_pass", _scrub_pass, _pass_seeds, shape="msgpack", rounds=600),
    Target(
        "bad_copies",
        _bad_copies,
        lambda: [u64(_SECTOR) + b"\0\0" + u32(1), msgspec.msgpack.encode(BadRecord(1, True, 5)), b"\0\0" + u32(9)],
    ),
    Target("staged", _staged, lambda: [u64(_SECTOR), _RECORD]),
    Target("doubts", _doubts, lambda: [b"12", u32(3), MISSING, b"4294967295", u64(_SECTOR) + u32(1)], rounds=800),
    Target("look", _looking, _look_seeds, shape="msgpack"),
    Target("misplaced", _misplaced, lambda: [u64(5), u64(2**64 - 1), b"\xff" * 9], rounds=800),
    Target("handing_down", _handing_down, lambda: [encode_handing_down(HandingDownRecord("4+2", 7)), b"\1"]),
)
