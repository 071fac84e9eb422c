"""A metadata store for tests: small segments, an epoch of its own at each open, values whose tails behave like the real ones."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

from storage.interfaces import Batch, MetadataReader, TailPiece
from storage.metadata.keys import VALUE, read_u64, u64
from storage.metadata.opening import open_store
from storage.metadata.records import digest
from storage.metadata.store import Store
from storage.seams import Failpoints, Seams

SEGMENT = 4096
LIMIT = 64 * SEGMENT

#: Epochs only go up, whatever directory a test copies from where.
_epochs = itertools.count(1)


def journal_key(salt: bytes) -> bytes:
    return digest(b"test", salt)


def needed(reader: MetadataReader, value_id: int, end: int) -> bool:
    """A value's record is how many of its bytes are in sectors; no record: freed, or never made."""
    raw = reader.get(VALUE + u64(value_id))
    return raw is not None and read_u64(raw) < end


def seal(store: Store, value_id: int, upto: int, batch: Batch | None = None) -> None:
    """Its first `upto` bytes are in sectors now."""
    batch = batch or Batch()
    batch.put(VALUE + u64(value_id), u64(upto))
    store.apply(batch)


def put(store: Store, key: bytes, value: bytes, *tails: TailPiece) -> None:
    batch = Batch()
    batch.put(key, value)
    store.apply(batch, tails)


def piece(value_id: int, offset: int, *data: bytes) -> TailPiece:
    return TailPiece(value_id, offset, data)


@asynccontextmanager
async def opened(
    directory: Path, *, seams: Seams | None = None, failpoints: Failpoints | None = None, segment: int = SEGMENT, limit: int = LIMIT
) -> AsyncIterator[Store]:
    seams = seams or Seams()
    if failpoints is not None:
        seams = replace(seams, failpoints=failpoints)
    async with open_store(
        directory, seams, journal_key=journal_key, tail_needed=needed, segment_size=segment, limit_bytes=limit, map_size=1 << 30
    ) as store:
        epoch = next(_epochs)
        store.begin_epoch(epoch, epoch.to_bytes(16, "big"))
        yield store


def content(store: Store) -> dict[bytes, bytes]:
    """Everything in it but its own records."""
    return {key: value for key, value in store.scan(b"\0", b"\xff" * 8, 1 << 30) if key[:1] != b"J"}


def tail_of(store: Store, value_id: int) -> bytes:
    """The value's tail as recovery would put it together from what the journal had at open."""
    return assemble(store, dict(store.recovered_tails()).get(value_id, []), value_id)


def assemble(store: Store, pieces: list[tuple[int, bytes]], value_id: int) -> bytes:
    at = sealed = read_u64(store.get(VALUE + u64(value_id)) or bytes(8))
    out = b""
    for offset, data in pieces:
        if offset <= at < offset + len(data):
            out += data[at - offset :]
            at = sealed + len(out)
    return out


async def take_over(store: Store) -> None:
    """Have LMDB take over all that is durable, and recycle what can be."""
    takeover = store._takeover
    for _ in range(2):
        takeover.since = -1e12
        wanted = takeover.begun + 1
        takeover.kick()
        while takeover.ended < wanted:
            await takeover.passed.wait()


def copy(directory: Path, to: Path, ignore: Callable[[str, list[str]], set[str]] | None = None) -> Path:
    """What a crash now would leave, while commits may go on. Once more where the store's housekeeping renamed a file under the copy.

    The journal's segments come last and the newest of them first. What is in one then proves that those before it are whole by the time
    they are copied, as a crash would leave them; in any other order one could be copied before it is full, and the next after it was begun.
    """

    def but_segments(directory: str, names: list[str]) -> set[str]:
        return {name for name in names if name.startswith("segment-")} | (ignore(directory, names) if ignore else set())

    for attempt in range(20):
        try:
            there = segments(directory)
            shutil.copytree(directory, to, ignore=but_segments)
            # Those that were there when the metadata were copied must still be; there may be more.
            for path in sorted({*there, *segments(directory)}, reverse=True):
                shutil.copy2(path, to / "journal")
        except (shutil.Error, FileNotFoundError):
            if attempt == 19:
                raise
            shutil.rmtree(to)
            time.sleep(0.02)
        else:
            break
    return to


@contextmanager
def quick_directory() -> Iterator[Path]:
    """A directory where flushes cost nothing."""
    shm = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as name:
        yield Path(name)


def segments(directory: Path) -> list[Path]:
    """The journal's segment files, oldest first."""
    return sorted((directory / "journal").glob("segment-*"))


class CopyAt:
    """At the `nth` hit of `name`: copy the directory, and note what `state` says then."""

    def __init__(self, name: str, nth: int, directory: Path, to: Path) -> None:
        self.name, self.left, self.directory, self.to = name, nth, directory, to
        self.acknowledged = self.applied = 0
        self.at_copy: tuple[int, int] | None = None

    def hit(self, name: str) -> None:
        if name == self.name:
            self.left -= 1
            if self.left == 0:
                self.at_copy = (self.acknowledged, self.applied)
                copy(self.directory, self.to)


class FailAt:
    """From the nth hit of `name` on, for `times` hits: raise `error`."""

    def __init__(self, name: str, error: BaseException, nth: int = 1, times: int = 1 << 30) -> None:
        self.name, self.error, self.nth, self.times = name, error, nth, times
        self.hits: list[str] = []

    def hit(self, name: str) -> None:
        self.hits.append(name)
        if name == self.name:
            self.nth -= 1
            if self.nth <= 0 and self.times > 0:
                self.times -= 1
                raise self.error
