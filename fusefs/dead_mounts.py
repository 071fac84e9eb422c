"""Mounts whose process was killed and cannot end.

A process that serves a mount also asks things of it (syncfs, invalidation). Killed while one of its own threads waits in the kernel for
an answer that only it could give, it stays: its files, its lock and /dev/fuse are open as long as that thread lives, so nobody's request
on the mount ever ends. The kernel ends them when the connection is aborted, through fusectl (Documentation/filesystems/fuse.rst) or
umount -f.

Only evidence counts, never a slow answer: the process is gone or a zombie, or SIGKILL is pending for it.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
from pathlib import Path

from fusefs.control_protocol import socket_address
from fusefs.mounts import Mount, mounts
from storage.errors import Unavailable

CONNECTIONS = Path("/sys/fs/fuse/connections")
PROC = Path("/proc")
#: Seconds for a killed process to end once its connection is aborted.
END_SECONDS = 20.0
#: Seconds for umount -f, and for reaching a socket.
COMMAND_SECONDS = 20.0
_SIGKILL = 1 << 8


def is_dying(pid: int) -> bool:
    """True if the process is gone, or was killed and will never answer again."""
    leader = _status(PROC / str(pid) / "status")
    if leader is None or leader.get("State", "X")[:1] in "ZX":
        # A leader that is a zombie while other threads live, too: Python's main thread has ended.
        return True
    return any(_kill_pending(_status(path)) for path in (PROC / str(pid) / "task").glob("*/status")) or _kill_pending(leader)


def _status(path: Path) -> dict[str, str] | None:
    """proc(5): what the kernel says of a process or thread; None if it is gone."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _kill_pending(status: dict[str, str] | None) -> bool:
    if status is None:
        return False
    return any(int(status.get(field, "0"), 16) & _SIGKILL for field in ("SigPnd", "ShdPnd"))


def peer_pid(connection: socket.socket) -> int:
    """The process that listens at the other end, as of when it began to."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def serving_pid(volume: Path) -> int | None:
    """The process whose control socket it is; None if nobody listens there, or nobody we may ask."""
    try:
        directory = os.open(volume, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(COMMAND_SECONDS)
            connection.connect(socket_address(directory))
            return peer_pid(connection) or None
    except OSError:
        return None
    finally:
        os.close(directory)


def free_dead(volume: Path) -> bool:
    """If the process that served `volume` was killed and cannot end: abort its mounts, and wait for its end. True if it was so.

    Unavailable where that needs root, or does not help.
    """
    pid = serving_pid(volume)
    if pid is None or not is_dying(pid):
        return False
    real = Path(os.path.realpath(volume))
    for mount in mounts():
        if mount.volume in (real, volume.absolute()):
            abort(mount)
    if not _ended(pid):
        raise Unavailable(f"process {pid}, which had {volume} mounted, was killed and does not end: as root, umount -f its mount point")
    return True


def abort(mount: Mount) -> None:
    """Whatever waits for the mount gets an error now. Unavailable if it is not for us to do."""
    try:
        # Named after the minor number of the mount's device; its mode lets only whoever mounted it.
        (CONNECTIONS / mount.device.partition(":")[2] / "abort").write_text("1")
        return
    except OSError as error:
        if os.geteuid() != 0:
            raise Unavailable(
                f"{mount.mountpoint} is a dead mount whose process cannot end, and the kernel's fusectl is not at hand "
                f"({error.strerror}); as root: umount -f {mount.mountpoint}"
            ) from None
    # Both at once: a forced unmount aborts the connection first, a lazy one does not mind who is still there.
    try:
        subprocess.run(
            ["umount", "-f", "-l", "--", os.fspath(mount.mountpoint)],
            capture_output=True,
            check=False,
            timeout=COMMAND_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{mount.mountpoint} is a dead mount, and umount -f did not take it away: {error}") from None


def _ended(pid: int) -> bool:
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        return bool(select.select([process], [], [], END_SECONDS)[0])
    finally:
        os.close(process)
