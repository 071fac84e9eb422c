"""Object Lock on real engines: a thief with the credentials deletes and overwrites every name, and everything is read back."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from botocore.exceptions import ClientError

from storage.creation import create_volume
from storage.errors import NotFound, NotPermitted
from storage.hosts.identity import claim_identity, probe
from storage.hosts.locking import LockedHost
from storage.hosts.opening import open_host
from storage.hosts.urls import parse_url
from storage.keyfile import CHEAP
from storage.pruning import open_pruner
from storage.recovery import recover_volume
from storage.seams import Seams
from storage.volume import Volume
from storage.wiring import open_volume
from tests.engines.fixtures import Engine
from tests.mounting import mounting_in
from tests.rig import PASSPHRASE, QUIET, append, contents, new_value, noise
from tests.rig import SECTOR as SECTOR_SIZE

_numbers = itertools.count()


@pytest.fixture(params=["moto", "seaweedfs"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return locked_bucket(request.getfixturevalue(request.param))


def locked_bucket(engine: Engine) -> Engine:
    """With a new bucket that has Object Lock."""
    bucket = f"locked{next(_numbers)}"
    engine.client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    return replace(engine, bucket=bucket)


def vandalize(engine: Engine) -> int:
    """All that the engine allows whoever has all rights: names deleted and overwritten, versions deleted where no lock keeps them."""
    client, bucket = engine.client, engine.bucket
    names = {entry["Key"] for page in _versions(engine) for entry in page.get("Versions", [])}
    for at, name in enumerate(sorted(names)):
        if at % 3 != 1:
            client.delete_object(Bucket=bucket, Key=name)
        if at % 3:
            client.put_object(Bucket=bucket, Key=name, Body=b"gone" * 50)
            client.put_object(Bucket=bucket, Key=name, Body=b"")
    for page in _versions(engine):
        for entry in page.get("Versions", []):
            if not entry["IsLatest"]:
                try:
                    client.delete_object(Bucket=bucket, Key=entry["Key"], VersionId=entry["VersionId"])
                except ClientError as error:
                    assert error.response["Error"]["Code"] in ("AccessDenied", "ObjectLocked")
    return len(names)


def _versions(engine: Engine) -> list[Any]:
    return list(engine.client.get_paginator("list_object_versions").paginate(Bucket=engine.bucket))


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Volume]:
    async with open_volume(path, passphrase=PASSPHRASE, options=replace(QUIET, cache=1)) as volume:
        yield volume


async def test_a_locked_bucket_keeps_versions_whatever_is_done_to_names(engine: Engine) -> None:
    seams = Seams()
    host = await open_host(parse_url(engine.url()), seams, create=True)
    assert isinstance(host, LockedHost)
    await claim_identity(host, seams)
    able = await probe(host, seams)
    assert able.object_lock and able.versions and able.conditional_put and able.ranges
    name = f"volumes/{'0' * 32}/sectors/ab/abcdef"
    until = time.time_ns() + 3600 * 10**9
    version = await host.put_locked(name, b"mine" * 10_000, until)
    await host.extend(name, version, until + 10**12)
    # Never shortened, and never an error for that.
    await host.extend(name, version, until)
    await host.put(name, b"other")
    await host.delete(name)
    with pytest.raises(NotFound):
        await host.get_range(name, 0, 10)
    first, second = await host.versions(name)
    assert first.version == version and first.size == 40_000 and second.size == 5
    assert await host.get_version(name, version, 2, 6) == b"nemine"
    assert await host.get_version(name, version, 0, 10**9) == b"mine" * 10_000
    assert await host.get_version(name, version, 40_000, 5) == b""
    assert [hidden.name async for hidden in host.hidden("volumes/")] == [name]
    assert "0" * 32 in await host.folders("volumes/")
    assert not await host.purge(name)
    assert [stored.version for stored in await host.versions(name)] == [version, second.version][: len(await host.versions(name))]
    await host.aclose()


async def test_what_a_thief_does_is_undone_by_the_locked_versions(engine: Engine, tmp_path: Path) -> None:
    urls = [engine.url(), engine.url()]
    await create_volume(tmp_path / "volume", PASSPHRASE, hosts=urls, replication="2", sector_size=SECTOR_SIZE, argon2=CHEAP)
    content = {}
    async with opened(tmp_path / "volume") as volume:
        for size in (3 * SECTOR_SIZE + 5, 20_000, 7):
            value = new_value(volume)
            content[value] = noise(size)
            await append(volume, value, content[value])
        await volume.flush()
        await volume.sectors.wait_uploads()
    assert vandalize(engine) > 10
    async with opened(tmp_path / "volume") as volume:
        for value, data in content.items():
            assert await contents(volume, value) == data
    vandalize(engine)
    # And from nothing but the passphrase and one of the hosts.
    await recover_volume(tmp_path / "again", urls[1:], passphrase=PASSPHRASE, argon2=CHEAP)
    async with opened(tmp_path / "again") as volume:
        for value, data in content.items():
            assert await contents(volume, value) == data


async def test_once_its_lock_is_over_a_version_can_be_purged(engine: Engine) -> None:
    seams = Seams()
    host = await open_host(parse_url(engine.url()), seams, create=True)
    assert isinstance(host, LockedHost)
    name = f"volumes/{'0' * 32}/contracts/x"
    # Below what `put_locked` gives: the engine's own clock cannot be turned.
    await host._locks.put(name, b"short", time.time_ns() + 2 * 10**9, new=True)
    await host.delete(name)
    assert not await host.purge(name)
    deadline = time.monotonic() + 30
    while not await host.purge(name):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert await host.versions(name) == [] and [hidden async for hidden in host.hidden("volumes/")] == []
    await host.aclose()


async def test_after_the_end_of_the_contract_it_can_be_pruned(
    moto: Engine, seaweedfs: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a contract of some seconds, on both at the same time: an engine's clock cannot be turned."""
    monkeypatch.setattr("storage.hosts.locking.SHORT_LOCK", 2.0)
    monkeypatch.setattr("storage.hosts.locked_shards.SHORT_LOCK", 2.0)
    async with trio.open_nursery() as nursery:
        for found in (moto, seaweedfs):
            nursery.start_soon(_end_and_prune, locked_bucket(found), tmp_path / found.name)


async def _end_and_prune(engine: Engine, path: Path) -> None:
    url, seconds = engine.url(), 20
    await create_volume(path, PASSPHRASE, hosts=[url], sector_size=SECTOR_SIZE, argon2=CHEAP, contract_days=seconds / 86400)
    ends = time.monotonic() + seconds
    async with opened(path) as volume:
        value = new_value(volume)
        await append(volume, value, noise(SECTOR_SIZE))
        await volume.flush()
        ends = min(ends, time.monotonic() + (volume.contractor.all_contracts()[-1].end_ns - time.time_ns()) / 1e9)
    async with open_pruner(url, grace_days=0) as pruner:
        (held,) = await pruner.survey()
        assert held.verdict == "in force" and not held.prunable
        await trio.sleep(max(0.0, ends - time.monotonic()) + 3.0)
        (held,) = await pruner.survey()
        assert held.prunable
        await pruner.prune(held)
        assert await pruner.survey() == []
    assert not [entry for page in _versions(engine) for entry in page.get("Versions", []) if "/volumes/" in entry["Key"]]


def without_deletions(moto: Engine, *, lock: bool) -> Engine:
    """A new bucket of moto's, which enforces policies: what a person would give to a machine whose backups must outlive it."""
    bucket = f"kept{next(_numbers)}"
    moto.client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=lock)
    actions = ["s3:DeleteObject", "s3:DeleteObjectVersion"]
    deny = {"Effect": "Deny", "Principal": "*", "Action": actions, "Resource": f"arn:aws:s3:::{bucket}/*"}
    moto.client.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [deny]}))
    return replace(moto, bucket=bucket)


def test_a_mount_works_with_credentials_that_may_not_delete(moto: Engine, tmp_path: Path) -> None:
    kept = without_deletions(moto, lock=True)
    with mounting_in(tmp_path) as mounting:
        volume = mounting.volume(hosts=[kept.url()], sector_size=SECTOR_SIZE)
        mounted = mounting.mount("commit_interval=1,flush_interval=1", volume=volume)
        files = {f"file{number}": noise(3000 * number) for number in range(1, 40)}
        for name, data in files.items():
            (mounted.path / name).write_bytes(data)
        for name in list(files)[::3]:
            (mounted.path / name).unlink()
            del files[name]
        (mounted.path / "file2").rename(mounted.path / "file3")
        files["file3"] = files.pop("file2")
        mounted.unmount()
        again = mounting.mount(volume=volume)
        assert {path.name: path.read_bytes() for path in again.path.iterdir()} == files
        (again.path / "more").write_bytes(b"more")
        again.unmount()
        assert mounting.mount(volume=volume).path.joinpath("more").read_bytes() == b"more"


async def test_who_may_not_delete_is_told_so_and_no_more(moto: Engine, tmp_path: Path) -> None:
    host = await open_host(parse_url(without_deletions(moto, lock=False).url()), Seams(), create=True)
    await host.put("a/b", b"1")
    with pytest.raises(NotPermitted, match="may not delete"):
        await host.delete("a/b")
    assert await host.get("a/b", 10) == b"1"
    await host.aclose()
