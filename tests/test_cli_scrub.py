"""`fusefs scrub` through the real command line, on volumes that are mounted and that are not; and a mount that needs nobody to ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusefs.control_client import ControlClient
from storage import ScrubStatus
from storage.errors import Busy, FusefsError
from tests.cli_runner import environment, fusefs, init, quick
from tests.mounting import wait_until


@dataclass(frozen=True)
class Rig:
    """Hosts host1 and host2, the volume, perhaps mounted on mnt."""

    base: Path

    @property
    def volume(self) -> Path:
        return self.base / "volume"

    @property
    def mountpoint(self) -> Path:
        return self.base / "mnt"

    def make(self, hosts: int = 2) -> None:
        named = [option for number in range(1, hosts + 1) for option in ("--host", f"dir:{self.base}/host{number}")]
        init(self.volume, "--replication", str(hosts), "--sector-size", "64K", *named)
        self.mountpoint.mkdir()

    @contextmanager
    def mounted(self, options: str) -> Iterator[None]:
        fusefs("mount", self.volume, self.mountpoint, "-o", f"flush_interval=1,commit_interval=1,{options}")
        try:
            yield
        finally:
            fusefs("umount", self.mountpoint, expect=None)

    def shards(self, number: int) -> list[Path]:
        return sorted((self.base / f"host{number}").glob("volumes/*/sectors/*/*"))

    def everything(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for number in (1, 2) for path in self.shards(number)}

    def told(self) -> ScrubStatus:
        """By the process that has it mounted."""
        with ControlClient.connect(self.volume) as client:
            return client.status().volume.scrub


def spoil(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def test_on_a_mount_what_is_damaged_is_found_told_and_repaired(tmp_path: Path) -> None:
    it = Rig(tmp_path)
    it.make()
    data = os.urandom(700_000)
    with it.mounted("cache=1M,scrub_interval=off"):
        (it.mountpoint / "file").write_bytes(data)
        fusefs("flush", it.mountpoint)
        good = it.everything()
        count = len(it.shards(1))
        said = fusefs("scrub", it.mountpoint).text
        assert said.startswith(f"all good: {2 * count} copies of {count} sectors, a block of each read")
        it.shards(1)[0].unlink()
        spoil(it.shards(2)[1])
        report = json.loads(fusefs("scrub", it.mountpoint, "--full", "--json", expect=20).text)
        assert (report["missing"], report["damaged"], report["repaired"], report["lost"], report["left"]) == (1, 1, 2, 0, 0)
        assert report["full"] is True
        assert it.everything() == good
        assert (it.mountpoint / "file").read_bytes() == data
        assert "2 bad copies, 2 repaired" in fusefs("status", it.mountpoint).text
        # Of one shard both copies: nobody has it any more.
        twins = [it.shards(number)[0] for number in (1, 2)]
        for twin in twins:
            spoil(twin)
        told = fusefs("scrub", it.mountpoint, "--full", expect=21).text
        assert "1 sector cannot be had" in told and "0 missing, 2 damaged, 0 repaired, 2 left" in told
        assert "cannot be had" in fusefs("status", it.mountpoint).text
        # The disk comes back from its rescuer, and the other copy is made of it.
        twins[0].write_bytes(good[twins[0]])
        fusefs("repair", it.mountpoint)
        assert it.everything() == good
        assert it.told().pending == 0
        # A host that is away is no damage.
        (tmp_path / "host2").rename(tmp_path / "elsewhere")
        told = fusefs("scrub", it.mountpoint, expect=21).text
        assert f"no answer from dir:{tmp_path}/host2" in told and "missing" not in told
        (tmp_path / "elsewhere").rename(tmp_path / "host2")
        assert it.told().pending == 0


def test_without_a_mount_the_same(tmp_path: Path) -> None:
    it = Rig(tmp_path)
    it.make()
    data = os.urandom(200_000)
    fusefs("put", it.volume, "-", "file", stdin=data)
    good = it.everything()
    it.shards(1)[0].unlink()
    spoil(it.shards(2)[1])
    report = json.loads(fusefs("scrub", it.volume, "--full", "--json", expect=20).text)
    assert (report["missing"], report["damaged"], report["repaired"], report["left"]) == (1, 1, 2, 0)
    assert it.everything() == good
    for number in (1, 2):
        spoil(it.shards(number)[0])
    assert "0 missing, 2 damaged, 0 repaired, 2 left" in fusefs("scrub", it.volume, "--full", expect=21).text
    # Whoever opens it later knows from the list that they are bad.
    assert "not repaired yet" in (status := fusefs("status", it.volume).text) or "cannot be had" in status


def test_bad_input_says_what_is_wrong(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for sample in ("0", "1.5", "nan", "many"):
        assert "sample" in quick(capfd, "scrub", str(tmp_path), "--sample", sample, expect=2).err
    for interval in ("0", "-1", "soon", "1e9", "nan"):
        assert "scrub_interval" in quick(capfd, "mount", str(tmp_path), str(tmp_path), "-o", f"scrub_interval={interval}", expect=2).err
    assert "not a fusefs volume" in fusefs("scrub", tmp_path, expect=2).error_line


def test_a_mount_looks_by_itself_and_mends_what_a_reader_meets(tmp_path: Path) -> None:
    it = Rig(tmp_path)
    it.make()
    data = os.urandom(500_000)
    # A pass in ten seconds.
    with it.mounted("scrub_interval=0.000116"):
        (it.mountpoint / "file").write_bytes(data)
        fusefs("flush", it.mountpoint)
        good = it.everything()
        it.shards(1)[1].unlink()
        wait_until(lambda: it.everything() == good, "the copy to be there again", 60)
        wait_until(lambda: it.told().last_ended_ns > 0, "a pass to end", 60)
        assert it.told().repaired_since == 1
    with it.mounted("scrub_interval=off,cache=64K"):
        # Some of each host: whichever the reader asks first.
        for path in it.shards(1)[::2] + it.shards(2)[1::2]:
            spoil(path)
        assert (it.mountpoint / "file").read_bytes() == data
        wait_until(lambda: it.told().repaired_since > 0 and it.told().pending == 0, "what was met to be mended", 60)
        assert json.loads(fusefs("scrub", it.mountpoint, "--full", "--json", expect=None).text)["left"] == 0
        assert it.everything() == good


def test_a_scrub_on_a_mount_ends_with_the_command_and_another_one_is_refused(tmp_path: Path) -> None:
    it = Rig(tmp_path)
    it.make(1)
    with it.mounted("scrub_interval=off"):
        (it.mountpoint / "file").write_bytes(os.urandom(8 << 20))
        fusefs("flush", it.mountpoint)
        for path in it.shards(1):
            # Each is looked at twice: it lasts.
            path.write_bytes(b"")
        command = subprocess.Popen([sys.executable, "-m", "fusefs", "scrub", str(it.mountpoint)], env=environment(), stdout=-3)
        wait_until(lambda: it.told().found_since >= 1, "the scrub to begin", 60)
        assert isinstance(attempt(it), Busy)
        command.kill()
        command.wait()
        wait_until(lambda: not isinstance(attempt(it), Busy), "the scrub to end", 60)


def attempt(it: Rig) -> FusefsError | None:
    """What a scrub of next to nothing is answered with."""
    try:
        with ControlClient.connect(it.volume) as client:
            client.scrub(False, 0.001)
    except FusefsError as error:
        return error
    return None
