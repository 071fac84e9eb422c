"""The directory a volume is mounted on: checked before, unmounted after."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

from fusefs.dead_mounts import free_dead
from fusefs.mounts import mount_at, mount_of_volume
from storage.errors import BadArgument, Busy, NotFound, Unavailable

#: Seconds that fusermount3 may take for an unmount: the kernel writes all dirty pages within.
UNMOUNT_SECONDS = 600.0


def check_mountpoint(volume: Path | None, mountpoint: Path, *, beside: bool = False) -> Path:
    """The absolute mount point, if `volume` can be mounted there; blocking. `beside`: it may be mounted elsewhere. None: there is only a
    mount point.

    NotFound (missing), BadArgument (not a directory, not empty, inside the volume), Busy (something is mounted there, or the volume is
    mounted elsewhere). A mount left by a process that was killed is taken away.
    """
    volume = Path(os.path.realpath(volume)) if volume is not None else None
    mountpoint = Path(os.path.abspath(mountpoint))
    freed_volume = volume is not None and free_dead(volume)
    existing = mount_at(mountpoint)
    if existing is not None:
        # Before anything is asked of the mount: a killed process that cannot end never answers. What was freed by aborting its connection
        # stays in the table, and the kernel goes on giving the attributes it has of its root.
        freed = free_dead(existing.volume) or (freed_volume and existing.volume == volume)
        if not freed and not _is_dead(existing.mountpoint):
            raise Busy(f"{mountpoint} is in use: {existing.volume} is mounted there")
        if mount_at(mountpoint) is not None:
            unmount(existing.mountpoint, lazy=True)
    try:
        entries = os.listdir(mountpoint)
    except FileNotFoundError:
        raise NotFound(f"{mountpoint} does not exist; make the directory first") from None
    except NotADirectoryError:
        raise BadArgument(f"{mountpoint} is not a directory") from None
    except OSError as error:
        raise BadArgument(f"{mountpoint} cannot be used: {error.strerror}") from None
    mountpoint = Path(os.path.realpath(mountpoint))
    if os.path.ismount(mountpoint):
        raise Busy(f"{mountpoint} is in use: something else is mounted there")
    if volume is not None and (mountpoint == volume or volume in mountpoint.parents):
        raise BadArgument(f"{mountpoint} lies in the volume itself; choose a directory outside {volume}")
    if entries:
        raise BadArgument(f"{mountpoint} is not empty; mount on an empty directory")
    other = mount_of_volume(volume) if volume is not None and not beside else None
    if other is not None and not _is_dead(other.mountpoint):
        raise Busy(f"{volume} is already mounted, on {other.mountpoint}")
    if not os.path.exists("/dev/fuse"):  # who may open it is fusermount3's affair
        raise Unavailable("there is no /dev/fuse; load the kernel module (modprobe fuse), or give this container the device")
    return mountpoint


def _is_dead(mountpoint: Path) -> bool:
    """True if nobody serves the mount any more. Only asked of the root, whose attributes the kernel of a live mount has at hand."""
    try:
        os.lstat(mountpoint)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _command(mountpoint: Path, lazy: bool) -> list[str]:
    program = shutil.which("fusermount3") or shutil.which("fusermount")
    if program is not None:
        return [program, "-u", *(["-z"] if lazy else []), "--", os.fspath(mountpoint)]
    return ["umount", *(["-l"] if lazy else []), "--", os.fspath(mountpoint)]


def _check(mountpoint: Path, returncode: int, stderr: bytes) -> None:
    if returncode == 0:
        return
    said = stderr.decode("utf-8", "backslashreplace").strip().splitlines()
    reason = said[-1] if said else f"exit status {returncode}"
    if "busy" in reason.lower():
        raise Busy(
            f"{mountpoint} is busy: a program has a file or its working directory there; end it (fuser -vm {mountpoint}) and try again"
        )
    if mount_at(mountpoint) is None:
        return  # it is unmounted, whoever did it
    raise Unavailable(f"{mountpoint} could not be unmounted: {reason}")


def unmount(mountpoint: Path, lazy: bool = False) -> None:
    """Unmount by a child process, and wait for it; blocking. `lazy`: it goes away once nobody uses it any more.

    Busy where a program uses the mount. Never call it from the loop that serves the mount: the kernel writes dirty pages first.
    """
    try:
        done = subprocess.run(
            _command(mountpoint, lazy), capture_output=True, check=False, timeout=UNMOUNT_SECONDS, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise Unavailable("neither fusermount3 nor umount was found; install the package fuse3") from None
    except subprocess.TimeoutExpired:
        raise Busy(f"{mountpoint} did not unmount within {UNMOUNT_SECONDS:.0f} s; its process is still writing") from None
    _check(mountpoint, done.returncode, done.stderr)


async def unmount_while_serving(mountpoint: Path, lazy: bool = False) -> None:
    """As `unmount`, while this process goes on answering the kernel."""
    import trio

    try:
        done = await trio.run_process(_command(mountpoint, lazy), capture_stdout=True, capture_stderr=True, check=False)
    except FileNotFoundError:
        raise Unavailable("neither fusermount3 nor umount was found; install the package fuse3") from None
    _check(mountpoint, done.returncode, done.stderr or b"")
