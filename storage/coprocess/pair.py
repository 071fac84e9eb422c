"""The arena of this process, and its two coprocesses: started with a mount, or else with the first large sector; they end with it."""

from __future__ import annotations

import atexit
import os

from storage.coprocess.arena import SLOTS, Arena
from storage.coprocess.client import several_cores
from storage.coprocess.disks import Disks
from storage.coprocess.sealer import Sealer

ARENA = Arena(slots=SLOTS if several_cores() else 0)
#: One seals and opens, by itself and undisturbed; the other puts and reads, with a thread for each thing. Both in one would quarrel over
#: one interpreter's lock again: for each block that is sealed it is let go of, and whoever puts takes it.
SEALING = Sealer(ARENA)
DISKS = Disks(ARENA)


def start() -> None:
    """Both, so that the first sector finds them there."""
    SEALING.start()
    DISKS.start()


def close() -> None:
    """Both."""
    SEALING.close()
    DISKS.close()


def _forget() -> None:
    SEALING.forget()
    DISKS.forget()


atexit.register(close)
os.register_at_fork(after_in_child=_forget)
