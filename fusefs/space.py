"""How much room there is, for df."""

from __future__ import annotations

from dataclasses import dataclass

from storage import VolumeStatus, parse_replication
from storage.errors import BadArgument


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
        factor = replication.hosts_needed / replication.k
        free = sum(host.free or 0 for host in status.hosts)
        total = sum(host.total or 0 for host in status.hosts)
        return cls(status.files, int(free / factor), int(total / factor))
