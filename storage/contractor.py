"""Contracts: concluded, renewed, and written down on the host first, then here.

Record under the key `k` + contract id (32 ASCII digits), a MessagePack array:

| # | field | type | meaning |
|---|---|---|---|
| 0 | version | int | 1 |
| 1 | ordinal | int | contracts of the volume in the order in which they were concluded, from 1 |
| 2 | host | int | host number |
| 3, 4 | start, end | int | nanoseconds since the Unix epoch |
| 5 | lineage | str | contract id of the first of the chain of renewals |
| 6 | renewed from | str or nil | contract id |

A crash between the two leaves a contract on the host that nobody here knows of: it holds nothing, and ends.

A host's owner may prune it (`storage/pruning.py`) at the very moment a contract is written down: the pruner puts its mark and then looks
for contracts, the contract is put and then the mark looked for. So at least one of the two sees the other, and steps back.

`on_change` is told the host of each new contract, once it is durable. What depends on until when a host is to keep things asks
`in_force()[host].end_ns` then: the reconciler (is the host keeping?), the renewal loop, and whatever extends a retention on the host.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
import trio

from storage.documents import MAX_DOCUMENT
from storage.errors import BadArgument, Busy, Corrupt, Fenced, NotFound, Unavailable
from storage.hosts.holders import Claim
from storage.hosts.layout import (
    CONTRACT_FORMAT,
    CONTRACT_VERSION,
    ContractFile,
    Id,
    Nanoseconds,
    contract_name,
    decode_contract_file,
    encode_json,
    is_id,
    pruning_name,
)
from storage.hosts.registry import HostRegistry
from storage.interfaces import Batch, Contract, MetadataStore
from storage.metadata.keys import CONTRACT, prefix_end
from storage.seams import Seams

RECORD_VERSION = 1
#: Seconds; a hundred years.
MAX_DURATION = 100 * 365.25 * 86400
#: Seconds a host has to give or to take the record of a contract.
TIMEOUT = 20.0
_MAX_NS = 2**63 - 1
_SLICE = 1000

T = TypeVar("T")


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    ordinal: Annotated[int, msgspec.Meta(ge=1)]
    host: Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
    start_ns: Nanoseconds
    end_ns: Nanoseconds
    lineage: Id
    renewed_from: Id | None


def encode_contract(contract: Contract, ordinal: int, renewed_from: str | None) -> tuple[bytes, bytes]:
    """(key, value) for the metadata store."""
    record = _Record(RECORD_VERSION, ordinal, contract.host_number, contract.start_ns, contract.end_ns, contract.lineage, renewed_from)
    return CONTRACT + contract.contract_id.encode("ascii"), msgspec.msgpack.encode(record)


def decode_contract(key: bytes, raw: bytes) -> tuple[Contract, int, str | None]:
    """(contract, ordinal, renewed from); Corrupt if it is no record of one."""
    contract_id = key[1:].decode("ascii", "replace")
    if key[:1] != CONTRACT or not is_id(contract_id):
        raise Corrupt(f"metadata: {key[:40].hex()} is no key of a contract")
    try:
        record = msgspec.msgpack.decode(raw, type=_Record)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Corrupt(f"metadata: the record of contract {contract_id} is damaged: {error}") from None
    if record.version != RECORD_VERSION or record.start_ns >= record.end_ns:
        raise Corrupt(f"metadata: the record of contract {contract_id} has an unknown layout (version {record.version})")
    contract = Contract(contract_id, record.host, record.start_ns, record.end_ns, record.lineage)
    return contract, record.ordinal, record.renewed_from


@dataclass(frozen=True, slots=True)
class _Force:
    """Which contracts are in force, and which of them go on: what is so from `since` until before `until`, while none is added."""

    since: float
    until: float
    by_host: Mapping[int, Contract]
    going_on: frozenset[int]


class Contractor:
    """See `interfaces.Contractor`. All contracts ever are in memory: a few hundred bytes per host and renewal.

    Placement asks for each sector, and reconcile in each round, so what is asked of all hosts is kept until time or a contract changes it,
    and what is asked of one host looks at no other's.
    """

    def __init__(self, volume_id: bytes, store: MetadataStore, registry: HostRegistry, seams: Seams) -> None:
        self._volume_id = volume_id
        self._store = store
        self._registry = registry
        self._seams = seams
        self._contracts: dict[str, Contract] = {}
        #: Host number -> its contracts, by end and id.
        self._on_host: dict[int, list[Contract]] = {}
        #: None: to be found again.
        self._force: _Force | None = None
        self._ordinals: dict[str, int] = {}
        self._renewed_from: dict[str, str | None] = {}
        self._latest = 0
        #: In the batch of a contract that was concluded where all had ended: nothing bound the host to keep what it had meanwhile.
        self.on_lapsed: Callable[[Batch, int], None] = lambda _batch, _number: None
        #: Called with the host number of each new contract, in order. No await inside.
        self.on_change: list[Callable[[int], None]] = []
        start, stop = CONTRACT, prefix_end(CONTRACT)
        while pairs := store.scan(start, stop, _SLICE):
            for key, raw in pairs:
                self._know(*decode_contract(key, raw))
            start = pairs[-1][0] + b"\0"

    # ----------------------------------------------------------------------------------------------------------------
    # What there is

    def contracts(self) -> list[str]:
        """Ids of the active ones, by host and end."""
        now = self._seams.clock.time_ns()
        return [contract.contract_id for contract in self.all_contracts() if contract.active(now)]

    def all_contracts(self) -> list[Contract]:
        """Every contract on record, ended ones included, by host and end."""
        return [contract for _, on_host in sorted(self._on_host.items()) for contract in on_host]

    def on_host(self, host_number: int) -> list[Contract]:
        """Every contract on record with that host, ended ones included, by end."""
        return list(self._on_host.get(host_number, ()))

    def contract(self, contract_id: str) -> Contract:
        """NotFound if there never was one."""
        try:
            return self._contracts[contract_id]
        except KeyError:
            raise NotFound(f"this volume has no contract {contract_id[:64]!r}; 'fusefs contracts' lists them") from None

    def contract_for(self, host_number: int) -> Contract | None:
        """The one to use on a host: the active one that ends last, else the last to have ended."""
        on_host = self._on_host.get(host_number, ())
        if len(on_host) < 2:
            # Mostly, and asked with each random read.
            return on_host[0] if on_host else None
        now = self._seams.clock.time_ns()
        return max(on_host, key=lambda c: (c.active(now), c.end_ns, c.contract_id), default=None)

    def in_force(self) -> Mapping[int, Contract]:
        """Host number -> the active contract that ends last, by host. As things are now: it does not change."""
        return self._in_force().by_host

    def going_on(self) -> frozenset[int]:
        """Hosts whose contract in force was renewed in time: it is not `ending`."""
        return self._in_force().going_on

    def _in_force(self) -> _Force:
        now = self._seams.clock.time_ns()
        # The wall clock may be set back: what was so later is not what is so now.
        if self._force is None or not self._force.since <= now < self._force.until:
            self._force = self._force_at(now)
        return self._force

    def _force_at(self, now: int) -> _Force:
        """One pass over all."""
        by_host: dict[int, Contract] = {}
        since, until = -math.inf, math.inf
        for number, on_host in sorted(self._on_host.items()):
            for contract in on_host:
                for moment in (contract.start_ns, contract.ending_ns, contract.end_ns):
                    if moment <= now:
                        since = max(since, moment)
                    else:
                        until = min(until, moment)
                if contract.active(now):
                    by_host[number] = contract
        return _Force(since, until, by_host, frozenset(number for number, contract in by_host.items() if not contract.ending(now)))

    def renewed_from(self, contract_id: str) -> str | None:
        """The contract this one renews; None if it renews none. NotFound."""
        return self._renewed_from[self.contract(contract_id).contract_id]

    def claim(self, contract_id: str) -> Claim:
        """The contract in the terms of `hosts.holders`. NotFound."""
        contract = self.contract(contract_id)
        chain: list[tuple[str, int]] = []
        following: str | None = contract_id
        # Ordinals descend along a chain, so damaged records cannot make it a circle.
        while following is not None and following in self._contracts and (not chain or self._ordinals[following] < chain[-1][1]):
            chain.append((following, self._ordinals[following]))
            following = self._renewed_from[following]
        return Claim(contract.lineage, tuple(chain))

    def active_claims(self, host_number: int) -> list[Claim]:
        """Of the contracts in force on a host."""
        now = self._seams.clock.time_ns()
        return [self.claim(c.contract_id) for c in self._on_host.get(host_number, ()) if c.active(now)]

    @property
    def latest_ordinal(self) -> int:
        """Of the contract concluded last; 0 before the first."""
        return self._latest

    # ----------------------------------------------------------------------------------------------------------------
    # Changing

    async def conclude_contract(self, host: str, duration: float) -> str:
        """A new contract from now on. Durable on the host and here when it returns its id. NotFound, Unavailable, NoSpace, BadArgument;
        Busy while the host's owner is pruning."""
        nanoseconds = _nanoseconds(duration)
        number = self._registry.resolve(host)
        contract_id = self._seams.random.token_bytes(16).hex()
        return await self._write_down(contract_id, number, nanoseconds, contract_id, None)

    async def renew_contract(self, contract_id: str, duration: float) -> str:
        """A new contract of the same lineage, from now for `duration`; the old one runs on to its end. Nothing is changed by a failure.

        NotFound if there is no such contract, or its host no longer has its record (it was pruned, and with it perhaps the data):
        conclude a new one then. Corrupt if the host's record is damaged or another. Unavailable, NoSpace, BadArgument, Busy as for
        `conclude_contract`.
        """
        nanoseconds = _nanoseconds(duration)
        old = self.contract(contract_id)
        host = self._registry.get(old.host_number)
        name = contract_name(self._volume_id, contract_id)
        try:
            raw = await self._answer(old.host_number, host.get(name, MAX_DOCUMENT))
        except NotFound:
            raise NotFound(
                f"host {host.url} has no contract {contract_id} any more: it was pruned, or has lost things; conclude a new one "
                f"(fusefs contracts VOLUME conclude {old.host_number} DAYS), and what is missing there is put there again"
            ) from None
        stored = decode_contract_file(raw, f"host {host.url}: {name}")
        if stored != self._file(old, self._renewed_from[contract_id]):
            raise Corrupt(f"host {host.url}: {name} is not the contract that was concluded; conclude a new one")
        return await self._write_down(self._seams.random.token_bytes(16).hex(), old.host_number, nanoseconds, old.lineage, contract_id)

    async def has_record(self, contract_id: str) -> bool:
        """Does its host still have the contract's record? NotFound if there is no such contract; Unavailable."""
        number = self.contract(contract_id).host_number
        host = self._registry.get(number)
        return await self._answer(number, host.tag(contract_name(self._volume_id, contract_id))) is not None

    async def _write_down(self, contract_id: str, number: int, nanoseconds: int, lineage: str, renewed_from: str | None) -> str:
        host = self._registry.get(number)
        if self._store.failure is not None:
            # Before the host has a contract that is on no record.
            raise Fenced(self._store.failure)
        now = self._seams.clock.time_ns()
        contract = Contract(contract_id, number, now, min(now + nanoseconds, _MAX_NS), lineage)
        self._seams.failpoints.hit("contract.before_host")
        # The name is new, with 128 random bits: there is nothing it could replace.
        name = contract_name(self._volume_id, contract_id)
        await self._answer(number, host.put(name, encode_json(self._file(contract, renewed_from))))
        # In this order: see the module.
        if await self._answer(number, host.tag(pruning_name(self._volume_id))) is not None:
            await self._answer(number, host.delete(name))
            raise Busy(
                f"host {host.url} is being pruned by its owner (fusefs host prune): what it held of this volume is going away; once "
                f"that is done, conclude a new contract (fusefs contracts VOLUME conclude {number} DAYS)"
            )
        self._seams.failpoints.hit("contract.before_apply")
        # No await from here to the record: the ordinal says which releases came before (hosts.holders).
        ordinal = self._latest + 1
        batch = Batch()
        batch.put(*encode_contract(contract, ordinal, renewed_from))
        known = self.contract_for(number)
        if renewed_from is None and known is not None and not known.active(now):
            self.on_lapsed(batch, number)
        self._store.apply(batch)
        self._know(contract, ordinal, renewed_from)
        self._seams.failpoints.hit("contract.before_commit")
        await self._store.commit()
        for told in self.on_change:
            told(number)
        return contract_id

    async def _answer(self, number: int, call: Awaitable[T]) -> T:
        """Unavailable if the host hangs: whoever waits for a contract must get an answer."""
        with trio.move_on_after(TIMEOUT):
            return await call
        self._registry.suspect(number)
        raise Unavailable(f"host {self._registry.url(number)} did not answer within {TIMEOUT:.0f} s")

    def _know(self, contract: Contract, ordinal: int, renewed_from: str | None) -> None:
        self._contracts[contract.contract_id] = contract
        insort(self._on_host.setdefault(contract.host_number, []), contract, key=lambda c: (c.end_ns, c.contract_id))
        self._force = None
        self._ordinals[contract.contract_id] = ordinal
        self._renewed_from[contract.contract_id] = renewed_from
        self._latest = max(self._latest, ordinal)

    def _file(self, contract: Contract, renewed_from: str | None) -> ContractFile:
        return ContractFile(
            format=CONTRACT_FORMAT,
            format_version=CONTRACT_VERSION,
            contract=contract.contract_id,
            volume=self._volume_id.hex(),
            host=self._registry.record(contract.host_number).host_id,
            start_ns=contract.start_ns,
            end_ns=contract.end_ns,
            lineage=contract.lineage,
            renewed_from=renewed_from,
        )


def _nanoseconds(duration: float) -> int:
    """A contract's duration in nanoseconds; BadArgument unless it is positive and at most a hundred years."""
    if not math.isfinite(duration) or not 0 < duration <= MAX_DURATION:
        raise BadArgument(f"a contract of {duration} seconds: it must be longer than 0 and at most {MAX_DURATION / 86400:.0f} days")
    return max(1, round(duration * 1e9))
