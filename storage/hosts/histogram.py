"""Histogram: how long calls take, as a distribution of which old samples fade.

Buckets a quarter of an octave wide, from 10 us on: a quantile is told to within 19 %, never too low. In the record of a host:

| what | type | meaning |
|---|---|---|
| weights | array of int | per bucket, from the first on, no zeros at the end; a sample weighs 16, all are halved beyond 512 |
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated

import msgspec

#: Upper end of the first bucket is BASE * 2 ** (1 / PER_OCTAVE); the last ends at 45 minutes and takes all above.
BASE = 1e-5
PER_OCTAVE = 4
BUCKETS = 112
#: Weight of a new sample; a power of two, so that it fades over some halvings.
_WEIGHT = 16
#: Samples from which on older ones fade.
_WINDOW = 512

Weights = Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=_WEIGHT * _WINDOW + _WEIGHT)]], msgspec.Meta(max_length=BUCKETS)]


class Histogram:
    """Of positive numbers, seconds mostly."""

    __slots__ = ("_total", "_weights")

    def __init__(self, weights: Iterable[int] = ()) -> None:
        """`weights`: as `weights` gave them."""
        self._weights = [*weights]
        self._weights += [0] * (BUCKETS - len(self._weights))
        self._total = sum(self._weights)

    @property
    def samples(self) -> int:
        """How many it stands for now."""
        return self._total // _WEIGHT

    def add(self, sample: float) -> None:
        """One more."""
        self._weights[_bucket(sample)] += _WEIGHT
        self._total += _WEIGHT
        if self._total > _WEIGHT * _WINDOW:
            self._weights = [weight >> 1 for weight in self._weights]
            self._total = sum(self._weights)

    def quantile(self, share: float) -> float | None:
        """What that share of the samples does not exceed; None without any."""
        if not self._total:
            return None
        wanted, passed = share * self._total, 0
        for bucket, weight in enumerate(self._weights):
            passed += weight
            if weight and passed >= wanted:
                return _end(bucket)
        return _end(BUCKETS - 1)

    def weights(self) -> list[int]:
        """For the record."""
        end = BUCKETS
        while end and not self._weights[end - 1]:
            end -= 1
        return self._weights[:end]


def _bucket(sample: float) -> int:
    if sample <= BASE:
        return 0
    return min(BUCKETS - 1, int(math.log2(sample / BASE) * PER_OCTAVE))


def _end(bucket: int) -> float:
    return BASE * math.exp2((bucket + 1) / PER_OCTAVE)
