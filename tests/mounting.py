"""Real mounts for tests. Each is served by a process of its own (`tests.mount_child`); whatever a test does, nothing stays mounted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio

from fusefs.control_client import ControlClient
from fusefs.mounts import mount_at
from storage import create_volume
from storage.keyfile import CHEAP
from tests.mount_child import PASSPHRASE

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 30.0
END_SECONDS = 40.0


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {seconds} s: {what}")
        time.sleep(0.02)


def reap(process: subprocess.Popen[bytes], mountpoint: Path) -> None:
    """Wait for a mount's process that was killed.

    One of its threads may be in the kernel, on its own mount, waiting for what only the process could answer: then neither it nor the
    programs that use the mount ever end, unless the connection is aborted.
    """
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        subprocess.run(["umount", "-f", mountpoint], check=False, capture_output=True)
        process.wait(END_SECONDS)


class MountFailed(Exception):
    """The process ended before it was ready; the text is what it said."""

    def __init__(self, returncode: int, said: str) -> None:
        super().__init__(said)
        self.returncode = returncode


class Mounted:
    """A volume, mounted. `path` is the mount point."""

    def __init__(self, base: Path, volume: Path, mountpoint: Path, options: str, without: Sequence[str], user: int | None = None) -> None:
        base.mkdir(exist_ok=True)
        self.base = base
        self.volume = volume
        self.path = mountpoint
        self.log = base / "log"
        (base / "faults").mkdir(exist_ok=True)
        (base / "ready").unlink(missing_ok=True)
        arguments = [item for rule in without for item in ("--without", rule)]
        if user is not None:
            for item in (base, base / "faults", mountpoint):
                os.chown(item, user, user)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.mount_child", volume, mountpoint, options, base, *arguments],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=[] if user is not None else None,
            )
        deadline = time.monotonic() + START_SECONDS
        while not (base / "ready").exists():
            if self.process.poll() is not None:
                raise MountFailed(self.process.returncode, self.logged())
            if time.monotonic() > deadline:
                self.end()
                raise MountFailed(-1, "not ready in time:\n" + self.logged())
            time.sleep(0.01)

    def logged(self) -> str:
        return self.log.read_text(errors="replace")

    def fault(self, name: str, text: str = "") -> None:
        (self.base / "faults" / name).write_text(text)

    def clear(self, name: str) -> None:
        (self.base / "faults" / name).unlink(missing_ok=True)

    def trace(self) -> list[str]:
        """What came, one line each."""
        return (self.base / "trace").read_text().splitlines()

    def writes(self, path: Path | None = None, ino: int | None = None) -> list[tuple[int, int, str]]:
        """(offset, length, outcome) of the WRITEs of one inode."""
        ino = path.stat().st_ino if path is not None else ino
        found = [line.split() for line in self.trace()]
        return [(int(f[1]), int(f[2]), f[3]) for f in found if len(f) == 4 and int(f[0]) == ino]

    def control(self) -> ControlClient:
        return ControlClient.connect(self.volume)

    def unmount(self) -> None:
        """As a person would; and the process ends well."""
        subprocess.run(["fusermount3", "-u", self.path], check=True, capture_output=True)
        self.wait()

    def wait(self) -> None:
        assert self.process.wait(END_SECONDS) == 0, self.logged()
        assert "Traceback" not in self.logged(), self.logged()

    def kill(self) -> None:
        """kill -9, and take the dead mount away."""
        self.process.kill()
        reap(self.process, self.path)
        self.end()

    def end(self) -> None:
        """Whatever state it is in: unmounted, ended, gone."""
        if mount_at(self.path) is not None:
            subprocess.run(["fusermount3", "-u", "-z", self.path], check=False, capture_output=True)
        if self.process.poll() is None:
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        if mount_at(self.path) is not None:
            raise AssertionError(f"{self.path} is still mounted")


class Mounting:
    """Makes volumes and mounts them; ends all of them."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._count = 0
        self._mounted: list[Mounted] = []

    def volume(self, name: str = "volume", **settings: object) -> Path:
        path = self.base / name
        if not path.exists():

            async def make() -> None:
                await create_volume(path, PASSPHRASE, argon2=CHEAP, **settings)  # type: ignore[arg-type]

            trio.run(make)
        return path

    def volume_of(self, user: int) -> Path:
        """A volume made by that user, whose root directory is his."""
        path = self.base / "theirs" / "volume"
        if not path.exists():
            path.parent.mkdir()
            os.chown(path.parent, user, user)
            code = f"import trio, storage; from pathlib import Path; trio.run(storage.create_volume, Path({str(path)!r}), {PASSPHRASE!r})"
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, user=user, group=user, extra_groups=[], check=True)
        return path

    def mount(
        self, options: str = "commit_interval=600", *, volume: Path | None = None, without: Sequence[str] = (), user: int | None = None
    ) -> Mounted:
        if volume is None:
            volume = self.volume() if user is None else self.volume_of(user)
        mountpoint = self.base / "mnt"
        if mount_at(mountpoint) is None:
            mountpoint.mkdir(exist_ok=True)
        self._count += 1
        mounted = Mounted(self.base / f"run{self._count}", volume, mountpoint, options, without, user)
        self._mounted.append(mounted)
        return mounted

    def end(self) -> None:
        for mounted in reversed(self._mounted):
            mounted.end()
        shutil.rmtree(self.base, ignore_errors=True)


@contextmanager
def mounting_in(base: Path) -> Iterator[Mounting]:
    base.chmod(0o755)
    for parent in base.parents:
        if parent.stat().st_mode & 0o077 == 0 and len(parent.parts) > 2:
            parent.chmod(0o711)  # pytest's own: so that other users get to the mount
    made = Mounting(base)
    try:
        yield made
    finally:
        made.end()
