"""Replication: how many shards a sector has, and how many must be durable before it counts.

`"3"` is three byte-identical copies on three distinct hosts; `"4+2"` is four data and two parity shards on
six. Hosts are distinct by id, not by URL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from storage.errors import BadArgument

#: More shards than this name no real fleet, and would let a typing error allocate without bound.
MAX_SHARDS = 255

_SPEC = re.compile(r"([0-9]{1,3})(?:\+([0-9]{1,3}))?\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Replication:
    """A parsed replication string.

    copies: number of identical copies (k = 1), or 1 where the sector is cut into shards.
    k, m: data and parity shards; (1, 0) for copies.
    """

    copies: int
    k: int
    m: int

    @property
    def hosts_needed(self) -> int:
        """Distinct hosts for full replication."""
        return self.copies if self.k == 1 and self.m == 0 else self.k + self.m

    @property
    def write_quorum(self) -> int:
        """Distinct hosts that must hold it before an extent may point to it (I2)."""
        if self.m == 0 and self.k == 1:
            return min(2, self.copies)
        return self.k + 1

    @property
    def coded(self) -> bool:
        """True for k+m."""
        return self.m > 0

    def __str__(self) -> str:
        return f"{self.k}+{self.m}" if self.coded else str(self.copies)


@lru_cache(maxsize=256)
def parse_replication(spec: str) -> Replication:
    """Parse `"3"` or `"4+2"`; `BadArgument` says what is wrong with anything else."""
    match = _SPEC.match(spec)
    if match is None:
        raise BadArgument(f"replication {spec!r} is neither a number of copies ('2') nor data+parity ('4+2')")
    first, second = int(match[1]), match[2]
    if second is None:
        if not 1 <= first <= MAX_SHARDS:
            raise BadArgument(f"replication {spec!r}: between 1 and {MAX_SHARDS} copies")
        return Replication(copies=first, k=1, m=0)
    parity = int(second)
    if first < 1 or parity < 1 or first + parity > MAX_SHARDS:
        raise BadArgument(f"replication {spec!r}: at least 1+1 and at most {MAX_SHARDS} shards together")
    return Replication(copies=1, k=first, m=parity)
