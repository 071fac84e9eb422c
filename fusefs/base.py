"""What the groups of handlers share: the volume, the open handles, and entries as the kernel wants them."""

from __future__ import annotations

import errno

import pyfuse3

from fusefs.backing import Backing
from fusefs.coherence import Coherence
from fusefs.handles import HandleTable
from fusefs.kernel import KernelCalls
from fusefs.listings import Listings
from fusefs.options import MountOptions
from fusefs.receiver import Receiver
from fusefs.refusals import Refusals
from storage import Attributes
from storage.errors import NotPermitted

#: Seconds the kernel may trust names and attributes: this process is the only writer, and every change comes through the kernel.
CACHE_SECONDS = 86_400.0
NAME_MAX = 255


def entry_of(attributes: Attributes) -> pyfuse3.EntryAttributes:
    """Attributes in pyfuse3's form."""
    entry = pyfuse3.EntryAttributes()
    entry.entry_timeout = CACHE_SECONDS
    entry.attr_timeout = CACHE_SECONDS
    fill(entry, attributes)
    return entry


def fill(entry: pyfuse3.EntryAttributes, attributes: Attributes) -> None:
    """Everything in `entry` but its timeouts and the size of a block, which is 4096 from the beginning."""
    entry.st_ino = attributes.ino
    entry.st_mode = attributes.mode
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_size = attributes.size
    entry.st_blocks = (attributes.stored + 511) // 512
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns


def negative_entry() -> pyfuse3.EntryAttributes:
    """Inode 0: there is no such name, and the kernel may remember that."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = CACHE_SECONDS
    return entry


def check_name(name: bytes) -> None:
    """ENAMETOOLONG for every handler alike, whatever the kernel lets through."""
    if len(name) > NAME_MAX:
        raise pyfuse3.FUSEError(errno.ENAMETOOLONG)


class HandlerBase(pyfuse3.Operations):
    """State of one mount."""

    def __init__(self, volume: Backing, options: MountOptions, kernel: KernelCalls) -> None:
        super().__init__()
        self.enable_writeback_cache = options.writeback
        self.volume = volume
        self.options = options
        self.namespace = volume.namespace
        self.kernel = kernel
        self.handles = HandleTable()
        self.receiver = Receiver()
        self.listings = Listings(volume.namespace)
        self.refusals = Refusals(volume)
        self.coherence = Coherence(volume, self.handles, kernel, writeback=options.writeback)

    def pinned_entry(self, ino: int) -> pyfuse3.EntryAttributes:
        """The reply that raises the kernel's lookup count by one, with the pin for it (R4). No await between the two and the reply's
        making, nor since somebody looked whether there is such an inode."""
        entry = entry_of(self.namespace.attributes(ino))
        self.namespace.pin(ino)
        return entry

    def refused(self, handler: str, args: tuple[object, ...], error: NotPermitted) -> None:
        """Called by `guarded` for NotPermitted: says who tried what. The arguments are the handler's."""
        match handler, args:
            case "write", (int(fh), int(offset), bytes()):
                handle = self.handles.get(fh)
                self.refusals.report(handle.pid, handle.ino, None, offset, str(error))
            case "setattr", (int(ino), pyfuse3.EntryAttributes() as attributes, _, _, pyfuse3.RequestContext() as ctx):
                self.refusals.report(ctx.pid, ino, None, attributes.st_size, str(error))
            case "rename", (int(), bytes(), int(parent), bytes(name), _, pyfuse3.RequestContext() as ctx):
                self.refusals.report(ctx.pid, parent, name, 0, str(error))
            case ("link", (int(), int(parent), bytes(name), pyfuse3.RequestContext() as ctx)):
                self.refusals.report(ctx.pid, parent, name, 0, str(error))
            case _, (int(ino), bytes(name), *_, pyfuse3.RequestContext() as ctx):
                self.refusals.report(ctx.pid, ino, name, 0, str(error))
            case _, (int(ino), *_, pyfuse3.RequestContext() as ctx):
                self.refusals.report(ctx.pid, ino, None, 0, str(error))
            case _:
                self.refusals.report(0, pyfuse3.ROOT_INODE, None, 0, f"{handler}: {error}")
