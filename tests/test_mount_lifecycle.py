"""From start to end of a mount: what is refused, who may do what, how it ends, what is left."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusefs.control_client import ControlClient
from fusefs.daemon import Order, read_order, setup_logging, start
from fusefs.mountpoint import check_mountpoint, unmount
from fusefs.mounts import mount_at, mount_of_volume
from storage.errors import BadArgument, Busy, NotFound, WrongPassphrase
from tests.mount_child import PASSPHRASE
from tests.mounting import MountFailed, Mounting, mounting_in, wait_until

NEVER = "commit_interval=600"


@pytest.fixture
def mounting(tmp_path: Path) -> Iterator[Mounting]:
    base = tmp_path / "m"
    base.mkdir()
    with mounting_in(base) as made:
        yield made


def errno_of(call: object, *args: object) -> int:
    try:
        call(*args)  # type: ignore[operator]
    except OSError as error:
        return error.errno or 0
    return 0


# --------------------------------------------------------------------------------------------------------- mount point


def test_a_mount_point_must_be_an_empty_directory_outside_the_volume(mounting: Mounting) -> None:
    volume = mounting.volume()
    base = mounting.base
    (base / "file").touch()
    (base / "full" / "x").mkdir(parents=True)
    (base / "empty").mkdir()
    (volume / "inside").mkdir()
    for path, kind, word in (
        (base / "missing", NotFound, "does not exist"),
        (base / "file", BadArgument, "not a directory"),
        (base / "full", BadArgument, "not empty"),
        (volume / "inside", BadArgument, "in the volume"),
        (volume, BadArgument, "in the volume"),
        (Path("/proc"), Busy, "in use"),
    ):
        with pytest.raises(kind, match=word) as caught:
            check_mountpoint(volume, path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert check_mountpoint(volume, base / "empty") == base / "empty"


def test_what_is_mounted_is_in_use(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    other = mounting.base / "other"
    other.mkdir()
    with pytest.raises(Busy, match="in use"):
        check_mountpoint(mounting.volume("second"), mounted.path)
    with pytest.raises(Busy, match="already mounted"):
        check_mountpoint(mounted.volume, other)
    assert mounted.path.is_dir()


def test_a_start_that_fails_leaves_nothing_mounted(mounting: Mounting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_PASSPHRASE", "wrong")
    with pytest.raises(MountFailed, match="WrongPassphrase") as caught:
        mounting.mount(NEVER)
    assert caught.value.returncode == WrongPassphrase.exit_status
    monkeypatch.delenv("TEST_PASSPHRASE")
    with pytest.raises(MountFailed, match="BadArgument"):
        mounting.mount("nonsense")
    not_a_volume = mounting.base / "not-a-volume"
    not_a_volume.mkdir()
    with pytest.raises(MountFailed, match="BadArgument"):
        mounting.mount(NEVER, volume=not_a_volume)
    assert mount_at(mounting.base / "mnt") is None
    mounting.mount(NEVER).unmount()


def test_after_kill_9_the_volume_mounts_again_over_the_dead_mount(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    fd = os.open(mounted.path / "f", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"synced")
    os.fsync(fd)
    mounted.process.kill()
    mounted.process.wait()
    assert errno_of(os.stat, mounted.path / "f") in (errno.ENOTCONN, errno.ECONNABORTED)
    errno_of(os.close, fd)
    again = mounting.mount(NEVER)
    assert (again.path / "f").read_bytes() == b"synced"
    assert mount_of_volume(again.volume) is not None


# ----------------------------------------------------------------------------------------------------------------- end


@pytest.mark.parametrize("command", [["umount"], ["fusermount3", "-u"]])
def test_a_plain_umount_loses_nothing(mounting: Mounting, command: list[str]) -> None:
    mounted = mounting.mount(NEVER)
    fd = os.open(mounted.path / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b"dirty" * 1000)
    os.close(fd)
    (mounted.path / "direct").write_bytes(b"direct" * 1000)
    subprocess.run([*command, mounted.path], check=True)
    mounted.wait()
    assert not (mounted.volume / "control.sock").exists()
    again = mounting.mount(NEVER)
    assert (again.path / "log").read_bytes() == b"dirty" * 1000
    assert (again.path / "direct").read_bytes() == b"direct" * 1000


def test_everything_is_on_the_hosts_after_an_unmount(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    (mounted.path / "f").write_bytes(os.urandom(300_000))
    with mounted.control() as control:
        before = control.status().volume
    mounted.unmount()
    assert before.pending_bytes > 0
    sectors = [path for path in (mounted.volume / "host").rglob("*") if path.is_file() and "sectors" in path.parts]
    assert sum(path.stat().st_size for path in sectors) > 300_000


def test_a_mount_waits_for_the_previous_process_and_says_so(mounting: Mounting) -> None:
    """The previous process is still flushing: stopped here, so that it stays so for a while."""
    mounted = mounting.mount(NEVER)
    (mounted.path / "f").write_bytes(b"kept" * 10_000)
    mounted.process.send_signal(19)  # SIGSTOP
    try:
        subprocess.run(["fusermount3", "-u", "-z", mounted.path], check=True)
        second: list[object] = []
        time.sleep(0.2)

        def mount() -> None:
            second.append(mounting.mount(NEVER))

        thread = threading.Thread(target=mount)
        thread.start()
        time.sleep(1.5)
        assert not second
    finally:
        mounted.process.send_signal(18)  # SIGCONT
    thread.join(40)
    assert second
    assert (mounting.base / "mnt" / "f").read_bytes() == b"kept" * 10_000


def test_the_same_volume_cannot_be_mounted_twice(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    other = mounting.base / "other"
    other.mkdir()
    with pytest.raises(Busy):
        start(mounted.volume, other, PASSPHRASE, [], None, lambda line: None)
    assert mount_at(other) is None


# ------------------------------------------------------------------------------------------------------- control socket


def test_control_of_a_live_mount(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    fd = os.open(mounted.path / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b"dirty" * 1000)
    (mounted.path / "dir").mkdir()
    (mounted.path / "dir" / "f").touch()
    with mounted.control() as control:
        status = control.status()
        assert (status.phase, status.mountpoint, status.pid) == ("mounted", str(mounted.path), mounted.process.pid)
        assert status.open_handles == 1
        report = control.flush()
        assert report.degraded_sectors == 0
        assert control.status().volume.pending_bytes == 0, "dirty pages of the kernel are part of a flush"
        assert control.status().volume.bytes == 5000
        control.worm((mounted.path / "dir").stat().st_ino)
        assert errno_of(os.unlink, mounted.path / "dir" / "f") == errno.EPERM
        assert any(refusal.path == "dir/f" for refusal in control.status().volume.refusals)
        with pytest.raises(NotFound):
            control.worm(10**9)
        host = control.hosts()[0]
        contract = control.conclude(str(host.number), 86400.0 * 200)
        assert contract in [known.contract_id for known in control.contracts()]
        assert control.renew(contract, 86400.0 * 300) != contract
        with pytest.raises(Busy):
            control.stop()
    os.close(fd)
    with mounted.control() as control, ControlClient.connect(mounted.volume) as drain:
        control.stop()
        drain.drain()
    mounted.wait()
    with pytest.raises(NotFound):
        mounted.control()


def test_only_the_owner_and_root_control_a_mount(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    os.chmod(mounted.volume, 0o755)
    code = (
        "from pathlib import Path; from fusefs.control_client import ControlClient;"
        f"ControlClient.connect(Path({str(mounted.volume)!r})).status()"
    )
    done = subprocess.run([sys.executable, "-c", code], user=65534, group=65534, extra_groups=[], capture_output=True, check=False)
    assert done.returncode != 0
    assert b"NotPermitted" in done.stderr or b"PermissionError" in done.stderr, done.stderr.decode()
    os.chmod(mounted.volume / "control.sock", 0o777)
    done = subprocess.run([sys.executable, "-c", code], user=65534, group=65534, extra_groups=[], capture_output=True, check=False)
    assert b"only the owner" in done.stderr or b"PermissionError" in done.stderr, done.stderr.decode()


# ------------------------------------------------------------------------------------------------------------- options


def test_xattrs_on_request(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER + ",xattr")
    path = mounted.path / "f"
    path.write_bytes(b"x")
    os.setxattr(path, "user.one", b"1")
    os.setxattr(path, "user.two", b"")
    assert sorted(os.listxattr(path)) == ["user.one", "user.two"]
    assert os.getxattr(path, "user.one") == b"1"
    assert errno_of(os.getxattr, path, "user.none") == errno.ENODATA
    assert errno_of(os.setxattr, path, "user.one", b"2", os.XATTR_CREATE) == errno.EEXIST
    assert errno_of(os.setxattr, path, "user.three", b"2", os.XATTR_REPLACE) == errno.ENODATA
    os.setxattr(path, "user.one", b"2", os.XATTR_REPLACE)
    os.removexattr(path, "user.two")
    assert errno_of(os.removexattr, path, "user.two") == errno.ENODATA
    assert errno_of(os.setxattr, path, "system.posix_acl_access", b"\x02\x00\x00\x00") in (errno.EOPNOTSUPP, errno.EINVAL)
    with open(path, "ab") as file:
        file.write(b"y")
    mounted.unmount()
    again = mounting.mount(NEVER + ",xattr")
    assert os.getxattr(again.path / "f", "user.one") == b"2"
    assert (again.path / "f").read_bytes() == b"xy"


def test_hard_links_can_be_denied(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER + ",link=deny")
    (mounted.path / "f").touch()
    assert errno_of(os.link, mounted.path / "f", mounted.path / "g") == errno.EPERM
    assert (mounted.path / "f").stat().st_nlink == 1
    os.symlink("f", mounted.path / "s")


def test_a_read_only_mount_takes_nothing(mounting: Mounting) -> None:
    first = mounting.mount(NEVER)
    (first.path / "f").write_bytes(b"x")
    first.unmount()
    mounted = mounting.mount(NEVER + ",ro")
    assert (mounted.path / "f").read_bytes() == b"x"
    assert errno_of(os.unlink, mounted.path / "f") == errno.EROFS
    assert errno_of(os.mkdir, mounted.path / "d") == errno.EROFS


def test_a_read_that_fails_is_an_error_and_not_zeros(mounting: Mounting) -> None:
    mounted = mounting.mount(NEVER)
    (mounted.path / "f").write_bytes(b"x" * 10_000)
    mounted.fault("read-unavailable")
    fd = os.open(mounted.path / "f", os.O_RDONLY)
    assert errno_of(os.pread, fd, 10_000, 0) == errno.EIO
    mounted.clear("read-unavailable")
    assert os.pread(fd, 10_000, 0) == b"x" * 10_000
    os.close(fd)
    assert "no host answers" in mounted.logged()


# ---------------------------------------------------------------------------------------------------------- background


def test_a_mount_in_the_background(mounting: Mounting) -> None:
    volume, mountpoint, log = mounting.volume(), mounting.base / "mnt", mounting.base / "log"
    mountpoint.mkdir()
    notes: list[str] = []
    pid = start(volume, mountpoint, PASSPHRASE, [NEVER], log, notes.append)
    try:
        (mountpoint / "f").write_bytes(b"x")
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert PASSPHRASE.encode() not in arguments
        assert os.getsid(pid) != os.getsid(0)
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        for fd in ("0", "1", "2"):
            assert not os.readlink(f"/proc/{pid}/fd/{fd}").startswith("/dev/pts")
    finally:
        with ControlClient.connect(volume) as client:
            unmount(mountpoint)
            client.drain()
    os.waitpid(pid, 0)
    assert "mounted on" in log.read_text()
    assert "closed" in log.read_text()
    assert notes == []


def test_the_background_process_hands_its_error_on(mounting: Mounting) -> None:
    volume, mountpoint = mounting.volume(), mounting.base / "mnt"
    mountpoint.mkdir()
    with pytest.raises(WrongPassphrase) as caught:
        start(volume, mountpoint, "wrong", [], mounting.base / "log", lambda line: None)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadArgument, match="nonsense"):
        start(volume, mountpoint, PASSPHRASE, ["nonsense"], None, lambda line: None)
    with pytest.raises(BadArgument, match="log file"):
        start(volume, mountpoint, PASSPHRASE, [], mounting.base / "no" / "log", lambda line: None)
    assert mount_at(mountpoint) is None


def test_the_order_for_the_background_process_is_checked() -> None:
    import io

    for text in (b"", b"{}", b"[" * 100_000, b'{"volume": 3}', b"x" * (1 << 20) + b"x"):
        with pytest.raises(BadArgument):
            read_order(io.BytesIO(text))
    assert isinstance(
        read_order(io.BytesIO(b'{"volume":"v","mountpoint":"m","passphrase":"p","options":[],"log_file":null,"report_fd":5}')), Order
    )


def test_a_log_file_that_is_moved_away_is_made_anew(tmp_path: Path) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        setup_logging(False, tmp_path / "log")
        logging.getLogger("x").info("one")
        shutil.move(tmp_path / "log", tmp_path / "log.1")
        logging.getLogger("x").info("two")
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = before
        root.setLevel(level)
    assert "one" in (tmp_path / "log.1").read_text()
    assert "two" in (tmp_path / "log").read_text()


def test_idle_mounts_do_not_keep_umount_busy(mounting: Mounting) -> None:
    mounted = mounting.mount("commit_interval=0.02")
    for number in range(20):
        (mounted.path / f"f{number}").write_bytes(b"x")
    time.sleep(0.3)
    subprocess.run(["umount", mounted.path], check=True)
    mounted.wait()
    wait_until(lambda: mount_at(mounted.path) is None, "it is unmounted")
