"""The conformance suites of the layers above HostIO, over every implementation there is."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from storage import open_volume
from storage.hosts.memory import forget_memory_hosts
from storage.interfaces import MetadataStore, SectorManager, Values
from storage.volume import Volume
from tests.conformance import sectors as sector_suite
from tests.conformance import values as value_suite
from tests.fake_values import FakeValues
from tests.fakes import MemoryStore
from tests.host_rig import FaultyOpener
from tests.rig import PASSPHRASE, QUIET, host_dirs, make, opened


@asynccontextmanager
async def sector_manager(kind: str, tmp_path: Path) -> AsyncIterator[SectorManager]:
    """Over directories, memory, or hosts of which one always fails: it must not matter."""
    forget_memory_hosts()
    urls = host_dirs(tmp_path, 3) if kind == "directories" else [f"mem:{name}" for name in "abc"]
    await make(tmp_path / "v", urls, "2")
    opener = FaultyOpener() if kind == "one failing" else None
    async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=QUIET, opener=opener) as volume:
        if opener is not None:
            opener.faults["mem:b"].gone = "on purpose"
        yield volume.sectors


@pytest.mark.parametrize("kind", ["directories", "memory", "one failing"])
@pytest.mark.parametrize("check", sector_suite.CHECKS, ids=lambda check: check.__name__)
async def test_sectors(check: Callable[[SectorManager], Awaitable[None]], kind: str, tmp_path: Path) -> None:
    async with sector_manager(kind, tmp_path) as sectors:
        await check(sectors)


@pytest.mark.parametrize("check", value_suite.CHECKS, ids=lambda check: check.__name__)
async def test_values_of_a_volume(check: Callable[[Values, MetadataStore, value_suite.Again], Awaitable[None]], tmp_path: Path) -> None:
    """Death is a copy of the directory: nothing is written while it is made, as nothing is awaited."""
    await make(tmp_path / "v", host_dirs(tmp_path, 1))
    async with AsyncExitStack() as stack:

        async def again() -> tuple[Values, MetadataStore]:
            await quiet(volume)
            shutil.copytree(tmp_path / "v", tmp_path / "later")
            # Dead: it tells the hosts nothing more, where the next one's epoch would fence it.
            volume.publisher = None
            later: Volume = await stack.enter_async_context(opened(tmp_path / "later"))
            return later.values, later.store

        volume: Volume = await stack.enter_async_context(opened(tmp_path / "v"))
        await check(volume.values, volume.store, again)


async def quiet(volume: Volume) -> None:
    """Until no thread of the store is at work: a copy made file by file would else be of no one moment."""
    await trio.sleep(0.3)


@pytest.mark.parametrize("check", value_suite.CHECKS, ids=lambda check: check.__name__)
async def test_the_values_that_other_tests_use(check: Callable[[Values, MetadataStore, value_suite.Again], Awaitable[None]]) -> None:
    store = MemoryStore()

    async def again() -> tuple[Values, MetadataStore]:
        later = store.crash()
        return FakeValues(later), later

    await check(FakeValues(store), store, again)
