"""The command line on a mounted volume: mount, status, flush, umount, worm, and bad input to mount."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli_runner import Result, environment, fusefs, init, quick


class Demo:
    """A volume with two hosts, and a place to mount it."""

    def __init__(self, base: Path) -> None:
        self.volume = base / "volume"
        self.mountpoint = base / "mnt"
        self.hosts = [base / "a", base / "b"]
        for made in (self.mountpoint, *self.hosts):
            made.mkdir()
        init(self.volume, "--replication", "2", *(word for host in self.hosts for word in ("--host", f"dir:{host}")))

    def mount(self, *options: str, expect: int = 0) -> Result:
        return fusefs("mount", self.volume, self.mountpoint, "--log", self.volume.parent / "log", *options, expect=expect)

    def pid(self) -> int:
        text = fusefs("status", self.mountpoint).text
        found = re.search(r"by process (\d+)", text)
        assert found, text
        return int(found[1])


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    made = Demo(tmp_path)
    yield made
    if is_mounted(made.mountpoint):
        subprocess.run(["fusermount3", "-u", "-z", made.mountpoint], check=False)


def is_mounted(path: Path) -> bool:
    return f" {path} " in Path("/proc/self/mountinfo").read_text()


def alive(pid: int) -> bool:
    """Neither gone nor a zombie, which only waits for init to look at it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def test_mount_use_umount_mount_again(demo: Demo) -> None:
    demo.mount()
    # Usable the moment mount has returned.
    (demo.mountpoint / "log").write_bytes(b"first\n")
    with open(demo.mountpoint / "log", "ab") as log:
        log.write(b"second\n")
    pid = demo.pid()
    assert fusefs("umount", demo.mountpoint).err == ""
    # Gone when umount has returned, and everything is on the hosts.
    assert not is_mounted(demo.mountpoint)
    assert not alive(pid)
    assert fusefs("cat", demo.volume, "log").out == b"first\nsecond\n"
    demo.mount()
    assert (demo.mountpoint / "log").read_bytes() == b"first\nsecond\n"
    fusefs("umount", demo.mountpoint)


def test_status_of_a_live_mount_needs_no_passphrase(demo: Demo) -> None:
    demo.mount()
    (demo.mountpoint / "x").write_bytes(b"12345")
    nobody = {"FUSEFS_PASSPHRASE": None}
    for path in (demo.volume, demo.mountpoint):
        text = fusefs("status", path, env=nobody).text
        assert re.search(rf"^mounted +on {re.escape(str(demo.mountpoint))} by process", text, re.MULTILINE)
    fields = json.loads(fusefs("status", demo.volume, "--json", env=nobody).text)
    assert fields["bytes"] == 5
    assert (fields["pid"], fields["mountpoint"], fields["phase"]) == (demo.pid(), str(demo.mountpoint), "mounted")
    assert len(fusefs("hosts", demo.volume, env=nobody).text.splitlines()) == 3
    contract = fusefs("contracts", demo.volume, "conclude", "1", "300", env=nobody).text.strip()
    assert contract in fusefs("contracts", demo.volume, env=nobody).text
    assert fusefs("contracts", demo.volume, "renew", contract, "301", env=nobody).text.strip()
    assert fusefs("contracts", demo.volume, "renew", "0" * 32, "301", env=nobody, expect=3).error_line
    fusefs("umount", demo.mountpoint)


def test_flush_brings_everything_to_the_hosts(demo: Demo) -> None:
    demo.mount()
    (demo.mountpoint / "x").write_bytes(os.urandom(100_000))
    assert fusefs("flush", demo.mountpoint).err == ""
    assert json.loads(fusefs("status", demo.mountpoint, "--json").text)["pending_bytes"] == 0
    for host in demo.hosts:
        assert sum(found.stat().st_size for found in host.rglob("*") if found.is_file()) > 100_000
    fusefs("umount", demo.mountpoint)


def test_what_works_on_an_unmounted_volume_says_where_it_is_mounted(demo: Demo) -> None:
    demo.mount()
    for command in (
        ["ls", demo.volume],
        ["cat", demo.volume, "x"],
        ["rm", demo.volume, "x"],
        ["put", demo.volume, "-", "x"],
        ["append", demo.volume, "x"],
    ):
        assert f"is mounted at {demo.mountpoint}: use it there" in fusefs(*command, expect=7).error_line
    fusefs("umount", demo.mountpoint)


def test_a_refusal_is_said_in_status(demo: Demo) -> None:
    demo.mount()
    (demo.mountpoint / "x").write_bytes(b"old")
    fd = os.open(demo.mountpoint / "x", os.O_WRONLY)
    try:
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"new", 0)
    finally:
        os.close(fd)
    text = fusefs("status", demo.mountpoint).text
    assert re.search(r"^refused +1 operation since", text, re.MULTILINE)
    refusals = json.loads(fusefs("status", demo.mountpoint, "--json").text)["refusals"]
    assert [(refusal["path"], refusal["offset"]) for refusal in refusals] == [("x", 0)]
    fusefs("umount", demo.mountpoint)


def test_worm_lets_a_directory_only_grow(demo: Demo) -> None:
    demo.mount()
    (demo.mountpoint / "archive").mkdir()
    (demo.mountpoint / "archive/x").write_bytes(b"kept")
    assert "directory" in fusefs("worm", demo.mountpoint / "archive/x", expect=2).error_line
    fusefs("worm", demo.mountpoint / "archive")
    with pytest.raises(PermissionError):
        (demo.mountpoint / "archive/x").unlink()
    (demo.mountpoint / "archive/y").write_bytes(b"new")
    assert "does not exist" in fusefs("worm", demo.mountpoint / "missing", expect=3).error_line
    assert fusefs("worm", demo.volume.parent / "a", expect=3).error_line
    fusefs("umount", demo.mountpoint)


def test_passwd_works_while_it_is_mounted(demo: Demo) -> None:
    demo.mount()
    (demo.mountpoint / "x").write_bytes(b"data")
    fusefs("passwd", demo.volume, env={"FUSEFS_NEW_PASSPHRASE": "battery staple"})
    fusefs("umount", demo.mountpoint)
    assert fusefs("cat", demo.volume, "x", env={"FUSEFS_PASSPHRASE": "battery staple"}).out == b"data"


def test_plain_umount_loses_nothing_and_a_command_meanwhile_waits_or_says_so(demo: Demo) -> None:
    demo.mount()
    data = os.urandom(2_000_000)
    (demo.mountpoint / "x").write_bytes(data)
    subprocess.run(["fusermount3", "-u", demo.mountpoint], check=True)
    demo.mount()
    assert (demo.mountpoint / "x").read_bytes() == data
    fusefs("umount", demo.mountpoint)


def test_umount_says_that_a_host_stayed_away(demo: Demo) -> None:
    demo.mount()
    demo.hosts[1].rename(demo.hosts[1].with_name("away"))
    (demo.mountpoint / "x").write_bytes(b"data")
    result = fusefs("umount", demo.mountpoint, expect=None)
    assert not is_mounted(demo.mountpoint)
    assert str(demo.hosts[1]) in result.err
    demo.hosts[1].with_name("away").rename(demo.hosts[1])
    assert fusefs("cat", demo.volume, "x").out == b"data"


def test_umount_of_a_mount_in_use_is_busy_and_it_stays_usable(demo: Demo) -> None:
    demo.mount()
    (demo.mountpoint / "x").write_bytes(b"data")
    with open(demo.mountpoint / "x", "rb"):
        assert "busy" in fusefs("umount", demo.mountpoint, expect=7).error_line
        assert (demo.mountpoint / "x").read_bytes() == b"data"
    fusefs("umount", demo.mountpoint)


def test_umount_of_a_volume_that_is_mounted_says_where_and_does_not_wait_for_it(demo: Demo) -> None:
    demo.mount()
    line = fusefs("umount", demo.volume, expect=2).error_line
    assert f"fusefs umount {demo.mountpoint}" in line
    assert is_mounted(demo.mountpoint)
    fusefs("umount", demo.mountpoint)


def test_status_of_a_mount_point_where_nothing_is_mounted_sends_nobody_to_init(demo: Demo) -> None:
    line = fusefs("status", demo.mountpoint, expect=2).error_line
    assert "not a fusefs volume" in line and "none is mounted there" in line and "init" not in line


def test_a_mount_whose_process_was_killed(demo: Demo) -> None:
    demo.mount()
    pid = demo.pid()
    (demo.mountpoint / "x").write_bytes(b"data")
    fusefs("flush", demo.mountpoint)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid))
    # status and cat work without it, and umount takes the dead mount away.
    assert "dead" in fusefs("status", demo.mountpoint).err
    assert fusefs("cat", demo.volume, "x").out == b"data"
    assert "dead" in fusefs("umount", demo.mountpoint).error_line
    assert not is_mounted(demo.mountpoint)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_the_foreground_a_signal_unmounts_cleanly(number: signal.Signals, demo: Demo) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "fusefs", "mount", "-f", demo.volume, demo.mountpoint], stderr=subprocess.PIPE, env=environment()
    )
    wait_for(lambda: is_mounted(demo.mountpoint))
    with open(demo.mountpoint / "x", "ab") as file:
        file.write(b"data")
    child.send_signal(number)
    assert child.wait(60) == 0
    assert child.stderr is not None
    said = child.stderr.read().decode()
    child.stderr.close()
    assert "Traceback" not in said
    assert "mounted on" in said
    assert not is_mounted(demo.mountpoint)
    assert fusefs("cat", demo.volume, "x").out == b"data"


def test_the_control_socket_is_for_the_owner_only(demo: Demo) -> None:
    demo.mount()
    assert (demo.volume / "control.sock").stat().st_mode & 0o777 == 0o600
    fusefs("umount", demo.mountpoint)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_bad_mount_points(demo: Demo, tmp_path: Path) -> None:
    def refused(mountpoint: Path, status: int) -> str:
        return fusefs("mount", demo.volume, mountpoint, expect=status).error_line

    assert "does not exist" in refused(tmp_path / "missing", 3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "not empty" in refused(tmp_path / "full", 2)
    assert "not a directory" in refused(tmp_path / "full/file", 2)
    assert refused(demo.volume, 2)
    demo.mount()
    assert "mounted" in refused(demo.mountpoint, 7)
    (tmp_path / "second").mkdir()
    assert "already mounted" in refused(tmp_path / "second", 7)
    assert (demo.mountpoint / "x").write_bytes(b"still alive")
    fusefs("umount", demo.mountpoint)


def test_bad_volumes_and_passphrases(demo: Demo, tmp_path: Path) -> None:
    assert "not a fusefs volume" in fusefs("mount", tmp_path, demo.mountpoint, expect=2).error_line
    assert "volume" in fusefs("mount", tmp_path / "missing", demo.mountpoint, expect=2).error_line
    assert "passphrase" in fusefs("mount", demo.volume, demo.mountpoint, env={"FUSEFS_PASSPHRASE": "wrong"}, expect=12).error_line
    keys = demo.volume / "keys.json"
    keys.write_bytes(keys.read_bytes()[:-20])
    assert "keys.json" in fusefs("mount", demo.volume, demo.mountpoint, expect=9).error_line
    assert not is_mounted(demo.mountpoint)


def test_unknown_and_contradictory_options_are_refused(demo: Demo, capfd: pytest.CaptureFixture[str]) -> None:
    for options in ("frobnicate", "ro,rw", "link=maybe", "cache=huge", "commit_interval=0", "fsync=never", "xattr,noxattr"):
        result = quick(capfd, "mount", str(demo.volume), str(demo.mountpoint), "-o", options, expect=2)
        assert options.split(",")[0].split("=")[0] in result.error_line
    assert "contradict" in quick(capfd, "mount", str(demo.volume), str(demo.mountpoint), "-o", "ro", "-o", "rw", expect=2).error_line
    assert not is_mounted(demo.mountpoint)


def test_a_log_file_that_cannot_be_written(demo: Demo, tmp_path: Path) -> None:
    assert "log" in fusefs("mount", demo.volume, demo.mountpoint, "--log", tmp_path / "no/log", expect=2).error_line
    assert not is_mounted(demo.mountpoint)


def test_umount_flush_and_worm_where_nothing_is_mounted(tmp_path: Path) -> None:
    for command in ("umount", "flush", "worm"):
        assert fusefs(command, tmp_path, expect=3).error_line
        assert fusefs(command, tmp_path / "missing", expect=3).error_line


def test_a_host_gone_at_mount_time_is_said_and_what_is_left_serves(demo: Demo) -> None:
    demo.mount()
    (demo.mountpoint / "x").write_bytes(b"data")
    fusefs("umount", demo.mountpoint)
    away = demo.hosts[0].with_name("away")
    demo.hosts[0].rename(away)
    assert [str(demo.hosts[0]) in line for line in demo.mount().err.splitlines()][:1] == [True]
    assert (demo.mountpoint / "x").read_bytes() == b"data"
    assert str(demo.hosts[0]) in fusefs("status", demo.mountpoint).text.splitlines()[0]
    away.rename(demo.hosts[0])
    fusefs("umount", demo.mountpoint, expect=None)


def test_with_all_hosts_gone_mount_says_so_and_umount_what_is_kept(demo: Demo) -> None:
    demo.mount()
    (demo.mountpoint / "before").write_bytes(b"1")
    fusefs("umount", demo.mountpoint)
    for host in demo.hosts:
        host.rename(host.with_name(host.name + ".away"))
    said = demo.mount().err
    assert all(str(host) in said for host in demo.hosts)
    assert "cannot be read before" in said
    (demo.mountpoint / "during").write_bytes(b"2")
    said = fusefs("umount", demo.mountpoint, expect=10).err
    assert re.search(r"is unmounted; what is not on its hosts yet is kept in .* yet: [\d,]+ \([\d,]+ bytes to send\)", said), said
    assert len(said.splitlines()) == 1
    for host in demo.hosts:
        host.with_name(host.name + ".away").rename(host)
    assert fusefs("cat", demo.volume, "before", "during").out == b"12"


def test_umount_says_that_another_mount_namespace_has_the_mount(demo: Demo) -> None:
    demo.mount()
    (demo.mountpoint / "f").write_bytes(b"kept")
    # As a container or a service with private mounts has: a copy of every mount there was when it started.
    other = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "9"])
    time.sleep(0.5)
    try:
        done = fusefs("umount", demo.mountpoint)
        assert "another mount namespace" in done.err
        assert not is_mounted(demo.mountpoint)
    finally:
        other.wait(30)
    assert fusefs("cat", demo.volume, "f").out == b"kept"
