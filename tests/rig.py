"""A whole volume for tests of the layers below the names: cheap passphrase, hosts in memory or in directories, values by hand."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from storage.creation import create_volume
from storage.interfaces import Batch
from storage.keyfile import CHEAP
from storage.seams import Seams
from storage.volume import Volume, VolumeOptions
from storage.wiring import open_volume

PASSPHRASE = "correct horse"
SECTOR = 256 * 1024
#: Nothing happens by itself: tests gather, commit and flush when they mean to.
QUIET = VolumeOptions(
    flush_interval=1e6,
    commit_interval=None,
    scrub_interval=None,
    journal_segment=1024 * 1024,
    journal_limit=32 * 1024 * 1024,
    cache=8 * 1024 * 1024,
    staging=0,
)


def host_dirs(tmp_path: Path, count: int) -> list[str]:
    """URLs of `count` new directory hosts."""
    urls = []
    for i in range(count):
        (tmp_path / f"host{i}").mkdir(exist_ok=True)
        urls.append(f"dir:{tmp_path / f'host{i}'}")
    return urls


async def make(path: Path, hosts: Sequence[str] = (), replication: str = "1", sector_size: int = SECTOR, seams: Seams | None = None) -> str:
    """A volume with a cheap key slot; returns its phrase."""
    return await create_volume(path, PASSPHRASE, hosts=hosts, replication=replication, sector_size=sector_size, seams=seams, argon2=CHEAP)


@asynccontextmanager
async def opened(path: Path, *, seams: Seams | None = None, options: VolumeOptions = QUIET) -> AsyncIterator[Volume]:
    async with open_volume(path, passphrase=PASSPHRASE, seams=seams, options=options) as volume:
        yield volume


def new_value(volume: Volume, replication: str | None = None) -> int:
    """An empty value that belongs to no file."""
    batch = Batch()
    value_id = volume.values.create(batch, 0, replication or volume.config.replication)
    volume.store.apply(batch)
    return value_id


async def append(volume: Volume, value_id: int, data: bytes) -> None:
    await volume.values.reserve(value_id, len(data))
    volume.values.append_now(value_id, data)


async def contents(volume: Volume, value_id: int) -> bytes:
    """All of a value, in reads of a megabyte."""
    size = volume.values.size_of(value_id)
    parts = []
    for offset in range(0, size, 1 << 20):
        parts.append(await volume.values.read(value_id, offset, 1 << 20))
    return b"".join(parts)


def free(volume: Volume, value_id: int) -> None:
    batch = Batch()
    volume.values.free(batch, value_id)
    volume.store.apply(batch)


async def published(volume: Volume) -> None:
    """One round of publishing, as every `flush_interval`: what was freed leaves the hosts after two of them (I3)."""
    assert volume.publisher is not None
    await volume.publisher.tick()


def noise(size: int) -> bytes:
    return os.urandom(size)
