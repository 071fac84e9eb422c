"""How much room there is, for df."""

from __future__ import annotations

from dataclasses import dataclass

from storage.errors import BadArgument
from storage.replication import parse_replication
from storage.volume import VolumeStatus


@dataclass(frozen=True, slots=True)
class Space:
    """In bytes of files: what hosts have, divided by what replication multiplies."""

    files: int
    free: int
    total: int

    @classmethod
    def of(cls, status: VolumeStatus) -> Space:
        """Hosts that do not tell count as nothing."""
        try:
            replication = parse_replication(status.replication)
        except BadArgument:
            return cls(status.files, 0, 0)
        free = sum(host.free or 0 for host in status.hosts)
        total = sum(host.total or 0 for host in status.hosts)
        return cls(status.files, int(free / (replication.hosts_needed / replication.k)), int(total / replication.expansion))
