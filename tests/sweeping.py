"""Sweeping by hand: a Sweeper over an open volume, behind a gate that the test opens and closes."""

from __future__ import annotations

from dataclasses import dataclass

from storage.interfaces import HistoryGate
from storage.sectors.sweep import Sweeper
from storage.volume import Volume


@dataclass
class TestGate:
    """A HistoryGate. Open: every superblock is ours, and all that was freed is released."""

    __test__ = False

    released: int = 1 << 62
    ours: bool = True
    asked: int = 0
    wanted: int = 0

    def released_sequence(self) -> int:
        return self.released

    def want_release(self, sequence: int) -> None:
        self.wanted = sequence

    async def confirm(self, host_number: int) -> bool:
        self.asked += 1
        return self.ours


def sweeper_of(volume: Volume, gate: HistoryGate | None = None) -> Sweeper:
    return Sweeper(
        volume.store,
        volume.config.volume_id_bytes,
        volume.epochs,
        volume.hosts,
        volume.contractor,
        volume.host_io,
        gate or TestGate(),
        volume.mender.surplus,
        volume.seams,
        pause=0.0,
    )
