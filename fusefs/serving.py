"""A process that serves a mount, in the background (fusefs/daemon.py) or in the foreground: its memory, and its event loop."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from fusefs.mount import Note, serve, serve_read_only
from fusefs.options import MountOptions
from fusefs.slow_steps import SlowSteps
from storage import ReadOnlySource


def run(source: ReadOnlySource, mountpoint: Path, options: MountOptions, ready: Callable[[], None], note: Note) -> None:
    """Serve `source` at `mountpoint` until it is unmounted: as `fusefs.mount.serve`, for a process that does nothing else."""
    calm_collector()
    calm_allocator()
    # For writing, if the options say no other; without a directory there is only reading.
    if source.path is not None:
        serving = partial(serve, source.path, mountpoint, source.passphrase, options, ready, note)
    else:
        serving = partial(serve_read_only, source, mountpoint, options, ready, note)
    trio.run(serving, instruments=[SlowSteps()] if options.debug else [])


def calm_collector() -> None:
    """Have the collector of cycles look at what a mount allocates less often, and never again at the program itself.

    Requests make no cycles; each of them makes a dozen objects, so by default it runs with every tenth.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


#: Of mallopt(3), glibc's <malloc.h>: parameters, and what they are set to.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
KEPT_FREE = 96 << 20
#: The largest that glibc takes on 64 bits.
FROM_THE_HEAP = 32 << 20


def calm_allocator() -> None:
    """Have memory that was freed kept for what is allocated next: what programs write, sealed sectors and replies come and go by megabytes.

    By default glibc gives it back to the kernel at once, and each page of what is allocated next is a fault, which in a virtual machine
    costs more than to fill it. In one heap, because it comes in one thread and goes in another. With another C library nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_MMAP_THRESHOLD, FROM_THE_HEAP)
    mallopt(M_TRIM_THRESHOLD, KEPT_FREE)
