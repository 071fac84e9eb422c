"""Which fusefs volumes are mounted where, by /proc/self/mountinfo: no request is made to any mount, so a hanging one does not hang us.

The source of a mount (what df shows) is the volume's absolute path, percent-encoded where libfuse and mount(8) would stumble.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

MOUNTINFO = Path("/proc/self/mountinfo")
FILESYSTEM_TYPE = "fuse.fusefs"
_NUMBER = re.compile(rb"[0-9]{1,18}\Z")
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted volume, as this mount namespace shows it."""

    mountpoint: Path
    volume: Path
    mount_id: int
    #: "major:minor" of its device number.
    device: str


def encode_source(volume: Path) -> str:
    """ASCII, without commas, backslashes, blanks."""
    return quote(os.fsencode(volume), safe="/._-+@:=~")


def decode_source(source: str) -> Path:
    # To bytes first: what others call fuse.fusefs may have any bytes as its source.
    return Path(os.fsdecode(unquote_to_bytes(os.fsencode(source))))


def parse_mountinfo(text: bytes) -> list[Mount]:
    """The fusefs mounts in a mountinfo file, oldest first; see proc(5). Lines that are not as described there are skipped."""
    found = []
    for line in text.split(b"\n"):
        before, separator, after = line.partition(b" - ")
        fields, rest = before.split(b" "), after.split(b" ")
        if not separator or len(fields) < 6 or len(rest) < 2 or rest[0] != FILESYSTEM_TYPE.encode() or _NUMBER.match(fields[0]) is None:
            continue
        mount = Mount(
            mountpoint=Path(os.fsdecode(_unescape(fields[4]))),
            volume=decode_source(os.fsdecode(_unescape(rest[1]))),
            mount_id=int(fields[0]),
            device=os.fsdecode(fields[2]),
        )
        # Neither can be a path with a NUL, which no system call takes; a source may say %00, if it is none of ours.
        if "\0" not in f"{mount.mountpoint}{mount.volume}":
            found.append(mount)
    return found


def _unescape(field: bytes) -> bytes:
    """proc(5): space, tab, newline and backslash stand as \\ooo."""
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field)


def mounts() -> list[Mount]:
    """Every fusefs mount, oldest first. A dead one (its process was killed) is among them."""
    return parse_mountinfo(MOUNTINFO.read_bytes())


def _absolute(path: Path) -> Path:
    """Links resolved in everything but the last component, which may be a mount that does not answer."""
    path = Path(os.path.abspath(path))
    if any(mount.mountpoint == path for mount in mounts()):
        return path
    return Path(os.path.realpath(path.parent)) / path.name if path.name else path


def mount_at(mountpoint: Path) -> Mount | None:
    """The (topmost) fusefs mount on exactly this directory."""
    wanted = _absolute(mountpoint)
    here = [mount for mount in mounts() if mount.mountpoint == wanted]
    return here[-1] if here else None


def mount_of_volume(volume: Path) -> Mount | None:
    """The mount of this volume, if it is mounted."""
    wanted = Path(os.path.realpath(volume))
    here = [mount for mount in mounts() if mount.volume in (wanted, volume.absolute())]
    return here[-1] if here else None


def mount_above(path: Path) -> Mount | None:
    """The fusefs mount that `path` is the root of, or lies below."""
    wanted = _absolute(path)
    here = [mount for mount in mounts() if mount.mountpoint == wanted or mount.mountpoint in wanted.parents]
    return max(here, key=lambda mount: (len(mount.mountpoint.parts), mount.mount_id), default=None)


def find_mount(path: Path) -> Mount | None:
    """The mount a person means by `path`: its mount point, something below it, or the volume that is mounted."""
    return mount_above(path) or mount_of_volume(path)
