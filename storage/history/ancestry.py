"""Which of two histories goes on from the other (I5).

A volume's history is a row of epochs, each with a random salt and the sequence number of its first commit. A *point* is a moment in some
history: (epoch, its salt, sequence). A *lineage* is one history up to now; it contains a point if it has that very epoch, and went on from
it no earlier than there:

    lineage   epoch 4, salt a, from 1     epoch 5, salt b, from 90    epoch 6, salt c, from 101
    point (5, b, 100)   contained: epoch 6 went on from it
    point (5, b, 120)   not: epoch 6 began at 101, what epoch 5 committed from there on is in no history but its own
    point (5, x, 95)    not: another epoch 5, of somebody who went on from elsewhere

Numbers alone never decide: (epoch, sequence) orders two points only where one's lineage contains the other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from storage.history.superblock import MAX_EPOCHS, KnownEpoch, Superblock


@dataclass(frozen=True, slots=True)
class Point:
    """A moment in some history."""

    epoch: int
    salt: bytes
    sequence: int


def point_of(block: Superblock) -> Point:
    """The moment a superblock gives back."""
    return Point(block.epoch, block.salt, block.sequence)


class Lineage:
    """Epochs in ascending order; `end`: the last sequence number of the history, None for no limit."""

    __slots__ = ("_numbers", "end", "epochs")

    def __init__(self, epochs: Sequence[KnownEpoch], end: int | None = None) -> None:
        self.epochs = list(epochs)
        self._numbers = [epoch.number for epoch in self.epochs]
        self.end = end

    @property
    def complete(self) -> bool:
        """True if it goes back to the volume's first epoch."""
        return bool(self.epochs) and self.epochs[0].number == 1

    def latest(self) -> list[KnownEpoch]:
        """As many as a superblock names."""
        return self.epochs[-MAX_EPOCHS:]

    def has_epoch(self, number: int, salt_start: str) -> bool:
        """Is there this epoch, with a salt whose hexadecimal digits begin so?"""
        place = bisect_right(self._numbers, number) - 1
        return place >= 0 and self.epochs[place].number == number and self.epochs[place].salt.hex().startswith(salt_start)

    def contains(self, point: Point) -> bool:
        """True if this history went through the point. Of an epoch before all it names it knows nothing, and says False."""
        place = bisect_right(self._numbers, point.epoch) - 1
        if place < 0:
            return False
        epoch = self.epochs[place]
        if (epoch.number, epoch.salt) != (point.epoch, point.salt):
            return False
        if place + 1 < len(self.epochs) and point.sequence >= max(self.epochs[place + 1].first_sequence, 1):
            return False
        return self.end is None or point.sequence <= self.end


def newest(found: Sequence[tuple[Superblock, Lineage]]) -> tuple[int | None, list[int]]:
    """(index of the superblock whose history contains all others, []), or (None, indices of the ends of the histories there are).

    In the second case nobody but a person can choose; it is (None, []) where nothing was found. Of equals (the same point) the highest
    generation is taken. A point of an epoch before all that a superblock names counts as contained: whoever relies on that checks it again
    with the whole lineage, which the metadata have.
    """
    order = sorted(range(len(found)), key=lambda i: (found[i][0].epoch, found[i][0].sequence, found[i][0].generation), reverse=True)
    ends: list[int] = []
    for index in order:
        point = point_of(found[index][0])
        if not any(_goes_on(found[end], point) for end in ends):
            ends.append(index)
    return (ends[0], []) if len(ends) == 1 else (None, ends)


def _goes_on(end: tuple[Superblock, Lineage], point: Point) -> bool:
    """Does the history that ends there contain the point, as far as it can say?"""
    block, lineage = end
    if lineage.epochs and point.epoch < lineage.epochs[0].number:
        return not lineage.complete
    return Lineage(lineage.epochs, block.sequence).contains(point)
