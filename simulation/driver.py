"""Time in a world: when hosts die, go away, come back and are replaced, and when reconcile looks.

All waiting times of hosts are exponential, drawn for the fleet as a whole. Reconcile looks when something has changed and when the grace of
a host that is away is over, not every few seconds as a mount does: in between it would find nothing new.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from simulation.world import World

DAY = 86400.0
#: Seconds after which reconcile tries again what it could not mend.
RETRY_SECONDS = 900.0
#: Seconds between two looks at how full hosts are, besides those when one is new.
POLL_SECONDS = 7 * DAY


@dataclass(frozen=True, slots=True)
class Rates:
    """What happens to hosts. Seconds; a mean of 0: it does not happen."""

    #: Mean time to a host's death; to a whole failure domain's.
    host_life: float
    domain_life: float
    #: Mean time between two absences of a host, and their mean length.
    away_every: float
    away_for: float
    #: From a death to the new, empty host in its place.
    replace_after: float


class Driver:
    """`slots`: places in racks, each with one host at a time."""

    def __init__(self, world: World, hosts: int, domains: int, capacity: int, seed: int) -> None:
        self._world = world
        self._random = random.Random(seed)
        self._capacity = capacity
        self._domains = [f"domain{number}" for number in range(domains)] if domains else []
        self.slots = [world.enter(self._domain(slot), capacity) for slot in range(hosts)]
        self._wake = trio.Event()
        self._down: set[int] = set()
        self._entered = True
        self._polled = trio.current_time()

    def _domain(self, slot: int) -> str:
        return self._domains[slot % len(self._domains)] if self._domains else ""

    async def live(self, rates: Rates, seconds: Sequence[float], then: Callable[[], None], passed: Callable[[float], None]) -> None:
        """So much time passes, and `then` is told; and so on. At the end everybody is back who is not dead.

        `passed`: told how many seconds of all that have passed, whenever reconcile has looked.
        """
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in [number for number, host in self._world.fleet.hosts.items() if host.dead and number not in self.slots]:
                self._forget(number)
            for slot, number in enumerate(self.slots):
                if self._world.fleet.hosts[number].dead:
                    nursery.start_soon(self._replace, slot, rates)
            nursery.start_soon(self._reconcile, lambda: passed(trio.current_time() - begun))
            nursery.start_soon(self._happen, rates, nursery)
            for span in seconds:
                await trio.sleep(span)
                self._world.integrate()
                then()
            nursery.cancel_scope.cancel()
        for number in sorted(self._down):
            self._back(number)

    async def _happen(self, rates: Rates, nursery: trio.Nursery) -> None:
        death = len(self.slots) / rates.host_life if rates.host_life else 0.0
        away = len(self.slots) / rates.away_every if rates.away_every else 0.0
        domain = len(self._domains) / rates.domain_life if rates.domain_life else 0.0
        total = death + away + domain
        while True:
            await trio.sleep(self._random.expovariate(total) if total else float("inf"))
            what = self._random.random() * total
            if what < death + away:
                slot = self._random.randrange(len(self.slots))
                # A slot whose host is dead already has nothing to lose: so each living one has its rate.
                if self._world.fleet.hosts[self.slots[slot]].dead:
                    continue
                if what < death:
                    self._die([slot], rates, nursery)
                else:
                    self._go(self.slots[slot], rates, nursery)
            else:
                name = self._random.choice(self._domains)
                hosts = self._world.fleet.hosts
                struck = [slot for slot, number in enumerate(self.slots) if hosts[number].domain == name and not hosts[number].dead]
                self._die(struck, rates, nursery)

    def _die(self, slots: list[int], rates: Rates, nursery: trio.Nursery) -> None:
        self._world.die([self.slots[slot] for slot in slots])
        self._down.update(self.slots[slot] for slot in slots)
        for slot in slots:
            nursery.start_soon(self._replace, slot, rates)
        self._world.fill()
        self._wake.set()

    async def _replace(self, slot: int, rates: Rates) -> None:
        await trio.sleep(rates.replace_after)
        number = self.slots[slot]
        self.slots[slot] = self._world.enter(self._domain(slot), self._capacity)
        self._entered = True
        self._world.fill()
        self._wake.set()
        # Nobody has said that the old one is lost: it is waited for like any other.
        await trio.sleep(max(0.0, 2 * self._world.standing.away_grace - rates.replace_after))
        self._forget(number)
        self._wake.set()

    def _forget(self, number: int) -> None:
        self._world.leave(number)
        self._down.discard(number)

    def _go(self, number: int, rates: Rates, nursery: trio.Nursery) -> None:
        host = self._world.fleet.hosts[number]
        if host.up:
            host.up = False
            self._down.add(number)
            nursery.start_soon(self._come_back, number, self._random.expovariate(1.0 / rates.away_for))
            self._wake.set()

    async def _come_back(self, number: int, seconds: float) -> None:
        await trio.sleep(seconds)
        self._back(number)

    def _back(self, number: int) -> None:
        host = self._world.fleet.hosts.get(number)
        if host is not None and not host.dead:
            host.up = True
            self._down.discard(number)
            self._wake.set()

    async def _reconcile(self, looked: Callable[[], None]) -> None:
        world = self._world
        seen: dict[int, float] = {}
        while True:
            self._wake = trio.Event()
            if self._entered or trio.current_time() >= self._polled + POLL_SECONDS:
                self._entered, self._polled = False, trio.current_time()
                await world.placement.poll_space()
            begun = trio.current_time()
            seen = {number: seen.get(number, begun) for number in sorted(self._down)}
            world.reconciler.wake()
            await world.reconciler.round()
            await world.deleter.drain()
            looked()
            now = trio.current_time()
            due = [since + world.standing.away_grace for number, since in seen.items() if not world.standing.gone(number)]
            if world.reconciler.status.pending:
                due.append(now + RETRY_SECONDS)
            with trio.move_on_at(min(due, default=float("inf")) + 1.0):
                await self._wake.wait()
