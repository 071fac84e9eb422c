"""Placement: which hosts a sector goes to.

Candidates are the hosts under an active contract that can be reached; `HostDB.rank_for_write` orders them. Distinct hosts are distinct
host numbers, and a number stands for one host id (see hosts.registry), so two URLs of one host never count twice.
"""

from __future__ import annotations

import trio

from storage.contractor import Contractor
from storage.errors import FusefsError, Unavailable
from storage.hosts.hostdb import HostDB
from storage.hosts.registry import HostRegistry
from storage.interfaces import Contract, HostSpace
from storage.replication import Replication

#: Seconds all hosts together have to tell their room.
POLL_TIMEOUT = 5.0


class Placement:
    """Ranks hosts for writing, and knows how much room they have."""

    def __init__(self, registry: HostRegistry, contractor: Contractor, hostdb: HostDB) -> None:
        self._registry = registry
        self._contractor = contractor
        self._hostdb = hostdb
        #: host number -> room, as of the last poll; empty before the first.
        self._space: dict[int, HostSpace] = {}

    def candidates(self, replication: Replication) -> list[Contract]:
        """Active contracts on distinct reachable hosts, best first. Unavailable if fewer than the write quorum."""
        by_host: dict[int, Contract] = {}
        for contract_id in self._contractor.contracts():
            contract = self._contractor.contract(contract_id)
            known = by_host.get(contract.host_number)
            if (known is None or known.end_ns < contract.end_ns) and self._registry.available(contract.host_number):
                by_host[contract.host_number] = contract
        if len(by_host) < replication.write_quorum:
            raise Unavailable(
                f"replication {replication} needs {replication.write_quorum} hosts for writing, {len(by_host)} can be used now; "
                f"bring hosts back, or conclude contracts (fusefs contracts)"
            )
        return [
            by_host[number]
            for number in self._hostdb.rank_for_write(list(by_host), {number: space.free for number, space in self._space.items()})
        ]

    async def poll_space(self) -> None:
        """Ask every reachable host for its room; one that does not tell, or does not answer, is left out."""
        known: dict[int, HostSpace] = {}

        async def ask(number: int) -> None:
            try:
                space = await self._registry.get(number).space()
            except FusefsError:
                return
            if space is not None:
                known[number] = space

        # One hung host must not keep us from knowing the others.
        with trio.move_on_after(POLL_TIMEOUT):
            async with trio.open_nursery() as nursery:
                for number in self._registry.numbers():
                    if self._registry.available(number):
                        nursery.start_soon(ask, number)
        self._space = known

    def space(self, number: int) -> HostSpace | None:
        """The host's room at the last poll; None if it did not tell."""
        return self._space.get(number)

    def room(self, replication: Replication) -> HostSpace | None:
        """The room on the host that would be the last to take a copy; None where hosts do not tell."""
        known = sorted(self._space.values(), key=lambda space: space.free, reverse=True)
        return known[min(replication.hosts_needed, len(known)) - 1] if known else None
