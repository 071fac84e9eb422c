"""Volumes and mounts on real engines: SeaweedFS, moto, azurite, rclone."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from storage.checking import Finding, check_volume
from storage.keyfile import CHEAP
from storage.recovery import recover_volume
from tests.cli_runner import ROOT, fusefs
from tests.engines.fixtures import Engine
from tests.engines.seaweedfs import Cluster
from tests.mount_child import PASSPHRASE as MOUNT_PASSPHRASE
from tests.mounting import Mounting, mounting_in, wait_until
from tests.rig import PASSPHRASE, QUIET, SECTOR, append, contents, make, new_value, noise, opened

#: Nothing is served from memory.
COLD = replace(QUIET, cache=1)


@pytest.fixture
def mounting(tmp_path: Path) -> Iterator[Mounting]:
    with mounting_in(tmp_path) as made:
        yield made


@pytest.mark.parametrize("name", ["seaweedfs", "moto", "azurite", "rclone"])
async def test_a_volume_is_kept_checked_and_recovered_on_every_engine(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    engine: Engine = request.getfixturevalue(name)
    urls = [engine.url(), engine.url()]
    await make(tmp_path / "volume", urls, "2")
    content = {}
    async with opened(tmp_path / "volume", options=replace(COLD, staging=1 << 28)) as volume:
        for size in (2 * SECTOR + 5, 30_000, 7):
            value = new_value(volume)
            content[value] = noise(size)
            await append(volume, value, content[value])
        report = await volume.flush()
        assert not report.degraded_sectors and not report.reasons
    assert list((tmp_path / "volume").glob("staging/volumes/*/sectors/*/*")), "such hosts are far away"
    shutil.rmtree(tmp_path / "volume" / "staging")
    async with opened(tmp_path / "volume", options=COLD) as volume:
        for value, data in content.items():
            assert await contents(volume, value) == data
        able = [record.capabilities.conditional_put for record in volume.hosts.records()]
        assert able == [name != "rclone"] * 2
    findings: list[Finding] = []
    await check_volume(tmp_path / "volume", passphrase=PASSPHRASE, data=True, on_finding=findings.append)
    # That these values belong to no file is found; and nothing else is.
    assert [found for found in findings if "value" not in str(found)] == []
    # And from nothing but one of the hosts and the passphrase.
    await recover_volume(tmp_path / "again", urls[1:], passphrase=PASSPHRASE, argon2=CHEAP)
    async with opened(tmp_path / "again", options=COLD) as volume:
        for value, data in content.items():
            assert await contents(volume, value) == data


async def test_a_host_without_true_conditional_puts_has_no_vote(rclone: Engine, tmp_path: Path) -> None:
    """Of one such host and two others, these two decide (I5); what it holds counts as copies all the same."""
    hosts = [f"dir:{tmp_path}/one", rclone.url(), f"dir:{tmp_path}/two"]
    await make(tmp_path / "volume", hosts, "3")
    async with opened(tmp_path / "volume", options=COLD) as volume:
        assert volume.publisher is not None
        assert [side.number for side in volume.publisher.fleet.voters()] == [1, 3]
        value = new_value(volume)
        await append(volume, value, data := noise(2 * SECTOR))
        await volume.flush()
    for gone in ("one", "two"):
        (tmp_path / gone).rename(tmp_path / f"{gone}.away")
    await recover_volume(tmp_path / "again", hosts[1:2], passphrase=PASSPHRASE, argon2=CHEAP)
    async with opened(tmp_path / "again", options=COLD) as volume:
        assert await contents(volume, value) == data


def test_a_volume_server_is_killed_and_restarted_under_load(seaweedfs: Engine, mounting: Mounting, tmp_path: Path) -> None:
    """Through a mount: a writer and a reader go on, nothing is wrong in between, and everything compares, also mounted anew."""
    cluster = seaweedfs.server
    assert isinstance(cluster, Cluster)
    hosts = [seaweedfs.url(), seaweedfs.url()]
    volume = mounting.volume(hosts=hosts, replication="2", sector_size=256 * 1024)
    # Of 20 MiB a reader finds little here: the rest it gets from the engine, whole or not.
    mounted = mounting.mount("commit_interval=1,flush_interval=1,cache=1M,staging=8M", volume=volume)
    expected: dict[str, str] = {}
    wrong: list[str] = []
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set() and number < 400:
            data = os.urandom(200_000 + number)
            (mounted.path / f"file{number}").write_bytes(data)
            expected[f"file{number}"] = hashlib.sha256(data).hexdigest()
            number += 1
            time.sleep(0.02)

    def read() -> None:
        while not stop.is_set():
            for name, digest in list(expected.items()):
                with open(mounted.path / name, "rb") as file:
                    # Else the kernel would have it from the first time.
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    if hashlib.sha256(file.read()).hexdigest() != digest:
                        wrong.append(name)
                if stop.is_set():
                    return
            time.sleep(0.01)

    def received() -> int:
        with mounted.control() as control:
            return sum(day.received for host in control.status().volume.hosts for day in host.days)

    threads = [threading.Thread(target=write, daemon=True), threading.Thread(target=read, daemon=True)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(expected) >= 100, "a load", 60)
        cluster.kill("volume1")
        before, read_before = len(expected), received()
        wait_until(lambda: len(expected) >= before + 30, "writing goes on", 60)
        wait_until(lambda: received() >= read_before + 2**20, "reading from the hosts goes on", 60)
        cluster.start("volume1")
        before = len(expected)
        wait_until(lambda: len(expected) >= before + 10, "writing goes on", 60)
    finally:
        stop.set()
        if not cluster.running()["volume1"]:
            cluster.start("volume1")
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
    with mounted.control() as control:
        report = control.flush()
    assert report.degraded_sectors == 0, report
    mounted.unmount()
    again = mounting.mount(volume=volume)
    for name, digest in expected.items():
        assert hashlib.sha256((again.path / name).read_bytes()).hexdigest() == digest
    again.unmount()
    checked = subprocess.run(
        [sys.executable, "-m", "fusefs", "check", volume, "--data"],
        env={**os.environ, "FUSEFS_PASSPHRASE": MOUNT_PASSPHRASE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_what_a_host_can_do_is_said_when_it_is_added_and_shown(seaweedfs: Engine, rclone: Engine, tmp_path: Path) -> None:
    volume = str(tmp_path / "volume")
    able, unable = seaweedfs.url(), rclone.url()
    said = fusefs("init", volume, "--host", able).err
    assert f"{able}: conditional puts, ranges" in said.splitlines()[0]
    said = fusefs("hosts", volume, "add", unable).err
    assert "whole objects only; no conditional puts: it does not count for a majority" in said
    lines = fusefs("hosts", "-l", volume).text.splitlines()
    assert "conditional puts, ranges " in next(line for line in lines if able in line)
    assert "does not count for a majority" in next(line for line in lines if unable in line)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda url: url.replace("s3://fusefs/", "s3://not-there/"), "there is no bucket 'not-there'"),
        (lambda url: url.replace("credentials=", "credentials=/no"), "cannot be read"),
        (lambda url: url.replace("endpoint=http://127.0.0.1:", "endpoint=http://127.0.0.1:1#"), "unknown fragment"),
        (lambda url: url.replace("s3://", "s3://AKIA:HIDE@"), "looks like a secret"),
    ],
)
def test_a_host_that_cannot_be_used_is_one_line_and_no_volume(
    change: Callable[[str], str], says: str, seaweedfs: Engine, tmp_path: Path
) -> None:
    done = fusefs("init", tmp_path / "volume", "--host", change(seaweedfs.url()), expect=None)
    assert done.status in (2, 10)
    line = done.error_line
    assert says in line
    assert "HIDE" not in line
    assert not (tmp_path / "volume").exists()


def test_scripts_seaweedfs_starts_a_cluster_and_serves_what_an_earlier_one_left(tmp_path: Path) -> None:
    """As the README walks through it."""

    def script(action: str, expect: int = 0) -> str:
        command = [sys.executable, "-m", "tests.engines.seaweedfs", action, str(tmp_path / "cluster")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == expect, done.stderr
        return done.stdout + done.stderr

    def variables(said: str) -> dict[str, str]:
        pairs = re.findall(r"^export (\w+)='?([^'\n]*)'?$", said, re.MULTILINE)
        return dict(pairs)

    assert "no cluster was started" in script("down", 1)
    volume, env = str(tmp_path / "volume"), variables(script("up"))
    try:
        assert set(env) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "FUSEFS_S3"}
        # In a second shell: the same keys, and no second cluster.
        assert variables(script("up")) == env
        fusefs("init", volume, "--host", env["FUSEFS_S3"], env=env)
        fusefs("put", volume, "-", "file", stdin=b"content" * 1000, env=env)
    finally:
        script("down")
    assert "does not run" in script("status", 1)
    again = variables(script("up"))
    try:
        assert variables(script("status")) == again
        # The same endpoint, unless somebody has taken its port: then the volume is found again by its host's id.
        fusefs("recover", f"{volume}2", "--host", again["FUSEFS_S3"], env=again)
        assert fusefs("cat", f"{volume}2", "file", env=again).out == b"content" * 1000
    finally:
        script("down")
