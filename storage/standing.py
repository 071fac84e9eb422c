"""Standing: which hosts the volume means to keep shards on.

A host *keeps* what it has, unless it is lost, is being left, has no contract that is in force, known to the host too, and will go on, or
has been away for longer than `AWAY_GRACE`. What does not keep counts for no replication: its shards are made again elsewhere (reconcile),
and deleted there, where that can be done, once they are.

A contract will go on as long as more than a sixth of its time is left: it is renewed at a third (`storage/renewal.py`), so half of that
time went by without success, and the other half is for moving what is there. With 90 days: 15 to find the reason, 15 to move. Until its
end the host is *ending*: still read from, and written to where no other host can take a sector; should it renew after all, it keeps again.

Record under the key `b` + host number u32: since when it is being left, nanoseconds u64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Set

from storage.contractor import Contractor
from storage.errors import Corrupt
from storage.hosts.registry import HostRegistry
from storage.interfaces import Batch, MetadataStore
from storage.metadata.keys import LEAVING, LOST, prefix_end, read_u32, u32, u64
from storage.seams import Seams

log = logging.getLogger("fusefs.hosts")

#: Seconds a host may be away before its shards are made again on others: a restart, an update, a night without that disk's machine.
AWAY_GRACE = 3600.0


class Standing:
    """Synchronous throughout. `look` now and then, so that absences are noticed."""

    def __init__(
        self, store: MetadataStore, registry: HostRegistry, contractor: Contractor, seams: Seams, *, away_grace: float = AWAY_GRACE
    ) -> None:
        self._store = store
        self._registry = registry
        self._contractor = contractor
        self._seams = seams
        self.away_grace = away_grace
        #: Host number -> monotonic time since when it has been away, as far as this process knows.
        self._away_since: dict[int, float] = {}
        #: Hosts that no longer have the record of our contract (storage/renewal.py).
        self.revoked: Callable[[], Set[int]] = frozenset

    def look(self) -> bool:
        """Notice who is away, and who is back: True if somebody is."""
        now, back = self._seams.clock.monotonic(), False
        for number in self._registry.numbers():
            if self._registry.available(number):
                back = self._away_since.pop(number, None) is not None or back
            else:
                self._away_since.setdefault(number, now)
        return back

    def lost(self) -> Set[int]:
        """Hosts somebody has given up."""
        return self._marked(LOST).keys()

    def _marked(self, prefix: bytes) -> dict[int, bytes]:
        """Host number -> record. What is damaged marks nobody: `fusefs check` finds it."""
        marked: dict[int, bytes] = {}
        for key, raw in self._store.scan(prefix, prefix_end(prefix), 100_000):
            try:
                marked[read_u32(key, 1)] = raw
            except Corrupt as error:
                log.error("%s", error)
        return marked

    def leaving(self) -> dict[int, int]:
        """Hosts that are being left: number -> since when, nanoseconds."""
        return {number: int.from_bytes(raw, "big") for number, raw in self._marked(LEAVING).items()}

    def mark_leaving(self, batch: Batch, number: int, leaving: bool) -> None:
        """In `batch`: the host is being left from now on, or is not after all."""
        if leaving:
            batch.put(LEAVING + u32(number), u64(self._seams.clock.time_ns()))
        else:
            batch.delete(LEAVING + u32(number))

    def here(self, number: int) -> bool:
        """Can it be used now?"""
        return self._registry.available(number)

    def gone(self, number: int) -> bool:
        """Away for longer than the grace."""
        since = self._away_since.get(number)
        return since is not None and self._seams.clock.monotonic() - since >= self.away_grace

    def keeping(self) -> frozenset[int]:
        """The hosts that keep what they have."""
        # Asked for each sector that is placed: no step of its own for each host.
        numbers = self._registry.numbers()
        gone = {number for number in self._away_since if self.gone(number)}
        marks = self._store.get_many([mark + u32(number) for mark in (LOST, LEAVING) for number in numbers])
        marked = {number for number, mark in zip(numbers * 2, marks, strict=True) if mark is not None}
        return self._contractor.going_on().intersection(numbers).difference(marked, self.revoked(), gone)

    def ending(self) -> frozenset[int]:
        """Hosts that would keep what they have, had their contract been renewed in time: it is still in force."""
        given_up = self.lost() | self.leaving().keys()
        now, revoked = self._seams.clock.time_ns(), self.revoked()
        return frozenset(
            number
            for number, contract in self._contractor.in_force().items()
            if (contract.ending(now) or number in revoked) and number not in given_up and not self.gone(number)
        )

    def ended(self) -> frozenset[int]:
        """Hosts that are neither lost nor being left, and have no contract in force, though they had one."""
        given_up, in_force = self.lost() | self.leaving().keys(), self._contractor.in_force()
        had = {contract.host_number for contract in self._contractor.all_contracts()}
        return frozenset(number for number in self._registry.numbers() if number in had - in_force.keys() - given_up)

    def present(self) -> frozenset[int]:
        """The hosts that have what they have, whether or not it is to stay there."""
        lost = self.lost()
        return frozenset(number for number in self._registry.numbers() if number not in lost and not self.gone(number))

    def domain(self, number: int) -> str:
        """The failure domain; a host without one is one of its own."""
        return self._registry.domain(number) or f"\0{number}"
