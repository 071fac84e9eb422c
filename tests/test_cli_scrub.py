"""`fusefs scrub` through the real command line, on volumes that are mounted and that are not; and a mount that needs nobody to ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli_runner import environment, fusefs
from tests.mounting import wait_until


@dataclass(frozen=True)
class Rig:
    base: Path
    mounted: bool

    @property
    def volume(self) -> Path:
        return self.base / "volume"

    @property
    def target(self) -> Path:
        """What a person names."""
        return self.base / "mnt" if self.mounted else self.volume

    def shards(self, number: int) -> list[Path]:
        return sorted((self.base / f"host{number}").glob("volumes/*/sectors/*/*"))

    def status(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = json.loads(fusefs("status", self.target, "--json").text)
        return found

    def check(self, content: dict[str, bytes]) -> None:
        for name, data in content.items():
            read = (self.base / "mnt" / name).read_bytes() if self.mounted else fusefs("cat", self.volume, name).out
            assert read == data, name


@pytest.fixture(params=[True, False], ids=["mounted", "unmounted"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Rig, dict[str, bytes]]]:
    """Two hosts, two copies of every sector, some files."""
    it = Rig(tmp_path, request.param)
    hosts = [option for number in (1, 2) for option in ("--host", f"dir:{tmp_path}/host{number}")]
    fusefs("init", it.volume, "--replication", "2", "--sector-size", "256K", *hosts)
    content = {"a": os.urandom(700_000), "b": os.urandom(300_000)}
    if not it.mounted:
        for name, data in content.items():
            fusefs("put", it.volume, "-", name, stdin=data)
        yield it, content
        return
    (tmp_path / "mnt").mkdir()
    fusefs("mount", it.volume, tmp_path / "mnt", "-o", "flush_interval=1,commit_interval=1,cache=1M,scrub_interval=off")
    try:
        for name, data in content.items():
            (tmp_path / "mnt" / name).write_bytes(data)
        fusefs("flush", tmp_path / "mnt")
        yield it, content
    finally:
        fusefs("umount", tmp_path / "mnt", expect=None)


def test_what_is_damaged_is_found_told_and_repaired(rig: tuple[Rig, dict[str, bytes]]) -> None:
    it, content = rig
    said = fusefs("scrub", it.target).text
    shards = [it.shards(1), it.shards(2)]
    assert said.startswith(f"all good: {len(shards[0]) * 2} copies of {len(shards[0])} sectors, a block of each read")
    good = {path: path.read_bytes() for paths in shards for path in paths}
    missing, damaged = shards[0][0], shards[1][1]
    missing.unlink()
    damaged.write_bytes(bytes(damaged.stat().st_size))
    report = json.loads(fusefs("scrub", it.target, "--full", "--json", expect=20).text)
    assert (report["missing"], report["damaged"], report["repaired"], report["lost"], report["left"]) == (1, 1, 2, 0, 0)
    assert report["full"] is True
    assert {path: path.read_bytes() for path in good} == good
    assert fusefs("scrub", it.target, "--full").text.startswith("all good: ")
    it.check(content)
    # The copies of one shard on both hosts: nobody has it any more.
    twins = [paths[0] for paths in shards]
    for twin in twins:
        twin.write_bytes(b"nothing")
    told = fusefs("scrub", it.target, expect=21).text
    assert "1 sectors cannot be had" in told and "0 missing, 2 damaged, 0 repaired, 2 left" in told
    status = fusefs("status", it.target).text
    # Whoever has just opened it knows from the list only that they are bad, and has not tried yet.
    assert "cannot be had" in status or "not repaired yet" in status
    # A rescued disk comes back, and a repair makes the other copy of it.
    twins[0].write_bytes(good[twins[0]])
    fusefs("repair", it.target)
    assert {path: path.read_bytes() for path in good} == good
    assert json.loads(fusefs("scrub", it.target, "--sample", "0.5", "--json").text)["left"] == 0
    assert it.status()["scrub"]["pending"] == 0
    it.check(content)


def test_a_host_that_is_away_is_told_and_is_no_damage(rig: tuple[Rig, dict[str, bytes]]) -> None:
    it, _ = rig
    (it.base / "host2").rename(it.base / "elsewhere")
    told = fusefs("scrub", it.target, expect=21).text
    assert f"no answer from dir:{it.base}/host2" in told and "missing" not in told
    (it.base / "elsewhere").rename(it.base / "host2")
    if it.mounted:
        wait_until(lambda: fusefs("scrub", it.target, expect=None).status == 0, "the host to be back", 40)
    else:
        assert fusefs("scrub", it.target).status == 0


def test_bad_input_says_what_is_wrong(tmp_path: Path) -> None:
    fusefs("init", tmp_path / "volume", "--host", f"dir:{tmp_path}/host")
    for sample in ("0", "1.5", "nan", "many"):
        assert "sample" in fusefs("scrub", tmp_path / "volume", "--sample", sample, expect=2).err
    assert fusefs("scrub", tmp_path, expect=2).error_line
    for interval in ("0", "-1", "soon", "1e9"):
        assert "scrub_interval" in fusefs("mount", tmp_path / "volume", tmp_path, "-o", f"scrub_interval={interval}", expect=2).err


def test_a_mount_looks_by_itself_and_mends_what_a_reader_meets(tmp_path: Path) -> None:
    it = Rig(tmp_path, True)
    hosts = [option for number in (1, 2) for option in ("--host", f"dir:{tmp_path}/host{number}")]
    fusefs("init", it.volume, "--replication", "2", "--sector-size", "256K", *hosts)
    (tmp_path / "mnt").mkdir()
    data = os.urandom(700_000)
    # A pass in ten seconds.
    fusefs("mount", it.volume, tmp_path / "mnt", "-o", "flush_interval=1,commit_interval=1,scrub_interval=0.000116")
    try:
        (tmp_path / "mnt" / "file").write_bytes(data)
        fusefs("flush", tmp_path / "mnt")
        shards = it.shards(1)
        good = shards[1].read_bytes()
        shards[1].unlink()
        wait_until(lambda: shards[1].exists() and shards[1].read_bytes() == good, "the copy to be there again", 40)
        wait_until(lambda: it.status()["scrub"]["last_ended_ns"] > 0, "a pass to end", 40)
        told = fusefs("status", tmp_path / "mnt").text
        assert "found since it was opened: 1 bad copy, 1 repaired" in told
    finally:
        fusefs("umount", tmp_path / "mnt", expect=None)
    fusefs("mount", it.volume, tmp_path / "mnt", "-o", "scrub_interval=off,cache=64K")
    try:
        # Both: whichever host the reader asks first.
        others = [paths[0] for paths in (it.shards(1), it.shards(2))]
        good = others[0].read_bytes()
        for path in it.shards(1)[::2] + it.shards(2)[1::2]:
            path.write_bytes(path.read_bytes()[:-1] + b"?")
            assert path.read_bytes() != good or path not in others
        assert (tmp_path / "mnt" / "file").read_bytes() == data
        wait_until(lambda: it.status()["scrub"]["found_since"] >= 1, "the damage to be met", 20)
        wait_until(lambda: it.status()["scrub"]["pending"] == 0, "it to be mended", 20)
        assert json.loads(fusefs("scrub", tmp_path / "mnt", "--full", "--json", expect=None).text)["left"] == 0
        assert fusefs("scrub", tmp_path / "mnt", "--full").text.startswith("all good")
    finally:
        fusefs("umount", tmp_path / "mnt", expect=None)


def test_a_scrub_on_a_mount_ends_with_the_command(tmp_path: Path) -> None:
    it = Rig(tmp_path, True)
    fusefs("init", it.volume, "--sector-size", "64K", "--host", f"dir:{tmp_path}/host1")
    (tmp_path / "mnt").mkdir()
    fusefs("mount", it.volume, tmp_path / "mnt", "-o", "flush_interval=1,commit_interval=1")
    try:
        (tmp_path / "mnt" / "file").write_bytes(os.urandom(8 << 20))
        fusefs("flush", tmp_path / "mnt")
        for path in it.shards(1):
            # Each takes a second look: it lasts.
            path.write_bytes(b"")
        command = subprocess.Popen(
            [sys.executable, "-m", "fusefs", "scrub", str(tmp_path / "mnt")], env=environment(), stdout=subprocess.DEVNULL
        )
        wait_until(lambda: it.status()["scrub"]["found_since"] >= 1, "the scrub to begin", 30)
        command.kill()
        command.wait()
        wait_until(lambda: fusefs("scrub", tmp_path / "mnt", "--sample", "0.01", expect=None).status != 7, "the scrub to end", 20)
    finally:
        fusefs("umount", tmp_path / "mnt", expect=None)
