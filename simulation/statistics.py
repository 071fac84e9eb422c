"""Intervals: Student's over batches, and the exact one of a Poisson count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Student's t at 97.5 % by degrees of freedom (Fisher and Yates' table); beyond the last, the one before it is used, which is wider.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 12: 2.179, 15: 2.131}
_T |= {19: 2.093, 24: 2.064, 29: 2.045, 40: 2.021, 60: 2.000, 120: 1.980}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high


def student(degrees: int) -> float:
    """The factor of a two-sided 95 % interval."""
    return _T[max(known for known in _T if known <= max(degrees, 1))]


def of_batches(values: Sequence[float]) -> Estimate:
    """The mean of independent batches of equal length; its low end is not below 0."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return Estimate(mean, 0.0, math.inf)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return Estimate(mean, max(0.0, mean - student(count - 1) * deviation), mean + student(count - 1) * deviation)


def of_count(count: int, exposure: float) -> Estimate:
    """The rate behind so many events in so much exposure: Garwood's exact interval (1936), found by bisection."""
    low = 0.0 if count == 0 else _solve(lambda mean: 1.0 - _poisson(count - 1, mean), 0.025, count)
    high = _solve(lambda mean: -_poisson(count, mean), -0.025, count)
    return Estimate(count / exposure, low / exposure, high / exposure)


def _poisson(count: int, mean: float) -> float:
    """P(at most `count`)."""
    if mean <= 0.0:
        return 1.0
    return sum(math.exp(i * math.log(mean) - mean - math.lgamma(i + 1)) for i in range(count + 1))


def _solve(rising: Callable[[float], float], wanted: float, count: int) -> float:
    low, high = 0.0, count + 10.0 * math.sqrt(count + 1.0) + 10.0
    for _ in range(100):
        middle = (low + high) / 2
        if rising(middle) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
