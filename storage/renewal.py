"""Renewal: each host's contract is renewed before it ends, without anybody asking.

    start                    2/3                   5/6              end             end + the owner's grace
      |-- nothing to do -------|-- renewed, or tried --|-- being left --|-- readable, renewable --|-- may be pruned

Due is the contract in force that ends last on its host (or, where none is, the one that ended last) once a third of its time is left; so
is one that has ended, for as long as the host has its record. The new one is as long as the old one was, and at least a day. Not renewed:
hosts that are lost, and those that have been left.

What fails is tried again, a minute later at first and in the end every hour (half to all of that, by chance, so that many machines do not
ask a host at the same moment), and as soon as a host that was away is back. Since when and why stands in the metadata, so a restart knows
it too. Each attempt that fails is in the log, and the last one in `status`. In good time before the end the host stops counting as one
that keeps what it has (`storage/standing.py`), and what is on it goes to others.

Where the host no longer has the contract's record, which is looked for every hour, it was pruned, or lost things: what it is said to hold
is doubted from then on (`forgot`), and the contract counts as one that could not be renewed. Such a host is `revoked`, and does not count
as one that keeps what it has, until a new contract is concluded there, which is for a person to decide: its owner may want us gone. That
it is away for a while, or refuses for another reason, changes nothing of that.
Metadata goes on going there, since it counts for the majority (I5), until it is marked lost.

Record under the key `w` + "renewal." + host number in decimal digits, a MessagePack array:

| # | field | type | meaning |
|---|---|---|---|
| 0 | version | int | 1 |
| 1 | contract | str | contract id: trouble with another one is none any more |
| 2 | since | int | when it failed first, nanoseconds |
| 3 | kind | str | class of the error; once it is NotFound, it stays so |
| 4 | reason | str | its message, when the kind was last another |

What binds the host besides the contract's record (retention on a bucket with Object Lock) is extended by whoever follows
`Contractor.on_change`, up to `Contractor.in_force()[host].end_ns`, on everything the volume has on record there: all keys `r` + root +
host.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Set
from dataclasses import dataclass

import msgspec
import trio

from storage.contractor import Contractor
from storage.errors import Corrupt, Fenced, FusefsError, NotFound
from storage.hosts.layout import Id, Nanoseconds
from storage.hosts.registry import HostRegistry
from storage.interfaces import Batch, Contract, MetadataStore
from storage.metadata.keys import SETTING, prefix_end
from storage.seams import Seams
from storage.standing import Standing
from storage.status import RenewalStatus

log = logging.getLogger("fusefs.contracts")

RECORD_VERSION = 1
#: Seconds between two looks at what is due: a machine that slept notices within this.
LOOK = 3600.0
#: The same while a host with a due contract is away.
LOOK_AWAY = 15.0
#: Seconds until what failed is tried again, doubling up to the last.
RETRY_FIRST, RETRY_LAST = 60.0, 3600.0
#: Seconds; a contract of seconds would be renewed every second.
SHORTEST = 86400.0
_MAX_REASON = 500
_TROUBLES = SETTING + b"renewal."


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    contract: Id
    since_ns: Nanoseconds
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a contract could not be renewed."""

    contract: str
    since_ns: int
    kind: str
    reason: str

    def encode(self) -> bytes:
        """For the metadata store."""
        return msgspec.msgpack.encode(_Record(RECORD_VERSION, self.contract, self.since_ns, self.kind, self.reason))


def trouble_key(number: int) -> bytes:
    """In the metadata store."""
    return _TROUBLES + b"%d" % number


def trouble_host(key: bytes) -> int:
    """The host number in such a key. Corrupt if it is none."""
    digits = key[len(_TROUBLES) :]
    # What `int` would take besides: signs, blanks, leading zeros.
    if not digits.isdigit() or len(digits) > 10 or key != trouble_key(int(digits)):
        raise Corrupt(f"metadata: {key[:40]!r} names no host whose contract could not be renewed; run fusefs check")
    return int(digits)


def is_trouble(key: bytes) -> bool:
    """Is the record of this kind, damaged or not?"""
    return key.startswith(_TROUBLES)


def decode_trouble(raw: bytes | None) -> Trouble | None:
    """None too for what is damaged: the next attempt writes it anew."""
    if raw is None:
        return None
    try:
        record = msgspec.msgpack.decode(raw, type=_Record)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return Trouble(record.contract, record.since_ns, record.kind, record.reason) if record.version == RECORD_VERSION else None


class Renewal:
    """See the module. `run` once, in the volume's nursery; `renew_due` may be called beside it."""

    def __init__(
        self,
        store: MetadataStore,
        registry: HostRegistry,
        contractor: Contractor,
        standing: Standing,
        seams: Seams,
        *,
        forgot: Callable[[Batch, int], None],
        has_left: Callable[[int], bool],
    ) -> None:
        """`forgot`: in a batch, the host has forgotten what it had. `has_left`: is the host, which is being left, no longer needed?"""
        self._store = store
        self._registry = registry
        self._contractor = contractor
        self._standing = standing
        self._seams = seams
        self._forgot = forgot
        self._has_left = has_left
        #: One round at a time: two would renew a contract twice.
        self._lock = trio.Lock()
        self._wake = trio.Event()
        #: Set after the first round of `run`, whose outcomes are `at_open`.
        self.looked = trio.Event()
        self.at_open: list[RenewalStatus] = []
        #: Host -> the latest trouble, as this process has met it.
        self._latest: dict[int, Trouble] = {}
        #: Host -> monotonic time when its contract's record was looked for; contracts whose record was not there.
        self._looked: dict[int, float] = {}
        self._missing: set[str] = set()
        #: Host -> (monotonic time of the next attempt, seconds waited last, was it away).
        self._later: dict[int, tuple[float, float, bool]] = {}
        contractor.on_change.append(self._changed)

    # ----------------------------------------------------------------------------------------------------------------
    # What is due, and what is wrong

    def due(self) -> dict[int, Contract]:
        """Host number -> the contract that is to be renewed now."""
        now, revoked = self._seams.clock.time_ns(), self.revoked()
        return {
            number: contract
            for number, contract in self._renewed().items()
            if contract.due(now) or number in revoked or contract.contract_id in self._missing
        }

    def _renewed(self) -> dict[int, Contract]:
        """Host number -> the contract that is renewed in time: of all hosts but those that are lost, or have been left."""
        lost, leaving = self._standing.lost(), self._standing.leaving()
        contracts = {number: self._contractor.contract_for(number) for number in self._registry.numbers() if number not in lost}
        return {
            number: contract
            for number, contract in contracts.items()
            if contract is not None and not (number in leaving and self._has_left(number))
        }

    def revoked(self) -> Set[int]:
        """Hosts that no longer have the record of the contract with them. What is damaged revokes nobody: `fusefs check` finds it."""
        found: set[int] = set()
        for key, raw in self._store.scan(_TROUBLES, prefix_end(_TROUBLES), 4096):
            trouble = decode_trouble(raw)
            if trouble is not None and trouble.kind == NotFound.__name__:
                try:
                    number = trouble_host(key)
                except Corrupt as error:
                    log.error("%s", error)
                    continue
                contract = self._contractor.contract_for(number)
                if contract is not None and contract.contract_id == trouble.contract:
                    found.add(number)
        return found

    def troubles(self) -> dict[int, Trouble]:
        """Host number -> why its contract, which is due, could not be renewed."""
        found: dict[int, Trouble] = {}
        for number, contract in self.due().items():
            trouble = self._latest.get(number) or decode_trouble(self._store.get(trouble_key(number)))
            if trouble is not None and trouble.contract == contract.contract_id:
                found[number] = trouble
        return found

    def warnings(self) -> list[str]:
        """What needs somebody's attention, a sentence each; the first to end first."""
        troubles = self.troubles()
        due = [(contract.end_ns, number) for number, contract in self.due().items() if number in troubles]
        return [self._text(number, troubles[number]) for _, number in sorted(due)]

    def _text(self, number: int, trouble: Trouble) -> str:
        contract, now = self._contractor.contract(trouble.contract), self._seams.clock.time_ns()
        url, end = self._registry.url(number), _day(contract.end_ns)
        if trouble.kind == NotFound.__name__ and contract.active(now):
            return f"since {_day(trouble.since_ns)}: {trouble.reason}; until then it goes to other hosts"
        since = f"could not be renewed since {_day(trouble.since_ns)}: {trouble.reason}"
        if not contract.active(now):
            return f"the contract with {url} ended on {end}, so nothing new goes there and its owner may prune what it holds; it {since}"
        left = ", and the host is being left" if contract.ending(now) else ""
        return f"the contract with {url} ends on {end}{left}; it {since}"

    # ----------------------------------------------------------------------------------------------------------------
    # Renewing

    async def renew_due(self, *, only_ready: bool = False) -> list[RenewalStatus]:
        """Renew what is due, on all hosts at the same time; what became of each host's contract. Durable when it returns.

        `only_ready`: not what failed lately. Fenced, NoSpace: of this machine's disk, not of a host.
        """
        outcomes: list[RenewalStatus] = []
        async with self._lock:
            await self._look_for_records(again=not only_ready)
            due = self.due()
            for number in self._registry.numbers():
                contract = self._contractor.contract_for(number)
                if contract is not None and number not in due:
                    outcomes.append(self._outcome(number, contract.contract_id))
            errors: list[FusefsError] = []

            async def one(number: int, contract: Contract) -> None:
                try:
                    outcomes.append(await self._renew(number, contract))
                except FusefsError as error:
                    errors.append(error)  # raised outside of the nursery, which would wrap it

            async with trio.open_nursery() as nursery:
                for number, contract in due.items():
                    if not only_ready or self._ready(number):
                        nursery.start_soon(one, number, contract)
            if errors:
                raise min(errors, key=lambda error: not isinstance(error, Fenced))
        return sorted(outcomes, key=lambda outcome: outcome.host_number)

    async def _look_for_records(self, *, again: bool) -> None:
        """Do the hosts still know of the contracts in force with them? At most once in `LOOK` seconds each, unless `again`."""

        async def look(number: int, contract: Contract) -> None:
            try:
                there = await self._contractor.has_record(contract.contract_id)
            except FusefsError as error:
                log.info("whether %s has its contract is looked at later: %s", self._registry.url(number), error)
                return
            self._looked[number] = self._seams.clock.monotonic()
            if not there:
                self._missing.add(contract.contract_id)

        self._missing.clear()
        now, lost = self._seams.clock.monotonic(), self._standing.lost()
        async with trio.open_nursery() as nursery:
            for number, contract in self._contractor.in_force().items():
                rested = number not in self._looked or now - self._looked[number] >= LOOK / 2
                if number not in lost and self._registry.available(number) and (again or rested):
                    nursery.start_soon(look, number, contract)

    async def _renew(self, number: int, contract: Contract) -> RenewalStatus:
        duration = max((contract.end_ns - contract.start_ns) / 1e9, SHORTEST)
        try:
            renewed = await self._contractor.renew_contract(contract.contract_id, duration)
        except Fenced:
            raise
        except FusefsError as error:
            await self._failed(number, contract, error)
            return self._outcome(number, contract.contract_id, error=str(error))
        log.info("the contract with %s was renewed, to %s", self._registry.url(number), _day(self._contractor.contract(renewed).end_ns))
        return self._outcome(number, renewed, renewed=True)

    def _outcome(self, number: int, contract_id: str, *, renewed: bool = False, error: str = "") -> RenewalStatus:
        end_ns = self._contractor.contract(contract_id).end_ns
        return RenewalStatus(number, self._registry.url(number), contract_id, end_ns, renewed, error)

    async def _failed(self, number: int, contract: Contract, error: FusefsError) -> None:
        known = decode_trouble(self._store.get(trouble_key(number)))
        if known is not None and known.contract != contract.contract_id:
            known = None
        since = known.since_ns if known is not None else self._seams.clock.time_ns()
        trouble = Trouble(contract.contract_id, since, type(error).__name__, str(error)[:_MAX_REASON])
        if known is not None and known.kind == NotFound.__name__ != trouble.kind:
            # That it is away now, say, gives it no contract back: it stays revoked.
            log.info("the contract with %s cannot be looked for now: %s", self._registry.url(number), error)
            trouble = known
        self._latest[number] = trouble
        if known is None or known.kind != trouble.kind:
            # Only then: an idle volume is silent, and a message may have something new in it each time.
            batch = Batch()
            batch.put(trouble_key(number), trouble.encode())
            if isinstance(error, NotFound):
                self._forgot(batch, number)
            self._store.apply(batch)
            await self._store.commit()
        log.warning("%s", self._text(number, trouble))
        waited = self._later.get(number, (0.0, RETRY_FIRST / 2, False))[1]
        wait = min(2 * waited, RETRY_LAST)
        chance = int.from_bytes(self._seams.random.token_bytes(2), "big") / 65536
        self._later[number] = (self._seams.clock.monotonic() + wait * (1 + chance) / 2, wait, not self._registry.available(number))

    def _ready(self, number: int) -> bool:
        following, _, away = self._later.get(number, (0.0, 0.0, False))
        return following <= self._seams.clock.monotonic() or (away and self._registry.available(number))

    def _changed(self, number: int) -> None:
        """The host has a new contract. No await."""
        self._latest.pop(number, None)
        self._later.pop(number, None)
        contract = self._contractor.contract_for(number)
        if self._store.get(trouble_key(number)) is not None and contract is not None and not contract.due(self._seams.clock.time_ns()):
            batch = Batch()
            batch.delete(trouble_key(number))
            self._store.apply(batch)
        self.wake()

    # ----------------------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Look again now."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled, or the volume can be written no more."""
        try:
            while True:
                self._wake = trio.Event()
                try:
                    outcomes = await self.renew_due(only_ready=True)
                    if not self.looked.is_set():
                        self.at_open = outcomes
                except Fenced as error:
                    log.info("contracts are renewed no more: %s", error)
                    return
                except FusefsError as error:
                    # The local disk is full, say: what was renewed is, here and on its host.
                    log.warning("contracts are looked at again later: %s", error)
                self.looked.set()
                with trio.move_on_after(self._pause()):
                    await self._wake.wait()
        finally:
            self.looked.set()

    def _pause(self) -> float:
        """Seconds until something can be due, or is to be tried again."""
        pause, now_ns, now = LOOK, self._seams.clock.time_ns(), self._seams.clock.monotonic()
        due = self.due()
        for number, contract in self._renewed().items():
            if number in due:
                following, _, _ = self._later.get(number, (now + LOOK, 0.0, False))
                pause = min(pause, following - now if self._registry.available(number) else LOOK_AWAY)
            else:
                pause = min(pause, (contract.end_ns - (contract.end_ns - contract.start_ns) // 3 - now_ns) / 1e9)
        return max(1.0, pause)


def _day(ns: int) -> str:
    """Local date."""
    return time.strftime("%Y-%m-%d", time.localtime(ns / 1e9))
