"""Blocks: memory that the coprocesses see, which large appends go to, so that a sector is sealed without a copy by this process."""

from __future__ import annotations

from weakref import ref

from storage.coprocess.pair import ARENA
from storage.interfaces import Buffer
from storage.values.tail import Block, Tail

#: Appends of this size and more, to values of that size and more, go there.
LARGE, STREAM = 64 * 1024, 1024 * 1024
#: Bytes of such memory that a value gets at a time.
BLOCK = 4 * 1024 * 1024


class Blocks:
    """Those lent to tails. All methods belong to the event loop's thread and await nothing."""

    def __init__(self, budget: int) -> None:
        """`budget`: bytes of tails, of which blocks are a part (I7)."""
        #: What pieces of tails stand in.
        self._lent: list[ref[object]] = []
        self._most = max(1, budget // BLOCK)

    def append(self, tail: Tail, data: Buffer, size: int) -> bool:
        """Append `size` bytes to the tail's buffer where the coprocess sees them. False: there is no room there."""
        block = tail.block
        # What goes into one sector stands together: it is told in fewer places.
        if block is None or block.left < size or not tail.buffer.length:
            tail.block = None
            # Few of them, since a little of one is all of it: no more than the budget of tails has room for (I7).
            self._lent = [lent for lent in self._lent if lent() is not None]
            memory = ARENA.spare(BLOCK) if size <= BLOCK and len(self._lent) < self._most else None
            if memory is None:
                return False
            self._lent.append(ref(memory.obj))
            tail.block = block = Block(memory)
        tail.buffer.append_in(block, data)
        return True
