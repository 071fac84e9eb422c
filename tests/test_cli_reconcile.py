"""`fusefs hosts add|leave|lost|back` and `fusefs repair` through the real command line, on volumes that are mounted and that are not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli_runner import fusefs, init
from tests.mounting import wait_until

NAMES = [f"file{i}" for i in range(6)]


@dataclass(frozen=True)
class Rig:
    base: Path
    mounted: bool

    @property
    def volume(self) -> Path:
        return self.base / "volume"

    def host(self, number: int) -> str:
        return f"dir:{self.base / f'host{number}'}"

    def shards(self, number: int) -> set[str]:
        return {path.name for path in (self.base / f"host{number}").glob("volumes/*/sectors/*/*")}

    def states(self) -> list[str]:
        return [host["state"] for host in json.loads(fusefs("status", self.volume, "--json").text)["hosts"]]

    def check(self, content: dict[str, bytes]) -> None:
        for name, data in content.items():
            read = (self.base / "mnt" / name).read_bytes() if self.mounted else fusefs("cat", self.volume, name).out
            assert read == data, name


@pytest.fixture
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Rig, dict[str, bytes]]]:
    """Three hosts, two copies of every sector, some files; mounted, unless the test asks for both."""
    rig = Rig(tmp_path, getattr(request, "param", True))
    hosts = [option for number in (1, 2, 3) for option in ("--host", rig.host(number))]
    init(rig.volume, "--replication", "2", "--sector-size", "256K", *hosts)
    content = {name: os.urandom(300_000) for name in NAMES}
    if not rig.mounted:
        for name in NAMES[2:]:
            del content[name]
        for name, data in content.items():
            fusefs("put", rig.volume, "-", name, stdin=data)
        yield rig, content
        return
    (tmp_path / "mnt").mkdir()
    fusefs("mount", rig.volume, tmp_path / "mnt", "-o", "flush_interval=1,commit_interval=1")
    try:
        for name, data in content.items():
            (tmp_path / "mnt" / name).write_bytes(data)
        fusefs("flush", tmp_path / "mnt")
        yield rig, content
    finally:
        fusefs("umount", tmp_path / "mnt", expect=None)


def test_a_host_that_is_left_can_be_unplugged(rig: tuple[Rig, dict[str, bytes]]) -> None:
    it, content = rig
    fusefs("hosts", it.volume, "leave", it.host(1))
    assert "every sector is as it should be" in fusefs("repair", it.volume).text
    assert it.states()[0] == "left"
    shutil.rmtree(it.base / "host1")
    it.check(content)
    assert it.shards(2) == it.shards(3)


def test_a_lost_host_s_sectors_are_made_again(rig: tuple[Rig, dict[str, bytes]]) -> None:
    it, content = rig
    shutil.rmtree(it.base / "host2")
    # As it was given to `add`: relative to where the person is.
    fusefs("hosts", it.volume, "lost", "dir:host2", cwd=it.base)
    fusefs("repair", it.volume)
    assert it.shards(1) == it.shards(3) and it.shards(1)
    it.check(content)
    assert "as it should be" in fusefs("repair", it.volume).text


@pytest.mark.parametrize("rig", [True, False], ids=["mounted", "unmounted"], indirect=True)
def test_with_too_few_hosts_it_says_so_and_goes_on_once_there_is_another(rig: tuple[Rig, dict[str, bytes]]) -> None:
    it, content = rig
    fusefs("hosts", it.volume, "leave", "1")
    fusefs("hosts", it.volume, "lost", "2")
    said = fusefs("repair", it.volume, expect=1).text
    assert "not as it should be" in said and "add a host" in said
    # Whether everything had left the first one before the second was lost is a matter of moments.
    assert it.states() in (["left", "lost", "ok"], ["leaving", "lost", "ok"])
    assert "host 4" in fusefs("hosts", it.volume, "add", it.host(4), "--contract", "30").text
    fusefs("repair", it.volume)
    assert it.states() == ["left", "lost", "ok", "ok"]
    assert it.shards(4) >= it.shards(1) | it.shards(3)
    it.check(content)


def test_a_mount_does_it_by_itself_and_a_new_host_gets_its_share(rig: tuple[Rig, dict[str, bytes]]) -> None:
    it, content = rig
    fusefs("hosts", it.volume, "add", "dir:host4#domain=elsewhere", cwd=it.base)
    wait_until(lambda: len(it.shards(4)) >= 2, "the new host to get sectors", 20)
    fusefs("hosts", it.volume, "leave", "1")
    wait_until(lambda: it.states()[0] == "left", "the host to be left", 20)
    wait_until(lambda: not it.shards(1), "the host to be empty", 30)
    it.check(content)
    fusefs("hosts", it.volume, "back", "1")
    assert it.states()[0] == "ok"


def test_bad_input_says_what_is_wrong(tmp_path: Path) -> None:
    it = Rig(tmp_path, False)
    init(it.volume, "--host", it.host(1))
    assert "needs URL" in fusefs("hosts", it.volume, "add", expect=2).err
    assert "needs HOST" in fusefs("hosts", it.volume, "leave", expect=2).err
    assert "--contract goes with add" in fusefs("hosts", it.volume, "leave", "1", "--contract", "3", expect=2).err
    assert "ftp" in fusefs("hosts", it.volume, "add", "ftp://x", expect=2).err
    assert "7" in fusefs("hosts", it.volume, "leave", "7", expect=3).err
    twice = fusefs("hosts", it.volume, "add", it.host(1), expect=None)
    assert twice.status and "already" in twice.err
