"""The machine is lost, at rest or at random moments, and now and then a host with it: what was flushed, or acknowledged, comes back.

Hundreds: scripts/torture lost.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli_runner import fusefs, init
from tests.torture_rig import ByCommand, LostRounds, temporary

ROUNDS = int(os.environ.get("FUSEFS_TORTURE_ROUNDS", "5"))
LIMIT = 60 + 30 * ROUNDS
HOSTS = 3


@pytest.fixture
def base() -> Iterator[Path]:
    with temporary() as path:
        yield path


def plant(root: Path) -> None:
    """Everything a tree can have."""
    dice = random.Random(7)
    (root / "d").mkdir()
    (root / "d" / "empty dir").mkdir(mode=0o700)
    for number, size in enumerate((0, 1, 4095, 70_000, 300_001)):
        path = root / "d" / f"file{number}"
        path.write_bytes(dice.randbytes(size))
        os.chown(path, 1000 + number, 2000)
        path.chmod((0o640, 0o4755, 0o2711, 0o400, 0o666)[number])
        os.utime(path, ns=(10**18 + number, 12 * 10**17 + 123_456_789))
    os.link(root / "d" / "file3", root / "second name \udcff\n")
    os.symlink("d/\udcfe nowhere", root / "link")
    os.chown(root / "link", 5, 6, follow_symlinks=False)
    os.mkfifo(root / "pipe", 0o600)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket"))
    with open(root / "holes", "wb") as file:
        file.truncate(2_000_000)
        file.seek(1_000_000)
        file.write(b"in the middle")
    os.setxattr(root / "holes", "user.note", b"\0value")
    os.setxattr(root / "d", "user.empty", b"")
    with open(root / "appended", "ab") as file:
        for _ in range(50):
            file.write(dice.randbytes(1000))
            file.flush()
    (root / "gone").write_bytes(dice.randbytes(100_000))
    (root / "gone").unlink()
    (root / "new").write_bytes(b"new")
    (root / "old").write_bytes(b"old")
    os.rename(root / "new", root / "old")
    os.utime(root / "d", ns=(1, 10**18))
    os.chown(root, 3, 4)


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Path -> all that can be seen of it: attributes first, since reading may change a time."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        s = path.lstat()
        attributes = (s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_rdev, s.st_size, s.st_blocks, s.st_mtime_ns, s.st_atime_ns)
        content: bytes | str = b""
        if stat.S_ISLNK(s.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(s.st_mode):
            content = path.read_bytes()
        xattrs = tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in os.listxattr(path, follow_symlinks=False))
        found[str(path.relative_to(root))] = (*attributes, content, xattrs)
    groups: dict[int, list[str]] = {}
    for path in root.rglob("*"):
        groups.setdefault(path.lstat().st_ino, []).append(str(path.relative_to(root)))
    # Which names are one file: st_nlink alone does not say.
    return found | {"links": tuple(sorted(tuple(sorted(names)) for names in groups.values() if len(names) > 1))}


@pytest.mark.timeout(180)
def test_a_flushed_tree_comes_back_from_each_host_alone_with_all_its_attributes(base: Path) -> None:
    hosts = [base / f"host{number}" for number in range(HOSTS)]
    mountpoint = base / "mnt"
    mountpoint.mkdir()
    options = [word for host in hosts for word in ("--host", f"dir:{host}")]
    init(base / "volume", "--replication", str(HOSTS), "--sector-size", "64K", *options)
    mounted = ByCommand(base / "volume", mountpoint, "commit_interval=600,flush_interval=600,xattr", base / "log")
    try:
        plant(mountpoint)
        expected = tree(mountpoint)
        fusefs("flush", mountpoint)
    finally:
        mounted.kill()
    shutil.rmtree(base / "volume")
    (base / "away").mkdir()
    for host in hosts:
        others = [other for other in hosts if other != host]
        for other in others:
            other.rename(base / "away" / other.name)
        path = base / f"from {host.name}"
        said = fusefs("recover", path, "--host", f"dir:{host}").err
        assert all(str(other) in said for other in others), said
        mounted = ByCommand(path, mountpoint, "commit_interval=600,xattr", base / "log")
        try:
            assert tree(mountpoint) == expected
        finally:
            mounted.kill()
        for other in others:
            (base / "away" / other.name).rename(other)


@pytest.mark.timeout(LIMIT)
def test_what_was_acknowledged_comes_back_without_the_machine(base: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    with LostRounds(base, seed) as rounds:
        for _ in range(ROUNDS):
            print(rounds.round())
        rounds.finish()
