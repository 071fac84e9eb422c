"""Plan: what is missing and what is too many of one sector, from its record and the hosts that keep what they have. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from storage.sectors.records import SectorRecord
from storage.sectors.redundancy import layout_of

#: Host number -> failure domain.
Domain = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Plan:
    """For one sector."""

    #: Index of a shard in the record, once for each host it is missing on.
    missing: tuple[int, ...]
    #: Per shard of the record: the hosts that count.
    counted: tuple[tuple[int, ...], ...]
    #: (index of a shard, host) on record that count for nothing once nothing is missing.
    surplus: tuple[tuple[int, int], ...]

    @property
    def hosts(self) -> set[int]:
        """Every host that counts."""
        return {host for hosts in self.counted for host in hosts}

    @property
    def done(self) -> bool:
        """The sector is as it should be, and nowhere else."""
        return not self.missing and not self.surplus


def make_plan(record: SectorRecord, keeping: Collection[int], domain: Domain, load: Mapping[int, int] | None = None) -> Plan:
    """Each shard on as many keeping hosts as the replication says, all distinct.

    Of too many, those stay that spread over the most failure domains, then those with the least `load` (bytes per host).
    """
    each = layout_of(record.replication, record.length).hosts_each
    taken: set[int] = set()
    counted: list[tuple[int, ...]] = []
    missing: list[int] = []
    for index, shard in enumerate(record.shards):
        able = [host for host in dict.fromkeys(shard.hosts) if host in keeping and host not in taken]
        # Most often there is nothing to choose; a look at a million sectors asks this for each of their shards.
        chosen = able if len(able) <= each else spread(able, each, domain, {domain(host) for host in taken}, load)
        taken.update(chosen)
        counted.append(tuple(chosen))
        missing.extend([index] * (each - len(chosen)))
    surplus = [(index, host) for index, shard in enumerate(record.shards) for host in shard.hosts if host not in counted[index]]
    return Plan(tuple(missing), tuple(counted), tuple(surplus))


def can_be_read(record: SectorRecord, hosts: Collection[int], here: Callable[[bytes], bool] = lambda _root: False) -> bool:
    """Do these hosts have enough of its shards, with those of which `here` says that they need not be asked for?"""
    there = sum(1 for shard in record.shards if any(host in hosts for host in shard.hosts) or here(shard.root))
    return there >= layout_of(record.replication, record.length).needed


def spread(
    hosts: Iterable[int], count: int, domain: Domain, domains: Collection[str] = (), load: Mapping[int, int] | None = None
) -> list[int]:
    """At most `count` of the hosts: one by one, from a failure domain not among `domains` or chosen yet where there is one.

    Within that in ascending order of `load`, then in the order given.
    """
    order = list(hosts)
    if load is not None:
        order.sort(key=lambda host: load.get(host, 0))
    used = set(domains)
    # One pass: who was passed over because of its domain never gets a turn before all domains have had one.
    first: list[int] = []
    others: list[int] = []
    for host in order:
        named = domain(host)
        if named in used:
            others.append(host)
        else:
            used.add(named)
            first.append(host)
    return [*first, *others][:count]
