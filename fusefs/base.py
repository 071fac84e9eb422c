"""What the groups of handlers share: the volume, the open handles, and entries as the kernel wants them."""

from __future__ import annotations

import errno

import pyfuse3

from fusefs.awake import Awake
from fusefs.backing import Backing
from fusefs.coherence import Coherence
from fusefs.entries import CACHE_SECONDS, entry_of
from fusefs.handles import HandleTable
from fusefs.kernel import KernelCalls
from fusefs.listings import Listings
from fusefs.options import MountOptions
from fusefs.receiver import Receiver
from fusefs.refusals import Refusals
from storage.errors import NotPermitted

NAME_MAX = 255


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
        self.receiver = Receiver(Awake(options.awake))
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
