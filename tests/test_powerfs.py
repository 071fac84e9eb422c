"""The filesystem whose power can be cut: what it keeps, what it drops, and that it is nasty enough."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.power_model import PAGE, Disk, Node
from tests.power_rig import Power, power_in
from tests.torture_rig import temporary


@pytest.fixture
def power() -> Iterator[Power]:
    with temporary() as base, power_in(base) as power:
        yield power


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def put(path: Path, data: bytes, *, sync: bool = True, name: bool = True) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    if name:
        sync_directory(path.parent)


def after_cut(power: Power, seed: int | None = None) -> Path:
    """The mount, with what survived."""
    power.cut(seed)
    power.end()
    power.start()
    return power.mountpoint


def test_what_was_flushed_stays_and_the_rest_goes(power: Power) -> None:
    root = power.mountpoint
    put(root / "whole", b"a" * 10_000)
    put(root / "no bytes", b"b" * 10_000, sync=False)
    put(root / "no name", b"c" * 10_000, name=False)
    put(root / "longer", b"d" * 100)
    with open(root / "longer", "ab") as file:
        file.write(b"e" * 100)
    put(root / "shorter", b"f" * 100)
    os.truncate(root / "shorter", 10)
    os.unlink(root / "whole")
    (root / "new directory").mkdir()
    assert (root / "longer").stat().st_size == 200
    root = after_cut(power)
    found = {path.name: path.read_bytes() for path in root.iterdir()}
    # "no name" got its name with the flushes of the directory that came after it.
    assert found == {
        "whole": b"a" * 10_000,
        "no bytes": b"",
        "no name": b"c" * 10_000,
        "longer": b"d" * 100,
        "shorter": b"f" * 100,
    }


def test_a_rename_counts_once_its_directory_is_flushed(power: Power) -> None:
    root = power.mountpoint
    for name in ("a", "b"):
        put(root / name, b"old")
        put(root / f"{name}.new", b"new")
    os.rename(root / "a.new", root / "a")
    sync_directory(root)
    os.rename(root / "b.new", root / "b")
    assert (root / "b").read_bytes() == b"new"
    root = after_cut(power)
    assert {path.name: path.read_bytes() for path in root.iterdir()} == {"a": b"new", "b": b"old", "b.new": b"new"}


def test_after_the_cut_nothing_of_the_old_reaches_anything(power: Power) -> None:
    root = power.mountpoint
    put(root / "a", b"old")
    fd = os.open(root / "a", os.O_RDWR)
    power.cut(None)
    before = (power.backing / "a").read_bytes()
    for call in (lambda: os.pwrite(fd, b"new", 0), lambda: os.fsync(fd), lambda: os.open(root / "x", os.O_CREAT | os.O_WRONLY)):
        with pytest.raises(OSError) as refused:
            call()
        assert refused.value.errno == errno.EIO
    try:
        os.close(fd)
    except OSError as error:
        assert error.errno == errno.EIO
    assert (power.backing / "a").read_bytes() == before == b"old"


def test_an_armed_cut_comes_before_the_change_it_counts_to(power: Power) -> None:
    root = power.mountpoint
    put(root / "a", b"")
    fd = os.open(root / "a", os.O_WRONLY)
    power.arm(3, None)
    os.write(fd, b"1")
    os.fsync(fd)
    with pytest.raises(OSError):
        os.write(fd, b"2")
    assert power.wait_cut(5) is not None
    assert (power.backing / "a").read_bytes() == b"1"


def test_locks_links_sockets_and_modes_work(power: Power) -> None:
    root = power.mountpoint
    put(root / "a", b"x")
    os.link(root / "a", root / "b")
    os.symlink("a", root / "s")
    os.chmod(root / "a", 0o640)
    os.mkfifo(root / "fifo", 0o600)
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(OSError):
        os.open("s", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    one, two = os.open("a", os.O_RDWR, dir_fd=directory), os.open("b", os.O_RDWR, dir_fd=directory)
    fcntl.flock(one, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError):
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert os.fstatvfs(directory).f_bavail > 0
    os.fsync(one)
    os.fsync(directory)
    for fd in (one, two, directory):
        os.close(fd)
    root = after_cut(power)
    assert (root / "a").stat().st_nlink == 2
    assert os.readlink(root / "s") == "a"
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o640
    assert stat.S_ISFIFO((root / "fifo").lstat().st_mode)


def test_what_lmdb_committed_stays(power: Power) -> None:
    path = power.mountpoint / "db"
    path.mkdir()
    sync_directory(power.mountpoint)
    with lmdb.open(os.fsencode(path), map_size=1 << 24) as env:
        # It never flushes the name of its file.
        sync_directory(path)
        for number in range(50):
            with env.begin(write=True) as txn:
                txn.put(b"%d" % number, bytes(3000))
        path = after_cut(power, 7) / "db"
    with lmdb.open(os.fsencode(path), map_size=1 << 24) as env, env.begin() as txn:
        assert [txn.get(b"%d" % number) for number in range(50)] == [bytes(3000)] * 50


# ---- the model


def new_file(disk: Disk, name: bytes, data: bytes = b"") -> Node:
    node = disk.new(stat.S_IFREG | 0o644, 0, 0, [0, 0, 0])
    disk.set_names((disk.root, name, node))
    node.write(0, data)
    return node


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 32), synced=st.integers(0, 8))
def test_any_cut_leaves_a_rename_whole_and_what_was_synced(seed: int, synced: int) -> None:
    disk, rng = Disk(), random.Random(seed)
    files = [new_file(disk, b"%d" % number, b"%d" % number * 9000) for number in range(8)]
    disk.sync_all()
    target = disk.new(stat.S_IFDIR | 0o755, 0, 0, [0, 0, 0])
    disk.set_names((disk.root, b"d", target))
    disk.sync_all()
    for number, file in enumerate(files):
        if number == synced:
            disk.sync_names(target)
        disk.set_names((target, b"%d" % number, file), (disk.root, b"%d" % number, None))
    disk.cut(rng)
    for number, file in enumerate(files):
        places = [directory for directory in (disk.root, target) if directory.durable_names.get(b"%d" % number) is file]
        assert len(places) == 1
        assert places == [target] or number >= synced or synced == 8
        assert bytes(file.durable) == b"%d" % number * 9000


def test_a_random_cut_leaves_all_sorts_of_things() -> None:
    seen = set()
    for seed in range(300):
        disk = Disk()
        node = new_file(disk, b"a", b"o" * (2 * PAGE))
        disk.sync_all()
        node.write(0, b"n" * (3 * PAGE))
        new_file(disk, b"b")
        new_file(disk, b"c")
        disk.cut(random.Random(seed))
        pages = [bytes(node.durable[at : at + PAGE]) for at in range(0, len(node.durable), PAGE)]
        kinds = tuple("mixed" if len(set(page)) > 1 else chr(page[0]) for page in pages)
        seen.add((kinds, b"b" in disk.root.durable_names, b"c" in disk.root.durable_names))
    contents = {kinds for kinds, _, _ in seen}
    assert ("o", "o") in contents
    assert ("n", "n", "n") in contents
    assert ("o", "n") in contents
    assert ("n", "o", "n") in contents
    assert ("o", "o", "\0") in contents
    assert any("mixed" in kinds for kinds in contents)
    # Names in any order.
    assert {(b, c) for _, b, c in seen} == {(False, False), (True, False), (False, True), (True, True)}
