"""`fusefs check` through the real command line: its lines, its JSON, its exit statuses."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli_runner import fusefs, init
from tests.test_check import Store, edit_inode, edit_sector, shard_of
from tests.test_cli_volume import put

CLEAN, REPAIRED, LEFT = 0, 20, 21


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hosts, two copies, three files."""
    place = tmp_path_factory.mktemp("made")
    hosts = [word for name in ("host0", "host1") for word in ("--host", f"dir:{place / name}")]
    init(place / "v", "--replication", "2", *hosts)
    put(place / "v", "logs/today", b"a line\n" * 1000)
    put(place / "v", "logs/\x1b[31mred\n", b"a name that must not reach the terminal as it is")
    put(place / "v", "other", b"data")
    return place


@pytest.fixture
def volume(made: Path) -> Iterator[Path]:
    """The volume as it was made; hosts know their paths, so it is put back there after each test."""
    backup = made.with_name("backup")
    shutil.copytree(made, backup, symlinks=True)
    yield made / "v"
    shutil.rmtree(made)
    backup.rename(made)


def copies(volume: Path, root: Path) -> list[Path]:
    return sorted(volume.parent.glob(f"host*/volumes/*/{root}"))


def test_a_healthy_volume_is_one_line_and_0(volume: Path) -> None:
    done = fusefs("check", volume, "--data", expect=CLEAN)
    assert done.text.startswith("nothing found: 3 files, ")
    assert done.text.count("\n") == 1
    assert done.err == ""


def test_findings_are_a_line_each_repaired_once_and_then_gone(volume: Path) -> None:
    store = Store(volume)
    edit_inode(store, "logs/today", nlink=5)
    key = b"s" + store.extents_of("other")[0].sector_id.to_bytes(8, "big")
    # With its live bytes the index of small sectors is wrong, too, until they are put right.
    edit_sector(store, key, live=1)
    store.close()
    told = fusefs("check", volume, expect=LEFT).text.splitlines()
    assert told[0] == (
        "found: /logs/today: it says it has 5 links, and has 1; it would be removed too early, or never: run fusefs check --repair"
    )
    assert told[-1].startswith("3 found, 0 repaired, 3 left: ")
    mended = fusefs("check", volume, "--repair", expect=REPAIRED).text.splitlines()
    assert mended[0] == "repaired: /logs/today: it says it has 5 links, and has 1"
    assert mended[-1].startswith("2 found, 2 repaired, 0 left: ")
    *notes, last = fusefs("check", volume, "--repair", expect=CLEAN).text.splitlines()
    assert last.startswith("nothing found")
    # What was repaired is on no host before the next mount.
    assert [note.split(":")[:2] for note in notes] == [["note", " hosts"]]
    assert fusefs("cat", volume, "logs/today").out == b"a line\n" * 1000


def test_what_is_lost_is_said_with_the_file_and_left(volume: Path) -> None:
    store = Store(volume)
    root = shard_of(store, "logs/today")
    store.close()
    for copy in copies(volume, root):
        copy.unlink()
    lines = fusefs("check", volume, "--repair", expect=LEFT).text.splitlines()
    assert sum("its copy on host dir:" in line for line in lines) == 2
    assert any(line.startswith("found: /logs/today: bytes 0 to 7000 are in sector") for line in lines), lines


def test_a_lost_copy_is_made_again(volume: Path) -> None:
    store = Store(volume)
    root = shard_of(store, "logs/today")
    store.close()
    copy = copies(volume, root)[0]
    sealed = copy.read_bytes()
    copy.unlink()
    assert "; a new one is on host dir:" in fusefs("check", volume, "--repair", expect=REPAIRED).text
    assert copy.read_bytes() == sealed


def test_json_is_an_object_per_finding_and_one_with_the_totals(volume: Path) -> None:
    store = Store(volume)
    edit_inode(store, "logs/today", nlink=5)
    store.close()
    finding, totals = (json.loads(line) for line in fusefs("check", volume, "--json", expect=LEFT).text.splitlines())
    assert finding["kind"] == "links"
    assert finding["where"] == "/logs/today"
    assert finding["repaired"] is finding["note"] is False
    assert set(finding) == {"kind", "where", "what", "consequence", "remedy", "repaired", "note"}
    assert (totals["found"], totals["repaired"], totals["left"], totals["kinds"]) == (1, 0, 1, {"links": 1})
    assert totals["looked_at"]["files"] == 3


def test_names_cannot_play_tricks(volume: Path) -> None:
    store = Store(volume)
    edit_inode(store, "logs/\x1b[31mred\n", nlink=3)
    store.close()
    done = fusefs("check", volume, expect=LEFT)
    assert "\x1b" not in done.text
    assert len(done.text.splitlines()) == 2


def test_a_host_that_is_away_is_a_finding(volume: Path) -> None:
    (volume.parent / "host1").rename(volume.parent / "away")
    done = fusefs("check", volume, expect=LEFT)
    assert done.text.count("found: host dir:") == 1
    assert "bring the host back" in done.text


def test_what_cannot_be_checked_has_the_status_of_what_is_wrong(volume: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in fusefs("check", tmp_path / "nothing", expect=2).error_line
    fusefs("check", volume, env={"FUSEFS_PASSPHRASE": "wrong"}, expect=12)
    (volume / "metadata" / "data.mdb").write_bytes(b"x" * 100_000)
    done = fusefs("check", volume, "--repair", expect=None)
    assert done.status in (9, 14)
    assert len(done.err.splitlines()) == 1


def test_a_mounted_volume_is_busy(volume: Path, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    fusefs("mount", volume, mountpoint, "--log", tmp_path / "log")
    try:
        line = fusefs("check", volume, expect=7).error_line
        assert f"is mounted at {mountpoint}; unmount it first" in line
    finally:
        fusefs("umount", mountpoint, expect=None)
        if f" {mountpoint} " in Path("/proc/self/mountinfo").read_text():
            subprocess.run(["fusermount3", "-u", "-z", mountpoint], check=False)
    fusefs("check", volume, expect=CLEAN)
