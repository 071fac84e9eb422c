"""Hosts deleted under a mount that is in use: programs go on, and after a repair every sector is complete again on the hosts left or added.

More pairs of hosts, chosen at random: FUSEFS_HOST_LOSS_ROUNDS.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from storage import open_volume
from tests.cli_runner import ROOT, fusefs
from tests.complete import incomplete, records
from tests.mount_child import PASSPHRASE
from tests.mounting import Mounted, Mounting, mounting_in, wait_until
from tests.steady import content

ROUNDS = int(os.environ.get("FUSEFS_HOST_LOSS_ROUNDS", "1"))
SECTOR = 256 * 1024
#: A small cache, so that reads ask hosts.
OPTIONS = "commit_interval=0.5,flush_interval=0.3,cache=1M"
MIB = 1 << 20


@pytest.fixture
def mounting(tmp_path: Path) -> Iterator[Mounting]:
    with mounting_in(tmp_path) as made:
        yield made


@dataclass
class Steady:
    """The two programs of `tests.steady` on one file of a mount."""

    base: Path
    file: Path
    seed: str
    programs: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def start(self, *what: str) -> None:
        for name in what:
            self.programs[name] = subprocess.Popen(
                [sys.executable, "-S", "-m", "tests.steady", name, self.file, self.base / f"{name}.notes", self.seed],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )

    def done(self, name: str) -> int:
        """Bytes."""
        try:
            text = (self.base / f"{name}.notes").read_text()
        except FileNotFoundError:
            return 0
        return int(text.rpartition("\n")[0].rpartition("\n")[2] or 0)

    def go_on(self, size: int) -> None:
        """Until each has done so many bytes more."""
        wanted = {name: self.done(name) + size for name in self.programs}

        def reached() -> bool:
            for name, program in self.programs.items():
                if program.poll() is not None:
                    raise AssertionError(f"{name} ended with {program.returncode}: {program.stderr.read() if program.stderr else ''}")
            return all(self.done(name) >= end for name, end in wanted.items())

        wait_until(reached, f"both programs go on, {wanted}", 60)

    def stop(self) -> None:
        """Neither has met an error, or a wrong byte."""
        for name, program in self.programs.items():
            program.terminate()
            _, said = program.communicate(timeout=30)
            assert program.returncode == 0, f"{name}: {said}"
        self.programs.clear()

    def kill(self) -> None:
        for program in self.programs.values():
            program.kill()
            program.wait()


def delete(host: Path) -> None:
    """As `rm -rf`, again and again while something is being put there."""
    while host.exists():
        shutil.rmtree(host, ignore_errors=True)


def same(path: Path, seed: str, size: int) -> bool:
    return path.stat().st_size == size and path.read_bytes() == content(seed)[:size]


async def complete(volume: Path, hosts: set[int]) -> list[str]:
    """Opened without a mount: every shard on every host, see `incomplete`; on no others than `hosts`."""
    async with open_volume(volume, passphrase=PASSPHRASE) as opened:
        found = records(opened)
        assert len(found) > 5
        used = {host for record in found.values() for shard in record.shards for host in shard.hosts}
        return [*await incomplete(opened), *([f"hosts in use: {used}"] if not used <= hosts else [])]


@pytest.mark.timeout(120 + 60 * ROUNDS)
@pytest.mark.parametrize(("replication", "count"), [("4+2", 6), ("3", 4)])
def test_any_two_hosts_may_be_deleted_under_a_writer_and_a_reader(mounting: Mounting, tmp_path: Path, replication: str, count: int) -> None:
    seed = str(random.SystemRandom().randrange(1 << 32))
    print("seed", seed)
    chance = random.Random(seed)
    hosts = {number: tmp_path / f"host{number}" for number in range(1, count + 1)}
    volume = mounting.volume(hosts=[f"dir:{path}" for path in hosts.values()], replication=replication, sector_size=SECTOR)
    mounted: Mounted | None = None
    for lap in range(ROUNDS):
        base = tmp_path / f"lap{lap}"
        base.mkdir()
        mounted = mounting.mount(OPTIONS, volume=volume)
        steady = Steady(base, mounted.path / f"file{lap}", f"{seed}/{lap}")
        try:
            steady.start("write")
            steady.go_on(MIB)
            steady.start("read")
            steady.go_on(MIB)
            victims = chance.sample(sorted(hosts), 2)
            print("deleted:", victims)
            for number in victims:
                delete(hosts.pop(number))
                steady.go_on(chance.randrange(MIB // 4))
            steady.go_on(MIB)
            needed = 6 if replication == "4+2" else 3
            with mounted.control() as client:
                for number in victims:
                    client.mark(str(number), "lost")
                for _ in range(chance.randint(max(1, needed - len(hosts)), 2)):
                    count += 1
                    hosts[count] = tmp_path / f"host{count}"
                    assert client.add_host(f"dir:{hosts[count]}", None) == count
            repaired = fusefs("repair", mounted.path, expect=None)
            assert repaired.text == "every sector is as it should be\n", f"{repaired}, {mounted.logged()[-5000:]}"
            steady.go_on(MIB)
            steady.stop()
        finally:
            steady.kill()
        size = steady.done("write")
        assert same(mounted.path / f"file{lap}", steady.seed, size)
        mounted.unmount()
        assert trio.run(complete, volume, set(hosts)) == []
        fusefs("check", volume, "--data")
    mounted = mounting.mount(OPTIONS, volume=volume)
    for lap in range(ROUNDS):
        path = mounted.path / f"file{lap}"
        assert same(path, f"{seed}/{lap}", path.stat().st_size)
    mounted.unmount()
