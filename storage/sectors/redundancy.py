"""Redundancy: how a sector becomes shards, and comes back from some of them. `"n"` and `"k+m"` are one mechanism with two codecs.

    copies "n":   one distinct shard with the whole sector, on n hosts
    coded "k+m":  the sector, with zeros up to k pieces of one length, cut into k contiguous pieces (data shards 0 to k-1), and m parity
                  pieces of the same length (shards k to k+m-1), each on a host of its own

A shard's plaintext is its piece and its label. So a small read touches one data shard; and since byte i of a parity piece is made of
the bytes i of the data pieces alone, any range of columns of any k shards makes the same columns of every other. The code is Reed-Solomon
with a Cauchy matrix over GF(2^8), as ISA-L has it, through pyeclib; its own 80-byte headers are not stored: what it needs of them follows
from k, m and the length, and lengths are checked here before C code sees them.

Nothing else in the program knows what is in a shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from storage.coprocess.pair import ARENA
from storage.errors import Corrupt
from storage.interfaces import Buffer
from storage.replication import Replication, parse_replication
from storage.sectors.isal import encoder
from storage.sectors.label import LABEL_SIZE, Label

#: Pieces are padded to a multiple of so many bytes: the width ISA-L's vector code works in.
ALIGNMENT = 32
#: Buffers of a sector that are encoded where they stand; more of them are quicker copied together.
_PARTS = 256
#: Bytes before each of pyeclib's fragments.
_HEADER = 80


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes [offset, offset + length) of a shard's plaintext."""

    shard: int
    offset: int
    length: int


class Codec(Protocol):
    """Pieces of one length out of a sector, and out of each other. Blocking."""

    def pieces(self, parts: Sequence[Buffer], piece: int) -> list[list[Buffer]]:
        """The buffers that make up each piece of `piece` bytes."""
        ...

    def rebuild(self, number: int, columns: Mapping[int, bytes]) -> bytes:
        """Columns of piece `number`, from the same columns, of one length, of as many others as are needed."""
        ...


class _Copies:
    def pieces(self, parts: Sequence[Buffer], piece: int) -> list[list[Buffer]]:  # noqa: ARG002 - a copy is as long as it is
        return [list(parts)]

    def rebuild(self, number: int, columns: Mapping[int, bytes]) -> bytes:
        return columns[number]


class _Coded:
    def __init__(self, k: int, m: int) -> None:
        # Only where there are codes: it brings libraries of its own.
        from pyeclib.ec_iface import ECDriver

        self._k, self._m = k, m
        self._driver = ECDriver(k=k, m=m, ec_type="isa_l_rs_cauchy")
        self._headers = lru_cache(maxsize=64)(self._make_headers)
        self._encoder = encoder(k, m, self._parity)

    def _make_headers(self, piece: int) -> list[bytes]:
        """pyeclib's headers of fragments of so many bytes: they say nothing of the contents."""
        return [fragment[:_HEADER] for fragment in self._driver.encode(bytes(self._k * piece))]

    def _parity(self, whole: bytes) -> list[bytes]:
        """By pyeclib."""
        fragments = self._driver.encode(whole)
        piece = len(whole) // self._k
        if len(fragments) != self._k + self._m or any(len(fragment) != _HEADER + piece for fragment in fragments):
            raise RuntimeError(f"pyeclib cut {len(whole)} bytes into pieces of another length than {piece}")
        return [fragment[_HEADER:] for fragment in fragments[self._k :]]

    def pieces(self, parts: Sequence[Buffer], piece: int) -> list[list[Buffer]]:
        whole = [*parts, bytes(self._k * piece - sum(map(len, parts)))]
        if len(whole) > _PARTS:
            whole = [_gathered(whole, self._k * piece)]
        # Where they stand: large appends are where the coprocess sees them.
        data = _cut(whole, piece)
        if self._encoder is None:
            parity: list[Buffer] = [*self._parity(b"".join(whole))]
            return [*data, *([made] for made in parity)]
        coded = ARENA.lend(self._m * piece)
        self._encoder.encode(data, coded)
        return [*data, *_cut([coded], piece)]

    def rebuild(self, number: int, columns: Mapping[int, bytes]) -> bytes:
        if number in columns:
            return columns[number]
        size = len(next(iter(columns.values())))
        headers = self._headers(size)
        fragments = [headers[other] + columns[other] for other in sorted(columns)[: self._k]]
        (fragment,) = self._driver.reconstruct(fragments, [number])
        return bytes(memoryview(fragment)[_HEADER:])


def _gathered(parts: Sequence[Buffer], size: int) -> memoryview:
    """One after the other, `size` bytes."""
    whole = ARENA.lend(size)
    if not ARENA.fill(whole, parts):
        at = 0
        for part in parts:
            whole[at : at + len(part)] = part
            at += len(part)
    return whole.toreadonly()


def _cut(parts: Sequence[Buffer], piece: int) -> list[list[Buffer]]:
    """The buffers that make up each `piece` bytes of `parts`, which have a multiple of that together."""
    pieces: list[list[Buffer]] = []
    room = 0
    for part in parts:
        view = memoryview(part)
        while len(view):
            if not room:
                pieces.append([])
                room = piece
            pieces[-1].append(view[:room].toreadonly())
            room, view = max(0, room - len(view)), view[room:]
    return pieces


_COPIES = _Copies()


@lru_cache(maxsize=32)
def _coded(k: int, m: int) -> _Coded:
    return _Coded(k, m)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a sector of `length` bytes is laid out. Made by `layout_of`."""

    spec: Replication
    length: int

    @property
    def shards(self) -> int:
        """Distinct shards."""
        return self.spec.k + self.spec.m if self.spec.coded else 1

    @property
    def hosts_each(self) -> int:
        """Hosts each shard is to be on."""
        return 1 if self.spec.coded else self.spec.copies

    @property
    def needed(self) -> int:
        """Distinct shards that make the others."""
        return self.spec.k

    @property
    def places(self) -> list[int]:
        """The shard for each distinct host the sector is to be on."""
        return [shard for shard in range(self.shards) for _ in range(self.hosts_each)]

    @property
    def piece(self) -> int:
        """Bytes of a shard without its label: where that begins."""
        if not self.spec.coded:
            return self.length
        exact = -(-self.length // self.spec.k)
        return max(-(-exact // ALIGNMENT), 1) * ALIGNMENT

    @property
    def shard_length(self) -> int:
        """Bytes of a shard's plaintext."""
        return self.piece + LABEL_SIZE

    @property
    def _codec(self) -> Codec:
        return _coded(self.spec.k, self.spec.m) if self.spec.coded else _COPIES

    def label(self, sector_id: int, number: int) -> bytes:
        """What shard `number` ends with."""
        return Label(sector_id, self.length, self.spec.k, self.spec.m, number).encode()

    def plaintexts(self, sector_id: int, parts: Sequence[Buffer]) -> list[list[Buffer]]:
        """Per distinct shard, the buffers of its plaintext. `parts`: `length` bytes, the sector. Blocking."""
        pieces = self._codec.pieces(parts, self.piece)
        return [[*piece, self.label(sector_id, number)] for number, piece in enumerate(pieces)]

    def locate(self, offset: int, length: int) -> list[Part]:
        """Where bytes [offset, offset + length) of the sector are, in order. The range lies within the sector."""
        parts: list[Part] = []
        piece = max(self.piece, 1)
        while length:
            shard, at = divmod(offset, piece)
            here = min(length, piece - at)
            parts.append(Part(shard, at, here))
            offset, length = offset + here, length - here
        return parts

    def whole(self) -> list[Part]:
        """Where all of the sector is: one part for each shard that has some of it."""
        return self.locate(0, self.length)

    def check(self, sector_id: int, number: int, plain: Buffer) -> None:
        """Corrupt unless it is the whole plaintext of that shard, as far as label and length tell."""
        view = memoryview(plain)
        if view.nbytes != self.shard_length or bytes(view[-LABEL_SIZE:]) != self.label(sector_id, number):
            raise Corrupt(f"sector {sector_id}: shard {number} is not the one expected")

    def rebuild(self, sector_id: int, number: int, first: int, ranges: Mapping[int, bytes]) -> bytes:
        """Bytes of shard `number`'s plaintext from those at the same place (`first` on) of others: at least `needed`, each as long as the
        result will be. Blocking. Corrupt: these cannot be of one sector."""
        sizes = {len(columns) for columns in ranges.values()}
        if len(ranges) < self.needed or len(sizes) != 1 or not all(0 <= other < self.shards for other in ranges):
            raise Corrupt(f"sector {sector_id}: shard {number} cannot be made of {len(ranges)} others with {sorted(sizes)} bytes")
        (size,) = sizes
        if first + size > self.shard_length:
            raise Corrupt(f"sector {sector_id}: bytes beyond the end of its shards")
        coded = max(0, min(self.piece - first, size))
        begin = max(0, first - self.piece)
        end = begin + size - coded
        for other, columns in ranges.items():
            if columns[coded:] != self.label(sector_id, other)[begin:end]:
                raise Corrupt(f"sector {sector_id}: shard {other} is not the one expected")
        tail = self.label(sector_id, number)[begin:end]
        if not coded:
            return tail
        return self._codec.rebuild(number, {other: columns[:coded] for other, columns in ranges.items()}) + tail


@lru_cache(maxsize=4096)
def layout_of(replication: str, length: int) -> Layout:
    """The layout of a sector of `length` bytes. BadArgument where the replication is none."""
    return Layout(parse_replication(replication), length)
