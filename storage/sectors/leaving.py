"""Leaving: which hosts that are being left still have something that is nowhere else, as far as records say.

The loop that moves what they have is `reconcile`; here stands only what it has come to.
"""

from __future__ import annotations

from collections.abc import Collection, Set

import msgspec

from storage.errors import Corrupt
from storage.interfaces import MetadataStore
from storage.metadata.keys import SECTOR, SETTING, UNDERREPLICATED, prefix_end
from storage.sectors.records import decode_sector

#: See sectors.reconcile.
KEEPING = SETTING + b"reconcile.keeping"
#: Sectors on the list that are looked through at once, and in one scan of it.
AT_ONCE, SLICE = 20_000, 200


class Leaving:
    """See the module."""

    def __init__(self, store: MetadataStore) -> None:
        self._store = store
        #: Of the hosts that are being left those that sectors on the list were on when it was last counted; None: it was not yet.
        self.counted: frozenset[int] | None = None

    def still_on(self, hosts: Collection[int]) -> set[int]:
        """Those of these hosts, which keep nothing any more, that sectors have places on, or may have. No await.

        A look with the others has put each such sector on the list, and there it stays until its record names none of these. What else
        is on the list, and cannot be made good, says nothing of them.
        """
        looked = self._looked_with()
        if looked is None:
            return set(hosts)
        wanted = set(hosts)
        found = wanted & looked
        start, left = UNDERREPLICATED, AT_ONCE
        while wanted - found and (listed := self._store.scan(start, prefix_end(UNDERREPLICATED), SLICE)):
            if left <= 0:
                # More than one step of the event loop looks at.
                return found | (wanted & self.counted if self.counted is not None else wanted)
            for raw in self._store.get_many([SECTOR + key[1:] for key, _ in listed]):
                found |= wanted & hosts_of(raw, wanted)
            start, left = listed[-1][0] + b"\0", left - len(listed)
        return found

    def _looked_with(self) -> frozenset[int] | None:
        """The hosts that kept when all sectors were last looked at; None: they were not, or nobody knows."""
        raw = self._store.get(KEEPING)
        try:
            return frozenset(msgspec.msgpack.decode(raw, type=list[int])) if raw is not None else None
        except msgspec.MsgspecError:
            return None


def hosts_of(raw: bytes | None, hosts: Set[int]) -> Set[int]:
    """Those of these hosts that the sector's record names; what does not decode may name any."""
    if raw is None:
        return frozenset()
    try:
        return {host for shard in decode_sector(raw, 0).shards for host in shard.hosts if host in hosts}
    except Corrupt:
        return hosts
