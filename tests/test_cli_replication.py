"""`fusefs replication` through the real command line, on volumes that are mounted and that are not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli_runner import fusefs, init


@pytest.fixture
def mnt(tmp_path: Path) -> Iterator[Path]:
    hosts = [option for number in range(4) for option in ("--host", f"dir:{tmp_path / f'host{number}'}")]
    init(tmp_path / "volume", "--replication", "2", "--sector-size", "256K", *hosts)
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    fusefs("mount", tmp_path / "volume", mnt, "-o", "flush_interval=1,commit_interval=1")
    yield mnt
    fusefs("umount", mnt, expect=None)


def shown(path: Path | str) -> dict[str, Any]:
    return dict(json.loads(fusefs("replication", path, "--json").text))


def test_a_directory_of_a_mount_and_of_a_volume(mnt: Path) -> None:
    content = {f"a/{number}": os.urandom(200_000) for number in range(4)} | {"b/file": os.urandom(100), "a/sub/deep": os.urandom(50_000)}
    for name, data in content.items():
        (mnt / name).parent.mkdir(parents=True, exist_ok=True)
        (mnt / name).write_bytes(data)
    fusefs("flush", mnt)
    assert shown(mnt / "a/sub") | {"below": []} == {"path": "a/sub", "replication": "2", "own": "", "source": "", "below": []}
    fusefs("replication", mnt / "a", "3")
    (mnt / "a/new").write_bytes(content.setdefault("a/new", b"new"))
    with (mnt / "a/0").open("ab") as log:
        log.write(b"more")
        content["a/0"] += b"more"
        below = {one["replication"]: one for one in shown(mnt / "a")["below"]}
        assert (below["2"]["files"], below["3"]["files"], below["3"]["misplaced"]) == (5, 1, 0)
        assert shown(mnt / "a/sub")["source"] == "a"
        assert fusefs("replication", mnt / "a", "5", "--now", expect=2).err.count("\n") == 1
        assert fusefs("replication", mnt / "a/0", "3", expect=2).err.count("--now") == 1
        fusefs("replication", mnt / "a", "2+2", "--now")
        assert [(one["replication"], one["files"], one["misplaced"]) for one in shown(mnt / "a")["below"]] == [("2+2", 6, 0)]
        log.write(b"and more")
        content["a/0"] += b"and more"
    fusefs("replication", mnt / "b/file", "1", "--now", "--background")
    assert "2+2, its own" in fusefs("replication", mnt / "a").text
    fusefs("umount", mnt)
    volume = mnt.parent / "volume"
    assert shown(f"{volume}:b/file")["replication"] == "1"
    fusefs("replication", f"{volume}:a", "inherit", "--now")
    size = sum(len(data) for name, data in content.items() if name.startswith("a/"))
    assert shown(f"{volume}:a")["below"] == [{"replication": "2", "files": 6, "bytes": size, "misplaced": 0}]
    assert fusefs("cat", volume, *sorted(content)).out == b"".join(content[name] for name in sorted(content))
    fusefs("check", volume, "--data")
    assert fusefs("replication", f"{volume}:nothing", "2", expect=3).err
