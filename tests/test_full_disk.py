"""Mounts on a local disk that others fill: what is accepted finds room, what does not is refused, and nothing is lost.

The volume's directory is on a small tmpfs, its host elsewhere.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli_runner import fusefs
from tests.mounting import Mounted, Mounting, mounting_in, wait_until

MB = 1 << 20


@dataclass
class Small:
    """A volume on a disk of its own, small; its host is in `host`."""

    disk: Path
    host: Path
    volume: Path
    mounting: Mounting

    @property
    def filler(self) -> Path:
        return self.disk / "filler"

    def fill(self, leave: int = 0) -> None:
        """To the last byte, or all but `leave`."""
        with open(self.filler, "ab", buffering=0) as out:
            for size in (MB, 4096, 1):
                try:
                    while out.write(bytes(size)) == size:
                        pass
                except OSError as error:
                    assert error.errno == errno.ENOSPC
            if leave:
                out.truncate(max(out.tell() - leave, 0))

    def empty(self) -> None:
        self.filler.unlink(missing_ok=True)

    def host_goes_away(self) -> None:
        self.host.rename(self.host.with_name("away"))

    def host_is_back(self) -> None:
        self.host.with_name("away").rename(self.host)

    def mount(self, options: str = "commit_interval=1", without: tuple[str, ...] = ()) -> Mounted:
        return self.mounting.mount(options, volume=self.volume, without=without)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    disk, host = tmp_path / "small", tmp_path / "host"
    disk.mkdir()
    host.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        (tmp_path / "mounts").mkdir()
        with mounting_in(tmp_path / "mounts") as mounting:
            volume = mounting.volume(str(disk / "volume"), hosts=[f"dir:{host}"], replication="1")
            yield Small(disk, host, volume, mounting)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def read_all(mounted: Mounted) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in mounted.path.iterdir()}


def test_more_than_the_disk_holds_goes_to_the_hosts(small: Small) -> None:
    """50 MB within a commit interval, on a disk of 40 MB, then not a byte of room: all of it gets to the host, and the mount ends."""
    mounted = small.mount("commit_interval=5")
    written = {}
    for number in range(25):
        written[f"f{number}"] = data = os.urandom(2 * MB)
        (mounted.path / f"f{number}").write_bytes(data)
    small.fill()
    assert fusefs("status", small.volume).text
    fusefs("umount", mounted.path)
    mounted.wait()
    small.empty()
    again = small.mount()
    assert read_all(again) == written
    again.unmount()


def test_without_hosts_what_is_accepted_is_durable_however_full_the_disk(small: Small) -> None:
    """Each write(2) that succeeded can be made durable, and survives kill -9: with no host and no byte of room. The rest got ENOSPC or
    EIO from write(2)."""
    mounted = small.mount("commit_interval=600,nowriteback,staging=0")
    small.host_goes_away()
    accepted: dict[str, bytes] = {}
    refused = 0
    sample = random.Random(5)
    for number in range(400):
        if number == 60:
            small.fill()
        data = sample.randbytes(sample.randrange(1, 200_000))
        try:
            fd = os.open(mounted.path / f"f{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            refused += 1
            if refused > 5:
                break
            continue
        try:
            done = 0
            try:
                while done < len(data):
                    done += os.write(fd, data[done:])
            except OSError as error:
                assert error.errno in (errno.ENOSPC, errno.EIO, errno.EHOSTUNREACH, errno.EAGAIN)
                refused += 1
            accepted[f"f{number}"] = data[:done]
            if number % 50 == 10:
                os.fsync(fd)
        finally:
            os.close(fd)
        if refused > 5:
            break
    assert refused > 5
    assert sum(map(len, accepted.values())) > 4 * MB
    assert fusefs("status", small.volume).text
    # One fsync of the directory, with the disk full.
    fd = os.open(mounted.path, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)
    for name in accepted:
        fd = os.open(mounted.path / name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    # What makes room works, too.
    for name in list(accepted)[::7]:
        (mounted.path / name).unlink()
        del accepted[name]
    fd = os.open(mounted.path, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)
    mounted.kill()
    small.empty()
    small.host_is_back()
    again = small.mount()
    found = read_all(again)
    assert found.keys() == accepted.keys()
    assert all(found[name] == data for name, data in accepted.items())
    again.unmount()


def test_umount_refuses_while_what_was_written_is_not_durable(small: Small) -> None:
    """Status 6, and the mount stays and answers; once there is room it ends, with nothing lost. (What is accepted finds room; so the rule
    that sees to it is taken out.)"""
    mounted = small.mount("commit_interval=600,staging=0", without=("room-ahead",))
    small.host_goes_away()
    written = {}
    for number in range(9):
        written[f"f{number}"] = data = os.urandom(2 * MB)
        (mounted.path / f"f{number}").write_bytes(data)
    small.fill()
    refused = fusefs("umount", mounted.path, expect=6)
    assert "stays mounted" in refused.error_line
    assert "free some space" in refused.error_line
    assert fusefs("status", small.volume).text
    assert read_all(mounted) == written
    with pytest.raises(OSError, match="No space"):
        (mounted.path / "more").write_bytes(b"x")
    with pytest.raises(OSError, match="No space"), open(mounted.path / "f0", "rb") as file:
        os.fsync(file.fileno())
    small.empty()
    # It is all durable here now; that its host is away is said, with the status for that, and is no reason to stay mounted.
    fusefs("umount", mounted.path, expect=10)
    mounted.wait()
    small.host_is_back()
    again = small.mount()
    assert read_all(again) == written
    again.unmount()


class Writer(threading.Thread):
    """Files of its own, some renamed, some removed; what it was told. `sure`: contents as of an fsync that succeeded."""

    def __init__(self, root: Path, name: str, seed: int) -> None:
        super().__init__()
        self.root, self.prefix = root, name
        self.sample = random.Random(seed)
        self.stop = threading.Event()
        self.written: dict[str, bytes] = {}
        self.sure: dict[str, int] = {}
        self.refused = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        number = 0
        while not self.stop.wait(0.01):
            number += 1
            try:
                self._step(f"{self.prefix}{number}")
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    self.wrong.append(str(error))
                self.refused += 1
                time.sleep(0.01)

    def _step(self, name: str) -> None:
        data = self.sample.randbytes(self.sample.randrange(1, 300_000))
        fd = os.open(self.root / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self.written[name] = b""
        try:
            for at in range(0, len(data), 65536):
                done = os.write(fd, data[at : at + 65536])
                self.written[name] += data[at : at + done]
                if done < len(data[at : at + 65536]):
                    break
            if self.sample.random() < 0.3:
                os.fsync(fd)
                self.sure[name] = len(self.written[name])
        finally:
            os.close(fd)
        if self.sample.random() < 0.2 and len(self.written) > 3:
            old = self.sample.choice([other for other in self.written if other != name])
            os.unlink(self.root / old)
            del self.written[old]
            self.sure.pop(old, None)
        if self.sample.random() < 0.2:
            os.rename(self.root / name, self.root / f"{name}r")
            self.written[f"{name}r"] = self.written.pop(name)
            if name in self.sure:
                self.sure[f"{name}r"] = self.sure.pop(name)


@pytest.mark.parametrize("ending", ["umount", "kill"])
def test_a_disk_that_fills_and_empties_while_writers_write(small: Small, ending: str) -> None:
    mounted = small.mount("commit_interval=0.5,flush_interval=1,nowriteback")
    sample = random.Random(9)
    writers = [Writer(mounted.path, name, seed) for seed, name in enumerate("abc")]
    for writer in writers:
        writer.start()
    end = time.monotonic() + 5
    full = 0
    while time.monotonic() < end:
        small.fill(sample.choice([0, 0, 4096, MB, 9 * MB]))
        full += 1
        time.sleep(sample.uniform(0.05, 0.8))
        small.empty()
        time.sleep(sample.uniform(0.0, 0.4))
    if ending == "kill":
        small.fill()
        time.sleep(0.3)
        mounted.process.kill()
    for writer in writers:
        writer.stop.set()
        writer.join()
    if ending == "kill":
        mounted.kill()
    assert full > 2
    assert mounted.process.poll() is None or ending == "kill", mounted.logged()
    if ending == "umount":
        assert not any(writer.wrong for writer in writers), [writer.wrong[:3] for writer in writers]
        small.fill()
        assert fusefs("status", small.volume).text
        small.empty()
        fusefs("umount", mounted.path)
        mounted.wait()
    small.empty()
    again = small.mount()
    found = read_all(again)
    for writer in writers:
        assert sum(map(len, writer.written.values())) > MB
        for name, data in writer.written.items():
            if ending == "umount":
                assert found.pop(name) == data, name
            elif name in writer.sure:
                there = found.get(name)
                if there is None:  # renamed after its fsync, and the rename is not durable: then it has its old name
                    there = found[name.removesuffix("r")]
                assert len(there) >= writer.sure[name], name
                assert data.startswith(there), name
    if ending == "umount":
        assert not found
    again.unmount()


def test_a_host_on_the_same_disk_is_full_with_it_and_deleting_makes_room(small: Small) -> None:
    """Volume and host on one disk: writers get ENOSPC; files removed make room for new ones, with nobody's help."""
    shutil.rmtree(small.volume)
    (small.disk / "host").mkdir()
    volume = small.mounting.volume(str(small.disk / "both"), hosts=[f"dir:{small.disk / 'host'}"], replication="1")
    mounted = small.mounting.mount("commit_interval=0.5,flush_interval=0.5,nowriteback", volume=volume)
    written: dict[str, bytes] = {}
    with pytest.raises(OSError, match="No space") as refused:
        for number in range(100):
            data = os.urandom(MB)
            (mounted.path / f"f{number}").write_bytes(data)
            written[f"f{number}"] = data
    assert refused.value.errno == errno.ENOSPC
    assert len(written) > 5
    assert fusefs("status", volume).text
    for name in list(written)[: len(written) // 2 + 1]:
        (mounted.path / name).unlink()
        del written[name]

    def again() -> bool:
        try:
            with open(mounted.path / "new", "ab") as out:
                out.write(b"new")
                os.fsync(out.fileno())
        except OSError:
            return False
        return True

    wait_until(again, "room for new files", 20)
    assert (mounted.path / "new").read_bytes().startswith(b"new")
    for name, data in written.items():
        assert (mounted.path / name).read_bytes() == data
    mounted.kill()


def test_a_volume_that_fills_its_own_disk_can_be_mounted_again_and_emptied(small: Small) -> None:
    """Nobody else's files are there to be removed: what is in the journal fills the disk to the last byte, host and all."""
    shutil.rmtree(small.volume)
    (small.disk / "host").mkdir()
    volume = small.mounting.volume(str(small.disk / "both"), hosts=[f"dir:{small.disk / 'host'}"], replication="1")
    mounted = small.mounting.mount("commit_interval=0.5,flush_interval=0.5,nowriteback", volume=volume)
    written: dict[str, bytes] = {}
    with pytest.raises(OSError, match="No space"):
        for number in range(100):
            data = os.urandom(MB)
            with open(mounted.path / f"f{number}", "wb", buffering=0) as file:
                assert file.write(data) == MB
                os.fsync(file.fileno())
            written[f"f{number}"] = data
    assert len(written) > 5
    # Whatever it says of its full host.
    fusefs("umount", mounted.path, expect=6)
    mounted.wait()
    small.fill()
    again = small.mounting.mount("commit_interval=0.5,flush_interval=0.5,nowriteback", volume=volume)
    assert all((again.path / name).read_bytes() == data for name, data in written.items())
    for name in list(written)[1:]:
        (again.path / name).unlink()
        del written[name]

    def room() -> bool:
        try:
            with open(again.path / "new", "wb", buffering=0) as out:
                out.write(bytes(MB))
                os.fsync(out.fileno())
        except OSError:
            # What each attempt leaves has to go, too.
            time.sleep(1)
            return False
        return True

    small.empty()
    wait_until(room, "room for new files", 60)
    assert (again.path / "f0").read_bytes() == written["f0"]
    again.kill()
