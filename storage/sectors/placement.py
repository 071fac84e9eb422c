"""Placement: which hosts a sector goes to.

Candidates are the hosts under an active contract that can be reached and keep what they have (`standing`); `HostDB.rank_for_write` orders
them, and failure domains take turns. Distinct hosts are distinct
host numbers, and a number stands for one host id (see hosts.registry), so two URLs of one host never count twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import trio

from storage.contractor import Contractor
from storage.errors import Expired, FusefsError, Unavailable
from storage.hosts.hostdb import LITTLE_SPACE, HostDB
from storage.hosts.registry import HostRegistry
from storage.interfaces import Contract, HostSpace
from storage.replication import Replication
from storage.sectors.plan import spread
from storage.standing import Standing

#: Seconds all hosts together have to tell their room.
POLL_TIMEOUT = 5.0
#: Bytes that buckets, which do not tell, have room for.
PLENTY = 1 << 50
#: Hosts a message names.
SHOWN = 5


class Placement:
    """Ranks hosts for writing, and knows how much room they have."""

    def __init__(self, registry: HostRegistry, contractor: Contractor, hostdb: HostDB, standing: Standing) -> None:
        self._registry = registry
        self._contractor = contractor
        self._hostdb = hostdb
        self._standing = standing
        #: host number -> room, as of the last poll; empty before the first.
        self._space: dict[int, HostSpace] = {}
        #: The same, what is free of it.
        self._free: dict[int, int] = {}

    def candidates(self, replication: Replication) -> list[Contract]:
        """Active contracts on distinct reachable hosts that keep what they have, best first, failure domains in turn.

        Then, where these are fewer than the replication needs, hosts whose contract is ending: what they take is moved as soon as there is
        another (`keep`). Unavailable, or Expired where contracts that have ended are the reason, if fewer than the write quorum.
        """
        usable = self._usable(self._standing.keeping())
        ranked = [usable[number] for number in spread(self._ranked(usable), len(usable), self._standing.domain)]
        if len(usable) < replication.hosts_needed:
            ending = self._usable(self._standing.ending())
            ranked += [ending[number] for number in spread(self._ranked(ending), len(ending), self._standing.domain)]
        if len(ranked) < replication.write_quorum:
            ended = [number for number in sorted(self._standing.ended()) if self._registry.available(number)]
            if len(ranked) + len(ended) >= replication.write_quorum:
                raise Expired(
                    f"contracts with {', '.join(self._registry.url(number) for number in ended)} have ended, so nothing can be written "
                    "there; renew them: fusefs contracts VOLUME renew --all"
                )
            raise Unavailable(
                f"to write with replication {replication}, hosts are needed: {replication.write_quorum}, can be used now: {len(ranked)}"
                f"{self.besides()}; bring hosts back, add one (fusefs hosts VOLUME add URL), or conclude contracts (fusefs contracts)"
            )
        return ranked

    def besides(self, hosts: Collection[int] = ()) -> str:
        """For messages: the hosts besides `hosts` that take nothing now, each with why, in brackets; "" if all do."""
        given_up = {**dict.fromkeys(self._standing.leaving(), "is being left"), **dict.fromkeys(self._standing.lost(), "is lost")}
        ending, keeping, revoked = self._standing.ending(), self._standing.keeping(), self._standing.revoked()
        found: list[str] = []
        for number in self._registry.numbers():
            if number in hosts:
                continue
            reason = self._registry.reason(number)
            if number in given_up:
                why = given_up[number]
            elif reason:
                why = "is another host now" if self._registry.state(number) == "foreign" else "cannot be reached"
            elif number in revoked:
                why = "does not know its contract any more"
            elif number in ending:
                why = "has a contract that ends soon"
            elif number not in keeping:
                why = "has no contract in force"
            elif not self.takes(number):
                why = "is full"
            else:
                continue
            found.append(f"{self._registry.url(number)} {why}")
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return f" ({', '.join(found[:SHOWN])}{more})" if found else ""

    def keep(self, hosts: Iterable[int]) -> bool:
        """Do all of these keep what they have?"""
        return self._standing.keeping().issuperset(hosts)

    def present(self, hosts: Iterable[int]) -> bool:
        """Do all of these have what they have, whether or not it is to stay there?"""
        return self._standing.present().issuperset(hosts)

    def others(self, hosts: Collection[int], keeping: Collection[int]) -> list[Contract]:
        """For one shard more of a sector that is on `hosts`: active contracts on hosts of `keeping` that are none of them, best first,
        those of other failure domains before the rest."""
        usable = {number: contract for number, contract in self._usable(keeping).items() if number not in hosts}
        domains = {self._standing.domain(host) for host in hosts}
        ranked = self._ranked(usable)
        # Sorting keeps the order of those that are alike.
        return [usable[number] for number in sorted(ranked, key=lambda number: self._standing.domain(number) in domains)]

    def remote(self, contract: Contract) -> bool:
        """Is its host behind a network, as far as its URL tells?"""
        return self._registry.remote(contract.host_number)

    def takes(self, number: int) -> bool:
        """Could the host take a shard now, as far as is known?"""
        space = self._space.get(number)
        return self._registry.available(number) and (space is None or space.free >= LITTLE_SPACE)

    def _usable(self, keeping: Collection[int]) -> dict[int, Contract]:
        """Per host: the active contract that ends last."""
        in_force, available = self._contractor.in_force(), self._registry.available
        return {number: contract for number, contract in in_force.items() if number in keeping and available(number)}

    def _ranked(self, hosts: Collection[int]) -> list[int]:
        return self._hostdb.rank_for_write(hosts, self._free)

    async def poll_space(self) -> None:
        """Ask every reachable host for its room; one that does not tell, or does not answer, is left out."""
        known: dict[int, HostSpace] = {}
        # One hung host must not keep us from knowing the others.
        with trio.move_on_after(POLL_TIMEOUT):
            async with trio.open_nursery() as nursery:
                for number in self._registry.numbers():
                    if self._registry.available(number):
                        nursery.start_soon(self._ask_space, number, known)
        self._space, self._free = known, {number: space.free for number, space in known.items()}

    async def ask_space(self, number: int) -> None:
        """Ask one host for its room, not all: it is new."""
        known: dict[int, HostSpace] = {}
        with trio.move_on_after(POLL_TIMEOUT):
            await self._ask_space(number, known)
        self._space |= known
        self._free |= {number: space.free for number, space in known.items()}

    async def _ask_space(self, number: int, known: dict[int, HostSpace]) -> None:
        try:
            space = await self._registry.get(number).space()
        except FusefsError:
            return
        if space is not None:
            known[number] = space

    def space(self, number: int) -> HostSpace | None:
        """The host's room at the last poll; None if it did not tell."""
        return self._space.get(number)

    def free(self, replication: Replication) -> int:
        """Bytes of files that hosts could still take, as of the last poll.

        Each sector goes to distinct hosts, so what only a few have room for does not count; what hosts share counts once. Those that do not
        tell have room for whatever comes, up to PLENTY.
        """
        disks: dict[str, tuple[int, int]] = {}
        for number in self._usable(self._standing.keeping()):
            space = self._space.get(number)
            # A host of its own where nothing is known to be shared.
            disk = (space.disk if space is not None else "") or f"host {number}"
            _, hosts = disks.get(disk, (0, 0))
            disks[disk] = (space.free if space is not None else PLENTY, hosts + 1)
        # The largest shard of all sectors together for which the hosts, each with one at most, have room.
        low, high = 0, PLENTY
        while low < high:
            middle = (low + high + 1) // 2
            if sum(min(room, hosts * middle) for room, hosts in disks.values()) >= replication.hosts_needed * middle:
                low = middle
            else:
                high = middle - 1
        return min(low * replication.k, PLENTY)

    def room(self, replication: Replication) -> HostSpace | None:
        """The room on the host that would be the last to take a copy; None where hosts do not tell."""
        known = sorted(self._space.values(), key=lambda space: space.free, reverse=True)
        return known[min(replication.hosts_needed, len(known)) - 1] if known else None
