"""Talking to the process that has a volume mounted, and finding out whether there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fusefs.cli.output import say
from fusefs.control_client import ControlClient
from fusefs.dead_mounts import free_dead
from fusefs.mounts import Mount, find_mount, mount_of_volume
from storage.errors import BadArgument, Busy, NotFound, Unavailable

#: What makes a directory a volume. (`storage.config`, which knows, would be long to import for who only asks a mount.)
VOLUME_FILE = "volume.json"


@dataclass(frozen=True, slots=True)
class Target:
    """What a command was given: a volume, where it is mounted, and whether a process serves it (which may outlive the mount)."""

    volume: Path
    mountpoint: Path | None
    served: bool


def resolve(path: Path) -> Target:
    """The volume a person means by `path`: its directory, its mount point, or something below that."""
    mount = find_mount(path)
    volume = mount.volume if mount is not None else path
    if mount is None and path.is_dir() and not (path / VOLUME_FILE).exists():
        # Right after `umount`, say. That `fusefs init` makes a volume is no help to who has one.
        raise BadArgument(
            f"{path} is not a fusefs volume (it has no {VOLUME_FILE}), and none is mounted there; name the volume's directory, or mount it"
        )
    if is_served(volume):
        return Target(volume, mount.mountpoint if mount is not None else None, True)
    if mount is not None:
        say(f"warning: the process that served {mount.mountpoint} has ended: fusefs umount {mount.mountpoint} takes the dead mount away")
    return Target(volume, None, False)


def is_served(volume: Path) -> bool:
    """True if a process answers on the volume's control socket. NotPermitted if it is somebody else's, Unavailable if it hangs.

    One that was killed and could not end is helped to (fusefs/dead_mounts.py).
    """
    if free_dead(volume):
        return False
    try:
        ControlClient.connect(volume).close()
    except NotFound:
        return False
    return True


@contextmanager
def client(volume: Path) -> Iterator[ControlClient]:
    """A connection for some requests. NotFound if nobody serves the volume; Unavailable if the process ends meanwhile."""
    try:
        with ControlClient.connect(volume) as connection:
            yield connection
    except (EOFError, ConnectionError):
        raise Unavailable(f"the process that has {volume} mounted ended; what it had committed is there at the next mount") from None


def refuse_if_mounted(volume: Path) -> None:
    """Busy, naming the mount point, if the volume is mounted."""
    mount = mount_of_volume(volume)
    if mount is not None and is_served(mount.volume):
        raise Busy(f"volume {volume} is mounted at {mount.mountpoint}: use it there")


def mount_for(path: Path) -> Mount:
    """The mount at, above or of `path`. NotFound if there is none."""
    mount = find_mount(path)
    if mount is None:
        raise NotFound(f"nothing of fusefs is mounted at {path}" if os.path.isdir(path) else f"{path} does not exist")
    return mount
