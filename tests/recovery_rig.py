"""Volumes with hosts that outlive them: trees with everything a tree can have, and what a host holds, for tests of recovery."""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path

from storage.history.superblock import superblock_number
from storage.keyfile import CHEAP
from storage.recovery import RecoveryReport, recover_volume
from storage.seams import Seams
from storage.volume import Volume
from tests import rig

ROOT = 1
FILE = stat.S_IFREG | 0o640


@dataclass(frozen=True)
class Node:
    """All that stat, readlink, getfattr and read show of a name."""

    mode: int
    uid: int
    gid: int
    rdev: int
    nlink: int
    mtime_ns: int
    atime_ns: int
    xattrs: tuple[tuple[bytes, bytes], ...]
    content: bytes


async def tree(volume: Volume, ino: int = ROOT, prefix: bytes = b"") -> dict[bytes, Node]:
    """Path -> everything there is to know about it, of the whole volume."""
    found: dict[bytes, Node] = {}
    for entry in volume.namespace.entries(ino, 0, 10_000):
        path = prefix + entry.name
        attributes = volume.namespace.attributes(entry.ino)
        content = b""
        if stat.S_ISREG(attributes.mode):
            content = await volume.namespace.read(entry.ino, 0, attributes.size + 1)
        elif stat.S_ISLNK(attributes.mode):
            content = volume.namespace.readlink(entry.ino)
        names = volume.namespace.listxattr(entry.ino)
        xattrs = tuple((name, volume.namespace.getxattr(entry.ino, name)) for name in sorted(names))
        a = attributes
        found[path] = Node(a.mode, a.uid, a.gid, a.rdev, a.nlink, a.mtime_ns, a.atime_ns, xattrs, content)
        if stat.S_ISDIR(attributes.mode):
            found |= await tree(volume, entry.ino, path + b"/")
    return found


async def plant(volume: Volume, label: bytes = b"") -> None:
    """Files of all sizes, holes, links, devices, attributes, something removed."""
    ns = volume.namespace
    top = ns.mkdir(ROOT, b"dir" + label, 0o2750, 7, 8)
    for number, size in enumerate((0, 1, 5000, rig.SECTOR - 1, 3 * rig.SECTOR + 17)):
        ino = ns.create(top, b"file%d" % number, FILE, 1000 + number, 100)
        if size:
            await ns.append(ino, rig.noise(size))
        ns.set_attributes(ino, mtime_ns=10**18 + number, atime_ns=5 * 10**17)
    holes = ns.create(top, b"holes", FILE, 1, 1)
    await ns.write(holes, 100_000, b"late")
    await ns.write(holes, 50, b"early")
    ns.setxattr(holes, b"user.note", b"\0value")
    ns.symlink(top, b"link", b"../\xff elsewhere", 3, 4)
    ns.link(ns.lookup(top, b"file2"), top, b"second name \xfe")
    ns.create(top, b"pipe", stat.S_IFIFO | 0o600, 0, 0)
    ns.create(top, b"null", stat.S_IFCHR | 0o666, 0, 0, os.makedev(1, 3))
    gone = ns.create(top, b"gone", FILE, 0, 0)
    await ns.append(gone, rig.noise(70_000))
    await volume.commit()
    ns.unlink(top, b"gone")


@dataclass
class Lost:
    """A volume whose directory is gone. `expected`: its tree when it was last on the hosts."""

    base: Path
    urls: list[str]
    phrase: str
    volume_id: str
    expected: dict[bytes, Node] = field(default_factory=dict)
    #: Number of directories recovered into so far.
    made: int = 0

    def host(self, number: int) -> Path:
        return self.base / f"host{number}"

    def below(self, number: int) -> Path:
        return self.host(number) / "volumes" / self.volume_id

    def superblocks(self, number: int) -> list[Path]:
        """Newest first."""
        found = [path for path in self.below(number).glob("superblock.*") if superblock_number(path.name) is not None]
        return sorted(found, reverse=True)

    def new_path(self) -> Path:
        self.made += 1
        return self.base / f"recovered{self.made}"

    async def recover(self, path: Path, *hosts: int, seams: Seams | None = None, **options: object) -> RecoveryReport:
        if "phrase" not in options:
            options.setdefault("passphrase", rig.PASSPHRASE)
        urls = [self.urls[number] for number in hosts]
        return await recover_volume(path, urls, seams=seams, argon2=CHEAP, **options)  # type: ignore[arg-type]


async def lose(tmp_path: Path, hosts: int = 2, replication: str = "2", *, rounds: int = 2, keep: bool = False) -> Lost:
    """A volume is made, filled in `rounds` (part of it only in the log's tails), published; its directory is removed unless `keep`."""
    urls = rig.host_dirs(tmp_path, hosts)
    path = tmp_path / "volume"
    phrase = await rig.make(path, urls, replication)
    async with rig.opened(path) as volume:
        lost = Lost(tmp_path, urls, phrase, volume.volume_id)
        for number in range(rounds):
            await plant(volume, b"%d" % number)
            await volume.flush()
        # What is in no sector: the log has to carry it.
        ino = volume.namespace.create(ROOT, b"tail", FILE, 0, 0)
        await volume.namespace.append(ino, b"only in the log")
        log = volume.namespace.lookup(volume.namespace.lookup(ROOT, b"dir0"), b"file2")
        await volume.namespace.append(log, b"and the end of this")
        await volume.commit()
        assert volume.publisher is not None
        await volume.publisher.publish()
        lost.expected = await tree(volume)
    if not keep:
        shutil.rmtree(path)
    return lost
