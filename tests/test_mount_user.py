"""Mounts of an ordinary user, by fusermount3.

/dev/fuse is open to everybody on a usual system. Where it is not (some virtual machines), these tests run in a mount namespace of their own
in which it is; the machine's stays as it was.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounting import Mounting, mounting_in

NEVER = "commit_interval=600"
ROOT = Path(__file__).resolve().parent.parent
PRIVATE = """
set -e
mount -t tmpfs -o mode=755 tmpfs "$1"
mknod -m 666 "$1/fuse" c 10 229
mount --bind "$1/fuse" /dev/fuse
shift
exec "$@"
"""


def everybody_may_open_fuse(test: Callable[..., None]) -> Callable[..., None]:
    """Run the test where /dev/fuse is open to others: here if it is, else in a namespace of its own."""

    @functools.wraps(test)
    def wrapper(mounting: Mounting, request: pytest.FixtureRequest) -> None:
        if stat.S_IMODE(os.stat("/dev/fuse").st_mode) & 0o006 == 0o006:
            test(mounting, request)
            return
        devices = mounting.base / "dev"
        devices.mkdir()
        again = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", request.node.nodeid]
        done = subprocess.run(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", PRIVATE, "sh", devices, *again],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "1 passed" in done.stdout

    return wrapper


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


@everybody_may_open_fuse
def test_an_ordinary_user_mounts_too(mounting: Mounting, request: pytest.FixtureRequest) -> None:
    user = 65534  # nobody: fusermount3 wants an entry in passwd
    mounted = mounting.mount(NEVER, user=user)
    script = f"cd {mounted.path} && echo one > f && echo two >> f && mkdir d && mv f d/ && cat d/f && cp -r /etc/pam.d . && rm -r pam.d"
    done = subprocess.run(["sh", "-c", script], user=user, group=user, extra_groups=[], capture_output=True, check=True)
    assert done.stdout == b"one\ntwo\n"
    assert errno_of(os.listdir, mounted.path) == errno.EACCES, "without allow_other not even root gets in"
    subprocess.run(["fusermount3", "-u", mounted.path], user=user, group=user, extra_groups=[], check=True)
    mounted.wait()


@everybody_may_open_fuse
def test_a_refused_append_is_repaired_for_an_ordinary_user(mounting: Mounting, request: pytest.FixtureRequest) -> None:
    """Without the right to open by inode number, the file is found by its path."""
    user = 65534  # nobody: fusermount3 wants an entry in passwd
    mounted = mounting.mount(NEVER, user=user)
    code = f"""
import os, time
path = {str(mounted.path / "log")!r}
fault = {str(mounted.base / "faults" / "no-space")!r}
fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
os.write(fd, b"good")
os.fsync(fd)
open(fault, "w").close()
os.write(fd, b"lost" * 1000)
try:
    os.fsync(fd)
    raise SystemExit("fsync did not fail")
except OSError:
    pass
os.unlink(fault)
for _ in range(200):
    if os.stat(path).st_size == 4:
        break
    time.sleep(0.05)
os.write(fd, b"goes on")
os.fsync(fd)
os.close(fd)
print(open(path).read())
"""
    done = subprocess.run([sys.executable, "-c", code], user=user, group=user, extra_groups=[], capture_output=True, check=False)
    assert done.stdout == b"goodgoes on\n", done.stderr.decode() + mounted.logged()
