"""The closed form: mean time to data loss of one sector, as a birth-death chain over the number of its shards that are missing.

    0 --(n)L--> 1 --(n-1)L--> 2 ... m --(n-m)L--> lost          L: rate at which hosts die
      <--1/T--    <--2/T--                                      T: mean time from a death to the shard's being made again

n hosts hold n shards (or copies), any k = n - m of which are enough; each missing shard is made again independently of the others. Such a
chain is the usual model of RAID and of k-out-of-n systems: Gibson, "Redundant Disk Arrays", MIT Press 1992, chapter 5; Chen et al., "RAID:
High-Performance, Reliable Secondary Storage", ACM Computing Surveys 26(2), 1994; for repairs side by side, Angus, "On Computing MTBF for a
k-out-of-n:G Repairable System", IEEE Transactions on Reliability 37(3), 1988. To first order in L * T the result does not depend on how
repair times are distributed, only on their mean.
"""

from __future__ import annotations

from storage.replication import Replication


def mean_time_to_loss(n: int, m: int, death_rate: float, repair_time: float) -> float:
    """In the unit of time of the arguments, from all shards there to m + 1 missing. `repair_time` > 0.

    The time from i missing to i + 1 is h(i) = (1 + down(i) * h(i - 1)) / up(i): sums of positive terms, so exact to rounding.
    """
    total = step = 0.0
    for missing in range(m + 1):
        up = (n - missing) * death_rate
        step = (1.0 + missing / repair_time * step) / up
        total += step
    return total


def loss_rate(spec: Replication, death_rate: float, repair_time: float) -> float:
    """Losses of one sector per unit of time, where a lost one is followed by a new one."""
    n = spec.hosts_needed
    return 1.0 / mean_time_to_loss(n, n - spec.k, death_rate, repair_time)
