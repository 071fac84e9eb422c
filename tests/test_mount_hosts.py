"""Hosts that are damaged, cut off, swapped, foreign or full, as a program on the mount sees them."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounting import Mounting, mounting_in, wait_until

SECTOR = 256 * 1024


@pytest.fixture
def mounting(tmp_path: Path) -> Iterator[Mounting]:
    with mounting_in(tmp_path) as made:
        yield made


def hosts_in(base: Path, count: int) -> list[Path]:
    paths = [base / "hosts" / f"{i}" for i in range(count)]
    for path in paths:
        path.mkdir(parents=True)
    return paths


def shards(host: Path) -> list[Path]:
    return sorted(path for path in host.rglob("*") if path.is_file() and "/sectors/" in str(path))


def damaged(shard: Path) -> None:
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 0x40
    shard.write_bytes(raw)


def cut_off(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def swapped(shard: Path) -> None:
    other = next(path for path in shards(shard.parents[4]) if path != shard)
    one, two = shard.read_bytes(), other.read_bytes()
    shard.write_bytes(two)
    other.write_bytes(one)


def foreign(shard: Path) -> None:
    shard.write_bytes(os.urandom(shard.stat().st_size))


def missing(shard: Path) -> None:
    shard.unlink()


@pytest.mark.parametrize("harm", [damaged, cut_off, swapped, foreign, missing])
def test_the_other_copy_is_read_and_with_none_good_it_is_eio_for_that_range_alone(mounting: Mounting, tmp_path: Path, harm: object) -> None:
    hosts = hosts_in(tmp_path, 2)
    volume = mounting.volume(hosts=[f"dir:{host}" for host in hosts], replication="2", sector_size=SECTOR)
    mounted = mounting.mount(volume=volume)
    data = os.urandom(10 * SECTOR)
    (mounted.path / "file").write_bytes(data)
    mounted.unmount()

    # A full one: on a slow machine there are partly filled ones as well, which were merged since and are read by nobody.
    victim = [shard for shard in shards(hosts[0]) if shard.stat().st_size > SECTOR * 3 // 4][3]
    harm(victim)  # type: ignore[operator]
    for _ in range(3):
        mounted = mounting.mount(volume=volume)
        assert (mounted.path / "file").read_bytes() == data
        mounted.unmount()

    # Whether or not the bad one has been put right meanwhile: now both are bad.
    for shard in [*shards(hosts[0]), *shards(hosts[1])]:
        if shard.name == victim.name:
            foreign(shard)
    mounted = mounting.mount(volume=volume)
    good = bad = 0
    with open(mounted.path / "file", "rb", buffering=0) as file:
        for offset in range(0, len(data), 4096):
            try:
                piece = os.pread(file.fileno(), 4096, offset)
            except OSError as error:
                assert error.errno == errno.EIO
                bad += 1
            else:
                assert piece == data[offset : offset + 4096]
                good += 1
    assert bad > 0
    assert good > 0
    assert "no copy can be read" in mounted.logged()
    assert mounted.process.poll() is None


def test_full_hosts_say_no_space_keep_everything_and_go_on_when_there_is_room(mounting: Mounting, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], check=True)
    try:
        volume = mounting.volume(hosts=[f"dir:{disk / 'host'}"], sector_size=SECTOR)
        mounted = mounting.mount("commit_interval=1,flush_interval=2", volume=volume)
        accepted, log = 0, mounted.path / "log"
        block = b"".join(b"%015d\n" % i for i in range(4096))
        said = None
        with open(log, "ab", buffering=0) as file:
            for i in range(10_000):
                try:
                    wrote = file.write(block)
                    os.fsync(file.fileno()) if i % 16 == 15 else None
                except OSError as error:
                    said = error.errno
                    break
                accepted += wrote or 0
        assert said in (errno.ENOSPC, errno.EDQUOT)
        assert accepted > 20 << 20
        wait_until(lambda: log.stat().st_size % 16 == 0 and log.stat().st_size <= accepted, "the size is what is stored", 30)
        stored = log.stat().st_size
        content = log.read_bytes()
        assert content == (block * (stored // len(block) + 1))[:stored]
        # A file that was there before is still readable, and names can still be made and removed.
        (mounted.path / "name").mkdir()
        (mounted.path / "name").rmdir()

        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        deadline = time.monotonic() + 60
        while True:
            try:
                with open(log, "ab", buffering=0) as file:
                    file.write(b"goes on\n")
                    os.fsync(file.fileno())
                break
            except OSError as error:
                assert error.errno in (errno.ENOSPC, errno.EDQUOT)
                assert time.monotonic() < deadline, "still no space"
                time.sleep(0.5)
        assert log.read_bytes().rstrip(b"\n").endswith(b"goes on")
        assert b"\0" not in log.read_bytes()
        assert log.read_bytes().replace(b"goes on\n", b"") == content
        mounted.unmount()
        mounted = mounting.mount(volume=volume)
        assert (mounted.path / "log").read_bytes().startswith(content)
        mounted.unmount()
    finally:
        mounting.end()
        subprocess.run(["umount", "-l", disk], check=False)


def test_with_all_hosts_gone_it_mounts_writes_and_is_killed_and_everything_drains_when_they_are_back(mounting: Mounting) -> None:
    """Staging under a real mount: what no host has survives kill -9, is read, and goes to the hosts with a later mount."""
    places = [mounting.base / f"host{number}" for number in range(2)]
    options = "commit_interval=1,flush_interval=1,writeback"
    volume = mounting.volume(hosts=[f"dir:{place}" for place in places], replication="2", sector_size=SECTOR)
    content = {name: os.urandom(2 * SECTOR) for name in ("before", "during", "after")}
    mounted = mounting.mount(options, volume=volume)
    (mounted.path / "before").write_bytes(content["before"])
    mounted.control().flush()
    for place in places:
        place.rename(place.with_suffix(".away"))
    with open(mounted.path / "during", "wb") as file:
        file.write(content["during"])
        file.flush()
        os.fsync(file.fileno())
    staged = volume / "staging"
    wait_until(lambda: len(list(staged.glob("volumes/*/sectors/*/*"))) >= 3, "the sectors are staged", 60)
    mounted.kill()

    mounted = mounting.mount(options, volume=volume)
    assert (mounted.path / "during").read_bytes() == content["during"]
    with pytest.raises(OSError) as refused:
        (mounted.path / "before").read_bytes()
    assert refused.value.errno == errno.EIO
    (mounted.path / "after").write_bytes(content["after"])
    now = mounted.control().status().volume
    assert any("cannot be read before that host is back" in warning for warning in now.warnings)
    mounted.unmount()

    for place in places:
        place.with_suffix(".away").rename(place)
    mounted = mounting.mount(options, volume=volume)
    report = mounted.control().flush()
    assert not report.degraded_sectors
    assert not mounted.control().status().volume.staging.sectors
    mounted.unmount()
    shutil.rmtree(staged)
    mounted = mounting.mount(options, volume=volume)
    for name, data in content.items():
        assert (mounted.path / name).read_bytes() == data
    mounted.unmount()


def test_nothing_readable_reaches_a_host(mounting: Mounting, tmp_path: Path) -> None:
    hosts = hosts_in(tmp_path, 2)
    volume = mounting.volume(hosts=[f"dir:{host}" for host in hosts], replication="2")
    mounted = mounting.mount(volume=volume)
    (mounted.path / "my-secret-directory").mkdir()
    (mounted.path / "my-secret-directory" / "my-secret-name").write_bytes(b"my secret content\n" * 1000)
    mounted.unmount()
    for host in hosts:
        assert shards(host)
        for path in host.rglob("*"):
            assert b"secret" not in os.fsencode(path.name)
            if path.is_file():
                assert b"secret" not in path.read_bytes()
    for path in volume.rglob("*"):
        if path.is_file():
            assert b"my secret content" not in path.read_bytes()


@pytest.mark.parametrize("program", ["restic", "borg"])
def test_a_backup_repository(mounting: Mounting, tmp_path: Path, program: str) -> None:
    """Back up, change, back up, check, restore; unmount in between."""
    source = tmp_path / "source"
    shutil.copytree(Path(__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {
        **os.environ,
        "RESTIC_PASSWORD": "x",
        "BORG_PASSPHRASE": "x",
        "BORG_BASE_DIR": str(tmp_path / "borg"),
        "RESTIC_CACHE_DIR": str(tmp_path / "cache"),
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
    }

    def run(*command: object, cwd: Path | None = None) -> None:
        done = subprocess.run(
            [str(part) for part in command], env=environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    def mount() -> Path:
        # Borg 1.x overwrites a hard-linked config in place; refused links make it copy instead.
        mounted.append(mounting.mount("commit_interval=2,link=deny" if program == "borg" else "commit_interval=2"))
        return mounted[-1].path / "repository"

    mounted: list = []
    restored = tmp_path / "restored"
    repository = mount()
    if program == "restic":
        run("restic", "-r", repository, "init")
        run("restic", "-r", repository, "backup", source)
    else:
        run("borg", "init", "--encryption", "repokey-blake2", repository)
        run("borg", "create", f"{repository}::one", source)
    (source / "changed").write_bytes(os.urandom(3 << 20))
    mounted[-1].unmount()
    repository = mount()
    if program == "restic":
        run("restic", "-r", repository, "backup", source)
        run("restic", "-r", repository, "check", "--read-data")
        run("restic", "-r", repository, "restore", "latest", "--target", restored)
        run("restic", "-r", repository, "forget", "--keep-last", "1", "--prune")
        run("restic", "-r", repository, "check")
    else:
        run("borg", "create", f"{repository}::two", source)
        run("borg", "check", "--verify-data", repository)
        restored.mkdir()
        run("borg", "extract", f"{repository}::two", cwd=restored)
        run("borg", "delete", f"{repository}::one")
        run("borg", "compact", repository)
        run("borg", "check", repository)
    run("diff", "-r", source, restored / source.relative_to("/"))
    mounted[-1].unmount()
