"""Points: one replication spec at one mean life of hosts, simulated in batches, with the closed form beside it.

Two estimates of the same rate of losses per sector and year:

- *counted*: losses divided by sectors and years;
- *expected*: while a sector has nothing to spare, each host that holds a shard of it would lose it by dying; the rate at which hosts die,
  integrated over all such time, has the same mean as the count, and is known long before the first loss (conditional Monte Carlo: the last
  step is not drawn but averaged over; Asmussen and Glynn, "Stochastic Simulation", Springer 2007, chapter V.4).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import trio
from trio.testing import MockClock

from simulation.driver import DAY, Driver, Rates
from simulation.markov import loss_rate
from simulation.statistics import Estimate, of_batches, of_count
from simulation.watching import Watch, nobody
from simulation.world import Tally, World
from storage.replication import Replication, parse_replication

YEAR = 365.25 * DAY
#: Batches of a point: their differences make the interval. Each is at least so many times the grace long, so that what is missing at the
#: end of one hardly matters to the next.
BATCHES = 10
BATCH_GRACES = 8
#: A shard of the simulation is so small, whatever it stands for: nobody stores it.
SECTOR_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a whole run. Seconds and bytes."""

    hosts: int
    domains: int
    sectors: int
    rates: Rates
    grace: float
    #: Bytes that a host holds of what is simulated and of what is not; what its disk takes; what it gives to repairs per second.
    data: float
    disk: float
    repair_rate: float
    #: The world runs so many times as quick at each point (deaths and replacements, not absences and repairs).
    speeds: tuple[float, ...]
    #: Deaths per point, at least.
    deaths: int
    seed: int


@dataclass(frozen=True, slots=True)
class Point:
    """What one spec did at one speed."""

    spec: str
    speed: float
    hosts: int
    host_life_days: float
    years: float
    deaths: int
    lost: int
    incidents: int
    #: Mean time from a death to its shards' being made again, hours.
    repair_hours: float
    counted: Estimate
    expected: Estimate
    closed_form: float


def simulate(spec: str, settings: Settings, watch: Watch = nobody) -> list[Point]:
    """All points of one spec. The same for the same arguments, whoever watches."""
    _order_tasks(settings.seed)
    return trio.run(_simulate, parse_replication(spec), settings, watch, clock=MockClock(autojump_threshold=0))


def _order_tasks(seed: int) -> None:
    """trio runs tasks that are ready at the same time in random order: from here on in an order that follows from the seed.

    As pytest-trio does it; there is no public way.
    """
    scheduler = trio._core._run
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    scheduler._r.seed(seed)


async def _simulate(spec: Replication, settings: Settings, watch: Watch) -> list[Point]:
    shards_per_host = settings.sectors * spec.hosts_needed / settings.hosts
    shard = SECTOR_BYTES if not spec.coded else max(SECTOR_BYTES // spec.k, 32)
    # So many bytes of the simulation stand for one.
    scale = shards_per_host * shard / settings.data
    world = World(
        spec,
        SECTOR_BYTES,
        settings.seed,
        rate=settings.repair_rate * settings.hosts * scale,
        grace=settings.grace,
        unit=1.0 / scale,
        domains=settings.rates.domain_life > 0,
    )
    driver = Driver(world, settings.hosts, settings.domains, round(settings.disk * scale), settings.seed)
    world.wanted = settings.sectors
    await world.placement.poll_space()
    world.fill(watch)
    return [await _point(world, driver, settings, speed, watch) for speed in sorted(settings.speeds)]


async def _point(world: World, driver: Driver, settings: Settings, speed: float, watch: Watch) -> Point:
    rates = replace(
        settings.rates,
        host_life=settings.rates.host_life / speed,
        domain_life=settings.rates.domain_life / speed,
        replace_after=settings.rates.replace_after / speed,
    )
    dying = 1.0 / rates.host_life if rates.host_life else 0.0
    struck = 1.0 / rates.domain_life if rates.domain_life else 0.0
    all_deaths = settings.hosts * (dying + struck)
    seconds = max(settings.deaths / all_deaths / BATCHES, BATCH_GRACES * settings.grace)
    seen: list[Tally] = []
    # The first is not counted: until what happens is what always happens at this speed.
    first = 4 * settings.grace + rates.replace_after
    spans = [first, *[seconds] * BATCHES]
    doing = f"{sum(spans) / DAY:.3g} days of {settings.hosts:,} hosts at speed {speed:g}"
    before, tally = world.tally.deaths, world.tally

    def passed(so_far: float) -> None:
        watch(doing, so_far / sum(spans), f"{tally.deaths - before} hosts died")

    await driver.live(rates, spans, lambda: seen.append(copy.copy(tally)), passed)
    batches = [_difference(now, earlier) for earlier, now in pairwise(seen)]
    sector_years = settings.sectors * seconds / YEAR
    whole = _sum(batches)
    repair_time = whole.waited / whole.remade if whole.remade else settings.grace
    counted = of_batches([batch.lost / sector_years for batch in batches])
    exact = of_count(whole.lost, sector_years * BATCHES)
    return Point(
        spec=str(world.spec),
        speed=speed,
        hosts=settings.hosts,
        host_life_days=rates.host_life / DAY,
        years=seconds * BATCHES / YEAR,
        deaths=whole.deaths,
        lost=whole.lost,
        incidents=whole.incidents,
        repair_hours=repair_time / 3600.0,
        # The wider of the two: losses come in groups, and batches without any say nothing of those that might have been.
        counted=Estimate(counted.mean, min(counted.low, exact.low), max(counted.high, exact.high)),
        expected=of_batches([(batch.exposed * dying + batch.domain_exposed * struck) / sector_years for batch in batches]),
        closed_form=loss_rate(world.spec, dying + struck, repair_time) * YEAR,
    )


def _difference(now: Tally, before: Tally) -> Tally:
    return Tally(*(getattr(now, name) - getattr(before, name) for name in Tally.__slots__))


def _sum(parts: Sequence[Tally]) -> Tally:
    return Tally(*(sum(getattr(part, name) for part in parts) for name in Tally.__slots__))
