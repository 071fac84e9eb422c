"""Virtual hosts, and one volume's sectors on them: the outside world of the real placement and reconcile code.

A host keeps no bytes, only which shards it has; a shard's sealed bytes are zeros, shared by all. What is alive is counted apart from the
volume's records, so that what the code believes and what is there can differ:

    alive     sector -> per shard, the hosts that have it and are not dead          (here)
    records   sector -> per shard, the hosts the volume has written down            (the store, as always)

A sector is lost when fewer distinct shards are alive than it needs. A new one then takes its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, cast

import trio

from simulation.store import MemoryStore, virtual_seams
from simulation.watching import Watch, nobody
from storage.contractor import Contractor
from storage.errors import Corrupt, NoSpace, NotFound, Unavailable
from storage.host_io import HostIO
from storage.hosts.hostdb import TYPICAL_WRITE, HostDB
from storage.hosts.registry import HostRecord, HostRegistry
from storage.interfaces import Batch, Buffer, Contract, Host, HostCapabilities, HostSpace, SealedShard
from storage.metadata.keys import SECTOR, UNDERREPLICATED, u64
from storage.replication import Replication
from storage.sectors.deleter import Deleter
from storage.sectors.doubts import Doubts
from storage.sectors.mending import Mender
from storage.sectors.placement import Placement
from storage.sectors.reconcile import Reconciler
from storage.sectors.records import VERSION, SectorRecord, ShardRecord, decode_sector
from storage.sectors.redundancy import Layout, layout_of
from storage.sectors.staging import Staging
from storage.sectors.strays import Strays
from storage.standing import Standing

_FOREVER_NS = 2**62


@dataclass(slots=True)
class VirtualHost:
    """One machine's disk."""

    number: int
    domain: str
    #: Bytes, and how many of a real one each stands for.
    capacity: int
    unit: float
    used: int = 0
    #: Its content is gone for good.
    dead: bool = False
    #: Does it answer?
    up: bool = True
    #: (sector, shard)
    shards: set[tuple[int, int]] = field(default_factory=set)

    async def space(self) -> HostSpace:
        return HostSpace(round(max(0, self.capacity - self.used) * self.unit), round(self.capacity * self.unit))


class Fleet(HostRegistry):
    """The registry, without asking anybody."""

    def __init__(self, store: MemoryStore, seed: int) -> None:
        super().__init__(bytes(16), store, virtual_seams(seed))
        self.hosts: dict[int, VirtualHost] = {}
        self._known: dict[int, HostRecord] = {}
        self._numbers: list[int] = []

    def enter(self, host: VirtualHost) -> None:
        self.hosts[host.number] = host
        capabilities = HostCapabilities(conditional_put=True, ranges=True)
        self._known[host.number] = HostRecord(host.number, f"{host.number:032x}", f"virtual:{host.number}", host.domain, 0, capabilities)
        # Numbers only grow.
        self._numbers.append(host.number)

    def leave(self, number: int) -> None:
        del self.hosts[number], self._known[number]
        self._numbers.remove(number)

    def numbers(self) -> list[int]:
        return self._numbers

    def domain(self, number: int) -> str:
        host = self.hosts.get(number)
        return "" if host is None else host.domain

    def record(self, number: int) -> HostRecord:
        try:
            return self._known[number]
        except KeyError:
            raise NotFound(f"there is no host {number}") from None

    def available(self, number: int) -> bool:
        host = self.hosts.get(number)
        return host is not None and host.up

    def get(self, number: int) -> Host:
        host = self.hosts[number]
        if not host.up:
            raise Unavailable(f"host {number} is away")
        # The part of a host that placement asks for.
        return cast("Host", host)


class Contracts(Contractor):
    """One contract without end per host, and nobody asked for it."""

    def __init__(self, store: MemoryStore, fleet: Fleet, seed: int) -> None:
        super().__init__(bytes(16), store, fleet, virtual_seams(seed))

    def enter(self, number: int) -> None:
        contract_id = f"{number:032x}"
        self._know(Contract(contract_id, number, 0, _FOREVER_NS, contract_id), number, None)

    def leave(self, number: int) -> None:
        """A volume of the world outside never forgets a contract."""
        contract_id = f"{number:032x}"
        del self._contracts[contract_id], self._ordinals[contract_id], self._renewed_from[contract_id], self._on_host[number]
        self._force = None


class VirtualIO:
    """`storage.interfaces.HostIO`: writes and deletions change what is alive; nothing can be read."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def write_sealed(self, contract_id: str, shard: SealedShard) -> None:
        await trio.lowlevel.checkpoint()
        host = self._world.fleet.hosts.get(int(contract_id, 16))
        if host is None or not host.up:
            raise Unavailable(f"host {int(contract_id, 16)} does not answer")
        if host.used + shard.plaintext_length > host.capacity:
            raise NoSpace(f"host {host.number} is full")
        self._world.stored(host, bytes.fromhex(shard.root))

    async def delete(self, contract_id: str, sector_root: str) -> None:
        await trio.lowlevel.checkpoint()
        host = self._world.fleet.hosts.get(int(contract_id, 16))
        if host is None or not host.up:
            raise Unavailable(f"host {int(contract_id, 16)} does not answer")
        self._world.deleted(host, bytes.fromhex(sector_root))

    async def read(self, contract_id: str, sector_root: str, sector_id: int) -> bytes:  # noqa: ARG002 - the Protocol's
        return _no_bytes()

    async def insecure_read(
        self,
        contract_id: str,  # noqa: ARG002 - the Protocol's
        sector_root: str,  # noqa: ARG002
        sector_id: int,  # noqa: ARG002
        offset: int,  # noqa: ARG002
        length: int,  # noqa: ARG002
        plaintext_length: int | None = None,  # noqa: ARG002
    ) -> bytes:
        return _no_bytes()

    async def write(self, contract_id: str, data: Buffer, sector_id: int) -> str:  # noqa: ARG002 - the Protocol's
        return _no_bytes()

    async def replace(self, contract_id: str, data: Buffer, sector_id: int, old_sector_root: str) -> str:  # noqa: ARG002 - the Protocol's
        return _no_bytes()

    def seal(self, data: Sequence[Buffer], sector_id: int) -> SealedShard:  # noqa: ARG002 - the Protocol's
        return _no_bytes()

    def seal_all(self, plaintexts: Sequence[Sequence[Buffer]], sector_id: int) -> list[SealedShard]:  # noqa: ARG002 - the Protocol's
        return _no_bytes()

    async def sealed(self, plaintexts: Sequence[Sequence[Buffer]], sector_id: int) -> list[SealedShard]:  # noqa: ARG002 - the Protocol's
        return _no_bytes()


def _no_bytes() -> NoReturn:
    raise Unavailable("virtual hosts keep no bytes")


class NothingStaged:
    """Shards go straight to their hosts here."""

    def has(self, root: bytes) -> bool:  # noqa: ARG002 - as of Staging
        return False


@dataclass(slots=True)
class Truth:
    """What is there of a sector."""

    #: Per shard, the hosts that have it.
    alive: list[set[int]]
    #: Hosts whose death alone would lose it; failure domains whose death would.
    killers: int = 0
    domain_killers: int = 0


@dataclass(slots=True)
class Tally:
    """What has happened."""

    deaths: int = 0
    lost: int = 0
    #: Deaths, of hosts or domains, with which some sector was lost.
    incidents: int = 0
    #: Shards made again, and the sum of the times since the deaths that took them (seconds).
    remade: int = 0
    waited: float = 0.0
    #: Integral over time of the sum of killers, of hosts and of domains: host seconds at which one death would have been a loss.
    exposed: float = 0.0
    domain_exposed: float = 0.0


class World:
    """One volume of `sectors` sectors on a fleet. Made inside a trio run; everything synchronous unless it says otherwise."""

    def __init__(self, spec: Replication, sector_bytes: int, seed: int, *, rate: float, grace: float, unit: float, domains: bool) -> None:
        """`rate`: bytes of the simulation sent for repairs per second; `unit`: bytes of a real host that one of them stands for."""
        self.spec = spec
        self.seams = virtual_seams(seed)
        self.layout: Layout = layout_of(str(spec), sector_bytes)
        self.store = MemoryStore()
        self.fleet = Fleet(self.store, seed)
        self.contracts = Contracts(self.store, self.fleet, seed)
        self.io = VirtualIO(self)
        self.standing = Standing(self.store, self.fleet, self.contracts, self.seams, away_grace=grace)
        self.hostdb = HostDB(self.store, self.seams)
        self.placement = Placement(self.fleet, self.contracts, self.hostdb, self.standing)
        self.deleter = Deleter(self.store, self.io, self.contracts, self.seams)
        # Of a HostIO it uses what the Protocol has; and `adopt`, where the record names too few hosts, which never is so here.
        io = cast("HostIO", self.io)
        doubts = Doubts(self.store, io, self.contracts)
        mender = Mender(
            store=self.store,
            host_io=io,
            placement=self.placement,
            standing=self.standing,
            deleter=self.deleter,
            doubts=doubts,
            regenerate=self._regenerate,
            contractor=self.contracts,
            strays=Strays(bytes(16), self.fleet, self.contracts, cast("Staging", NothingStaged())),
            seams=self.seams,
            rate=rate,
        )
        self.reconciler = Reconciler(
            store=self.store, placement=self.placement, standing=self.standing, doubts=doubts, mender=mender, seams=self.seams
        )
        self.tally = Tally()
        self._domains = domains
        self._unit = unit
        self._sealed = bytes(self.layout.shard_length)
        self._shards: dict[bytes, tuple[int, int]] = {}
        self._truth: dict[int, Truth] = {}
        self._killers = self._domain_killers = 0
        self._integrated_at = trio.current_time()
        #: (sector, shard) -> when the hosts died that left it short of one, oldest first.
        self._missing: dict[tuple[int, int], list[float]] = {}
        self._next_sector = 1
        self._next_host = 1
        #: Sectors there ought to be.
        self.wanted = 0

    # ---- hosts

    def enter(self, domain: str, capacity: int) -> int:
        """A new, empty host; its number."""
        number, self._next_host = self._next_host, self._next_host + 1
        self.fleet.enter(VirtualHost(number, domain, capacity, self._unit))
        # As fast as any other: a host nobody has written to would be known for nothing.
        self.hostdb.succeeded(number, "write", TYPICAL_WRITE, 0.1)
        self.contracts.enter(number)
        return number

    def leave(self, number: int) -> None:
        """Nobody expects a dead host back any more."""
        self.fleet.leave(number)
        self.contracts.leave(number)

    def die(self, numbers: Collection[int]) -> None:
        """All at once."""
        self.integrate()
        now = trio.current_time()
        hit: set[int] = set()
        for number in numbers:
            host = self.fleet.hosts[number]
            host.dead, host.up = True, False
            self.tally.deaths += 1
            for sector, shard in host.shards:
                alive = self._truth[sector].alive[shard]
                alive.discard(number)
                if len(alive) < self.layout.hosts_each:
                    self._missing.setdefault((sector, shard), []).append(now)
                hit.add(sector)
            host.shards.clear()
        lost = [sector for sector in sorted(hit) if self._living(sector) < self.layout.needed]
        for sector in hit:
            self._weigh(sector)
        for sector in lost:
            self._lose(sector)
        self.tally.lost += len(lost)
        self.tally.incidents += bool(lost)

    # ---- sectors

    def fill(self, watch: Watch = nobody) -> None:
        """As many sectors as there ought to be, where there is room for them."""
        while len(self._truth) < self.wanted:
            watch(f"placing {self.wanted:,} sectors on {len(self.fleet.hosts):,} hosts", len(self._truth) / self.wanted, "")
            try:
                contracts = self.placement.candidates(self.spec)
            except Unavailable:
                return
            if len(contracts) < self.spec.hosts_needed:
                return
            self._place([contract.host_number for contract in contracts[: self.spec.hosts_needed]])

    def _place(self, hosts: list[int]) -> None:
        sector, self._next_sector = self._next_sector, self._next_sector + self.layout.shards
        roots = [hashlib.sha256(u64(sector) + bytes([shard])).digest() for shard in range(self.layout.shards)]
        self._truth[sector] = Truth([set() for _ in roots])
        per_shard: list[list[int]] = [[] for _ in roots]
        for shard, number in zip(self.layout.places, hosts, strict=True):
            self._shards[roots[shard]] = (sector, shard)
            self.stored(self.fleet.hosts[number], roots[shard])
            per_shard[shard].append(number)
        shards = [ShardRecord(sector + i, self.layout.shard_length, root, sorted(per_shard[i])) for i, root in enumerate(roots)]
        batch = Batch()
        length = self.layout.length
        batch.put(SECTOR + u64(sector), SectorRecord(VERSION, str(self.spec), length, length, length, shards).encode())
        self.store.apply(batch)

    def _lose(self, sector: int) -> None:
        raw = self.store.get(SECTOR + u64(sector))
        batch = Batch()
        batch.delete(SECTOR + u64(sector))
        batch.delete(UNDERREPLICATED + u64(sector))
        self.store.apply(batch)
        if raw is not None:
            for each in decode_sector(raw, sector).shards:
                self._shards.pop(each.root, None)
        truth = self._truth.pop(sector)
        self._killers -= truth.killers
        self._domain_killers -= truth.domain_killers
        for shard, alive in enumerate(truth.alive):
            self._missing.pop((sector, shard), None)
            for number in alive:
                self._take(self.fleet.hosts[number], (sector, shard))

    def stored(self, host: VirtualHost, root: bytes) -> None:
        """A shard is durable on the host."""
        place = self._shards.get(root)
        if place is None or place in host.shards:
            return
        self.integrate()
        host.shards.add(place)
        host.used += self.layout.shard_length
        self._truth[place[0]].alive[place[1]].add(host.number)
        missing = self._missing.get(place)
        if missing:
            self.tally.remade += 1
            self.tally.waited += trio.current_time() - missing.pop(0)
            if not missing:
                del self._missing[place]
        self._weigh(place[0])

    def deleted(self, host: VirtualHost, root: bytes) -> None:
        place = self._shards.get(root)
        if place is not None and place in host.shards:
            self.integrate()
            self._take(host, place)
            self._truth[place[0]].alive[place[1]].discard(host.number)
            self._weigh(place[0])

    def _take(self, host: VirtualHost, place: tuple[int, int]) -> None:
        host.shards.discard(place)
        host.used -= self.layout.shard_length

    # ---- what is at stake

    def integrate(self) -> None:
        """Time has passed with things as they are."""
        now = trio.current_time()
        passed, self._integrated_at = now - self._integrated_at, now
        self.tally.exposed += passed * self._killers
        self.tally.domain_exposed += passed * self._domain_killers

    def _living(self, sector: int) -> int:
        return sum(1 for alive in self._truth[sector].alive if alive)

    def _weigh(self, sector: int) -> None:
        truth = self._truth[sector]
        self._killers -= truth.killers
        self._domain_killers -= truth.domain_killers
        spare = self._living(sector) - self.layout.needed
        # Hosts, and domains, that have the last copies of so many shards.
        alone: dict[int, int] = {}
        together: dict[str, int] = {}
        for alive in truth.alive:
            if len(alive) == 1:
                (number,) = alive
                alone[number] = alone.get(number, 0) + 1
            if self._domains and alive:
                domains = {self.fleet.hosts[number].domain for number in alive}
                if len(domains) == 1:
                    (domain,) = domains
                    together[domain] = together.get(domain, 0) + 1
        truth.killers = sum(1 for count in alone.values() if count > spare)
        truth.domain_killers = sum(1 for count in together.values() if count > spare)
        self._killers += truth.killers
        self._domain_killers += truth.domain_killers

    async def _regenerate(self, sector_id: int, record: SectorRecord, index: int) -> SealedShard:
        """As storage.sectors.regenerate: from a host that has it, or of enough other shards; from hosts that answer."""
        await trio.lowlevel.checkpoint()
        truth = self._truth.get(sector_id)
        if truth is None:
            raise Corrupt(f"sector {sector_id} is lost")
        there = [any(self.fleet.available(number) for number in alive) for alive in truth.alive]
        if not there[index] and sum(there) < self.layout.needed:
            raise Unavailable(f"sector {sector_id}: too few of its hosts answer")
        shard = record.shards[index]
        return SealedShard(shard.root.hex(), shard.shard_id, shard.length, self._sealed)
