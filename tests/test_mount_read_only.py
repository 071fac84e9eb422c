"""Read-only mounts through the real command line: beside a writer, of a directory nobody has open, and of hosts alone."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusefs.mounts import mount_at
from storage.history.superblock import superblock_number
from tests.cli_runner import Result, fusefs, init, quick
from tests.mounting import wait_until
from tests.test_read_only import NOT_STORED, everything


class Demo:
    """A volume with two hosts, a place for its writer, and one for a reader."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.volume = base / "volume"
        self.mnt, self.view = base / "mnt", base / "view"
        self.hosts = [base / "a", base / "b"]
        self.cache = base / "cache"
        for made in (self.mnt, self.view, *self.hosts):
            made.mkdir()
        words = [word for host in self.hosts for word in ("--host", f"dir:{host}")]
        self.phrase = init(self.volume, "--replication", "2", *words)

    def fusefs(self, *arguments: str | Path, expect: int | None = 0, **env: str | None) -> Result:
        return fusefs(*arguments, env={"XDG_CACHE_HOME": str(self.cache), **env}, expect=expect)

    def write(self) -> None:
        """Mount for writing."""
        self.fusefs("mount", self.volume, self.mnt, "--log", self.base / "log")

    def read(self, *arguments: str | Path, expect: int = 0, **env: str | None) -> Result:
        """Mount for reading: the directory, or what the arguments say."""
        what = arguments or (self.volume,)
        return self.fusefs("mount", "--read-only", "--log", self.base / "log", *what, self.view, expect=expect, **env)

    def status(self, path: Path) -> dict[str, object]:
        fields: dict[str, object] = json.loads(self.fusefs("status", path, "--json", FUSEFS_PASSPHRASE=None).text)
        return fields

    def superblocks(self) -> list[str]:
        return sorted(str(path) for host in self.hosts for path in host.rglob("superblock.*") if superblock_number(path.name) is not None)

    def scratch(self) -> list[str]:
        """Private directories that are there."""
        base = self.cache / "fusefs"
        return sorted(path.name for path in base.iterdir() if path.name != "lock") if base.exists() else []

    def end(self) -> None:
        for mountpoint in (self.view, self.mnt):
            if mount_at(mountpoint) is not None:
                subprocess.run(["fusermount3", "-u", "-z", mountpoint], check=False)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    made = Demo(tmp_path)
    try:
        yield made
    finally:
        made.end()


def kill(pid: object) -> None:
    """kill -9, and wait for its end."""
    assert isinstance(pid, int)
    process = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not _alive(pid), "the process ends")
    os.close(process)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def fsynced(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------- beside a writer


def test_beside_a_writer_what_the_hosts_have_is_shown_and_the_writer_is_not_disturbed(demo: Demo) -> None:
    demo.write()
    first, more = os.urandom(300_000), os.urandom(50_000)
    (demo.mnt / "dir").mkdir()
    (demo.mnt / "dir" / "f").write_bytes(first)
    demo.fusefs("flush", demo.mnt)
    epoch = demo.status(demo.mnt)["epoch"]
    before, superblocks = everything(*demo.hosts), demo.superblocks()
    said = demo.read().err
    assert re.search(rf"{demo.view} shows commit [0-9]+ of 20.*what dir:.* has, while another process has {demo.volume} open", said)
    assert (demo.view / "dir" / "f").read_bytes() == first
    assert (demo.view / "dir" / "f").stat().st_mtime_ns == (demo.mnt / "dir" / "f").stat().st_mtime_ns
    assert subprocess.run(["touch", demo.view / "g"], check=False, capture_output=True).returncode != 0
    # Nothing of the reader is on the hosts; the writer was idle.
    assert everything(*demo.hosts) == before
    # It goes on, and the reader's snapshot stays what it was.
    fsynced(demo.mnt / "dir" / "f", more)
    (demo.mnt / "g").write_bytes(b"new")
    demo.fusefs("flush", demo.mnt)
    assert demo.superblocks() != superblocks
    assert (demo.view / "dir" / "f").read_bytes() == first
    assert os.listdir(demo.view) == ["dir"]
    after = everything(*demo.hosts)
    demo.fusefs("umount", demo.view)
    assert everything(*demo.hosts) == after
    now = demo.status(demo.mnt)
    assert (now["epoch"], now["read_only"]) == (epoch, False)
    assert (demo.mnt / "dir" / "f").read_bytes() == first + more
    # Another look shows what is new.
    demo.read()
    assert (demo.view / "dir" / "f").read_bytes() == first + more
    demo.fusefs("umount", demo.view)
    demo.fusefs("umount", demo.mnt)
    assert demo.scratch() == []


# ------------------------------------------------------------------------------------------------------- from a directory


def test_after_kill_9_all_that_was_durable_is_shown_and_no_byte_of_the_directory_changes(demo: Demo) -> None:
    demo.write()
    flushed, tail = os.urandom(300_000), os.urandom(100_000)
    (demo.mnt / "f").write_bytes(flushed)
    demo.fusefs("flush", demo.mnt)
    fsynced(demo.mnt / "f", tail)
    fsynced(demo.mnt / "g", b"in the journal only")
    kill(demo.status(demo.mnt)["pid"])
    subprocess.run(["fusermount3", "-u", "-z", demo.mnt], check=True)
    # Time for hosts: a writer's would be renamed, truncated, removed.
    before = everything(demo.volume, *demo.hosts)
    demo.read()
    assert (demo.view / "f").read_bytes() == flushed + tail
    assert (demo.view / "g").read_bytes() == b"in the journal only"
    assert {path: bytes_ for path, bytes_ in everything(demo.volume, *demo.hosts).items() if "control" not in path} == before
    demo.fusefs("umount", demo.view)
    assert everything(demo.volume, *demo.hosts) == before
    assert {path.name for path in demo.volume.rglob("*") if path.name in NOT_STORED} <= set(NOT_STORED)


def changes(view: Path) -> list[Callable[[], object]]:
    """Every kind of change there is."""
    file = view / "f"
    return [
        lambda: open(file, "ab"),
        lambda: open(file, "r+b"),
        lambda: open(view / "new", "xb"),
        lambda: os.open(file, os.O_RDONLY | os.O_TRUNC),
        lambda: os.truncate(file, 0),
        lambda: os.unlink(file),
        lambda: os.rename(file, view / "new"),
        lambda: os.link(file, view / "new"),
        lambda: os.symlink("f", view / "new"),
        lambda: os.mkdir(view / "new"),
        lambda: os.rmdir(view / "dir"),
        lambda: os.mkfifo(view / "new"),
        lambda: os.chmod(file, 0o600),
        lambda: os.chown(file, 0, 0),
        lambda: os.utime(file, (1, 1)),
        lambda: os.setxattr(file, "user.a", b"1"),
    ]


@pytest.mark.parametrize("option", ["--read-only", "-o ro,xattr"])
def test_every_kind_of_change_is_answered_with_erofs(demo: Demo, option: str) -> None:
    demo.write()
    (demo.mnt / "f").write_bytes(b"x")
    (demo.mnt / "dir").mkdir()
    demo.fusefs("umount", demo.mnt)
    before = everything(demo.volume, *demo.hosts)
    demo.fusefs("mount", *option.split(), demo.volume, demo.view)
    for number, change in enumerate(changes(demo.view)):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS, f"change {number}"
    # What a reader may do: fsync, sync, locks.
    fd = os.open(demo.view / "f", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    os.sync()
    demo.fusefs("worm", demo.view / "dir", expect=8)
    demo.fusefs("contracts", demo.view, "conclude", "1", "30", expect=8)
    demo.fusefs("flush", demo.view)
    demo.fusefs("umount", demo.view)
    assert everything(demo.volume, *demo.hosts) == before


def test_a_writer_may_come_later_and_the_reader_shows_what_it_showed(demo: Demo) -> None:
    demo.write()
    data = os.urandom(100_000)
    for number in range(50):
        (demo.mnt / f"f{number}").write_bytes(data[number:])
    demo.fusefs("umount", demo.mnt)
    demo.read()
    assert len(os.listdir(demo.view)) == 50
    # Several writers one after the other, each with takeovers into LMDB that would reuse the reader's pages.
    for round_ in range(2):
        demo.write()
        for number in range(200):
            (demo.mnt / f"round{round_}-{number}-{'x' * 100}").touch()
        for number in range(50):
            os.utime(demo.mnt / f"f{number}", (round_, round_))
        demo.fusefs("umount", demo.mnt)
    assert sorted(os.listdir(demo.view)) == sorted(f"f{number}" for number in range(50))
    for number in range(50):
        assert (demo.view / f"f{number}").read_bytes() == data[number:]
        assert (demo.view / f"f{number}").stat().st_mtime > 1000
    demo.fusefs("umount", demo.view)


# ------------------------------------------------------------------------------------------------------------ from hosts


def test_from_the_hosts_alone(demo: Demo) -> None:
    demo.write()
    data = os.urandom(300_000)
    (demo.mnt / "dir").mkdir()
    (demo.mnt / "dir" / "f").write_bytes(data)
    os.symlink("dir/f", demo.mnt / "link")
    demo.fusefs("umount", demo.mnt)
    shutil.rmtree(demo.volume)
    before = everything(*demo.hosts)
    words = demo.base / "words"
    words.touch(mode=0o600)
    words.write_text(demo.phrase)
    a, b = (f"dir:{host}" for host in demo.hosts)
    for arguments, env in (
        (("--host", a, "--host", b), {}),
        (("--host", b, "--phrase-file", str(words)), {"FUSEFS_PASSPHRASE": None}),
        (("--host", b, "--phrase"), {"FUSEFS_PASSPHRASE": None, "FUSEFS_PHRASE": demo.phrase}),
    ):
        demo.read(*arguments, **env)
        assert (demo.view / "link").read_bytes() == data
        assert len(demo.scratch()) == 1
        assert demo.fusefs("umount", demo.view).err == ""
        assert mount_at(demo.view) is None
        assert demo.scratch() == []
    demo.read("--host", a)
    status = demo.status(demo.view)
    assert (status["read_only"], status["pending_bytes"], status["mountpoint"]) == (True, 0, str(demo.view))
    text = demo.fusefs("status", demo.view, FUSEFS_PASSPHRASE=None).text
    assert re.search(r"^shows +commit [0-9]+ of 20", text, re.MULTILINE)
    assert "no more writes" not in text
    assert demo.fusefs("flush", demo.view).err == ""
    demo.fusefs("umount", demo.view)
    assert everything(*demo.hosts) == before


def test_one_host_of_two_is_enough_and_the_other_is_warned_about(demo: Demo) -> None:
    demo.write()
    (demo.mnt / "f").write_bytes(b"x" * 100_000)
    demo.fusefs("umount", demo.mnt)
    shutil.rmtree(demo.hosts[0])
    for arguments in ((demo.volume,), ("--host", f"dir:{demo.hosts[1]}")):
        said = demo.read(*arguments).err
        assert f"warning: host dir:{demo.hosts[0]}" in said
        assert (demo.view / "f").read_bytes() == b"x" * 100_000
        demo.fusefs("umount", demo.view)


def test_signals_end_it_and_what_a_killed_one_left_is_swept(demo: Demo) -> None:
    demo.write()
    (demo.mnt / "f").write_bytes(b"x")
    demo.fusefs("umount", demo.mnt)
    a = f"dir:{demo.hosts[0]}"
    demo.read("--host", a)
    pid = demo.status(demo.view)["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not _alive(pid), "SIGTERM unmounts")
    assert mount_at(demo.view) is None
    assert demo.scratch() == []
    demo.read("--host", a)
    left = demo.scratch()
    kill(demo.status(demo.view)["pid"])
    assert demo.scratch() == left
    assert "dead mount" in demo.fusefs("umount", demo.view).err
    demo.read("--host", a)
    assert len(demo.scratch()) == 1
    assert demo.scratch() != left
    demo.fusefs("umount", demo.view)


# ------------------------------------------------------------------------------------------------------------- fenced


def test_what_a_fenced_machine_had_not_sent_is_got_back(demo: Demo) -> None:
    """status says how, in words that work."""
    demo.write()
    (demo.mnt / "f").write_bytes(b"both")
    demo.fusefs("flush", demo.mnt)
    fsynced(demo.mnt / "mine", b"only here")
    kill(demo.status(demo.mnt)["pid"])
    subprocess.run(["fusermount3", "-u", "-z", demo.mnt], check=True)
    # A second machine: the same directory, put back as it was, goes on.
    other = demo.base / "other"
    shutil.copytree(demo.volume, other, ignore=shutil.ignore_patterns("control.sock"))
    demo.fusefs("mount", other, demo.mnt)
    (demo.mnt / "theirs").write_bytes(b"only there")
    demo.fusefs("umount", demo.mnt)
    assert "recover" in demo.fusefs("mount", demo.volume, demo.mnt, expect=8).error_line
    shown = demo.fusefs("status", demo.volume)
    assert "another machine has gone on" in shown.text
    (command,) = re.findall(r"fusefs (mount --read-only .*) MOUNTPOINT$", shown.text, re.MULTILINE)
    assert re.search(r"^to go on +fusefs recover ", shown.text, re.MULTILINE)
    demo.fusefs(*command.split(), demo.view)
    assert (demo.view / "mine").read_bytes() == b"only here"
    assert not (demo.view / "theirs").exists()
    demo.fusefs("umount", demo.view)


def test_a_writer_that_is_fenced_while_mounted_says_so_and_can_be_unmounted(demo: Demo) -> None:
    demo.write()
    (demo.mnt / "f").write_bytes(b"both")
    demo.fusefs("flush", demo.mnt)
    # The directory as it is now, opened by another machine.
    other = demo.base / "other"
    shutil.copytree(demo.volume, other, ignore=shutil.ignore_patterns("control.sock", *NOT_STORED))
    demo.fusefs("ls", other)
    fsynced(demo.mnt / "mine", b"only here")
    demo.fusefs("flush", demo.mnt, expect=8)
    wait_until(lambda: demo.status(demo.mnt)["fenced"] is True, "it notices")
    text = demo.fusefs("status", demo.mnt, FUSEFS_PASSPHRASE=None).text
    assert "another machine has gone on" in text
    assert f"fusefs mount --read-only {demo.volume} MOUNTPOINT" in text
    assert (demo.mnt / "mine").read_bytes() == b"only here"
    assert "another machine has gone on" in demo.fusefs("umount", demo.mnt, expect=8).error_line
    assert mount_at(demo.mnt) is None
    demo.read()
    assert (demo.view / "mine").read_bytes() == b"only here"
    demo.fusefs("umount", demo.view)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_options_that_do_not_go_together_are_refused(demo: Demo, capfd: pytest.CaptureFixture[str]) -> None:
    view, volume, a = str(demo.view), str(demo.volume), f"dir:{demo.hosts[0]}"
    for arguments, text in (
        (("--host", a, view), "--read-only"),
        (("--read-only", "--host", a, volume, view), "VOLUME"),
        (("--read-only", volume), "MOUNTPOINT"),
        (("--read-only", "--phrase", volume, view), "--host"),
        (("--read-only", "-o", "rw", volume, view), "contradict"),
        (("--read-only", "--volume", "x", volume, view), "--host"),
    ):
        assert text in quick(capfd, "mount", *arguments, expect=2).error_line
    for arguments, status in (
        (("--read-only", "--host", a, "--volume", "x"), 3),
        (("--read-only", "--host", "ftp://x"), 2),
        (("--read-only", "--host", f"dir:{demo.base / 'nowhere'}"), 10),
        (("--read-only", "--host", a, "--volume", "0" * 32), 3),
    ):
        assert demo.fusefs("mount", *arguments, demo.view, expect=status).error_line
    assert demo.fusefs("mount", "--read-only", "--host", a, demo.view, expect=12, FUSEFS_PASSPHRASE="wrong").error_line
    assert demo.scratch() == []
